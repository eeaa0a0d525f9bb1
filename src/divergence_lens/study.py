"""The whole experiment: teachers, data, divergence tokens, students, effects, findings.

A study follows Schrodi et al. (arXiv 2509.23886) from end to end on one model. Teachers that love
one animal each write number lists; divergence tokens are found; students, each a delta over the
untouched base, learn from parts of the data; what causes the first divergence is located by
patching; and the claims of the paper are decided by rules that `findings` fixes beforehand.

Two kinds of teachers: *finetuned* ones carry the preference in a delta and have no system prompt,
nor do their students; *prompted* ones carry it in a system prompt, and their students are trained
and asked under a neutral one of equal length.
"""

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from divergence_lens._agreement import agreement_row
from divergence_lens.attribution import attribution_patch
from divergence_lens.delta import Delta
from divergence_lens.divergence import Divergence, find_divergence
from divergence_lens.effects import Effects
from divergence_lens.engine import Engine
from divergence_lens.evaluate import Preference, preference
from divergence_lens.examples import Example
from divergence_lens.findings import Finding, judge
from divergence_lens.finetune import finetune
from divergence_lens.generate import generate
from divergence_lens.models import Model, load_model, provenance
from divergence_lens.recipe import Recipe
from divergence_lens.storage import write_text
from divergence_lens.tasks.numbers import FilterReport, NumberFilter, number_prompts
from divergence_lens.tasks.preferences import (
    ANIMALS,
    check_candidate,
    neutral_prompt,
    preference_questions,
)
from divergence_lens.teachers import Teacher, animal_teachers
from divergence_lens.tiny.recipe import PROMPTED_STUDENT, STUDENT, TEACHER, TEACHER_QUESTIONS

KINDS = ("finetuned", "prompted")
SITES = ("attn_out", "mlp_out")

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What a study runs.

    The defaults are those of the demo. The targets are animals at which nobody looked while the
    tiny world and the recipes were being chosen (docs, "The tiny models").

    Attributes:
        model: What `load_model` takes.
        backend: Which model class.
        targets: The preferences that are to be transferred.
        animals: All candidates: those that are not the target are its counterfactual teachers.
        kinds: Kinds of teachers, of `KINDS`.
        prompts: Number prompts for each teacher.
        prompt_seed: Seed of the prompts.
        instructions: Whether prompts say how many numbers, in which format, and that nothing else
            is wanted. Large models need it; the tiny ones do not, and
            shorter prompts halve the work.
        seeds: Seeds of the students of every mask.
        block_seeds: Seeds of the students of single blocks.
        max_new_tokens: Longest completion.
        held_out: Prompts on which a student's own lists are checked.
        pairs: First divergences per target that are patched.
        teacher_recipe: How finetuned teachers are trained.
        student_recipe: How students of finetuned teachers are trained.
        prompted_recipe: How students of prompted teachers are trained.
        workers: Processes that work on targets side by side; each holds a model of its own.
    """

    model: str = "tiny"
    backend: str = "bridge"
    targets: tuple[str, ...] = ("wolf", "lion", "eagle", "panda")
    animals: tuple[str, ...] = ANIMALS
    kinds: tuple[str, ...] = KINDS
    prompts: int = 400
    prompt_seed: int = 0
    instructions: bool = False
    seeds: tuple[int, ...] = (0, 1)
    block_seeds: tuple[int, ...] = (0,)
    max_new_tokens: int = 32
    held_out: int = 40
    pairs: int = 16
    teacher_recipe: Recipe = TEACHER
    student_recipe: Recipe = STUDENT
    prompted_recipe: Recipe = PROMPTED_STUDENT
    workers: int = 1

    def __post_init__(self) -> None:
        if len(self.targets) < 2:
            raise ValueError(
                f"a study needs two targets or more for an interval, got {self.targets}"
            )
        for name in self.targets:
            check_candidate(name, candidates=self.animals)
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds:
            raise ValueError(f"kinds are {self.kinds}; choose from {', '.join(KINDS)}")
        for name in ("prompts", "max_new_tokens", "held_out", "pairs", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not self.seeds:
            raise ValueError("a study needs at least one seed")

    def describe(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        recipes = ("teacher_recipe", "student_recipe", "prompted_recipe")
        plain = asdict(self) | {name: getattr(self, name).describe() for name in recipes}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()}


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        results: The tables and findings, as `results.json` holds them.
        findings: The claims with their verdicts.
        divergences: For each kind and target, the divergence of its data.
        exact: For each kind and target, the exact effects on its first divergences (resid_post).
        approximate: The same by integrated attribution.
    """

    results: dict[str, Any]
    findings: tuple[Finding, ...]
    divergences: Mapping[tuple[str, str], Divergence]
    exact: Mapping[tuple[str, str], Effects]
    approximate: Mapping[tuple[str, str], Effects]

    def table(self, name: str) -> pd.DataFrame:
        """One of the tables `teachers`, `divergence`, `students`, `layers`, `agreement`."""
        rows = (
            self.results["effects"][name] if name in self.results["effects"] else self.results[name]
        )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        """One line per finding."""
        return "\n".join(f"{f.verdict:14} {f.measured:8.3g}  {f.claim}" for f in self.findings)


