"""Loading a finished study from its folder, without its model and without computing anything.

`results.json` holds the tables and findings; divergences and effects are files of cells. A folder
may also hold cells of other settings, so a cell belongs to the study only if its result equals the
row in the tables.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from divergence_lens.divergence import Divergence
from divergence_lens.patching import Effects
from divergence_lens.study.findings import Finding

StudentKey = tuple[str, str, str, int]
"""Kind, target, condition, and seed of a student."""


def load_parts(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of the `Study` stored in a folder.

    Raises:
        FileNotFoundError: The folder has no `results.json`.
        ValueError: `results.json` was not written by a study.
    """
    out = Path(folder)
    path = out / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{out} has no results.json, so no study was finished there; "
            f"divergence-lens study --out {out} starts or resumes one"
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        findings = tuple(_finding(row) for row in results["findings"])
        rows, effects = results["divergence"], results["effects"]
        missing = {"settings", "students", "teachers", "data", "failures"} - set(results)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} was not written by a study: {error!r}") from error
    if missing:
        raise ValueError(f"{path} was not written by a study: it lacks {', '.join(missing)}")
    divergences = {
        (row["kind"], row["target"]): Divergence.load(cell.with_suffix(".safetensors"))
        for row in rows
        for cell in _cells(out, f"divergence/{row['kind']}/{row['target']}-greedy")
        if _result(cell) == row
    }
    exact, approximate = {}, {}
    for kind, target in divergences:
        own = {
            name: [row for row in table if (row["kind"], row["target"]) == (kind, target)]
            for name, table in effects.items()
        }
        for cell in _cells(out, f"effects/{kind}/{target}"):
            if _result(cell) == own:
                exact[kind, target] = Effects.load(cell.with_suffix(".exact.safetensors"))
                approximate[kind, target] = Effects.load(
                    cell.with_suffix(".approximate.safetensors")
                )
    students = sorted((out / "students").glob("*.safetensors"))
    return {
        "results": results,
        "findings": findings,
        "divergences": divergences,
        "exact": exact,
        "approximate": approximate,
        "files": {key: path for path in students if (key := _student_key(path.stem)) is not None},
    }


def _cells(out: Path, name: str) -> Iterator[Path]:
    """The result files of a cell, under any settings."""
    path = out / "cells" / name
    yield from sorted(path.parent.glob(f"{path.name}.*.json"))


def _result(cell: Path) -> Any:
    try:
        return json.loads(cell.read_text(encoding="utf-8"))["result"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finding(row: Mapping[str, Any]) -> Finding:
    """The inverse of `Finding.to_dict`; missing numbers become NaN again."""
    names = [field.name for field in dataclasses.fields(Finding)]
    fields = {name: row[name] for name in names if name in row}
    for name in ("interval", "difference_interval", "bootstrap_interval"):
        if fields.get(name) is not None:
            fields[name] = tuple(_number(end) for end in fields[name])
    for name in ("values", "related"):
        fields[name] = {key: _number(value) for key, value in fields.get(name, {}).items()}
    return Finding(**fields | {"measured": _number(fields["measured"])})


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _student_key(stem: str) -> StudentKey | None:
    """The key in the name of a student's file, `<kind>-<target>-<condition>-<seed>`."""
    parts = stem.split("-")
    if len(parts) < 4 or not parts[-1].isdigit():
        return None
    return parts[0], parts[1], "-".join(parts[2:-1]), int(parts[-1])
