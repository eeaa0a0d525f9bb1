"""The students of a sweep: trained once each, stored in a folder, shared by processes."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from divergence_lens._utils.checkpoints import Checkpoints, Processes
from divergence_lens._utils.interrupts import partial_on_interrupt
from divergence_lens.training.rows import TrainingRows
from divergence_lens.training.sweep_result import Condition, Values

Work = Sequence[tuple[TrainingRows, Sequence["Job"]]]


class Job(NamedTuple):
    """One student to train: its condition, its layer (None: all layers) and its seed."""

    condition: Condition
    layer: int | None
    seed: int


class Students:
    """Trains each student once, in one of the processes, and collects the values of all.

    Args:
        folder: Where the values of finished students are stored; None to store nothing.
        accelerator: The accelerator whose processes share the students.
        identity: Returns JSON data on which the students depend.

    Raises:
        ValueError: Several processes without a folder, or with different sweeps.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        accelerator: Any,
        identity: Callable[[], Any],
    ) -> None:
        self._processes = Processes(accelerator)
        self._store: Checkpoints | None = None
        self._folder = folder
        if folder is None:
            if self._processes.count > 1:
                raise ValueError(
                    f"{self._processes.count} processes share a sweep through a folder that all of "
                    "them see; give checkpoint_dir"
                )
            return
        digest = hashlib.sha256(json.dumps(identity(), sort_keys=True).encode()).hexdigest()
        self._processes.agree(digest)
        self._store = Checkpoints(Path(folder), "sweep shard", digest)

    def run(
        self,
        work: Work,
        measured_students: Callable[[TrainingRows, Sequence[Job]], Iterable[Values]],
        *,
        progress: bool,
    ) -> Iterator[tuple[Job, Values]]:
        """Yield every job with the values of its student, in the order of the jobs.

        Args:
            work: Training data, each with the jobs that learn from it.
            measured_students: Trains and measures the students of some jobs, one by one.
            progress: Whether to show a progress bar in the first process.
        """
        jobs = [job for _, own_jobs in work for job in own_jobs]
        processes = self._processes
        with processes.together():  # all processes must see the same finished students
            done = self._load(jobs)
        waiting = [job for job in jobs if job not in done]
        mine = set(waiting[processes.index :: processes.count])
        shown = progress and processes.index == 0
        bar = tqdm(total=len(jobs), initial=len(done), desc="students", disable=not shown)

        def partial() -> list[tuple[Job, Values]]:
            return [(job, done[job]) for job in jobs if job in done]

        interruptible = partial_on_interrupt("layer_sweep", done, len(jobs), "students", partial)
        with processes.together(), bar, interruptible:
            for rows, own_jobs in work:
                assigned = [job for job in own_jobs if job in mine]
                if not assigned:
                    continue
                for job, values in zip(assigned, measured_students(rows, assigned), strict=True):
                    done[job] = values
                    if self._store is not None:
                        self._store.save(jobs.index(job), values)
                    bar.update()
        done = self._load(jobs) | done
        for job in jobs:
            if job not in done:
                raise RuntimeError(
                    f"the student of layer {job.layer}, seed {job.seed}, is not in {self._folder}; "
                    "all processes must see the same folder"
                )
            yield job, done[job]

    def _load(self, jobs: Sequence[Job]) -> dict[Job, Values]:
        """Read the values of the students that are finished."""
        if self._store is None:
            return {}
        shards = {job: self._store.load(number) for number, job in enumerate(jobs)}
        return {job: Values(shard[0]) for job, shard in shards.items() if shard is not None}
