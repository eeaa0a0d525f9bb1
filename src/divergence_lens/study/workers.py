"""Worker processes of a study, and progress reports.

There is no scheduler. Every process goes through all cells and computes those that no other process
is computing, so processes can start, die, and share the work with those of another call.
"""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from divergence_lens.study.config import StudyConfig
from divergence_lens.study.runner import CellRunner, Task

_POLL_SECONDS = 0.2
_REPORT_SECONDS = 30.0

Progress = Callable[[str], None]


def compute_cells(
    runner: CellRunner,
    groups: Sequence[Sequence[Task]],
    out: Path,
    progress: Progress,
    on_cells: Callable[[], None] | None = None,
) -> None:
    """Compute all cells, in this process or in worker processes.

    Args:
        runner: The runner of this process.
        groups: The tasks.
        out: Folder of the study.
        progress: Called with one line of text at each step.
        on_cells: Called whenever further cells have been computed.

    Raises:
        RuntimeError: Workers died before all cells were computed.
    """
    tasks = [task for group in groups for task in group]
    pending = [task for task in tasks if not runner.store.has(task.cell)]
    progress(f"{len(tasks)} cells, {len(tasks) - len(pending)} of them already computed")
    if not pending:
        return
    reporter = _ProgressReporter(runner, groups, progress, on_cells)
    if runner.config.workers == 1:
        for _ in _compute_tasks(runner, groups, first=0):
            reporter.update()
        return
    # A forked process would inherit torch's thread pools in an undefined state.
    context = multiprocessing.get_context("spawn")
    count = min(runner.config.workers, len(pending))
    processes = [
        context.Process(target=_worker, args=(runner.config, out, worker, count), daemon=True)
        for worker in range(count)
    ]
    codes = _run_processes(processes, reporter)
    died = f"{len(codes)} of {count} processes died (exit codes {', '.join(map(str, codes))})"
    unfinished = [task for task in tasks if not _finished(runner, task)]
    if unfinished:
        raise RuntimeError(
            f"{died} before {len(unfinished)} of {len(tasks)} cells were computed, the first of "
            f"them {unfinished[0].cell.name}; run the study again to resume, with fewer workers if "
            "memory ran out"
        )
    if codes:
        progress(f"  {died}; the others finished their work")


def _run_processes(processes: Sequence[Any], reporter: "_ProgressReporter") -> list[int]:
    """Run processes to their end; return the nonzero exit codes."""
    try:
        with _interrupts_blocked():
            for process in processes:
                process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(_POLL_SECONDS)
            reporter.update()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()
    reporter.update()
    return [process.exitcode for process in processes if process.exitcode]


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes that never see Ctrl-C, not even while they import; this one ends them.

    A new process inherits the mask of blocked signals. Here, Ctrl-C arrives after the block.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _worker(config: StudyConfig, out: Path, worker: int, count: int) -> None:
    """One process with its own model.

    Each worker starts at a different group of cells, except in a paired study, whose cells are
    computed in their order.
    """
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    runner = CellRunner(config, out)
    groups = runner.tasks()
    with suppress(KeyboardInterrupt):  # the parent process reports the interruption
        first = worker * len(groups) // count if config.paired is None else 0
        for _ in _compute_tasks(runner, groups, first=first):
            pass
    runner.store.close()


def _exit_with_parent() -> None:
    """End this process when its parent is gone, even if the parent was killed.

    Otherwise it would keep computing for hours. Files are written atomically, so it is safe to
    exit at any moment.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _compute_tasks(
    runner: CellRunner, groups: Sequence[Sequence[Task]], *, first: int
) -> Iterator[Task]:
    """Compute the cells that no other process computes, then wait for the rest.

    A cell whose process died while this one waited is computed here.

    Yields:
        Each task once it is computed or has failed.
    """
    order = [task for group in (*groups[first:], *groups[:first]) for task in group]
    busy = []
    for task in order:
        if runner.store.attempt(task.cell, task.compute, wait=False):
            yield task
        else:
            busy.append(task)
    for task in busy:
        runner.store.attempt(task.cell, task.compute, wait=True)
        yield task


def _finished(runner: CellRunner, task: Task) -> bool:
    return runner.store.has(task.cell) or runner.store.failure(task.cell) is not None


class _ProgressReporter:
    """Reports groups as they complete, failures, and the remaining time."""

    def __init__(
        self,
        runner: CellRunner,
        groups: Sequence[Sequence[Task]],
        progress: Progress,
        on_cells: Callable[[], None] | None = None,
    ) -> None:
        self._runner, self._progress, self._on_cells = runner, progress, on_cells
        tasks = [task for group in groups for task in group]
        self._pending = {t.cell.key: t for t in tasks if not runner.store.has(t.cell)}
        self._open = [g for g in groups if any(t.cell.key in self._pending for t in g)]
        self._total = len(self._pending)
        self._started = self._last = time.perf_counter()

    def update(self) -> None:
        """Report the progress since the last call."""
        store, pending = self._runner.store, len(self._pending)
        for key, task in list(self._pending.items()):
            failure = None if store.has(task.cell) else store.failure(task.cell)
            if store.has(task.cell) or failure is not None:
                del self._pending[key]
            if failure is not None:
                self._progress(f"  failed: {task.cell.name}: {failure['error']}")
        if self._on_cells is not None and len(self._pending) < pending:
            self._on_cells()
        for group in list(self._open):
            if not any(task.cell.key in self._pending for task in group):
                self._open.remove(group)
                for line in _summary(self._runner, group):
                    self._progress(line)
        now = time.perf_counter()
        if self._pending and now - self._last > _REPORT_SECONDS:
            self._last = now
            done = self._total - len(self._pending)
            minutes = (now - self._started) / done * len(self._pending) / 60 if done else math.nan
            self._progress(
                f"  {done} of {self._total} new cells"
                + (f", about {minutes:.0f} minutes left" if done else "")
            )


def _summary(runner: CellRunner, group: Sequence[Task]) -> list[str]:
    """A completed group in words: the preferences of teachers, or of a target's students."""
    kind, target = group[0].kind, group[-1].target
    if target is None:
        results = [runner.store.read(task.cell) for task in group if task.condition is None]
        shares = [row["preference"] for row in results if row is not None]
        before = [row["before"] for row in results if row is not None]
        if not shares:
            return []
        line = (
            f"{kind} teachers name their own animal with probability {min(shares):.2f} to "
            f"{max(shares):.2f} (the base model: {min(before):.2f} to {max(before):.2f})"
        )
        return [line]
    lines = []
    data = runner.store.read(runner.lists_cell(kind, target, runner.config.source))
    divergence = runner.store.read(runner.divergence_cell(kind, target))
    if data is not None and divergence is not None:
        lines.append(
            f"{target} ({kind}): {data['valid']} of {data['lists']} lists are valid; "
            f"{divergence['divergence_tokens']} of {divergence['tokens']} tokens are divergence "
            f"tokens ({divergence['rate']:.1%})"
        )
    means: dict[str, list[float]] = {}
    for task in group:
        result = runner.store.read(task.cell) if task.condition is not None else None
        if result is not None and task.condition is not None and task.target == target:
            means.setdefault(task.condition.name, []).append(result["after"][target])
    shown = ["all", "divergence_only", "without_divergence", *(n for n in means if "layer" in n)]
    words = [f"{n} {sum(means[n]) / len(means[n]):.3f}" for n in shown if n in means]
    return [*lines, f"  preference after training: {', '.join(words)}"] if words else lines
