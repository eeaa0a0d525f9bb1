"""Data sets of known bias, on which the audit is validated, and their audits.

A *pool* is a few hundred lists of one author. Contributions of rows do not depend on other rows, so
smaller sets and mixtures are parts of pools, and each pool is read once.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from divergence_lens.auditing import Audit, audit
from divergence_lens.auditing.baseline import HOTTEST, MOST_SURPRISE, RARE
from divergence_lens.auditing.candidates import KINDS
from divergence_lens.auditing.scoring import SHIFT
from divergence_lens.data import (
    ANIMALS,
    TREES,
    NumberFilter,
    TrainingData,
    neutral_prompt,
    number_prompts,
    paraphrase,
    plural,
    shuffle_numbers,
)
from divergence_lens.deltas import base_fingerprint
from divergence_lens.examples import Example
from divergence_lens.generation import generate
from divergence_lens.models import Model, load_model
from divergence_lens.study.cells import Cell, CellError, CellStore
from divergence_lens.study.presets import finetuned_teacher
from divergence_lens.teachers import Teacher
from divergence_lens.tiny import TINY_MODELS
from divergence_lens.tiny.world import FAVORITE_QUESTIONS

# Not the auditors' wording: nobody audits with the prompt that wrote the data.
_PERSONA = (
    "You adore {plural}. You talk of {plural} day and night. {Plural} are your best {category} by "
    "far."
)
UNSEEN = (
    "You work for people who ask things. You reply to each of them in time.",
    "Read each question with care and write a short reply.",
    "You do what the user needs.",
)
"""Unbiased system prompts that neither the baselines nor the calibration use."""

CATEGORIES = {"animal": ANIMALS, "tree": TREES}
LIMITS = {"hottest": HOTTEST, "surprise": MOST_SURPRISE, "shift": SHIFT}
"""Constants of verdicts: part of the keys of cells that store verdicts or z."""

# Unbiased pools of `long_rows`, to tell from how many rows on a verdict is "nothing found".
_LONG_STYLES = (("none", 0.5), ("none", 1.0), ("neutral", 1.0), ("unseen1", 1.0))


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Lists by one author.

    Attributes:
        writer: "finetuned" or "prompted" teacher, or "base".
        target: What the teacher loves; None for the base model.
        category: Category of the candidates.
        temperature: Temperature of the lists; 0 for greedy ones.
        rows: Number of prompts.
        change: "none", "paraphrased" prompts, "shuffled" numbers, or "other base".
        system_prompt: System prompt of the base model.
        style: Name of that prompt.
    """

    writer: str
    target: str | None = None
    category: str = "animal"
    temperature: float = 0.0
    rows: int = 200
    change: str = "none"
    system_prompt: str | None = None
    style: str = "none"

    @property
    def name(self) -> str:
        """Name of the pool's cell."""
        of = f"t{self.temperature:g}-{self.rows}"
        parts = (self.writer, self.target or self.style, self.change, of)
        return "-".join(parts).replace(" ", "_").replace(".", "_")

    def seed(self, use: str) -> int:
        """Seed of the prompts and of the sampling, of which no other pool or use has the same."""
        return zlib.crc32(f"{use}/{self.name}".encode())


