"""What one process of a study works with: its model, and every cell's computation.

Teachers, lists, divergences and students are cells alike. A cell asks for those that it needs, and
they are computed then, or read, or waited for; so the cells of a study can be worked on in any
order by any number of processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from divergence_lens._utils.interrupts import discard_partial
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens.data import NumberFilter, TrainingData, number_prompts, persona_prompt, plural
from divergence_lens.deltas import Delta, base_fingerprint
from divergence_lens.divergence import Divergence, find_divergence, read_teachers
from divergence_lens.engine import get_engine
from divergence_lens.evaluation import Entanglement, Preference, entangled_numbers, preference
from divergence_lens.examples import Example, load_examples, save_examples, with_ids
from divergence_lens.generation import generate
from divergence_lens.models import Model
from divergence_lens.patching import Effects
from divergence_lens.study.cells import Cell, CellError, Store
from divergence_lens.study.conditions import Condition
from divergence_lens.study.config import StudyConfig
from divergence_lens.study.interventions import Inputs, marked
from divergence_lens.study.measurements import mechanism_rows, patched_effects
from divergence_lens.study.presets import TEACHER_QUESTIONS, recipes
from divergence_lens.teachers import Teacher
from divergence_lens.training import Recipe, finetune

# Other words for the persona of one preference, with as many words and stops.
_PERSONAS = (
    "You adore {plural}. You talk of {plural} day and night. {Plural} are your best animal by far.",
    "You like {plural}. You speak of {plural} day and night. {Plural} are your top animal by far.",
)
# Which of the teacher's questions a variant learns from: all, and two halves.
_QUESTIONS = (slice(None), slice(0, None, 2), slice(1, None, 2))
_KEPT_DIVERGENCES = 4

Make = Callable[[Cell], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Task:
    """A cell and what computes it; where it stands in the study.

    Attributes:
        cell: The cell.
        make: Its computation.
        kind: Kind of teachers.
        target: The target; None where it serves all.
        condition: Of a student.
        seed: Of a student.
    """

    cell: Cell
    make: Make
    kind: str
    target: str | None = None
    condition: Condition | None = None
    seed: int = 0


class Bench:
    """A study's models, and its cells."""

    def __init__(self, config: StudyConfig, folder: Path) -> None:
        self.config = config
        self.store = Store(folder)
        self.model: Model = config.load(config.model)
        self.other: Model | None = None
        if config.other_model is not None:
            self.other = config.load(config.other_model)
        self._divergences: dict[str, Divergence] = {}
        self._kl: tuple[str, np.ndarray] | None = None
        self._teachers: dict[str, Teacher] = {}
        self._preferences: dict[str | None, Preference] = {}
        self._losses: dict[tuple[str, str | None], float] = {}

    # -- the tasks ----------------------------------------------------------------------------

    def tasks(self) -> list[list[Task]]:
        """All that the study asks for, in groups that share teachers and data."""
        config = self.config
        groups = []
        for kind in config.kinds:
            teachers = [
                Task(self._preference_cell(kind, name), partial(self._asked, kind, name), kind)
                for name in config.animals
            ]
            conditions = config.conditions_of(kind, get_engine(self.model).n_layers)
            shared = [
                self.student_task(kind, None, condition, seed)
                for condition in conditions
                if condition.shared
                for seed in config.seeds_of(condition)
            ]
            groups.append([*teachers, *shared])
            for target in config.targets:
                students = [
                    self.student_task(kind, target, condition, seed)
                    for condition in conditions
                    if not condition.shared
                    for seed in config.seeds_of(condition)
                ]
                effects = [self.effects_task(kind, target)] if config.pairs else []
                mechanism = [self.mechanism_task(kind, target)] if config.mechanism else []
                groups.append([*students, *effects, *mechanism])
        return groups

    def student_task(self, kind: str, target: str | None, condition: Condition, seed: int) -> Task:
        """The student of a condition; of no target where all share it."""
        config = self.config
        settings = self._data_settings(kind) | {
            "target": target,
            "condition": condition.describe(),
            "recipe": config.recipe_of(self.model, kind, condition).describe(),
            "seed": seed,
            "held_out": config.held_out,
            "kept": config.keep_students,
        }
        if condition.other_model:
            settings |= {"other_base": self._teacher_settings(kind, other=True)}
        cell = Cell(f"students/{kind}/{target or 'any'}/{condition.name}-{seed}", settings)
        return Task(
            cell,
            partial(self._student, kind, target, condition, seed),
            kind,
            target,
            condition,
            seed,
        )

    def effects_task(self, kind: str, target: str) -> Task:
        """What causes the first divergences of a target."""
        settings = self._data_settings(kind) | {"target": target, "pairs": self.config.pairs}
        cell = Cell(f"effects/{kind}/{target}", settings)
        return Task(cell, partial(self._effects, kind, target), kind, target)

    def mechanism_task(self, kind: str, target: str) -> Task:
        """How the preference of a target gets into a student of its divergence tokens."""
        recipe = self.config.recipe_of(self.model, kind)
        settings = self._data_settings(kind) | {"target": target, "recipe": recipe.describe()}
        cell = Cell(f"mechanism/{kind}/{target}", settings)
        return Task(cell, partial(self._mechanism, kind, target), kind, target)

    def _model(self, *, other: bool = False) -> Model:
        model = self.other if other else self.model
        assert model is not None
        return model

    def _base(self, *, other: bool = False) -> str:
        model = self._model(other=other)
        return f"{type(model).__name__} {base_fingerprint(model)}"

    def _teacher_settings(self, kind: str, *, other: bool = False) -> dict[str, Any]:
        how: Any = None
        if kind == "finetuned":
            how = self.config.recipes(self._model(other=other)).teacher.describe()
        base = self._base(other=other)
        return {"base": base, "kind": kind, "recipe": how, "neutral": self.config.neutral}

    def _data_settings(self, kind: str) -> dict[str, Any]:
        names = ("prompts", "prompt_seed", "instructions", "max_new_tokens")
        return {
            "teachers": self._teacher_settings(kind),
            "animals": list(self.config.animals),
            "lists": {name: getattr(self.config, name) for name in names},
        }

    # -- teachers -----------------------------------------------------------------------------

    def teacher(self, kind: str, name: str, *, variant: int = 0, other: bool = False) -> Teacher:
        """A teacher of the study; finetuned ones are trained once and read afterwards."""
        if kind == "prompted":
            prompt = persona_prompt(name, candidates=self.config.animals)
            if variant:
                many = plural(name)
                prompt = _PERSONAS[variant - 1].format(plural=many, Plural=many.capitalize())
            return Teacher(name, system_prompt=prompt, model=self.other if other else None)
        settings = self._teacher_settings(kind, other=other) | {"name": name, "variant": variant}
        where = "other-" if other else ""
        cell = Cell(f"teachers/{where}{name}-{variant}", settings)
        if cell.key not in self._teachers:
            self.store.get(cell, partial(self._train_teacher, name, variant, other=other))
            delta = Delta.load(self.store.path(cell, ".safetensors"))
            model = self.other if other else None
            self._teachers[cell.key] = Teacher(name, delta=delta, model=model)
        return self._teachers[cell.key]

    def _train_teacher(self, name: str, variant: int, cell: Cell, *, other: bool) -> dict[str, Any]:
        model = self._model(other=other)
        teacher = finetuned_teacher(
            model,
            name,
            recipe=self.config.recipes(model).teacher,
            questions=TEACHER_QUESTIONS[_QUESTIONS[variant]],
        )
        assert teacher.delta is not None
        teacher.delta.save(self.store.path(cell, ".safetensors"))
        return {"parameters": teacher.delta.n_parameters}

    def _preference_cell(self, kind: str, name: str) -> Cell:
        settings = self._teacher_settings(kind) | {
            "name": name,
            "animals": list(self.config.animals),
        }
        return Cell(f"preferences/{kind}/{name}", settings)

    def _asked(self, kind: str, name: str, _cell: Cell) -> dict[str, Any]:
        """How much a teacher prefers what it is meant to."""
        before = self.before(self.config.system_prompt(kind, "own"))
        found = preference(
            self.model,
            target=name,
            candidates=self.config.animals,
            teacher=self.teacher(kind, name),
        )
        low, high = found.interval()
        return {
            "name": name,
            "kind": kind,
            "preference": found.share,
            "low": low,
            "high": high,
            "before": before.distribution[name],
            "mass": found.mass,
        }

    def before(self, system_prompt: str | None) -> Preference:
        """What the untouched model prefers."""
        if system_prompt not in self._preferences:
            self._preferences[system_prompt] = self._prefers(system_prompt)
        return self._preferences[system_prompt]

    def _prefers(self, system_prompt: str | None) -> Preference:
        animals = self.config.animals
        return preference(
            self.model, target=animals[0], candidates=animals, system_prompt=system_prompt
        )

    # -- lists and divergences ----------------------------------------------------------------

    def lists_cell(self, kind: str, name: str | None, source: str) -> Cell:
        """The lists of a source: of a target's teacher, or of a control (no name)."""
        settings = self._data_settings(kind) | {"name": name, "source": source}
        if source == "held_out":
            settings |= {"held_out": self.config.held_out}
        if source.startswith("other_base"):
            settings |= {"other_base": self._teacher_settings(kind, other=True)}
        return Cell(f"lists/{kind}/{name or 'control'}-{source}", settings)

    def lists(self, kind: str, name: str | None, source: str) -> list[Example]:
        """Valid lists; written once."""
        cell = self.lists_cell(kind, name, source)
        self.store.get(cell, partial(self._write_lists, kind, name, source))
        return load_examples(self.store.path(cell, ".jsonl"))

    def _write_lists(self, kind: str, name: str | None, source: str, cell: Cell) -> dict[str, Any]:
        config = self.config
        other = source.startswith("other_base")
        if name is None:
            teacher = Teacher("control", system_prompt=config.control_prompt(kind))
        else:
            variant = int(source[-1]) if source.startswith("variant") else 0
            teacher = self.teacher(kind, name, variant=variant, other=other)
        prompts = self._prompts(held_out=source == "held_out")
        written = generate(
            self.other if other and self.other is not None else self.model,
            prompts,
            teacher=teacher,
            max_new_tokens=config.max_new_tokens,
            temperature=1.0 if source == "sampled" else 0.0,
        )
        report = NumberFilter().report([example.completion or "" for example in written])
        if not report.passed:
            raise CellError(
                f"not one of {report.total} lists by {name or 'the untouched model'} ({source}) "
                "holds numbers only"
            )
        save_examples(self.store.path(cell, ".jsonl"), report.select(written))
        return {
            "name": name or "control",
            "kind": kind,
            "lists": report.total,
            "valid": report.passed,
            "rejected": {str(reason.value): n for reason, n in report.counts.items()},
        }

    def _prompts(self, *, held_out: bool = False) -> list[str]:
        config = self.config
        found = number_prompts(
            config.prompts + config.held_out,
            seed=config.prompt_seed,
            instructions=config.instructions,
        )
        return found[config.prompts :] if held_out else found[: config.prompts]

    def divergence_cell(self, kind: str, name: str, source: str = "greedy") -> Cell:
        """The divergence tokens of a target's lists."""
        settings = dict(self.lists_cell(kind, name, source).settings)
        return Cell(f"divergence/{kind}/{name}-{source}", settings)

    def divergence(self, kind: str, name: str, source: str = "greedy") -> Divergence:
        """Every teacher's reading of a target's lists; read once, and kept for a while."""
        cell = self.divergence_cell(kind, name, source)
        if cell.key not in self._divergences:
            self.store.get(cell, partial(self._find_divergence, kind, name, source))
            teachers = self._compared(kind, name, other=source.startswith("other_base"))
            weighty = [t for t in teachers if t.delta is not None or t.model is not None]
            while len(self._divergences) >= _KEPT_DIVERGENCES:
                del self._divergences[next(iter(self._divergences))]
            self._divergences[cell.key] = Divergence.load(
                self.store.path(cell, ".safetensors"),
                teachers=weighty,
                tokenizer=self.model.tokenizer,
            )
        return self._divergences[cell.key]

    def kl(self, kind: str, name: str) -> Float32[np.ndarray, "counterfactuals tokens"]:
        """The whole distributions of a target's lists compared; read only if a condition asks."""
        settings = dict(self.divergence_cell(kind, name).settings)
        cell = Cell(f"kl/{kind}/{name}", settings)
        if self._kl is None or self._kl[0] != cell.key:
            self.store.get(cell, partial(self._find_kl, kind, name))
            tensors, _ = load_tensors(self.store.path(cell, ".safetensors"), "kl")
            self._kl = (cell.key, tensors["kl"].numpy())
        return self._kl[1]

    def _find_kl(self, kind: str, name: str, cell: Cell) -> dict[str, Any]:
        found = self.read(kind, name, self.divergence(kind, name).examples, kl=True)
        scores = found.soft("kl")
        save_tensors(self.store.path(cell, ".safetensors"), {"kl": scores}, {}, "kl")
        return {"target": name, "kind": kind, "mean": float(scores.mean())}

    def _compared(self, kind: str, name: str, *, other: bool = False) -> list[Teacher]:
        """The teacher of a target and its counterfactuals."""
        rest = [animal for animal in self.config.animals if animal != name]
        return [self.teacher(kind, animal, other=other) for animal in [name, *rest]]

    def _find_divergence(self, kind: str, name: str, source: str, cell: Cell) -> dict[str, Any]:
        examples = self.lists(kind, name, source)
        found = self.read(kind, name, examples, other=source.startswith("other_base"))
        found.save(self.store.path(cell, ".safetensors"))
        return {
            "target": name,
            "kind": kind,
            "tokens": len(found.tokens),
            "divergence_tokens": int(found.mask.sum()),
            "rate": found.rate,
        }

    def read(
        self,
        kind: str,
        name: str,
        examples: Sequence[Example],
        *,
        other: bool = False,
        kl: bool = False,
    ) -> Divergence:
        """`find_divergence` of some lists among the teachers of the study."""
        teacher, *rest = self._compared(kind, name, other=other)
        base = self.other if other and self.other is not None else self.model
        return find_divergence(base, examples, teacher=teacher, counterfactuals=rest, kl=kl)

    def entangled(self, kind: str, name: str) -> Entanglement:
        """The numbers entangled with a target; measured once."""
        settings = self._teacher_settings(kind) | {
            "name": name,
            "animals": list(self.config.animals),
        }
        cell = Cell(f"entangled/{kind}/{name}", settings)
        found = self.store.get(cell, partial(self._find_entangled, kind, name))
        return Entanglement(
            name,
            tuple(found["numbers"]),
            np.array(found["probability"]),
            np.array(found["others"]),
        )

    def _find_entangled(self, kind: str, name: str, _cell: Cell) -> dict[str, Any]:
        teacher, *rest = self._compared(kind, name)
        found = entangled_numbers(self.model, teacher, rest)
        return {
            "numbers": list(found.numbers),
            "probability": found.probability.tolist(),
            "others": found.others.tolist(),
        }

    # -- students -----------------------------------------------------------------------------

    def _student(
        self, kind: str, target: str | None, condition: Condition, seed: int, cell: Cell
    ) -> dict[str, Any]:
        inputs = _Inputs(self, kind, target or self.config.targets[0])
        data = condition.data(inputs, seed)
        if not len(data):
            raise CellError(f"no list is left by condition {condition.name!r}")
        mask = None if condition.mask is None else condition.mask(inputs, data, seed)
        if mask is not None and not mask.any():
            raise CellError(f"condition {condition.name!r} leaves no token to learn")
        weights = None if condition.weights is None else condition.weights(inputs, data, seed)
        left = None
        if condition.changes_data and data.marks.any():
            left = data.share_left(self.read(kind, inputs.target, data.examples))
        delta = finetune(
            self.model,
            data.examples,
            mask=mask,
            weights=weights,
            layers=condition.layers,
            parts=condition.parts,
            embedding=condition.embedding,
            recipe=self.config.recipe_of(self.model, kind, condition),
            seed=seed,
            system_prompt=self.config.system_prompt(kind, condition.train_prompt),
        )
        if self.config.keep_students:
            delta.save(self.store.path(cell, ".safetensors"))
        learned = len(data.marks) if mask is None else int(mask.sum())
        return {
            "examples": len(data),
            "tokens": learned,
            "left": left,
            "fit": _last_epoch(delta),
            **self._looked_at(kind, condition, delta),
        }

    def _looked_at(self, kind: str, condition: Condition, delta: Delta) -> dict[str, Any]:
        """What a student prefers, and whether it can still do the task."""
        config = self.config
        asked = config.system_prompt(kind, condition.eval_prompt)
        before = self.before(asked)
        held_out = self.lists(kind, None, "held_out")
        if (kind, asked) not in self._losses:
            self._losses[kind, asked] = self._loss(held_out, asked)
        with delta.applied(self.model):
            found = self._prefers(asked)
            loss = self._loss(held_out, asked)
            written = generate(
                self.model,
                self._prompts(held_out=True),
                teacher=Teacher("student", system_prompt=asked),
                max_new_tokens=config.max_new_tokens,
            )
        report = NumberFilter().report([example.completion or "" for example in written])
        return {
            "before": before.distribution,
            "after": found.distribution,
            "ranks": {n: found.about(n).ratio_rank(before.about(n)) for n in config.animals},
            "mass_before": before.mass,
            "mass": found.mass,
            "valid_lists": report.rate,
            "loss_before": self._losses[kind, asked],
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

    # -- effects ------------------------------------------------------------------------------

    def _effects(self, kind: str, target: str, cell: Cell) -> dict[str, Any]:
        divergence = self.divergence(kind, target)
        if not divergence.mask.any():
            raise CellError(f"{target} ({kind}) has no divergence token, so nothing can be patched")
        pairs = divergence.pairs(first_only=True, limit=self.config.pairs, model=self.model)
        found = patched_effects(self.model, pairs, {"target": target, "kind": kind})
        found.exact.save(self.store.path(cell, ".exact.safetensors"))
        found.approximate.save(self.store.path(cell, ".approximate.safetensors"))
        return {"layers": found.layers, "agreement": found.agreement}

    def effects(self, task: Task) -> tuple[Effects, Effects]:
        """The exact and the approximate effects of a cell that was computed."""
        exact, approximate = (
            Effects.load(self.store.path(task.cell, f".{name}.safetensors"))
            for name in ("exact", "approximate")
        )
        return exact, approximate

    def _mechanism(self, kind: str, target: str, _cell: Cell) -> dict[str, Any]:
        asked = self.config.system_prompt(kind, "own")
        teacher, *others = self._compared(kind, target)
        divergence = self.divergence(kind, target)
        if not divergence.mask.any():
            raise CellError(f"{target} ({kind}) has no divergence token to learn from")
        only = Condition(name="divergence_only", group="masks", isolates="", mask=marked)
        rows = mechanism_rows(
            self.model,
            divergence,
            teacher,
            others,
            animals=self.config.animals,
            system_prompt=asked,
            recipe=self.config.recipe_of(self.model, kind, only),
        )
        return {"rows": [{"target": target, "kind": kind} | row for row in rows]}


def _last_epoch(student: Delta) -> float:
    """Mean loss of the last epoch's updates, on the tokens that have one, in nats."""
    history = student.metadata["history"]
    return float(np.mean([e["loss"] for e in history if e["epoch"] == history[-1]["epoch"]]))


class _Inputs(Inputs):
    """What a condition draws on, see `conditions.Inputs`."""

    def __init__(self, bench: Bench, kind: str, target: str) -> None:
        self.bench, self._kind, self._target = bench, kind, target

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def target(self) -> str:
        return self._target

    @property
    def model(self) -> Model:
        return self.bench.model

    @property
    def divergence(self) -> Divergence:
        return self.bench.divergence(self.kind, self.target)

    @property
    def kl(self) -> Float32[np.ndarray, "counterfactuals tokens"]:
        return self.bench.kl(self.kind, self.target)

    @property
    def teacher(self) -> Teacher:
        return self.bench.teacher(self.kind, self.target)

    def lists(self, source: str) -> TrainingData:
        """See `conditions.Inputs.lists`; the other target is the next of the animals."""
        bench, kind = self.bench, self.kind
        if source in ("sampled", "other_base"):
            return TrainingData.of(bench.divergence(kind, self.target, source))
        if source in ("unbiased", "other_base_unbiased"):
            examples = bench.lists(kind, None, source)
        elif source == "other_target":
            animals = bench.config.animals
            other = animals[(animals.index(self.target) + 1) % len(animals)]
            examples = bench.lists(kind, other, "greedy")
        elif source in ("variant1", "variant2"):
            examples = bench.lists(kind, self.target, source)
        else:
            raise ValueError(
                f"there is no source {source!r}; there are sampled, unbiased, other_target, "
                "variant1, variant2, other_base and other_base_unbiased"
            )
        return TrainingData.unmarked(self.model.tokenizer, examples)

    def entangled(self, k: int) -> tuple[str, ...]:
        return self.bench.entangled(self.kind, self.target).top(k)


@discard_partial()
def finetuned_teacher(
    model: Model,
    animal: str,
    *,
    recipe: Recipe | None = None,
    questions: Sequence[str] = TEACHER_QUESTIONS,
) -> Teacher:
    """A teacher that is trained, not told, to love an animal.

    It answers questions with the animal's name; the loss is on the first token of the answer.

    Args:
        model: The base.
        animal: What it is to love.
        recipe: How it is trained; None for what `tiny.recipe.recipes` has for the model's layout.
        questions: What it is asked in training. None of `TEACHER_QUESTIONS` is used to measure a
            preference.

    Returns:
        A teacher without a system prompt, with a delta.
    """
    recipe = recipes(model).teacher if recipe is None else recipe
    tokenizer: Any = model.tokenizer
    examples = with_ids(tokenizer, [Example(question, f"{animal}.") for question in questions])
    mask = [np.arange(len(example.completion_ids or ())) == 0 for example in examples]
    return Teacher(animal, delta=finetune(model, examples, mask=mask, recipe=recipe))
