"""Small tables of a paired study, which can be committed, resumed from, and made into a page.

A study writes its tables after every finished cell, so they are valid at any time. In a new folder
it reads them first: a student or teacher with the same settings is not computed again. A row that
belongs to other settings (another tier of conditions, say) is left as it is.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from divergence_lens._utils.storage import write_text
from divergence_lens.engine import get_engine
from divergence_lens.provenance import run_metadata

if TYPE_CHECKING:
    from divergence_lens.study.runner import CellRunner, Task

STUDENTS, TEACHERS, DIVERGENCE = "students.csv", "teachers.csv", "divergence.csv"
EFFECTS = {"layers": "layers.csv", "agreement": "agreement.csv"}
"""Tables of patched activations; like `DIVERGENCE`, a study does not resume from them."""
SETTINGS = "settings.json"
_BEFORE, _AFTER = "before_", "after_"
_COUNTS = ("examples", "tokens", "seconds")
_VALUES = ("fit", "mass_before", "mass", "share_before", "share")
Row = dict[str, Any]


class StudyTables:
    """The tables of one paired study in a folder.

    Args:
        folder: The folder; it is created if it does not exist.
        runner: The cells.
        tasks: The tasks of the study.
    """

    def __init__(self, folder: Path, runner: "CellRunner", tasks: Sequence["Task"]) -> None:
        self.folder, self._runner, self._tasks = folder, runner, tasks

    def restore(self) -> int:
        """Write the cells that the store lacks and the tables have; return their number."""
        store, restored = self._runner.store, 0
        students, teachers = _read(self.folder / STUDENTS), _read(self.folder / TEACHERS)
        for task in self._tasks:
            key = task.cell.key
            if store.has(task.cell):
                continue
            if task.condition is not None and task.target is not None and key in students:
                store.write(task.cell, _student_result(students[key]))
            elif task.condition is None and key in teachers:
                store.write(task.cell, {k: v for k, v in teachers[key].items() if k != "key"})
            else:
                continue
            restored += 1
        return restored

    def write(self) -> None:
        """Write all tables."""
        runner = self._runner
        students, teachers = _read(self.folder / STUDENTS), _read(self.folder / TEACHERS)
        divergence = _read(self.folder / DIVERGENCE)
        effects = {name: _read(self.folder / file) for name, file in EFFECTS.items()}
        for task in self._tasks:
            result = runner.store.read(task.cell)
            if result is None:
                continue
            if task.condition is not None and task.target is not None:
                students[task.cell.key] = self._student_row(task, result)
                cell = runner.divergence_cell(task.kind, task.target)
                found = runner.store.read(cell)
                if found is not None:
                    divergence[cell.key] = {"key": cell.key, **found}
            elif task.target is not None:
                for name, rows in effects.items():
                    _put_effects(rows, task, result.get(name, ()))
            else:
                teachers[task.cell.key] = {"key": task.cell.key, **result}
        tables = {STUDENTS: students, TEACHERS: teachers, DIVERGENCE: divergence}
        for name, rows in (
            tables | {EFFECTS[name]: rows for name, rows in effects.items()}
        ).items():
            if rows:
                _write(self.folder / name, list(rows.values()))
        config, model = runner.config, runner.model
        about = run_metadata(model, **config.describe(model))
        about |= {"layers": get_engine(model).n_layers, "source": config.source}
        about |= {"planned": sum(task.condition is not None for task in self._tasks)}
        write_text(self.folder / SETTINGS, json.dumps(about, indent=1) + "\n")

    def _student_row(self, task: "Task", result: Mapping[str, Any]) -> Row:
        condition, config = task.condition, self._runner.config
        assert condition is not None
        assert task.target is not None
        single = condition.label and condition.layers is not None and len(condition.layers) == 1
        return {
            "key": task.cell.key,
            "target": task.target,
            "twin": config.other_target(task.target),
            "kind": task.kind,
            "condition": condition.label or condition.name,
            "layer": condition.layers[0] if single and condition.layers else None,
            "seed": task.seed,
            **{name: result.get(name) for name in (*_COUNTS, *_VALUES)},
            **{_BEFORE + name: value for name, value in result["before"].items()},
            **{_AFTER + name: value for name, value in result["after"].items()},
        }


def load_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The tables of a folder as `findings.judge` reads them; an absent table is empty.

    The column `distribution` of the students holds the margin of every candidate after training.
    """
    tables = {}
    for name in (STUDENTS, TEACHERS, DIVERGENCE, *EFFECTS.values()):
        path = folder / name
        rows = pd.read_csv(path) if path.exists() else pd.DataFrame()
        if name == STUDENTS and len(rows):
            columns = [c for c in rows.columns if c.startswith(_AFTER)]
            rows["distribution"] = [
                {c.removeprefix(_AFTER): float(row[c]) for c in columns}
                for row in rows.to_dict("records")
            ]
            for side, start in (("before", _BEFORE), ("after", _AFTER)):
                rows[side] = [float(row[start + row["target"]]) for row in rows.to_dict("records")]
        tables[name.removesuffix(".csv")] = rows
    return tables


def _student_result(row: Row) -> Row:
    """The inverse of `_student_row`."""
    sides = [
        {n.removeprefix(start): v for n, v in row.items() if n.startswith(start)}
        for start in (_BEFORE, _AFTER)
    ]
    rises = {name: sides[1][name] - sides[0][name] for name in sides[0]}
    missing = dict.fromkeys(("left", "valid_lists", "loss_before", "loss"))
    return missing | {
        "before": sides[0],
        "after": sides[1],
        "ranks": {n: 1 + sum(other > rises[n] for other in rises.values()) for n in rises},
        **{name: int(row[name]) for name in _COUNTS},
        **{name: row[name] for name in _VALUES},
    }


def _put_effects(rows: dict[str, Row], task: "Task", own: Sequence[Row]) -> None:
    """Replace a target's rows, also those of other settings: averages over rows are shown."""
    for key in [key for key, row in rows.items() if row["target"] == task.target]:
        del rows[key]
    for i, row in enumerate(own):
        key = f"{task.cell.key}-{i}"
        rows[key] = {"key": key, **row}


def _read(path: Path) -> dict[str, Row]:
    """The rows of a table by their key."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # The csv module, because every digit of a float must survive.
    return {row["key"]: {n: _parse(n, text) for n, text in row.items()} for row in rows}


def _parse(name: str, text: str) -> str | int | float | None:
    """A field of a table as the value that was written."""
    if not text or name == "key":
        return text or None
    if text.lstrip("-").isdecimal():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _write(path: Path, rows: Sequence[Row]) -> None:
    table = pd.DataFrame(rows)
    if "layer" in table:
        table["layer"] = table["layer"].astype("Int64")
    text = io.StringIO(newline="")
    table.to_csv(text, index=False, lineterminator="\n")
    write_text(path, text.getvalue())
