"""What titles and hover texts of figures call things, and what they count in tables."""

import numpy as np
import pandas as pd
from jaxtyping import Float

from divergence_lens.plots import style

# Conditions of students in words, and short, for a legend that is 80 mm wide.
CONDITIONS = {
    "all": ("all tokens", "all tokens"),
    "divergence_only": ("divergence tokens only", "divergence only"),
    "without_divergence": ("all but divergence tokens", "no divergence"),
    "control": ("lists by the untouched model", "control"),
}

_SITES = {
    "resid_pre": "residual stream before the block",
    "resid_mid": "residual stream inside the block",
    "resid_post": "residual stream after the block",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "block_out": "block output",
    "z": "attention heads",
    "q": "queries of attention heads",
    "k": "keys of attention heads",
    "v": "values of attention heads",
}


def titled(what: str, name: str | None) -> str:
    """What was measured, and whose it is, if that is said."""
    return what if name is None else f"{what}: {name}"


def site_words(site: str) -> str:
    """A site in words."""
    return _SITES.get(site, site)


def metric_words(metric: str) -> str:
    """A metric in words."""
    return metric.replace("_", " ")


def condition_words(name: str) -> tuple[str, str]:
    """What students learned, in words and short."""
    plain = name.replace("_", " ")
    return CONDITIONS.get(name, (plain, plain))


def column_of(rows: pd.DataFrame, name: str) -> Float[np.ndarray, " rows"] | None:
    """A column that a table may lack."""
    return rows[name].to_numpy(float) if name in rows.columns else None


def intervals_said(rows: pd.DataFrame, over: str = "") -> str:
    """What the thin lines are, where the table has intervals."""
    return f"; thin lines: 95 % intervals{over}" if {"low", "high"} <= set(rows.columns) else ""


def students_of(rows: pd.DataFrame) -> str:
    """How many students the rows are of; those of the control are in the rows of every target."""
    control = of_condition(rows, "control")
    words = style.plural(len(rows) - len(control), "student")
    return f"{words} and {controls_of(control)}" if len(control) else words


def controls_of(control: pd.DataFrame) -> str:
    """How many students of the control the rows are of: the same ones stand by every target."""
    shared = len(control[["kind", "seed"]].drop_duplicates())
    words = style.plural(shared, "control")
    return f"{words} that all targets share" if len(control) > shared else words


def of_condition(rows: pd.DataFrame, condition: str) -> pd.DataFrame:
    """The rows of one condition."""
    return rows[rows["condition"] == condition]


def teachers_of(rows: pd.DataFrame) -> str:
    """How many there are, and of which kind if they are of one."""
    kinds = list(dict.fromkeys(rows["kind"]))
    return style.plural(len(rows), f"{kinds[0]} teacher" if len(kinds) == 1 else "teacher")


def one_kind(table: pd.DataFrame, kind: str | None, name: str) -> tuple[pd.DataFrame, str]:
    """The rows of one kind of teachers, and which.

    Raises:
        ValueError: If there are several and none was chosen, or none of the kind that was.
    """
    kinds = [str(value) for value in dict.fromkeys(table["kind"])]
    if kind is None and len(kinds) > 1:
        raise ValueError(f"the {name} table holds the kinds {kinds}; choose one with kind=")
    if kind is not None and kind not in kinds:
        raise ValueError(f"the {name} table has no rows of kind {kind!r}; it holds {kinds}")
    chosen = kind or kinds[0]
    return table[table["kind"] == chosen], chosen


def means_by_target(table: pd.DataFrame, column: str) -> dict[str, float]:
    """The mean of a column over all rows of a target."""
    return {
        str(target): float(value)
        for target, value in table.groupby("target", sort=False)[column].mean().items()
    }
