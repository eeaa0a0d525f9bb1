"""Names and counts in the titles and hover texts of figures."""

import numpy as np
import pandas as pd
from jaxtyping import Float

from divergence_lens._utils.wording import plural

# Conditions of students: long names for hover texts, short ones for legends of 80 mm.
CONDITIONS = {
    "all": ("all tokens", "all tokens"),
    "divergence_only": ("divergence tokens only", "divergence only"),
    "without_divergence": ("all except divergence tokens", "no divergence"),
    "control": ("lists by the base model", "control"),
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
    "pattern": "attention patterns of heads",
}


def titled(headline: str, name: str | None) -> str:
    """Append a name to a title, if there is one."""
    return headline if name is None else f"{headline}: {name}"


def site_words(site: str) -> str:
    """Return a site in words."""
    return _SITES.get(site, site)


def metric_words(metric: str) -> str:
    """Return a metric in words."""
    return metric.replace("_", " ")


def condition_words(name: str) -> tuple[str, str]:
    """Return the long and the short name of a condition."""
    plain = name.replace("_", " ")
    return CONDITIONS.get(name, (plain, plain))


def column_of(rows: pd.DataFrame, name: str) -> Float[np.ndarray, " rows"] | None:
    """Return a column, or None if the table lacks it."""
    return rows[name].to_numpy(float) if name in rows.columns else None


def interval_note(rows: pd.DataFrame, over: str = "") -> str:
    """Describe the thin lines, if the table has intervals."""
    return f"; thin lines: 95 % intervals{over}" if {"low", "high"} <= set(rows.columns) else ""


def students_of(rows: pd.DataFrame) -> str:
    """Count students; control students occur in the rows of every target and count once."""
    control = of_condition(rows, "control")
    words = plural(len(rows) - len(control), "student")
    return f"{words} and {controls_of(control)}" if len(control) else words


def controls_of(control: pd.DataFrame) -> str:
    """Count control students, which all targets share."""
    shared = len(control[["kind", "seed"]].drop_duplicates())
    words = plural(shared, "control")
    return f"{words} shared by all targets" if len(control) > shared else words


def of_condition(rows: pd.DataFrame, condition: str) -> pd.DataFrame:
    """Select the rows of one condition."""
    return rows[rows["condition"] == condition]


def teachers_of(rows: pd.DataFrame) -> str:
    """Count teachers, with their kind if there is only one."""
    kinds = list(dict.fromkeys(rows["kind"]))
    return plural(len(rows), f"{kinds[0]} teacher" if len(kinds) == 1 else "teacher")


def one_kind(table: pd.DataFrame, kind: str | None, name: str) -> tuple[pd.DataFrame, str]:
    """Select the rows of one kind of teachers, and return the kind.

    Raises:
        ValueError: The table holds more than one kind and `kind` is None, or no rows of `kind`.
    """
    kinds = [str(value) for value in dict.fromkeys(table["kind"])]
    if kind is None and len(kinds) > 1:
        raise ValueError(f"the {name} table holds the kinds {kinds}; choose one with kind=")
    if kind is not None and kind not in kinds:
        raise ValueError(f"the {name} table has no rows of kind {kind!r}; it holds {kinds}")
    chosen = kind or kinds[0]
    return table[table["kind"] == chosen], chosen


def means_by_target(table: pd.DataFrame, column: str) -> dict[str, float]:
    """Average a column over the rows of each target."""
    return {
        str(target): float(value)
        for target, value in table.groupby("target", sort=False)[column].mean().items()
    }
