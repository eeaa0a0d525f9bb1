"""The students of a sweep: finished ones in a folder, and processes that share the others."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from divergence_lens._utils.checkpoints import Checkpoints, Processes
from divergence_lens._utils.interrupts import partial_on_interrupt
from divergence_lens.deltas import Delta
from divergence_lens.evaluation import Preference, TaskQuality
from divergence_lens.training.rows import Rows


class Job(NamedTuple):
    """What one student learns, in which block (None: in all), with which seed."""

    condition: str
    block: int | None
    seed: int


class Outcome(NamedTuple):
    """What was measured of a student, and the student itself if it is kept."""

    preference: Preference
    quality: TaskQuality | None
    delta: Delta | None


class Sharing:
    """Students that are trained once, by whichever process, and then known to all.

    Args:
        folder: Where finished students are kept; None for nowhere.
        accelerator: Whose processes share the students.
        base: What the base prefers, to questions and candidates of which students answer too.
        keep_deltas: Whether the students are kept themselves.
        identity: Gives JSON that holds all that the students depend on.

    Raises:
        ValueError: Several processes without a folder, or with different sweeps.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        accelerator: Any,
        base: Preference,
        *,
        keep_deltas: bool,
        identity: Callable[[], Any],
    ) -> None:
        self._processes = Processes(accelerator)
        self._base, self._deltas = base, keep_deltas
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            if self._processes.count > 1:
                raise ValueError(
                    f"{self._processes.count} processes share a sweep through a folder that all of "
                    "them see; give checkpoint_dir"
                )
            return
        text = json.dumps([identity(), keep_deltas], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        self._processes.agree(digest)
        self._store = Checkpoints(self._folder, "sweep shard", digest)

    def run(
        self,
        work: Sequence[tuple[Rows, Sequence[Job]]],
        students: Callable[[Rows, Sequence[Job]], Iterable[Outcome]],
        *,
        progress: bool,
    ) -> Iterator[tuple[Job, Outcome]]:
        """Every job with its outcome, in their order.

        Args:
            work: The data, each with the jobs that learn it.
            students: Does jobs on data, one after the other.
            progress: Whether to show a progress bar, in the first process.
        """
        jobs = [job for _, several in work for job in several]
        processes = self._processes
        with processes.together():  # so that all see the same students, and share the others
            done = self._load(jobs, {})
        waiting = [job for job in jobs if job not in done]
        mine = set(waiting[processes.index :: processes.count])
        shown = progress and processes.index == 0
        bar = tqdm(total=len(jobs), initial=len(done), desc="students", disable=not shown)

        def partial() -> list[tuple[Job, Outcome]]:
            return [(job, done[job]) for job in jobs if job in done]

        stoppable = partial_on_interrupt("layer_sweep", done, len(jobs), "students", partial)
        with processes.together(), bar, stoppable:
            for rows, several in work:
                wanted = [job for job in several if job in mine]
                if not wanted:
                    continue
                for job, outcome in zip(wanted, students(rows, wanted), strict=True):
                    done[job] = outcome
                    self._save(jobs.index(job), outcome)
                    bar.update()
        done = self._load(jobs, done)
        for job in jobs:
            if job not in done:
                raise RuntimeError(
                    f"the student of block {job.block}, seed {job.seed}, is not in {self._folder}; "
                    "all processes must see the same folder"
                )
            yield job, done[job]

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"student-{number:06d}.safetensors"

    def _load(self, jobs: Sequence[Job], done: dict[Job, Outcome]) -> dict[Job, Outcome]:
        """What is done, with what is in the folder."""
        found = dict(done)
        for number, job in enumerate(jobs):
            kept = None if job in found or self._folder is None else self._store.load(number)
            if kept is None:
                continue
            arrays, notes = kept
            found[job] = Outcome(
                replace(self._base, probabilities=arrays["probabilities"]),
                None if notes["quality"] is None else TaskQuality(**notes["quality"]),
                Delta.load(self._path(number)) if self._deltas else None,
            )
        return found

    def _save(self, number: int, outcome: Outcome) -> None:
        """Keep a finished student; its shard comes last, and says that all is there."""
        if self._folder is None:
            return
        if outcome.delta is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            outcome.delta.save(self._path(number))
        quality = None if outcome.quality is None else outcome.quality.describe()
        arrays = {"probabilities": outcome.preference.probabilities}
        self._store.save(number, arrays, {"quality": quality})
