"""Input tables of figures, and the rendering of results in a notebook."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeAlias

import pandas as pd

Table: TypeAlias = pd.DataFrame | Sequence[Mapping[str, Any]]
"""A table of results.json: a list of rows, or the same as a DataFrame."""


_LONGEST = 300


def checked_table(rows: Table, columns: Iterable[str], name: str) -> pd.DataFrame:
    """Convert rows to a data frame, and check that it has these columns.

    Raises:
        ValueError: If it is empty or lacks a column.
    """
    table = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame([dict(row) for row in rows])
    if table.empty:
        raise ValueError(f"the {name} table is empty; there is nothing to draw")
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise ValueError(
            f"the {name} table lacks the column {missing[0]!r}; it has {list(table.columns)}"
        )
    return table


def preview(result: object, table: pd.DataFrame, *, rows: int = 8) -> str:
    """Return HTML for a notebook: `repr(result)`, then the first rows of a table."""
    shown = table.head(rows).to_html(
        border=0, float_format=lambda value: f"{value:.3f}", max_cols=8, na_rep=""
    )
    note = f"<p>first {rows:,} of {len(table):,} rows</p>" if len(table) > rows else ""
    return f"<p>{escape(repr(result))}</p>{shown}{note}"


def short_repr(one: Any, *, always: Sequence[str] = (), longest: int = 60) -> str:
    """Describe a dataclass in one line: the fields of `always` and all that are not the default."""
    parts = []
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if field.name in always or (default is not dataclasses.MISSING and value != default):
            text = repr(getattr(value, "__name__", value))
            parts.append(
                f"{field.name}={text if len(text) <= longest else text[: longest - 1] + '…'}"
            )
    text = f"{type(one).__name__}({', '.join(parts)})"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 2] + "…)"
