"""Run the whole experiment: teachers, data, divergence tokens, students, effects, findings.

A study follows Schrodi et al. (arXiv 2509.23886) from end to end on one model:

1. Teachers that each love one animal write number lists.
2. The divergence tokens of these lists are computed.
3. Students, each a delta on the base model, are trained under one condition each (see
   `registry`).
4. Patching locates the causes of the first divergence.
5. The paper's claims are judged by the rules fixed in `claims` and `findings`.

There are two kinds of teachers. *Finetuned* teachers carry the preference in a delta; neither they
nor their students have a system prompt. *Prompted* teachers carry it in a system prompt; their
students are trained and evaluated under a neutral system prompt of equal length.

Each piece of work is a cell: computed once, stored in its own file, and read after that. A study
that was stopped resumes, and additional seeds or conditions compute only new cells.
"""

import csv
import io
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from divergence_lens._utils.interrupts import discard_partial
from divergence_lens._utils.storage import write_file, write_text
from divergence_lens.data import preference_questions
from divergence_lens.divergence import Divergence
from divergence_lens.engine import get_engine
from divergence_lens.patching import Effects
from divergence_lens.provenance import run_metadata
from divergence_lens.study.conditions import Condition
from divergence_lens.study.config import StudyConfig, lora_kinds
from divergence_lens.study.config_checks import check_models
from divergence_lens.study.findings import ALL_CLAIMS, judge
from divergence_lens.study.loading import StudentKey
from divergence_lens.study.paired_claims import PAIRED_CLAIMS
from divergence_lens.study.result import Study
from divergence_lens.study.rows import StudyTables
from divergence_lens.study.runner import CellRunner, Task
from divergence_lens.study.workers import Progress, compute_cells

_MARKER = ".divergence-lens-study"
TABLES = ("teachers", "data", "divergence", "students", "layers", "agreement", "mechanism")