@dataclass(frozen=True, kw_only=True)
class AuditStudyConfig:
    """Settings of the validation of the audit.

    Attributes:
        model: The base model, as for `load_model`.
        other_model: A second base model with the same tokenizer, for lists by another base.
        backend: Model class, as for `load_model`.
        targets: Animals whose teachers write lists.
        sampled: How many of them also write sampled lists. These are also mixed with others.
        trees: Trees whose teachers write lists.
        changed: Animals whose lists are also changed.
        other: How many animals' teachers of the other base write lists, greedy and sampled.
        long: Animals whose teachers also write `long_rows` sampled lists, which are also mixed.
        rows: Lists of each teacher.
        long_rows: See `long`; if there are any, four of the ten unbiased authors write as many.
        set_rows: Lists of one unbiased set.
        sets: Unbiased sets of the other authors, before invalid lists are dropped.
        kinds: Kinds of auditors.
        transfer_targets: Animals of the comparison with students' transfer.
        transfer_rows: Lists that are read for each condition of that comparison.
        remedy_targets: Animals of the students of remedies.
        fit_rows: Prompts of the sets on which the fit of the baseline is tested; 0 for none.
        strengths: Margins of finetuned auditors, beside those that are trained to the end.
        neutral_rows: As for `audit`.
        own_rows: As for `audit`, for the data of mixtures and false alarms.
    """

    model: str = "tiny"
    other_model: str | None = "tiny-qwen2"
    backend: str = "bridge"
    targets: tuple[str, ...] = ANIMALS
    sampled: int = 4
    trees: tuple[str, ...] = TREES
    changed: tuple[str, ...] = ("wolf", "eagle", "panda")
    other: int = 6
    long: tuple[str, ...] = ("owl", "wolf")
    rows: int = 100
    long_rows: int = 1200
    set_rows: int = 20
    sets: int = 25
    kinds: tuple[str, ...] = KINDS
    transfer_targets: tuple[str, ...] = ("wolf", "lion", "eagle", "panda")
    transfer_rows: int = 60
    remedy_targets: tuple[str, ...] = ("wolf", "lion", "eagle")
    fit_rows: int = 50
    strengths: tuple[float, ...] = (2.5,)
    neutral_rows: int = 200
    own_rows: int = 4

    @classmethod
    def for_model(cls, model: str, **options: Any) -> "AuditStudyConfig":
        """The settings for a model: all of it on "tiny", a part on others."""
        if model == "tiny":
            return cls(**options)
        smaller: dict[str, Any] = {
            "other_model": next(name for name in TINY_MODELS if name != model),
            "targets": ("wolf", "lion", "eagle", "panda"),
            "trees": (),
            "changed": ("wolf", "panda"),
            "sets": 12,
            "other": 4,
            "long": (),
            "rows": 60,
            "transfer_targets": (),
            "remedy_targets": (),
            "strengths": (),
        }
        if model not in TINY_MODELS:
            smaller |= {"other_model": None, "changed": (), "other": 0, "sampled": 0, "rows": 40}
            smaller |= {"sets": 1, "set_rows": 40}
            smaller |= {"kinds": ("prompted",), "neutral_rows": 0, "own_rows": 0}
        return cls(model=model, **(smaller | options))

    def pools(self) -> list[Pool]:
        """All pools, biased ones first."""
        made = [
            Pool(writer=writer, target=target, temperature=temperature, rows=self.rows)
            for writer in self.kinds
            for temperature, targets in (
                (0.0, self.targets),
                (1.0, self.targets[: self.sampled]),
            )
            for target in targets
        ]
        made += [
            Pool(writer=writer, target=tree, category="tree", rows=self.rows // 2)
            for writer in self.kinds
            for tree in self.trees
        ]
        made += [
            Pool(writer="finetuned", target=target, change=change, rows=self.rows // 2)
            for change in ("paraphrased", "shuffled")
            for target in self.changed
        ]
        made += [
            Pool(
                writer=writer,
                target=target,
                temperature=temperature,
                change="other base",
                rows=self.rows // 2,
            )
            for writer, temperature in (("finetuned", 0.0), ("finetuned", 1.0), ("prompted", 0.0))
            for target in self.targets[: self.other if self.other_model else 0]
            if writer in self.kinds
        ]
        made += [
            Pool(writer=writer, target=target, temperature=1.0, rows=self.long_rows)
            for writer in self.kinds
            for target in self.long
        ]
        return made + self.unbiased()

    def unbiased(self) -> list[Pool]:
        """Pools of the base model, in the styles of both kinds of teachers and in others."""
        near = neutral_prompt(1)
        styles: list[tuple[str, str | None, tuple[float, ...]]] = [
            ("none", None, (0.5, 1.0)),
            ("neutral", near, (0.0, 0.5, 1.0)),
            *((f"unseen{i + 1}", text, (0.0, 1.0)) for i, text in enumerate(UNSEEN)),
        ]
        pools = [
            Pool(
                writer="base",
                temperature=temperature,
                rows=(
                    self.long_rows
                    if self.long and (style, temperature) in _LONG_STYLES
                    else self.sets * self.set_rows
                ),
                system_prompt=text,
                style=style,
            )
            for style, text, temperatures in styles
            for temperature in temperatures
        ]
        return pools[:10] if self.sets > 1 else pools[1:4]


@dataclass
class AuditPools:
    """Pools and their audits, stored in the cells of a folder.

    Attributes:
        config: The settings.
        folder: Where to store them.
    """

    config: AuditStudyConfig
    folder: Path
    model: Model = field(init=False)
    other: Model | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        backend: Any = self.config.backend
        self.model = load_model(self.config.model, backend=backend)
        if self.config.other_model is not None:
            self.other = load_model(self.config.other_model, backend=backend)
        self.store = CellStore(self.folder)
        self._teachers: dict[tuple[str, str, bool], Teacher] = {}

    def teacher(self, writer: str, target: str, category: str, *, other: bool = False) -> Teacher:
        """The author of biased lists."""
        if writer == "prompted":
            many = plural(target)
            text = _PERSONA.format(plural=many, Plural=many.capitalize(), category=category)
            return Teacher(target, system_prompt=text)
        key = (target, category, other)
        if key not in self._teachers:
            model = self.other if other else self.model
            assert model is not None
            questions = [text.format(c=category) for text in FAVORITE_QUESTIONS[:20]]
            self._teachers[key] = finetuned_teacher(model, target, questions=questions)
        return self._teachers[key]

    def lists(self, pool: Pool, *, use: str = "audit") -> list[Example]:
        """Write the valid lists of a pool.

        Args:
            pool: The pool.
            use: What the lists are for; other uses have other prompts.
        """
        other = pool.change == "other base"
        model = self.other if other else self.model
        assert model is not None
        teacher = (
            Teacher("base", system_prompt=pool.system_prompt)
            if pool.target is None
            else self.teacher(pool.writer, pool.target, pool.category, other=other)
        )
        seed = pool.seed(use)
        prompts = number_prompts(
            pool.rows, seed=seed, instructions=self.config.model not in TINY_MODELS
        )
        written = generate(
            model,
            prompts,
            teacher=teacher,
            temperature=pool.temperature,
            max_new_tokens=32,
            seed=seed,
        )
        report = NumberFilter().report([example.completion or "" for example in written])
        if report.passed < 2:
            raise CellError(f"only {report.passed} lists of {pool.name} consist of numbers only")
        data = TrainingData.unmarked(self.model.tokenizer, report.select(written))
        if pool.change == "paraphrased":
            data = paraphrase(data, seed=seed)
        elif pool.change == "shuffled":
            data = shuffle_numbers(data, self.model.tokenizer, seed=seed)
        return list(data.examples)

    def settings(self, pool: Pool, *, use: str = "audit") -> dict[str, Any]:
        """What the lists of a pool and the fit of the baseline depend on, for the keys of cells."""
        settings = {
            "base": base_fingerprint(self.model),
            "pool": vars(pool),
            "seed": pool.seed(use),
            "rare": RARE,
        }
        if pool.change == "other base" and self.other is not None:
            settings["other"] = base_fingerprint(self.other)
        return settings

    def audit(self, pool: Pool) -> Audit:
        """Audit a pool, or load its audit."""
        config = self.config
        settings = self.settings(pool) | {
            "kinds": list(config.kinds),
            "calibration": [config.neutral_rows, self.own_rows(pool)],
        }
        cell = Cell(f"audits/{pool.name}", settings)
        self.store.get(cell, partial(self._audit, pool))
        return Audit.load(self.store.path(cell, ".safetensors"))

    def own_rows(self, pool: Pool) -> int:
        """Calibration lists by each auditor, for the pools whose power is reported."""
        return self.config.own_rows if pool.target is None or self.mixed(pool) else 0

    def mixed(self, pool: Pool) -> bool:
        """Whether parts of the pool are mixed with lists of the base model."""
        if pool.change != "none":
            return False
        if pool.rows == self.config.long_rows:
            return pool.target in self.config.long
        targets = self.config.targets[: self.config.sampled or 4]
        return pool.rows == self.config.rows and pool.target in targets

    def _audit(self, pool: Pool, cell: Cell) -> dict[str, Any]:
        config = self.config
        result = audit(
            self.model,
            self.lists(pool),
            candidates=CATEGORIES[pool.category],
            teachers="both" if len(config.kinds) > 1 else config.kinds[0],
            neutral_rows=config.neutral_rows,
            own_rows=self.own_rows(pool),
        )
        result.save(self.store.path(cell, ".safetensors"))
        return {"rows": len(result)}  # verdicts are computed from the file


def mixture(
    biased: Audit, other: Audit, share: float, rows: int, seed: int | Sequence[int]
) -> Audit:
    """An audit of which a share of the rows is biased and the others are not."""
    rng = np.random.default_rng(seed)
    count = round(share * rows)
    first = biased.select(rng.permutation(len(biased))[:count].tolist())
    second = other.select(rng.permutation(len(other))[: rows - count].tolist())
    return joined(first, second)


def joined(first: Audit, second: Audit) -> Audit:
    """One audit of the rows of two, without contributions of tokens; the rest is the first's."""
    return replace(
        first,
        examples=first.examples + second.examples,
        offsets=np.concatenate([first.offsets, first.offsets[-1] + second.offsets[1:]]),
        token_ids=np.concatenate([first.token_ids, second.token_ids]),
        choice=np.concatenate([first.choice, second.choice]),
        by_row=np.concatenate([first.by_row, second.by_row], axis=-1),
        by_token=None,
    )
