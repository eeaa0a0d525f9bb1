"""A study read back from its folder, without its model and without computing anything.

`results.json` holds the tables and findings. Divergences and effects lie in the cells; a folder may
have cells of other settings beside them, so that each is recognised by what it says it found, which
is in the tables word for word.
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
from divergence_lens.study.run import Study


def read_study(folder: str | os.PathLike[str]) -> Study:
    """The study in a folder that `run_study`, `divergence-lens demo` or `study` wrote.

    Raises:
        FileNotFoundError: There is no `results.json`.
        ValueError: It is not one of a study.
    """
    out = Path(folder)
    path = out / "results.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{out} holds no results.json, so no study was finished there; "
            f"divergence-lens study --out {out} begins one or goes on with it"
        )
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        findings = tuple(_finding(row) for row in results["findings"])
        rows, effects = results["divergence"], results["effects"]
        missing = {"settings", "students", "teachers", "data", "failures"} - set(results)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what a study writes: {error!r}") from error
    if missing:
        raise ValueError(f"{path} is not what a study writes: it lacks {', '.join(missing)}")
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
    files = {key: path for path in students if (key := _key(path.stem)) is not None}
    return Study(results, findings, divergences, exact, approximate, files)


def _cells(out: Path, name: str) -> Iterator[Path]:
    """The files of results of a cell, under any settings."""
    path = out / "cells" / name
    yield from sorted(path.parent.glob(f"{path.name}.*.json"))


def _result(cell: Path) -> Any:
    try:
        return json.loads(cell.read_text(encoding="utf-8"))["result"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finding(row: Mapping[str, Any]) -> Finding:
    """A finding as `to_dict` wrote it; numbers that are missing are NaN again."""
    names = [field.name for field in dataclasses.fields(Finding)]
    plain = {name: row[name] for name in names if name in row}
    for name in ("interval", "difference_interval", "resampled"):
        if plain.get(name) is not None:
            plain[name] = tuple(_number(end) for end in plain[name])
    for name in ("values", "beside"):
        plain[name] = {key: _number(value) for key, value in plain.get(name, {}).items()}
    return Finding(**plain | {"measured": _number(plain["measured"])})


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _key(stem: str) -> tuple[str, str, str, int] | None:
    """Kind, target, condition and seed, as the file of a student is called after them."""
    parts = stem.split("-")
    if len(parts) < 4 or not parts[-1].isdigit():
        return None
    return parts[0], parts[1], "-".join(parts[2:-1]), int(parts[-1])