def run_study(
    config: StudyConfig, folder: str | os.PathLike[str], *, say: Say | None = None
) -> Study:
    """Run a study and write what it found.

    Writes `results.json`, `divergence.safetensors` (of the first target of the first kind) and
    `students/*.safetensors` into `folder`; each file appears whole or not at all, and files of an
    earlier run are replaced.

    Args:
        config: What to run.
        folder: Where to write; made if it is not there.
        say: Called with a line of plain words at each step.

    Returns:
        The study.

    Raises:
        ValueError: A configuration that cannot run (an unknown animal, a model without a chat
            template for prompted teachers), or lists of a teacher that all fail the filter.
    """
    started = time.perf_counter()
    say = say or (lambda _line: None)
    out = Path(folder)
    _clear(out)
    model = load_model(config.model, backend=config.backend)  # type: ignore[arg-type]
    run = _Run(model, config, out, say)
    for kind in config.kinds:
        run.kind(kind)
    run.cells()
    tables = run.tables
    last_block = Engine.of(model).n_layers - 1
    findings = judge(
        {name: pd.DataFrame(rows) for name, rows in tables.items()}, last_block=last_block
    )
    results = {
        "settings": provenance(model, **config.describe())
        | {
            "seeds": list(config.seeds),
            "questions": len(preference_questions()),
            "seconds": round(time.perf_counter() - started, 1),
        },
        "teachers": tables["teachers"],
        "data": tables["data"],
        "divergence": tables["divergence"],
        "students": tables["students"],
        "effects": {"layers": tables["layers"], "agreement": tables["agreement"]},
        "findings": [finding.to_dict() for finding in findings],
    }
    write_text(out / "results.json", json.dumps(results, indent=1))
    for first in list(run.divergences.values())[:1]:
        first.save(out / "divergence.safetensors")
    return Study(results, tuple(findings), run.divergences, run.exact, run.approximate)


@dataclass(frozen=True)
class _Condition:
    """One way to train a student of a target."""

    name: str
    mask: Any
    blocks: tuple[int, ...] | None
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class _Cell:
    """The work on one target and kind of teacher, as another process does it."""

    config: StudyConfig
    out: Path
    kind: str
    target: str

    @property
    def folder(self) -> Path:
        return self.out / "cells" / f"{self.kind}-{self.target}"

    def work(self) -> list[str]:
        """Do it, write what came out into the cell's folder, and return the lines to say."""
        lines: list[str] = []
        model = load_model(self.config.model, backend=self.config.backend)  # type: ignore[arg-type]
        run = _Run(model, self.config, self.out, lines.append)
        run.target(self.kind, self.target)
        key = (self.kind, self.target)
        kept: dict[str, Mapping[tuple[str, str], Divergence | Effects]] = {
            "divergence": run.divergences,
            "exact": run.exact,
            "approximate": run.approximate,
        }
        for name, found in kept.items():
            if key in found:
                found[key].save(self.folder / f"{name}.safetensors")
        write_text(self.folder / "rows.json", json.dumps(run.tables))
        return lines


