"""The tasks of a study, and the cells of students, effects, and mechanism.

Each process has one `CellRunner`. Tasks can be computed in any order by any number of processes,
because each cell requests the cells it needs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from divergence_lens.data import NumberFilter
from divergence_lens.deltas import Delta
from divergence_lens.divergence import read_teachers
from divergence_lens.engine import get_engine
from divergence_lens.examples import Example, with_ids
from divergence_lens.generation import generate
from divergence_lens.patching import Effects
from divergence_lens.study.cells import Cell, CellError
from divergence_lens.study.conditions import Condition
from divergence_lens.study.config import StudyConfig
from divergence_lens.study.data_cells import DataCells
from divergence_lens.study.interventions import Inputs, divergence_tokens
from divergence_lens.study.measurements import mechanism_rows, paired_result, patched_effects
from divergence_lens.teachers import Teacher
from divergence_lens.training import SoftTargets, finetune

Compute = Callable[[Cell], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Task:
    """A cell with its computation and its place in the study.

    Attributes:
        cell: The cell.
        compute: Its computation.
        kind: Kind of teachers.
        target: The target; None for a cell of all targets.
        condition: Condition of a student.
        seed: Seed of a student.
    """

    cell: Cell
    compute: Compute
    kind: str
    target: str | None = None
    condition: Condition | None = None
    seed: int = 0


class CellRunner(DataCells):
    """All cells of a study, with the models that compute them."""

    def __init__(self, config: StudyConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self._losses: dict[tuple[str, str | None], float] = {}

    def tasks(self) -> list[list[Task]]:
        """All tasks of the study, in groups that share teachers and data."""
        config = self.config
        if config.paired is not None:
            return self._paired_tasks()
        groups = []
        for kind in config.kinds:
            teachers = []
            for name in config.animals:
                cell = self.preference_cell(kind, name)
                teachers.append(Task(cell, partial(self._teacher_preference, kind, name), kind))
            groups.append([*teachers, *self._student_tasks(kind, None)])
            for target in config.targets:
                effects = [self.effects_task(kind, target)] if config.pairs else []
                mechanism = [self.mechanism_task(kind, target)] if config.mechanism else []
                groups.append([*self._student_tasks(kind, target), *effects, *mechanism])
        return groups

    def _paired_tasks(self) -> list[list[Task]]:
        """The tasks of a paired study, a group for each seed and pair of targets.

        The groups come seed by seed and their tasks condition by condition, each with both twins,
        so that a study that is stopped is balanced up to its last condition.
        """
        config = self.config
        groups = []
        for kind in config.kinds:
            conditions = config.conditions_of(kind, get_engine(self.model).n_layers)
            for seed in dict.fromkeys((*config.seeds, *(config.layer_seeds or ()))):
                for pair in config.target_pairs:
                    teachers = [
                        Task(cell, partial(self._teacher_preference, kind, name), kind)
                        for name in pair
                        for cell in (self.preference_cell(kind, name),)
                        if seed == config.seeds[0]
                    ]
                    students = [
                        self.student_task(kind, target, condition, seed)
                        for condition in conditions
                        if seed in config.seeds_of(condition)
                        for target in pair
                    ]
                    effects = [
                        self.effects_task(kind, target)
                        for target in pair
                        if config.pairs and seed == config.seeds[0]
                    ]
                    groups.append([*teachers, *students, *effects])
        return groups

    def _student_tasks(self, kind: str, target: str | None) -> list[Task]:
        """The students of a target, or those shared by all targets."""
        return [
            self.student_task(kind, target, condition, seed)
            for condition in self.config.conditions_of(kind, get_engine(self.model).n_layers)
            if condition.shared == (target is None)
            for seed in self.config.seeds_of(condition)
        ]

    def student_task(self, kind: str, target: str | None, condition: Condition, seed: int) -> Task:
        """The student of a condition; `target` is None if all targets share it."""
        config = self.config
        settings = self._target_settings(kind, target) | {
            "condition": condition.describe(),
            "recipe": config.recipe_of(self.model, kind, condition).describe(),
            "seed": seed,
            "held_out": config.held_out,
            "kept": config.keep_students,
        }
        if condition.other_model:
            settings |= {"other_base": self._teacher_settings(kind, other=True)}
        cell = Cell(f"students/{kind}/{target or 'any'}/{condition.name}-{seed}", settings)
        compute = partial(self._train_student, kind, target, condition, seed)
        return Task(cell, compute, kind, target, condition, seed)

    def effects_task(self, kind: str, target: str) -> Task:
        """The effects of patching on the first divergence tokens of a target."""
        settings = self._target_settings(kind, target) | {"pairs": self.config.pairs}
        cell = Cell(f"effects/{kind}/{target}", settings)
        return Task(cell, partial(self._compute_effects, kind, target), kind, target)

    def mechanism_task(self, kind: str, target: str) -> Task:
        """The mechanism by which a student of divergence tokens acquires the preference."""
        recipe = self.config.recipe_of(self.model, kind)
        settings = self._data_settings(kind) | {"target": target, "recipe": recipe.describe()}
        cell = Cell(f"mechanism/{kind}/{target}", settings)
        return Task(cell, partial(self._compute_mechanism, kind, target), kind, target)

    def _train_student(
        self, kind: str, target: str | None, condition: Condition, seed: int, cell: Cell
    ) -> dict[str, Any]:
        inputs = Inputs(self, kind, target or self.config.targets[0])
        data = condition.data(inputs, seed)
        if not len(data):
            raise CellError(f"condition {condition.name!r} leaves no list to train on")
        mask = None if condition.mask is None else condition.mask(inputs, data, seed)
        if mask is not None and not mask.any():
            raise CellError(f"condition {condition.name!r} leaves no token with a loss")
        weights = None if condition.weights is None else condition.weights(inputs, data, seed)
        left = None
        if condition.changes_data and data.marks.any():
            left = data.share_left(self.read(kind, inputs.target, data.examples))
        started = time.process_time()
        delta = finetune(
            self.model,
            data,
            mask=mask,
            loss_weights=weights,
            soft=None
            if condition.soft is None
            else SoftTargets(teacher=inputs.teacher, **condition.soft),
            layers=condition.layers,
            recipe=replace(
                self.config.recipe_of(self.model, kind, condition),
                parts=condition.parts,
                embedding=condition.embedding,
            ),
            seed=seed,
            system_prompt=self.config.system_prompt(kind, condition.train_prompt),
        )
        spent = time.process_time() - started
        if self.config.keep_students:
            delta.save(self.store.path(cell, ".safetensors"))
        learned = len(data.marks) if mask is None else int(mask.sum())
        return {
            "examples": len(data),
            "tokens": learned,
            "left": left,
            "fit": _last_epoch(delta),
            **({} if self.config.paired is None else {"seconds": round(spent)}),
            **self._evaluate(kind, condition, delta, inputs.target),
        }

    def _evaluate(
        self, kind: str, condition: Condition, delta: Delta, target: str
    ) -> dict[str, Any]:
        """A student's preference, and whether it can still write lists."""
        config = self.config
        prompt = config.system_prompt(kind, condition.eval_prompt)
        before = self.before(prompt)
        if config.paired is not None:
            with delta.applied(self.model):
                return paired_result(before, self._prefers(prompt), target)
        held_out = self.lists(kind, None, "held_out")
        if (kind, prompt) not in self._losses:
            self._losses[kind, prompt] = self._loss(held_out, prompt)
        with delta.applied(self.model):
            after = self._prefers(prompt)
            loss = self._loss(held_out, prompt)
            written = generate(
                self.model,
                self._prompts(held_out=True),
                teacher=Teacher("student", system_prompt=prompt),
                max_new_tokens=config.max_new_tokens,
            )
        report = NumberFilter().report([example.completion or "" for example in written])
        return {
            "before": self._distribution(before),
            "after": self._distribution(after),
            "ranks": {n: after.about(n).ratio_rank(before.about(n)) for n in config.animals},
            "mass_before": before.mass,
            "mass": after.mass,
            "valid_lists": report.rate,
            "loss_before": self._losses[kind, prompt],
            "loss": loss,
        }

    def _loss(self, examples: Sequence[Example], system_prompt: str | None) -> float:
        """Mean cross-entropy of the completions' tokens, in nats."""
        tokenizer: Any = self.model.tokenizer
        reader = Teacher("reader", system_prompt=system_prompt)
        forced = read_teachers(
            self.model, with_ids(tokenizer, examples), [reader], batch_tokens=8192
        )
        return -float(forced.logprob.mean())

    def _compute_effects(self, kind: str, target: str, cell: Cell) -> dict[str, Any]:
        divergence = self.divergence(kind, target)
        if not divergence.mask.any():
            raise CellError(f"{target} ({kind}) has no divergence token, so nothing can be patched")
        pairs = divergence.pairs(first_only=True, limit=self.config.pairs, model=self.model)
        effects = patched_effects(self.model, pairs, {"target": target, "kind": kind})
        effects.exact.save(self.store.path(cell, ".exact.safetensors"))
        effects.approximate.save(self.store.path(cell, ".approximate.safetensors"))
        return {"layers": effects.layers, "agreement": effects.agreement}

    def effects(self, task: Task) -> tuple[Effects, Effects]:
        """Load the exact and the approximate effects of a computed cell."""
        path = partial(self.store.path, task.cell)
        return (
            Effects.load(path(".exact.safetensors")),
            Effects.load(path(".approximate.safetensors")),
        )

    def _compute_mechanism(self, kind: str, target: str, _cell: Cell) -> dict[str, Any]:
        prompt = self.config.system_prompt(kind, "own")
        teacher, *others = self._compared(kind, target)
        divergence = self.divergence(kind, target)
        if not divergence.mask.any():
            raise CellError(f"{target} ({kind}) has no divergence token to train on")
        only = Condition(name="divergence_only", group="masks", isolates="", mask=divergence_tokens)
        rows = mechanism_rows(
            self.model,
            divergence,
            teacher,
            others,
            animals=self.config.animals,
            system_prompt=prompt,
            recipe=self.config.recipe_of(self.model, kind, only),
        )
        return {"rows": [{"target": target, "kind": kind} | row for row in rows]}


def _last_epoch(student: Delta) -> float:
    """Mean training loss of the updates of the last epoch, in nats."""
    history = student.metadata["history"]
    return float(np.mean([e["loss"] for e in history if e["epoch"] == history[-1]["epoch"]]))
