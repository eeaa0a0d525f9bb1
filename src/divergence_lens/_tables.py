"""Tables that figures are drawn from: rows of results.json, or data frames."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, TypeAlias

import pandas as pd

Table: TypeAlias = pd.DataFrame | Sequence[Mapping[str, Any]]
"""A table of results.json: a list of rows, or the same as a DataFrame."""


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
    """HTML for a notebook: `repr(what)` as a line, and the first rows of a table that says more."""
    shown = table.head(rows).to_html(
        border=0, float_format=lambda value: f"{value:.3f}", max_cols=8, na_rep=""
    )
    more = f"<p>first {rows:,} of {len(table):,} rows</p>" if len(table) > rows else ""
    return f"<p>{escape(repr(what))}</p>{shown}{more}"