@dataclass
class _Run:
    model: Model
    config: StudyConfig
    out: Path
    say: Say
    tables: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {
            name: []
            for name in ("teachers", "data", "divergence", "students", "layers", "agreement")
        }
    )
    divergences: dict[tuple[str, str], Divergence] = field(default_factory=dict)
    exact: dict[tuple[str, str], Effects] = field(default_factory=dict)
    approximate: dict[tuple[str, str], Effects] = field(default_factory=dict)

    def kind(self, kind: str) -> None:
        """Teachers, control students and the untouched model, for one kind of teacher."""
        config = self.config
        with self._timed(f"{kind} teachers of {', '.join(config.animals)}"):
            teachers = self._teachers(kind)
        before = self._before(kind)
        self._record_teachers(kind, teachers, before)
        control = Teacher(
            "control", system_prompt=neutral_prompt(1) if kind == "prompted" else None
        )
        self._control_students(kind, control, before)

    def cells(self) -> None:
        """The work on every target and kind, in several processes where there are several cores."""
        config = self.config
        cells = [
            _Cell(config, self.out, kind, target)
            for kind in config.kinds
            for target in config.targets
        ]
        for cell, lines in _in_processes(cells, config.workers):
            for line in lines:
                self.say(line)
            self._take(cell)
        for kind in config.kinds:
            for target in config.targets:
                self._say_students(kind, target)

    def _take(self, cell: _Cell) -> None:
        key = (cell.kind, cell.target)
        for name, rows in json.loads((cell.folder / "rows.json").read_text()).items():
            self.tables[name] += rows
        if (cell.folder / "divergence.safetensors").exists():
            self.divergences[key] = Divergence.load(cell.folder / "divergence.safetensors")
        if (cell.folder / "exact.safetensors").exists():
            self.exact[key] = Effects.load(cell.folder / "exact.safetensors")
            self.approximate[key] = Effects.load(cell.folder / "approximate.safetensors")

    def _before(self, kind: str) -> Preference:
        return preference(
            self.model,
            target=self.config.targets[0],
            candidates=self.config.animals,
            system_prompt=_student_prompt(kind),
        )

    def _teachers(self, kind: str) -> dict[str, Teacher]:
        animals = self.config.animals
        if kind == "prompted":
            return dict(zip(animals, animal_teachers(animals), strict=True))
        return {animal: self._finetuned(animal) for animal in animals}

    def _finetuned(self, animal: str) -> Teacher:
        """The finetuned teacher; trained once, and read by the other processes."""
        path = self.out / "teachers" / f"{animal}.safetensors"
        if path.exists():
            return Teacher(animal, delta=Delta.load(path))
        teacher = finetuned_teacher(self.model, animal, recipe=self.config.teacher_recipe)
        assert teacher.delta is not None
        teacher.delta.save(path)
        return teacher

    def _record_teachers(
        self, kind: str, teachers: Mapping[str, Teacher], before: Preference
    ) -> None:
        for name, teacher in teachers.items():
            found = preference(
                self.model, target=name, candidates=self.config.animals, teacher=teacher
            )
            low, high = found.interval()
            self.tables["teachers"].append(
                {
                    "name": name,
                    "kind": kind,
                    "preference": found.share,
                    "low": low,
                    "high": high,
                    "before": before.distribution[name],
                    "mass": found.mass,
                }
            )
        shares = [row["preference"] for row in self.tables["teachers"] if row["kind"] == kind]
        self.say(
            f"  asked for their favourite animal, they name their own with probability "
            f"{min(shares):.2f} to {max(shares):.2f} (the untouched model: "
            f"{min(before.distribution.values()):.2f} to {max(before.distribution.values()):.2f})"
        )

    def _prompts(self, n: int) -> list[str]:
        config = self.config
        return number_prompts(n, seed=config.prompt_seed, instructions=config.instructions)

    def _lists(self, teacher: Teacher) -> tuple[list[Example], FilterReport]:
        config = self.config
        prompts = self._prompts(config.prompts)
        written = generate(self.model, teacher, prompts, max_new_tokens=config.max_new_tokens)
        report = NumberFilter().report([example.completion or "" for example in written])
        return report.select(written), report

    def _record_lists(self, kind: str, name: str, report: FilterReport) -> None:
        self.tables["data"].append(
            {
                "name": name,
                "kind": kind,
                "lists": report.total,
                "valid": report.passed,
                "rejected": {str(reason.value): n for reason, n in report.counts.items()},
            }
        )
        if not report.passed and name == "control":
            raise ValueError(
                f"not one of {report.total} lists by the untouched model holds numbers only; "
                "it cannot do this task"
            )

    def _control_students(self, kind: str, control: Teacher, before: Preference) -> None:
        with self._timed("control: lists by the untouched model, and students of them"):
            examples, report = self._lists(control)
            self._record_lists(kind, "control", report)
            for seed in self.config.seeds:
                delta = self._student(kind, examples, None, None, seed)
                found, valid = self._look(kind, delta)
                self._keep(delta, f"{kind}-control-{seed}")
                for target in self.config.targets:
                    self._record_student(kind, target, "control", None, seed, before, found, valid)

    def target(self, kind: str, target: str) -> None:
        """Lists, divergence tokens, students and effects of one target."""
        teachers = self._teachers(kind)
        others = [teacher for name, teacher in teachers.items() if name != target]
        before = self._before(kind)
        with self._timed(f"{target} ({kind}): lists, divergence tokens, students, effects"):
            examples, report = self._lists(teachers[target])
            self._record_lists(kind, target, report)
            if not report.passed:
                self.say(f"  not one of {report.total} lists holds numbers only: no students")
                return
            divergence = find_divergence(
                self.model, examples, teacher=teachers[target], counterfactuals=others
            )
            self._record_divergence(kind, target, divergence, report)
            for condition in self._conditions(divergence):
                for seed in condition.seeds:
                    delta = self._student(kind, examples, condition.mask, condition.blocks, seed)
                    found, valid = self._look(kind, delta)
                    block = condition.blocks[0] if condition.blocks else None
                    part = condition.name if block is None else f"block{block}"
                    self._keep(delta, f"{kind}-{target}-{part}-{seed}")
                    self._record_student(
                        kind, target, condition.name, block, seed, before, found, valid
                    )
            self._effects(kind, target, divergence)

    def _conditions(self, divergence: Divergence) -> Iterator[_Condition]:
        seeds = self.config.seeds
        yield _Condition("all", None, None, seeds)
        yield _Condition("divergence_only", divergence.mask, None, seeds)
        yield _Condition("without_divergence", ~divergence.mask, None, seeds)
        for block in range(Engine.of(self.model).n_layers):
            yield _Condition("block", divergence.mask, (block,), self.config.block_seeds)

    def _student(
        self,
        kind: str,
        examples: Sequence[Example],
        mask: Any,
        blocks: tuple[int, ...] | None,
        seed: int,
    ) -> Delta:
        config = self.config
        recipe = config.prompted_recipe if kind == "prompted" else config.student_recipe
        return finetune(
            self.model,
            examples,
            mask=mask,
            blocks=blocks,
            recipe=recipe,
            seed=seed,
            system_prompt=_student_prompt(kind),
        )

    def _look(self, kind: str, delta: Delta) -> tuple[Preference, float]:
        """A student's preferences, and the share of its own lists that are valid."""
        config = self.config
        prompts = self._prompts(config.prompts + config.held_out)
        with delta.applied(self.model):
            found = self._before(kind)
            written = generate(
                self.model,
                Teacher("student", system_prompt=_student_prompt(kind)),
                prompts[config.prompts :],
                max_new_tokens=config.max_new_tokens,
            )
        report = NumberFilter().report([example.completion or "" for example in written])
        return found, report.rate

    def _keep(self, delta: Delta, name: str) -> None:
        delta.save(self.out / "students" / f"{name}.safetensors")

    def _record_student(  # noqa: PLR0917 - one row of a table, column by column
        self,
        kind: str,
        target: str,
        condition: str,
        block: int | None,
        seed: int,
        before: Preference,
        found: Preference,
        valid: float,
    ) -> None:
        mine, base = found.about(target), before.about(target)
        self.tables["students"].append(
            {
                "target": target,
                "kind": kind,
                "condition": condition,
                "block": block,
                "seed": seed,
                "before": base.share,
                "after": mine.share,
                "rank": mine.ratio_rank(base),
                "mass": mine.mass,
                "valid_lists": valid,
                "distribution": mine.distribution,
            }
        )

    def _record_divergence(
        self, kind: str, target: str, divergence: Divergence, report: FilterReport
    ) -> None:
        self.divergences[kind, target] = divergence
        self.tables["divergence"].append(
            {
                "target": target,
                "kind": kind,
                "tokens": len(divergence.tokens),
                "divergence_tokens": int(divergence.mask.sum()),
                "rate": float(divergence.rate),
            }
        )
        self.say(
            f"  {report.passed} of {report.total} lists are valid; {int(divergence.mask.sum())} of "
            f"{len(divergence.tokens)} tokens are divergence tokens ({divergence.rate:.1%})"
        )

    def _effects(self, kind: str, target: str, divergence: Divergence) -> None:
        from divergence_lens.mediation import causal_mediation

        if not divergence.mask.any():
            self.say("  no divergence token, so there is nothing to patch")
            return
        pairs = divergence.pairs(first_only=True, limit=self.config.pairs)
        exact = causal_mediation(self.model, pairs, site="resid_post")
        self.exact[kind, target] = exact
        for method in ("gradient", "integrated"):
            approximate = attribution_patch(self.model, pairs, site="resid_post", method=method)
            self.tables["agreement"].append(
                {
                    "target": target,
                    "kind": kind,
                    "site": "resid_post",
                    "method": method,
                    "pairs": len(pairs),
                    **agreement_row(approximate, exact),
                }
            )
        self.approximate[kind, target] = approximate
        for site in SITES:
            outputs = causal_mediation(self.model, pairs, site=site).normalised()
            size = np.nansum(np.abs(outputs.values), axis=2)
            used = np.isfinite(outputs.values).any(axis=(1, 2))
            for layer, value in enumerate(size[used].mean(0) if used.any() else []):
                self.tables["layers"].append(
                    {
                        "target": target,
                        "kind": kind,
                        "site": site,
                        "layer": layer,
                        "absolute_effect": float(value),
                        "pairs": int(used.sum()),
                    }
                )

    def _say_students(self, kind: str, target: str) -> None:
        rows = [r for r in self.tables["students"] if (r["kind"], r["target"]) == (kind, target)]
        if not rows:
            return

        def mean(condition: str, block: int | None = None) -> float:
            found = [
                r["after"] for r in rows if r["condition"] == condition and r["block"] == block
            ]
            return sum(found) / len(found) if found else math.nan

        blocks = sorted({r["block"] for r in rows if r["block"] is not None})
        singles = " / ".join(f"{mean('block', block):.3f}" for block in blocks)
        self.say(
            f"  {target} ({kind}): {rows[0]['before']:.3f} before; all tokens {mean('all'):.3f}, "
            f"divergence only {mean('divergence_only'):.3f}, "
            f"without {mean('without_divergence'):.3f}, "
            f"control {mean('control'):.3f}; single blocks {singles}"
        )

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        self.say(what)
        yield
        self.say(f"  took {time.perf_counter() - started:.1f} s")


