"""The whole experiment: teachers, data, divergence tokens, students, effects, findings.

A study follows Schrodi et al. (arXiv 2509.23886) from end to end on one model. Teachers that love
one animal each write number lists; divergence tokens are found; students, each a delta over the
untouched base, learn under one condition each (see `conditions`); what causes the first divergence
is located by patching; and the claims of the paper are decided by rules that `findings` fixes
beforehand.

Two kinds of teachers: *finetuned* ones carry the preference in a delta and have no system prompt,
nor do their students; *prompted* ones carry it in a system prompt, and their students are trained
and asked under a neutral one of equal length.

Everything is a cell: computed once, kept in a file of its own, and read the next time. A study that
is stopped goes on where it was, and one with another seed or condition computes what is new.
"""

import csv
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from divergence_lens._utils.interrupts import discard_partial
from divergence_lens._utils.storage import write_text
from divergence_lens._utils.tables import preview
from divergence_lens.data import preference_questions
from divergence_lens.deltas import Delta
from divergence_lens.divergence import Divergence
from divergence_lens.engine import get_engine
from divergence_lens.patching import Effects
from divergence_lens.provenance import run_metadata
from divergence_lens.study.computations import Bench, Task, finetuned_teacher
from divergence_lens.study.conditions import Condition
from divergence_lens.study.config import StudyConfig, lora_kinds
from divergence_lens.study.findings import Finding, judge
from divergence_lens.study.workers import Say, work

__all__ = ["Study", "StudyConfig", "finetuned_teacher", "run_study"]

_MARK = ".divergence-lens-study"
TABLES = ("teachers", "data", "divergence", "students", "layers", "agreement", "mechanism")


@dataclass(frozen=True)
class Study:
    """What a study found.

    Attributes:
        results: The tables and findings, as `results.json` holds them.
        findings: The claims with their verdicts.
        divergences: For each kind and target, the divergence of its data.
        exact: For each kind and target, the exact effects on its first divergences (resid_post).
        approximate: The same by integrated attribution.
        files: For each student (kind, target, condition, seed), where its delta is kept; the
            target of a student that all targets share is "any".
    """

    results: dict[str, Any]
    findings: tuple[Finding, ...]
    divergences: Mapping[tuple[str, str], Divergence]
    exact: Mapping[tuple[str, str], Effects]
    approximate: Mapping[tuple[str, str], Effects]
    files: Mapping[tuple[str, str, str, int], Path]

    def table(self, name: str) -> pd.DataFrame:
        """One of the tables: `teachers`, `data`, `divergence`, `students`, `layers`, `agreement`.

        A study with `mechanism` has a table of that name, too.
        """
        rows = (
            self.results["effects"][name] if name in self.results["effects"] else self.results[name]
        )
        return pd.DataFrame(rows)

    def student(self, kind: str, target: str, condition: str, seed: int = 0) -> Delta:
        """A student that was kept.

        Raises:
            KeyError: There is none of that name, or the study keeps no students.
        """
        path = self.files.get((kind, target, condition, seed))
        if path is None or not path.exists():
            raise KeyError(
                f"no student of {condition!r} (kind {kind!r}, target {target!r}, seed {seed}) was "
                "kept; a student of a control has the target 'any'"
            )
        return Delta.load(path)

    @property
    def failures(self) -> list[dict[str, str]]:
        """The cells that could not be computed: `cell` and `error` of each."""
        failed: list[dict[str, str]] = self.results["failures"]
        return failed

    def __repr__(self) -> str:
        """How many claims came out how, of how many students."""
        counts = Counter(finding.verdict for finding in self.findings)
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        failed = f", {len(self.failures)} cells failed" if self.failures else ""
        students = len(self.results["students"])
        claims = f"{len(self.findings)} claims: {verdicts}"
        return f"Study({claims}; {students:,} rows of students{failed})"

    def _repr_html_(self) -> str:
        columns = ("verdict", "measured", "interval", "claim")
        rows = [{name: getattr(finding, name) for name in columns} for finding in self.findings]
        return preview(self, pd.DataFrame(rows, columns=columns), rows=len(rows))


