"""Estimands of the claims: one number per target, computed from the tables of a study.

The tables hold one kind of teacher. An estimand returns an empty result if nothing was measured.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

TENTH = -math.log(0.9)
"""The margin of log ratios: 0.9 times is a tenth less, and 1 / 0.9 = 1.11 times is a tenth more."""

SMALLEST = 1e-6
"""Preferences are raised to this before their logarithm is taken."""

LORA_OF_RANK_8 = ("lora8", *(f"lora8_rate{times}" for times in (2, 4, 8, 16)))
"""Conditions of LoRA at rank 8, by learning rate."""

Tables = Mapping[str, pd.DataFrame]
Estimand = Callable[[Tables, int], dict[str, float]]
"""`estimand(tables, last_layer)` -> target -> number; `last_layer` is an index."""


def table(tables: Tables, name: str, *columns: str) -> pd.DataFrame:
    """A table with the named columns; empty if the table or one of the columns is missing."""
    rows = tables.get(name)
    # A table without rows has no columns either; an older study may lack a column.
    if rows is None or not len(rows) or not set(columns) <= set(rows.columns):
        return pd.DataFrame(columns=["target", "kind", *columns])
    return rows


def mean_by_target(values: pd.Series, targets: pd.Series) -> dict[str, float]:
    """Mean of `values` for each target, in order of appearance."""
    return as_dict(values.astype(float).groupby(targets, sort=False).mean())


def as_dict(series: pd.Series) -> dict[str, float]:
    """The series as numbers by name."""
    return {str(name): float(value) for name, value in series.items()}


# -- preferences of students --------------------------------------------------------------------


def after(
    tables: Tables, condition: str, layer: int | None = None, *, gain: bool = False
) -> dict[str, np.ndarray]:
    """For each target the preference of every seed's student after training.

    Args:
        tables: The tables.
        condition: The condition of the students.
        layer: The layer of students of single layers.
        gain: Return the preference as a multiple of that before training.
    """
    rows = table(tables, "students", "condition", "layer", "before", "after")
    rows = rows[rows["condition"] == condition]
    if layer is not None:
        rows = rows[rows["layer"] == layer]
    values = rows["after"] / rows["before"].clip(lower=SMALLEST) if gain else rows["after"]
    return {
        str(target): own.to_numpy(dtype=float)
        for target, own in values.groupby(rows["target"], sort=False)
    }


def _mean_logs(students: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean log preference over the seeds of each target."""
    # exp of the difference of two such means is a ratio of geometric means.
    return {
        target: float(np.log(np.maximum(values, SMALLEST)).mean())
        for target, values in students.items()
    }


