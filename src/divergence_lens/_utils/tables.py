"""Tables that figures are drawn from, and how results render in a notebook."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeAlias

import pandas as pd

Table: TypeAlias = pd.DataFrame | Sequence[Mapping[str, Any]]
"""A table of results.json: a list of rows, or the same as a DataFrame."""


_LONGEST = 300


def checked_table(rows: Table, columns: Iterable[str], name: str) -> pd.DataFrame:
    """The rows as a data frame that has these columns.

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


def preview(what: object, table: pd.DataFrame, *, rows: int = 8) -> str:
    """HTML for a notebook: `repr(what)` in one line, then the first rows of a table."""
    shown = table.head(rows).to_html(
        border=0, float_format=lambda value: f"{value:.3f}", max_cols=8, na_rep=""
    )
    more = f"<p>first {rows:,} of {len(table):,} rows</p>" if len(table) > rows else ""
    return f"<p>{escape(repr(what))}</p>{shown}{more}"


def short_repr(one: Any, *, always: Sequence[str] = (), longest: int = 60) -> str:
    """A dataclass in one line: the fields of `always`, and those that differ from their default."""
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