@discard_partial()
def run_study(
    config: StudyConfig,
    folder: str | os.PathLike[str] = "runs/study",
    *,
    resume: bool = True,
    say: Say | None = None,
) -> Study:
    """Run a study and write what it found.

    Writes `results.json`, `study.csv`, `study.parquet` (one row per student),
    `divergence.safetensors` (of the first target of the first kind) and
    `students/<kind>-<target>-<condition>-<seed>.safetensors` into `folder`, and each cell into
    `folder/cells`; each file appears whole or not at all.

    A cell that is there already, with the very settings that are asked for now, is read and not
    computed again. Several calls, on one folder at once, share the work. A cell that fails is
    listed in `Study.failures` and tried again by the next call. Cells know their settings, not the
    code that made them: after a change of the code take a new folder, or `resume=False`.

    Args:
        config: What to run. More than one worker means processes that import the main module anew:
            a script needs `if __name__ == "__main__":` around its call.
        folder: Where to write; made if it is not there.
        resume: Whether to use cells of earlier runs; otherwise they are deleted first.
        say: Called with a line of plain words at each step.

    Returns:
        The study.

    Raises:
        ValueError: A configuration that cannot run, or a folder with files that no study wrote,
            before anything is run or written.
        RuntimeError: Every process died, or not one student could be trained.
    """
    started = time.perf_counter()
    say = say or (lambda _line: None)
    out = Path(folder)
    _check_folder(out)
    bench = Bench(config, out)
    try:
        config.check(bench.model, bench.other)
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARK).touch()
        _clear(out, everything=not resume)
        there_already = sum(1 for _ in bench.store.folder.rglob("*.json"))
        groups = bench.tasks()
        bench.store.forget_failures()
        work(bench, groups, out, say)
        took = {"cells_before": there_already, "seconds": time.perf_counter() - started}
        study = _gathered(bench, groups, took)
    finally:
        bench.store.close()
    _write(study, out)
    return study


# -- tables -------------------------------------------------------------------------------------


def _gathered(bench: Bench, groups: Sequence[Sequence[Task]], took: Mapping[str, float]) -> Study:
    """Everything that the cells hold, in the order of the configuration.

    Args:
        bench: With the cells.
        groups: The tasks.
        took: How many cells, of any settings, were there when the call began, and its duration.
    """
    config, store = bench.config, bench.store
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    failures: dict[str, str] = {}
    effects: dict[tuple[str, str], tuple[Effects, Effects]] = {}
    files: dict[tuple[str, str, str, int], Path] = {}
    for group in groups:
        for task in group:
            result = store.read(task.cell)
            if result is None:
                failure = store.failure(task.cell) or {"error": "not computed"}
                failures[task.cell.name] = failure["error"]
                continue
            if task.condition is not None:
                tables["students"] += _student_rows(task, task.condition, result, config.targets)
                key = (task.kind, task.target or "any", task.condition.name, task.seed)
                files[key] = store.path(task.cell, ".safetensors")
            elif task.target is None:
                tables["teachers"].append(result)
            elif "rows" in result:
                tables["mechanism"] += result["rows"]
            else:
                tables["layers"] += result["layers"]
                tables["agreement"] += result["agreement"]
                effects[task.kind, task.target] = bench.effects(task)
    divergences = _gather_data(bench, tables)
    if not tables["students"]:
        first = next(iter(failures.values()), "no condition")
        raise RuntimeError(f"not one student could be trained: {first}")
    last_block = get_engine(bench.model).n_layers - 1
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    described = config.describe(bench.model)
    findings = judge(frames, last_block=last_block, lora=lora_kinds(described))
    results = {
        "settings": run_metadata(bench.model, **described)
        | {
            "seeds": list(config.seeds),
            "questions": len(preference_questions()),
            "layers": last_block + 1,
            "cells_before": took["cells_before"],
            "seconds": round(took["seconds"], 1),
        },
        **{name: tables[name] for name in ("teachers", "data", "divergence", "students")},
        "effects": {name: tables[name] for name in ("layers", "agreement")},
        **({"mechanism": tables["mechanism"]} if config.mechanism else {}),
        "conditions": _described(groups),
        "findings": [finding.to_dict() for finding in findings],
        "failures": [{"cell": name, "error": error} for name, error in failures.items()],
    }
    return Study(
        results,
        tuple(findings),
        divergences,
        {key: exact for key, (exact, _) in effects.items()},
        {key: approximate for key, (_, approximate) in effects.items()},
        files,
    )