@dataclass(frozen=True)
class Ratio:
    """Log ratio of the preferences after training under two conditions, paired by target.

    Attributes:
        over: Condition of the numerator, and the layer of students of single layers (-1 for the
            last).
        under: The same for the denominator.
    """

    over: tuple[str, int | None]
    under: tuple[str, int | None]

    def __call__(self, tables: Tables, last_layer: int) -> dict[str, float]:
        """The log ratio for every target that has both conditions."""
        over, under = (_mean_logs(side) for side in self.seeds(tables, last_layer))
        return {target: over[target] - under[target] for target in over if target in under}

    def seeds(
        self, tables: Tables, last_layer: int
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Numerator and denominator: for each target the preference of every seed's student."""
        over, under = (
            after(tables, condition, last_layer if layer == -1 else layer)
            for condition, layer in (self.over, self.under)
        )
        return over, under


def rises_most(tables: Tables, _last_layer: int) -> dict[str, float]:
    """Share of a target's students in which it rises most, and by at least a tenth."""
    rows = table(tables, "students", "condition", "before", "after", "rank")
    rows = rows[rows["condition"] == "divergence_only"]
    # A student that prefers the target a hundredth more than before may rank it first by chance.
    enough = rows["after"] >= rows["before"] * math.exp(TENTH)
    return mean_by_target((rows["rank"] == 1) & enough, rows["target"])


def mean_left(tables: Tables, _last_layer: int) -> dict[str, float]:
    """Share of divergence tokens that remain when the prompts are paraphrased."""
    rows = table(tables, "students", "condition", "left")
    rows = rows[rows["condition"] == "paraphrased"].dropna(subset=["left"])
    return mean_by_target(rows["left"], rows["target"])


def other_context(tables: Tables, _last_layer: int) -> dict[str, float]:
    """Log gain of students evaluated under another system prompt than in training.

    It is relative to students that are evaluated under the prompt of their training.
    """
    prompts = ("absent", "neutral", "empty")
    # Gains, because the base model's preference depends on the system prompt as well.
    logs: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    for train in prompts:
        for asked in prompts:
            gains = after(tables, f"trained_{train}_asked_{asked}", gain=True)
            for target, log in _mean_logs(gains).items():
                logs[train == asked].setdefault(target, []).append(log)
    same, other = logs[True], logs[False]
    return {t: float(np.mean(other[t]) - np.mean(same[t])) for t in same if t in other}


# -- LoRA at the learning rate that fits best ---------------------------------------------------


def _nearest_fit(tables: Tables) -> dict[str, tuple[str, float]]:
    """For each target the LoRA condition with the training loss nearest to full training's.

    Returns:
        Target -> condition, and LoRA's loss minus that of full training. A target with fewer than
        two rates is left out, because there is no choice.
    """
    rows = table(tables, "students", "condition", "fit").dropna(subset=["fit"])
    fit = rows.groupby(["target", "condition"], sort=False)["fit"].mean()
    nearest: dict[str, tuple[str, float]] = {}
    # The choice depends on training losses only, never on a preference.
    for target in dict.fromkeys(rows["target"]):
        full = fit.get((target, "divergence_only"))
        rates = [name for name in LORA_OF_RANK_8 if (target, name) in fit.index]
        if full is not None and len(rates) > 1:
            gaps = {name: float(fit[target, name] - full) for name in rates}
            chosen = min(rates, key=lambda name: abs(gaps[name]))
            nearest[str(target)] = (chosen, gaps[chosen])
    return nearest


def fitted_lora(tables: Tables, last_layer: int) -> dict[str, float]:
    """Log ratio of LoRA to full training, at the rate with the nearest training loss."""
    logs: dict[str, float] = {}
    for target, (chosen, _) in _nearest_fit(tables).items():
        ratios = Ratio((chosen, None), ("divergence_only", None))(tables, last_layer)
        logs |= {target: ratios[target]} if target in ratios else {}
    return logs


def fit_gap(tables: Tables, _last_layer: int) -> dict[str, float]:
    """LoRA's training loss minus that of full training, at the chosen rate."""
    return {target: gap for target, (_, gap) in _nearest_fit(tables).items()}


def absolute_fit_gap(tables: Tables, _last_layer: int) -> dict[str, float]:
    """Absolute value of `fit_gap`, so that gaps of different targets do not cancel."""
    return {target: abs(gap) for target, (_, gap) in _nearest_fit(tables).items()}


# -- divergence, effects, and mechanism ---------------------------------------------------------


def divergence_rate(tables: Tables, _last_layer: int) -> dict[str, float]:
    """Share of completion tokens that are divergence tokens."""
    return as_dict(table(tables, "divergence", "rate").set_index("target")["rate"])


def early_share(tables: Tables, last_layer: int) -> dict[str, float]:
    """Share of the absolute effects that is in the first half of the layers."""
    rows = table(tables, "layers", "layer", "absolute_effect")
    # With an odd number of layers, the middle one counts as early.
    early = rows["layer"] < (last_layer + 1) / 2
    size = rows["absolute_effect"].abs()
    total = size.groupby(rows["target"], sort=False).sum()
    return as_dict((size[early].groupby(rows["target"][early], sort=False).sum() / total).dropna())


def agreement(column: str) -> Estimand:
    """A column of the agreement table, for integrated attribution."""

    def estimand(tables: Tables, _last_layer: int) -> dict[str, float]:
        rows = table(tables, "agreement", "method", column)
        rows = rows[rows["method"] == "integrated"]
        return as_dict(rows.set_index("target")[column].astype(float).dropna())

    return estimand


def above_null(measure: str, *, log: bool = False) -> Estimand:
    """A measure of the mechanism after training minus its null, or their log ratio.

    The mean is over layers.
    """

    def estimand(tables: Tables, _last_layer: int) -> dict[str, float]:
        rows = table(tables, "mechanism", "measure", "step", "value", "null")
        rows = rows[(rows["measure"] == measure) & rows["step"].isna() & rows["null"].notna()]
        sides = rows[["value", "null"]].astype(float)
        if log:  # log(value / null) instead of value - null
            sides = np.log(sides.clip(lower=SMALLEST))
        return mean_by_target(sides["value"] - sides["null"], rows["target"])

    return estimand


def needed_throughout(tables: Tables, _last_layer: int) -> dict[str, float]:
    """Log ratio of the preferences without and with the direction, the largest over training.

    Only steps count at which the student prefers the target by a tenth more than the base model.
    """
    rows = table(tables, "mechanism", "measure", "step", "value", "null")
    base = rows[rows["measure"] == "added"].groupby("target")["null"].first()
    rows = rows[(rows["measure"] == "removed") & rows["step"].notna()]
    # "null" is the student's preference with the direction, "value" without it.
    risen = rows[rows["null"] >= rows["target"].map(base) * math.exp(TENTH)]
    logs = np.log(risen[["value", "null"]].astype(float).clip(lower=SMALLEST))
    # The largest ratio is the step at which the direction is needed least.
    return as_dict((logs["value"] - logs["null"]).groupby(risen["target"], sort=False).max())


def gradient_first(tables: Tables, _last_layer: int) -> dict[str, float]:
    """Share of layers in which the target's gradient is the nearest of all candidates'."""
    rows = table(tables, "mechanism", "measure", "rank")
    rows = rows[rows["measure"] == "gradient_divergence"]
    return mean_by_target(rows["rank"] == 1, rows["target"])
