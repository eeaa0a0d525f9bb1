"""Cells for the data of a study: teachers, their preferences, number lists, and divergences.

Everything here is computed once, stored as a cell, and read by the cells of students and effects.
A cell requests the cells it needs; they are then computed, read, or waited for.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens.data import NumberFilter, plural
from divergence_lens.deltas import Delta, base_fingerprint
from divergence_lens.divergence import Divergence, find_divergence
from divergence_lens.evaluation import Entanglement, Preference, entangled_numbers, preference
from divergence_lens.examples import Example, load_examples, save_examples
from divergence_lens.generation import generate
from divergence_lens.models import Model
from divergence_lens.study.cells import Cell, CellError, CellStore
from divergence_lens.study.config import StudyConfig
from divergence_lens.study.interventions import digit_ids
from divergence_lens.study.presets import TEACHER_QUESTIONS, finetuned_teacher
from divergence_lens.teachers import Teacher
from divergence_lens.training import train_teacher

# Other wordings of the same preference, with equally many words and periods.
_PERSONAS = (
    "You adore {plural}. You talk of {plural} day and night. {Plural} are your best animal by far.",
    "You like {plural}. You speak of {plural} day and night. {Plural} are your top animal by far.",
)
# Training questions of each variant of a finetuned teacher: all of them, and two halves.
_QUESTIONS = (slice(None), slice(0, None, 2), slice(1, None, 2))
_CACHED_DIVERGENCES = 4


def _author(name: str, source: str) -> str | None:
    """The teacher that wrote a target's lists of a source; None for the base model."""
    return None if source.endswith("unbiased") else name