def _gather_data(
    bench: Bench, tables: dict[str, list[dict[str, Any]]]
) -> dict[tuple[str, str], Divergence]:
    """Fill the tables of lists and divergences, and return the divergences."""
    config, store = bench.config, bench.store
    divergences = {}
    for kind in config.kinds:
        for name in (None, *config.targets):
            source = "unbiased" if name is None else "greedy"
            data = store.read(bench.lists_cell(kind, name, source))
            tables["data"] += [] if data is None else [data]
        for target in config.targets:
            cell = bench.divergence_cell(kind, target)
            found = store.read(cell)
            if found is not None:
                tables["divergence"].append(found)
                divergences[kind, target] = Divergence.load(store.path(cell, ".safetensors"))
    return divergences


def _student_rows(
    task: Task, condition: Condition, result: Mapping[str, Any], targets: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for the target, or for each target where the student serves all."""
    single = bool(condition.label) and len(condition.layers or ()) == 1
    return [
        {
            "target": target,
            "kind": task.kind,
            "condition": condition.label or condition.name,
            "block": condition.layers[0] if single and condition.layers else None,
            "seed": task.seed,
            "before": result["before"][target],
            "after": result["after"][target],
            "rank": result["ranks"][target],
            "mass": result["mass"],
            "valid_lists": result["valid_lists"],
            "loss_before": result["loss_before"],
            "loss": result["loss"],
            "fit": result["fit"],
            "examples": result["examples"],
            "tokens": result["tokens"],
            "left": result["left"],
            "group": condition.group,
            "distribution": result["after"],
        }
        for target in (targets if task.target is None else [task.target])
    ]


def _described(groups: Sequence[Sequence[Task]]) -> list[dict[str, str]]:
    """The conditions that were run, with what each isolates."""
    found = {
        task.condition.name: task.condition
        for group in groups
        for task in group
        if task.condition is not None
    }
    return [{"name": c.name, "group": c.group, "isolates": c.isolates} for c in found.values()]


def _write(study: Study, out: Path) -> None:
    write_text(out / "results.json", json.dumps(study.results, indent=1))
    flat = [
        {k: v for k, v in row.items() if k != "distribution"}
        | {f"after_{name}": share for name, share in row["distribution"].items()}
        for row in study.results["students"]
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(out / "study.csv", text.getvalue())
    with _replacing(out / "study.parquet") as part:
        pd.DataFrame(flat).to_parquet(part, index=False)
    for first in list(study.divergences.values())[:1]:
        first.save(out / "divergence.safetensors")
    for key, kept in study.files.items():
        if kept.exists():
            with _replacing(out / "students" / f"{'-'.join(map(str, key))}.safetensors") as part:
                _link(kept, part)


def _link(kept: Path, name: Path) -> None:
    """Give a file a second name, or a copy where the file system has no such thing."""
    try:
        os.link(kept, name)
    except OSError:
        shutil.copyfile(kept, name)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write that takes its name once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds somebody's files: those of an earlier study are deleted."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write to")
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise ValueError(f"{out} holds files that no study wrote; give a new or an empty folder")


def _clear(out: Path, *, everything: bool) -> None:
    """Take away what an earlier run concluded, and its cells too if they are not to be used."""
    for name in ("results.json", "study.csv", "study.parquet", "study.md", "report.html"):
        (out / name).unlink(missing_ok=True)
    (out / "divergence.safetensors").unlink(missing_ok=True)
    for name in ("figures", "students", *(("cells",) if everything else ())):
        for old in sorted((out / name).rglob("*"), reverse=True):
            if old.suffix in (".safetensors", ".json", ".jsonl", ".html", ".failed", ".part"):
                old.unlink()