@discard_partial()
def run_study(
    config: StudyConfig,
    folder: str | os.PathLike[str] = "runs/study",
    *,
    resume: bool = True,
    tables: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Study:
    """Run a study and write its results.

    Writes `results.json`, `study.csv`, `study.parquet` (one row per student),
    `divergence.safetensors` (of the first target of the first kind) and
    `students/<kind>-<target>-<condition>-<seed>.safetensors` into `folder`, and each cell into
    `folder/cells`; each file appears whole or not at all.

    A cell that was already computed with the same settings is read and not computed again. Several
    calls on one folder at the same time share the work. A cell that fails is listed in
    `Study.failures` and tried again by the next call. A cell's key covers its settings, not the
    code that computed it: after changing the code, use a new folder or `resume=False`.

    Args:
        config: What to run. Worker processes import the main module again, so with more than one
            worker a script needs `if __name__ == "__main__":` around its call.
        folder: Where to write. It is created if it does not exist.
        resume: Whether to use cells of earlier runs, and rows of `tables`; otherwise cells are
            deleted first, and rows replaced as they are computed again.
        tables: A folder for the tables of a paired study, such as one under version control. Rows
            with the same settings are not computed again, and the tables are written after every
            cell.
        progress: Called with one line of text at each step.

    Returns:
        The study.

    Raises:
        ValueError: The configuration cannot run, or the folder has files that no study wrote. This
            is raised before anything is run or written.
        RuntimeError: Every worker died, or no student could be trained.
    """
    started = time.perf_counter()
    progress = progress or (lambda _line: None)
    out = Path(folder)
    _check_folder(out)
    if tables is not None and config.paired is None:
        raise ValueError("tables are those of a paired study; leave them out, or set paired")
    runner = CellRunner(config, out)
    try:
        check_models(config, runner.model, runner.other)
        out.mkdir(parents=True, exist_ok=True)
        (out / _MARKER).touch()
        _clear(out, everything=not resume)
        cells_before = sum(1 for _ in runner.store.folder.rglob("*.json"))
        groups = runner.tasks()
        runner.store.forget_failures()
        table = None
        if tables is not None:
            table = StudyTables(Path(tables), runner, [task for group in groups for task in group])
            if resume:
                progress(f"{table.restore()} cells are read from {tables}")
            table.write()
        compute_cells(runner, groups, out, progress, None if table is None else table.write)
        timing = {"cells_before": cells_before, "seconds": time.perf_counter() - started}
        study = _gather(runner, groups, timing)
    finally:
        runner.store.close()
    _write(study, out)
    return study


# -- tables -------------------------------------------------------------------------------------


def _gather(
    runner: CellRunner, groups: Sequence[Sequence[Task]], timing: Mapping[str, float]
) -> Study:
    """Collect the results of all cells, in the order of the configuration.

    Args:
        runner: The runner of the cells.
        groups: The tasks.
        timing: Number of cells, of any settings, that existed before the call, and its duration.
    """
    config, store = runner.config, runner.store
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    failures: dict[str, str] = {}
    effects: dict[tuple[str, str], tuple[Effects, Effects]] = {}
    files: dict[StudentKey, Path] = {}
    for group in groups:
        for task in group:
            result = store.read(task.cell)
            if result is None:
                failure = store.failure(task.cell) or {"error": "not computed"}
                failures[task.cell.name] = failure["error"]
                continue
            if task.condition is not None:
                rows = _student_rows(task, task.condition, result, config.targets)
                if config.paired is not None:
                    rows = [row | {"twin": config.other_target(row["target"])} for row in rows]
                tables["students"] += rows
                key = (task.kind, task.target or "any", task.condition.name, task.seed)
                files[key] = store.path(task.cell, ".safetensors")
            elif task.target is None:
                tables["teachers"].append(result)
            elif "rows" in result:
                tables["mechanism"] += result["rows"]
            else:
                tables["layers"] += result["layers"]
                tables["agreement"] += result["agreement"]
                effects[task.kind, task.target] = runner.effects(task)
    divergences = _gather_data(runner, tables)
    if not tables["students"]:
        first = next(iter(failures.values()), "no condition")
        raise RuntimeError(f"no student could be trained: {first}")
    last_layer = get_engine(runner.model).n_layers - 1
    frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
    described = config.describe(runner.model)
    claims = ALL_CLAIMS if config.paired is None else PAIRED_CLAIMS
    findings = judge(
        frames,
        last_layer=last_layer,
        lora=lora_kinds(described),
        claims=claims,
        required=0 if config.paired is None else len(config.targets),
    )
    results = {
        "settings": run_metadata(runner.model, **described)
        | {
            "seeds": list(config.seeds),
            "questions": len(preference_questions()),
            "layers": last_layer + 1,
            "cells_before": timing["cells_before"],
            "seconds": round(timing["seconds"], 1),
        },
        **{name: tables[name] for name in ("teachers", "data", "divergence", "students")},
        "effects": {name: tables[name] for name in ("layers", "agreement")},
        **({"mechanism": tables["mechanism"]} if config.mechanism else {}),
        "conditions": _condition_rows(groups),
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
    runner: CellRunner, tables: dict[str, list[dict[str, Any]]]
) -> dict[tuple[str, str], Divergence]:
    """Fill the tables of lists and divergences, and load the divergences."""
    config, store = runner.config, runner.store
    divergences = {}
    for kind in config.kinds:
        for name in (None, *config.targets):
            source = "unbiased" if name is None else config.source
            data = store.read(runner.lists_cell(kind, name, source))
            tables["data"] += [] if data is None else [data]
        for target in config.targets:
            cell = runner.divergence_cell(kind, target)
            row = store.read(cell)
            if row is not None:
                tables["divergence"].append(row)
                divergences[kind, target] = Divergence.load(store.path(cell, ".safetensors"))
    return divergences


def _student_rows(
    task: Task, condition: Condition, result: Mapping[str, Any], targets: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for the target, or one per target if all targets share the student."""
    single = bool(condition.label) and len(condition.layers or ()) == 1
    return [
        {
            "target": target,
            "kind": task.kind,
            "condition": condition.label or condition.name,
            "layer": condition.layers[0] if single and condition.layers else None,
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


def _condition_rows(groups: Sequence[Sequence[Task]]) -> list[dict[str, str]]:
    """The conditions of a study, and the factor that each isolates."""
    used = {
        task.condition.name: task.condition
        for group in groups
        for task in group
        if task.condition is not None
    }
    return [{"name": c.name, "group": c.group, "isolates": c.isolates} for c in used.values()]


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
    table = pd.DataFrame(flat)
    write_file(out / "study.parquet", lambda path: table.to_parquet(path, index=False))
    for first in list(study.divergences.values())[:1]:
        first.save(out / "divergence.safetensors")
    for key, stored in study.files.items():
        if stored.exists():
            name = f"{'-'.join(map(str, key))}.safetensors"
            write_file(out / "students" / name, partial(_link, stored))


def _link(stored: Path, path: Path) -> None:
    """Link a file to a second name, or copy it if the file system has no links."""
    path.unlink()
    try:
        os.link(stored, path)
    except OSError:
        shutil.copyfile(stored, path)


def _check_folder(out: Path) -> None:
    """Refuse a folder with files that are not a study's, because a study deletes old files."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write to")
    if out.exists() and any(out.iterdir()) and not (out / _MARKER).exists():
        raise ValueError(f"{out} has files that no study wrote; give a new or an empty folder")


def _clear(out: Path, *, everything: bool) -> None:
    """Delete the results of an earlier run, and with `everything` its cells too."""
    for name in ("results.json", "study.csv", "study.parquet", "study.md", "report.html"):
        (out / name).unlink(missing_ok=True)
    (out / "divergence.safetensors").unlink(missing_ok=True)
    for name in ("figures", "students", *(("cells",) if everything else ())):
        for old in sorted((out / name).rglob("*"), reverse=True):
            if old.suffix in (".safetensors", ".json", ".jsonl", ".html", ".failed", ".part"):
                old.unlink()