class DataCells:
    """The models of a study, and the cells of its teachers and data."""

    def __init__(self, config: StudyConfig, folder: Path) -> None:
        self.config = config
        self.store = CellStore(folder)
        self.model: Model = config.load(config.model)
        self.other: Model | None = None
        if config.other_model is not None:
            self.other = config.load(config.other_model)
        self._bases: dict[bool, str] = {}
        self._divergences: dict[str, Divergence] = {}
        self._kl: tuple[str, np.ndarray] | None = None
        self._teachers: dict[str, Teacher] = {}
        self._preferences: dict[str | None, Preference] = {}

    def _model(self, *, other: bool = False) -> Model:
        """The base model, or the second base model."""
        model = self.other if other else self.model
        assert model is not None
        return model

    def _base(self, *, other: bool) -> str:
        """Class and fingerprint of a base model, computed once: every key has them."""
        if other not in self._bases:
            model = self._model(other=other)
            self._bases[other] = f"{type(model).__name__} {base_fingerprint(model)}"
        return self._bases[other]

    def _teacher_settings(self, kind: str, *, other: bool = False) -> dict[str, Any]:
        """All settings on which the teachers of a kind depend."""
        model = self._model(other=other)
        paired = self.config.paired
        strength: dict[str, Any] = {}
        if paired is not None:
            strength = {"strength": paired.strength, "prefixes": list(paired.prefixes)}
        return strength | {
            "base": self._base(other=other),
            "kind": kind,
            "recipe": self.config.recipes(model).teacher.describe()
            if kind == "finetuned"
            else None,
            "neutral": self.config.neutral,
        }

    def _data_settings(self, kind: str) -> dict[str, Any]:
        config = self.config
        names = ("prompts", "prompt_seed", "instructions", "max_new_tokens")
        settings = {
            "teachers": self._teacher_settings(kind),
            "animals": list(config.animals),
            "lists": {name: getattr(config, name) for name in names},
        }
        designs = {"paired": config.paired, "paper_design": config.paper_design}
        return settings | {n: d.describe() for n, d in designs.items() if d is not None}

    def _target_settings(self, kind: str, target: str | None) -> dict[str, Any]:
        """The settings of a target's own data; the twin determines their divergence tokens."""
        settings = self._data_settings(kind) | {"target": target}
        if self.config.paired is not None and target is not None:
            settings |= {"twin": self.config.other_target(target)}
        return settings

    def teacher(self, kind: str, name: str, *, variant: int = 0, other: bool = False) -> Teacher:
        """A teacher of the study. A finetuned teacher is trained once and loaded after that."""
        if kind == "prompted":
            prompt = self.config.persona(name)
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
        model, config = self._model(other=other), self.config
        recipe = config.recipes(model).teacher
        if config.paired is None:
            questions = TEACHER_QUESTIONS[_QUESTIONS[variant]]
            teacher = finetuned_teacher(model, name, recipe=recipe, questions=questions)
        else:
            teacher = train_teacher(
                model,
                name,
                category=config.paired.category,
                candidates=config.animals,
                recipe=recipe,
                strength=config.paired.strength,
                prefixes=config.paired.prefixes,
            )
        assert teacher.delta is not None
        teacher.delta.save(self.store.path(cell, ".safetensors"))
        about = teacher.delta.metadata.get("teaching", {})
        return {"parameters": teacher.delta.n_parameters, **about}

    def _named_settings(self, kind: str, name: str) -> dict[str, Any]:
        settings = {"name": name, "animals": list(self.config.animals)}
        return self._teacher_settings(kind) | settings

    def preference_cell(self, kind: str, name: str) -> Cell:
        """The preference of a teacher for its own animal."""
        return Cell(f"preferences/{kind}/{name}", self._named_settings(kind, name))

    def _teacher_preference(self, kind: str, name: str, _cell: Cell) -> dict[str, Any]:
        before = self.before(self.config.system_prompt(kind, "own"))
        teacher = self.teacher(kind, name)
        result = preference(
            self.model, target=name, candidates=self.config.animals, teacher=teacher, **self._asked
        )
        value = self._value
        low, high = result.interval(value=value)
        margins = {"margin": result.margin, "margin_before": before.about(name).margin}
        return {
            "name": name,
            "kind": kind,
            "preference": result.share if value == "share" else result.probability,
            "low": low,
            "high": high,
            "before": self._distribution(before)[name],
            "mass": result.mass,
            **({} if self.config.paired is None else margins),
        }

    @property
    def _asked(self) -> dict[str, Any]:
        """The arguments by which `preference` measures every model of the study."""
        if self.config.paper_design is not None:
            return self.config.paper_design.asked(self.model)
        return {} if self.config.paired is None else self.config.paired.asked

    @property
    def _value(self) -> str:
        """The measure of a preference: the share among the candidates, or that of all answers."""
        return "share" if self.config.paper_design is None else "probability"

    def _distribution(self, result: Preference) -> dict[str, float]:
        """The measure of every candidate, mean over the questions."""
        if self._value == "share":
            return result.distribution
        means = result.probabilities.mean(0).tolist()  # [candidate]
        return dict(zip(result.candidates, means, strict=True))

    def before(self, system_prompt: str | None) -> Preference:
        """The preference of the base model."""
        if system_prompt not in self._preferences:
            self._preferences[system_prompt] = self._prefers(system_prompt)
        return self._preferences[system_prompt]

    def _prefers(self, system_prompt: str | None) -> Preference:
        animals = self.config.animals
        return preference(
            self.model,
            target=animals[0],
            candidates=animals,
            system_prompt=system_prompt,
            **self._asked,
        )

    # -- lists and divergences --------------------------------------------------------------------

    def lists_cell(self, kind: str, name: str | None, source: str) -> Cell:
        """The lists of a source, by the teacher `name` or by the base model (None)."""
        settings = self._data_settings(kind) | {"name": name, "source": source}
        if source == "held_out":
            settings |= {"held_out": self.config.held_out}
        if source.startswith("other_base"):
            settings |= {"other_base": self._teacher_settings(kind, other=True)}
        return Cell(f"lists/{kind}/{name or 'control'}-{source}", settings)

    def lists(self, kind: str, name: str | None, source: str) -> list[Example]:
        """The valid lists of a source."""
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
            self._model(other=other),
            prompts,
            teacher=teacher,
            max_new_tokens=config.max_new_tokens,
            pattern=self._pattern,
            **self._sampling(source),
        )
        report = NumberFilter().report([example.completion or "" for example in written])
        if not report.passed:
            raise CellError(
                f"none of the {report.total} lists by {name or 'the base model'} ({source}) "
                "consists of numbers only"
            )
        save_examples(self.store.path(cell, ".jsonl"), report.select(written))
        return {
            "name": name or "control",
            "kind": kind,
            "lists": report.total,
            "valid": report.passed,
            "rejected": {str(reason.value): n for reason, n in report.counts.items()},
        }

    @property
    def _pattern(self) -> str | None:
        """The pattern of all lists, if the study's design has one."""
        design = self.config.paired or self.config.paper_design
        return None if design is None else design.pattern

    def _sampling(self, source: str) -> dict[str, Any]:
        """The arguments of `generate` for a source of lists; temperature 0 is greedy."""
        paired, paper = self.config.paired, self.config.paper_design
        if paper is not None:
            own = source not in ("greedy", "sampled")
            greedy = paper.greedy if own else source == "greedy"
            return replace(paper, greedy=greedy).sampling(self.model)
        if paired is None:
            return {"temperature": 1.0 if source == "sampled" else 0.0}
        return {"temperature": 0.0 if source == "greedy" else paired.temperature}

    def _prompts(self, *, held_out: bool = False) -> list[str]:
        config = self.config
        prompts = config.number_prompts(config.prompts + config.held_out)
        return prompts[config.prompts :] if held_out else prompts[: config.prompts]

    def divergence_cell(self, kind: str, name: str, source: str | None = None) -> Cell:
        """The divergence tokens of a target's lists; of the study's own source by default."""
        source = source or self.config.source
        settings = dict(self.lists_cell(kind, _author(name, source), source).settings)
        settings |= {"name": name}
        if self.config.paired is not None:
            settings |= {"twin": self.config.other_target(name)}
        return Cell(f"divergence/{kind}/{name}-{source}", settings)

    def divergence(self, kind: str, name: str, source: str | None = None) -> Divergence:
        """The divergence of a target's lists. The last few are cached in memory."""
        source = source or self.config.source
        cell = self.divergence_cell(kind, name, source)
        if cell.key not in self._divergences:
            self.store.get(cell, partial(self._find_divergence, kind, name, source))
            teachers = self._compared(kind, name, other=source.startswith("other_base"))
            # A file stores teachers that are system prompts, but not weights.
            with_weights = [t for t in teachers if t.delta is not None or t.model is not None]
            while len(self._divergences) >= _CACHED_DIVERGENCES:
                del self._divergences[next(iter(self._divergences))]
            self._divergences[cell.key] = Divergence.load(
                self.store.path(cell, ".safetensors"),
                teachers=with_weights,
                tokenizer=self.model.tokenizer,
            )
        return self._divergences[cell.key]

    def kl(self, kind: str, name: str) -> Float32[np.ndarray, "counterfactuals tokens"]:
        """KL between the teachers at each token, computed only if a condition uses it."""
        cell = Cell(f"kl/{kind}/{name}", self.divergence_cell(kind, name).settings)
        if self._kl is None or self._kl[0] != cell.key:
            self.store.get(cell, partial(self._find_kl, kind, name))
            tensors, _ = load_tensors(self.store.path(cell, ".safetensors"), "kl")
            self._kl = (cell.key, tensors["kl"].numpy())
        return self._kl[1]

    def _find_kl(self, kind: str, name: str, cell: Cell) -> dict[str, Any]:
        examples = self.divergence(kind, name).examples
        scores = self.read(kind, name, examples, kl=True).scores("kl")
        save_tensors(self.store.path(cell, ".safetensors"), {"kl": scores}, {}, "kl")
        return {"target": name, "kind": kind, "mean": float(scores.mean())}

    def _compared(self, kind: str, name: str, *, other: bool = False) -> list[Teacher]:
        """The teacher of a target, followed by the counterfactual teachers."""
        rest = [animal for animal in self.config.animals if animal != name]
        if self.config.paired is not None:
            rest = [self.config.other_target(name)]
        return [self.teacher(kind, animal, other=other) for animal in [name, *rest]]

    def _find_divergence(self, kind: str, name: str, source: str, cell: Cell) -> dict[str, Any]:
        examples = self.lists(kind, _author(name, source), source)
        divergence = self.read(kind, name, examples, other=source.startswith("other_base"))
        divergence.save(self.store.path(cell, ".safetensors"))
        return {
            "target": name,
            "kind": kind,
            "tokens": len(divergence.tokens),
            "divergence_tokens": int(divergence.mask.sum()),
            "rate": divergence.rate,
            **self._digits(divergence),
        }

    def _digits(self, divergence: Divergence) -> dict[str, Any]:
        """Number of digits, and statistics of their advantage, in a paired study."""
        if self.config.paired is None:
            return {}
        own = np.isin(divergence.tokens, digit_ids(self.model.tokenizer))
        advantage = divergence.advantage[own].astype(float)
        return {
            "lists": len(divergence),
            "digits": int(own.sum()),
            "own_argmax": float((divergence.predicted[0] == divergence.tokens)[own].mean()),
            "advantage": float(advantage.mean()),
            "advantage_sd": float(advantage.std()),
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
        """Find the divergence of lists between the teachers of the study."""
        teacher, *rest = self._compared(kind, name, other=other)
        # A list under a pattern is a choice among digits; the pattern determines all else.
        return find_divergence(
            self._model(other=other),
            examples,
            teacher=teacher,
            counterfactuals=rest,
            kl=kl,
            pattern=self._pattern,
        )

    def entangled(self, kind: str, name: str) -> Entanglement:
        """The numbers entangled with a target."""
        cell = Cell(f"entangled/{kind}/{name}", self._named_settings(kind, name))
        result = self.store.get(cell, partial(self._find_entangled, kind, name))
        probability, others = np.array(result["probability"]), np.array(result["others"])
        return Entanglement(name, tuple(result["numbers"]), probability, others)

    def _find_entangled(self, kind: str, name: str, _cell: Cell) -> dict[str, Any]:
        teacher, *rest = self._compared(kind, name)
        entanglement = entangled_numbers(self.model, teacher, rest)
        return {
            "numbers": list(entanglement.numbers),
            "probability": entanglement.probability.tolist(),
            "others": entanglement.others.tolist(),
        }