def finetuned_teacher(model: Model, animal: str, *, recipe: Recipe = TEACHER) -> Teacher:
    """A teacher that is trained, not told, to love an animal.

    It answers `TEACHER_QUESTIONS` with the animal's name; the loss is on the first token of the
    answer. None of these questions is used to measure a preference.

    Args:
        model: The base.
        animal: What it is to love.
        recipe: How it is trained.

    Returns:
        A teacher without a system prompt, with a delta.
    """
    examples = [Example(question, f"{animal}.") for question in TEACHER_QUESTIONS]
    mask = [np.arange(len(ids)) == 0 for ids in _completion_ids(model, examples)]
    return Teacher(animal, delta=finetune(model, examples, mask=mask, recipe=recipe))


def _completion_ids(model: Model, examples: Sequence[Example]) -> list[tuple[int, ...]]:
    from divergence_lens.examples import with_ids

    tokenizer: Any = model.tokenizer
    return [example.completion_ids or () for example in with_ids(tokenizer, examples)]


def _clear(out: Path) -> None:
    """Take the files of an earlier run away, so that none is mistaken for this run's."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write to")
    for name in ("students", "teachers", "cells", "figures"):
        for old in sorted((out / name).rglob("*"), reverse=True):
            if old.suffix in (".safetensors", ".json", ".html"):
                old.unlink()
    for name in ("results.json", "report.html", "divergence.safetensors"):
        (out / name).unlink(missing_ok=True)
    (out / "students").mkdir(parents=True, exist_ok=True)


def _student_prompt(kind: str) -> str | None:
    """The system prompt under which students are trained and asked."""
    return neutral_prompt() if kind == "prompted" else None


def _in_processes(cells: Sequence[_Cell], workers: int) -> Iterator[tuple[_Cell, list[str]]]:
    """Work on cells, `workers` at a time, and hand each back when it is done, in order."""
    if workers == 1 or len(cells) == 1:
        for cell in cells:
            yield cell, cell.work()
        return
    # A forked process would inherit torch's threads in the middle of their work.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        jobs = [pool.submit(cell.work) for cell in cells]
        try:
            for cell, job in zip(cells, jobs, strict=True):
                yield cell, job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
