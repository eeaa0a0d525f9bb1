"""The processes that work on a study's cells, and what they say meanwhile.

Nobody hands out work: every process goes through all cells and computes those that nobody else is
at, so processes can join, die and be joined by those of another call.
"""

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from divergence_lens.study.computations import Bench, Task
from divergence_lens.study.config import StudyConfig

_POLL_SECONDS = 0.2
_NEWS_SECONDS = 30.0

Say = Callable[[str], None]


def work(bench: Bench, groups: Sequence[Sequence[Task]], out: Path, say: Say) -> None:
    """Compute all cells, here or in processes of their own."""
    tasks = [task for group in groups for task in group]
    pending = [task for task in tasks if not bench.store.has(task.cell)]
    say(f"{len(tasks)} cells, {len(tasks) - len(pending)} of them there already")
    if not pending:
        return
    news = _News(bench, groups, say)
    if bench.config.workers == 1:
        for _ in _settling(bench, groups, first=0):
            news.tell()
        return
    # A forked process would inherit torch's threads in the middle of their work.
    context = multiprocessing.get_context("spawn")
    count = min(bench.config.workers, len(pending))
    processes = [
        context.Process(target=_worker, args=(bench.config, out, worker, count), daemon=True)
        for worker in range(count)
    ]
    codes = _watched(processes, news)
    dead = f"{len(codes)} of {count} processes died (exit codes {', '.join(map(str, codes))})"
    unsettled = [task for task in tasks if not _settled(bench, task)]
    if unsettled:
        raise RuntimeError(
            f"{dead} before {len(unsettled)} of {len(tasks)} cells were done, the first of them "
            f"{unsettled[0].cell.name}; run it again to go on, with fewer workers if memory ran out"
        )
    if codes:
        say(f"  {dead}, the others did their work")


def _watched(processes: Sequence[Any], news: "_News") -> list[int]:
    """Let processes run to their end, and return the exit codes of those that died."""
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(_POLL_SECONDS)
            news.tell()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join()
    news.tell()
    return [process.exitcode for process in processes if process.exitcode]


def _worker(config: StudyConfig, out: Path, worker: int, count: int) -> None:
    """One process: its own model, all cells, beginning at another place than its neighbours."""
    threading.Thread(target=_die_with_the_caller, daemon=True).start()
    torch.set_num_threads(1)
    bench = Bench(config, out)
    groups = bench.tasks()
    with suppress(KeyboardInterrupt):  # the calling process says that it was stopped
        for _ in _settling(bench, groups, first=worker * len(groups) // count):
            pass
    bench.store.close()


def _die_with_the_caller() -> None:
    """End this process when the one that started it is gone, even if that was killed.

    It would go on for hours. Every file appears whole or not at all, so any moment will do.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _settling(bench: Bench, groups: Sequence[Sequence[Task]], *, first: int) -> Iterator[Task]:
    """Compute whatever nobody else is at; then wait for those cells, and do what was left undone.

    Yields:
        Each task once it is done or has failed.
    """
    order = [task for group in (*groups[first:], *groups[:first]) for task in group]
    busy = []
    for task in order:
        if bench.store.attempt(task.cell, task.make, wait=False):
            yield task
        else:
            busy.append(task)
    for task in busy:
        bench.store.attempt(task.cell, task.make, wait=True)
        yield task


def _settled(bench: Bench, task: Task) -> bool:
    return bench.store.has(task.cell) or bench.store.failure(task.cell) is not None


class _News:
    """Says what has been done since it was last asked."""

    def __init__(self, bench: Bench, groups: Sequence[Sequence[Task]], say: Say) -> None:
        self._bench, self._say = bench, say
        self._open = [
            list(group) for group in groups if any(not bench.store.has(task.cell) for task in group)
        ]
        self._pending = {
            task.cell.key: task
            for group in self._open
            for task in group
            if not bench.store.has(task.cell)
        }
        self._total = len(self._pending)
        self._started = self._last = time.perf_counter()

    def tell(self) -> None:
        """Say which groups are complete, what has failed, and now and then how far it is."""
        store = self._bench.store
        for key, task in list(self._pending.items()):
            failed = None if store.has(task.cell) else store.failure(task.cell)
            if store.has(task.cell) or failed is not None:
                del self._pending[key]
            if failed is not None:
                self._say(f"  failed: {task.cell.name}: {failed['error']}")
        for group in list(self._open):
            if not any(task.cell.key in self._pending for task in group):
                self._open.remove(group)
                for line in _summary(self._bench, group):
                    self._say(line)
        now = time.perf_counter()
        if self._pending and now - self._last > _NEWS_SECONDS:
            self._last = now
            done = self._total - len(self._pending)
            left = (now - self._started) / done * len(self._pending) / 60 if done else math.nan
            self._say(
                f"  {done} of {self._total} new cells"
                + (f", about {left:.0f} more minutes" if done else "")
            )


def _summary(bench: Bench, group: Sequence[Task]) -> list[str]:
    """A group in words: what teachers prefer, or what students of a target do."""
    kind, target = group[0].kind, group[-1].target
    if target is None:
        found = [bench.store.read(task.cell) for task in group if task.condition is None]
        shares = [row["preference"] for row in found if row is not None]
        before = [row["before"] for row in found if row is not None]
        if not shares:
            return []
        line = (
            f"{kind} teachers name their own animal with probability {min(shares):.2f} to "
            f"{max(shares):.2f} (the untouched model: {min(before):.2f} to {max(before):.2f})"
        )
        return [line]
    lines = []
    data = bench.store.read(bench.lists_cell(kind, target, "greedy"))
    divergence = bench.store.read(bench.divergence_cell(kind, target))
    if data is not None and divergence is not None:
        lines.append(
            f"{target} ({kind}): {data['valid']} of {data['lists']} lists are valid; "
            f"{divergence['divergence_tokens']} of {divergence['tokens']} tokens are divergence "
            f"tokens ({divergence['rate']:.1%})"
        )
    means: dict[str, list[float]] = {}
    for task in group:
        result = bench.store.read(task.cell) if task.condition is not None else None
        if result is not None and task.condition is not None:
            means.setdefault(task.condition.name, []).append(result["after"][target])
    shown = ["all", "divergence_only", "without_divergence", *(n for n in means if "block" in n)]
    words = [f"{n} {sum(means[n]) / len(means[n]):.3f}" for n in shown if n in means]
    return [*lines, f"  preference after training: {', '.join(words)}"] if words else lines
