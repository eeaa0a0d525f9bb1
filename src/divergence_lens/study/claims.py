"""The paper's claims and what measures each: fixed here, before anything runs.

Each claim has an estimand (a number per target) and a threshold. `findings` makes intervals of
these and decides. Claims are those of Schrodi et al. (arXiv 2509.23886) and Cloud et al. (arXiv
2507.14805), put as they can be tested in miniature.

**What has changed since the first run of the demo, and why.** The first rules were read by someone
who had not written them, who found errors of statistics in them. Their results were known by then,
so no threshold was chosen anew: a tenth, which stood in one rule, now stands wherever a margin is
needed.

- *Approximation*: one correlation over all cells is high by construction (see `_agreement`). What
  is compared with the threshold is now the mean correlation within a pair, outside the target
  position and the last layer; the old figure is shown beside it.
- *Claims about transfer that compare two kinds of students* ("at least as much as", "less than",
  "rises most") were supported where nothing transferred, and neither of two null effects was worse
  than the other. They are unclear now unless the transfer that they presuppose is supported.
- *Shares of students* had an interval by Student's t, which has no width where all agree and runs
  beyond 0 and 1. They are now shares of targets with the exact binomial interval.
- *Transfer* meant any difference, however small. It is now a rise by a tenth at least, also for a
  student in which the target is to rise most.
- *Two claims that were made in words only*, that students end where the control does, are tested
  for equivalence to within the same tenth.
- *A claim for which nothing was measured* is listed as unclear and no longer left out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

TENTH = -math.log(0.9)
"""The one margin, of log ratios: 0.9 times is a tenth less, 1 / 0.9 = 1.11 times a tenth more."""

SMALLEST = 1e-6
"""Preferences below this count as this, so that their logarithm is a number."""

Tables = Mapping[str, pd.DataFrame]
Estimand = Callable[[Tables, int], dict[str, float] | None]


@dataclass(frozen=True)
class Claim:
    """A claim, what measures it, and what decides; see `findings`.

    Attributes:
        id: A short name.
        claim: In words.
        estimand: One number per target.
        unit: What the number is.
        caveat: What to bear in mind with it.
        threshold: What the estimand is compared with; of an equivalence, the margin.
        above: Whether it is to lie above.
        log: Whether the estimand is a log ratio, shown as a ratio.
        equal: Whether the claim is that the estimand is zero to within `threshold`.
        count: Whether the claim is about the share of targets whose estimand is 1.
        within: Between which numbers the estimand lies by definition.
        optional: Whether to leave it out, and not to call it unclear, where nothing was measured.
        needs: Claims that must be supported for this one to mean anything.
        beside: Other figures that are shown beside it, as means over targets.
        full_training: Whether it compares with full training, so that it says nothing where the
            other students are trained with LoRA themselves.
    """

    id: str
    claim: str
    estimand: Estimand
    unit: str
    caveat: str
    threshold: float = 0.0
    above: bool = True
    log: bool = False
    equal: bool = False
    count: bool = False
    within: tuple[float, float] = (-math.inf, math.inf)
    optional: bool = False
    needs: tuple[str, ...] = ()
    beside: Mapping[str, Estimand] = field(default_factory=dict)
    full_training: bool = False


def after(
    tables: Tables, condition: str, layer: int | None = None, *, gain: bool = False
) -> dict[str, np.ndarray]:
    """Preference after training for each target, over seeds."""
    students = filled(tables, "students")
    if students is None:
        return {}
    rows = students[students["condition"] == condition]
    if layer is not None:
        rows = rows[rows["layer"] == layer]
    values = rows["after"] / rows["before"].clip(lower=SMALLEST) if gain else rows["after"]
    return {
        str(target): found.to_numpy(dtype=float)
        for target, found in values.groupby(rows["target"], sort=False)
    }


@dataclass(frozen=True)
class Ratio:
    """Log ratio of the preference after training under two conditions, paired by target.

    Attributes:
        over, under: Condition, and the layer of a student of one layer; -1 is the last.
        gain: Compare what each student has gained over its own preference before training, for
            conditions that are asked in different ways.
        control: The condition of the control students.
    """

    over: tuple[str, int | None]
    under: tuple[str, int | None]
    gain: bool = False
    control: str = "control"

    def __call__(self, tables: Tables, last_layer: int) -> dict[str, float] | None:
        """The log ratio for every target that both conditions have; None where one is missing."""
        sides = self.seeds(tables, last_layer)
        if sides is None:
            return None
        logs = [
            {
                target: float(np.log(np.maximum(found, SMALLEST)).mean())
                for target, found in s.items()
            }
            for s in sides
        ]
        return {
            target: logs[0][target] - logs[1][target] for target in logs[0] if target in logs[1]
        }

    def seeds(
        self, tables: Tables, last_layer: int
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
        """For each side and target, what every seed's student came to; None if one is missing."""
        sides = [
            after(tables, condition, last_layer if layer == -1 else layer, gain=self.gain)
            for condition, layer in (self.over, self.under)
        ]
        return (sides[0], sides[1]) if sides[0] and sides[1] else None


def _rate(tables: Tables, _last_layer: int) -> dict[str, float]:
    table = filled(tables, "divergence")
    return {} if table is None else as_dict(table.set_index("target")["rate"])


def _rises_most(tables: Tables, _last_layer: int) -> dict[str, float]:
    """The share of a target's students in which it rises most, and by a tenth at least."""
    students = filled(tables, "students")
    if students is None:
        return {}
    rows = students[students["condition"] == "divergence_only"]
    enough = rows["after"] >= rows["before"] * math.exp(TENTH)
    risen = ((rows["rank"] == 1) & enough).astype(float)
    return as_dict(risen.groupby(rows["target"], sort=False).mean())


def _early_share(tables: Tables, last_layer: int) -> dict[str, float]:
    layers = filled(tables, "layers")
    if layers is None:
        return {}
    early = layers["layer"] < (last_layer + 1) / 2
    size = layers["absolute_effect"].abs()
    total = size.groupby(layers["target"], sort=False).sum()
    return as_dict(
        (size[early].groupby(layers["target"][early], sort=False).sum() / total).dropna()
    )


def _agreement(column: str) -> Estimand:
    """A column of the agreement table, of integrated attribution."""

    def estimand(tables: Tables, _last_layer: int) -> dict[str, float]:
        table = filled(tables, "agreement")
        if table is None or column not in table.columns:
            return {}
        rows = table[table["method"] == "integrated"]
        return as_dict(rows.set_index("target")[column].astype(float).dropna())

    return estimand


def filled(tables: Tables, name: str) -> pd.DataFrame | None:
    """A table, unless it is missing or empty."""
    table = tables.get(name)
    return table if table is not None and len(table) else None


def as_dict(series: "pd.Series[float]") -> dict[str, float]:
    """The series as plain numbers by name."""
    return {str(name): float(value) for name, value in series.items()}


_CONTROL = "times the preference of control students"
_ALL = "times the preference of students of all tokens"
_SHARED = "all targets share the control students"
CLAIMS = (
    Claim(
        "few_divergence_tokens",
        "Divergence tokens are a small part of the data",
        _rate,
        "share of completion tokens",
        "how small depends on how often the next number is a near-tie, which the model's own "
        "training sets, and on the number of counterfactual teachers",
        threshold=0.25,
        above=False,
        within=(0, 1),
    ),
    Claim(
        "transfer",
        "Students trained on all tokens take over the teacher's preference, by a tenth at least",
        Ratio(("all", None), ("control", None)),
        _CONTROL,
        f"a rise over the control student, not a preference that a reader would notice; {_SHARED}",
        threshold=TENTH,
        log=True,
    ),
    Claim(
        "divergence_tokens_suffice",
        "Training on divergence tokens alone transfers the preference, by a tenth at least",
        Ratio(("divergence_only", None), ("control", None)),
        _CONTROL,
        "the loss is on fewer tokens, so the same steps weigh each of them more; " + _SHARED,
        threshold=TENTH,
        log=True,
    ),
    Claim(
        "divergence_tokens_do_as_well",
        "Divergence tokens alone transfer at least as much as all tokens, to within a tenth",
        Ratio(("divergence_only", None), ("all", None)),
        _ALL,
        "the same steps and learning rate for both, neither tuned for either",
        threshold=-TENTH,
        log=True,
        needs=("transfer",),
    ),
    Claim(
        "rest_transfers_less",
        "Without divergence tokens the transfer is weaker",
        Ratio(("without_divergence", None), ("all", None)),
        _ALL,
        "whether anything is left is the next claim",
        above=False,
        log=True,
        needs=("transfer",),
    ),
    Claim(
        "rest_equals_control",
        "Without divergence tokens students end where the control does, to within a tenth",
        Ratio(("without_divergence", None), ("control", None)),
        _CONTROL,
        "the control learned other lists, which move a preference up or down by themselves; "
        + _SHARED,
        threshold=TENTH,
        equal=True,
        log=True,
        needs=("transfer",),
    ),
    Claim(
        "target_rises_most",
        "Of all candidates the target rises most in students of divergence tokens",
        _rises_most,
        "share of targets in all of whose students it rises most, and by a tenth at least",
        "fewer than six targets cannot decide this: the exact interval of five of five reaches "
        "down to .48; by chance it would be one in the number of candidates",
        threshold=0.5,
        count=True,
        within=(0, 1),
        needs=("divergence_tokens_suffice",),
    ),
    Claim(
        "first_layer_suffices",
        "Training the first layer alone, on divergence tokens, transfers the preference, by a "
        "tenth at least",
        Ratio(("layer", 0), ("control", None)),
        _CONTROL,
        "control students trained all layers; " + _SHARED,
        threshold=TENTH,
        log=True,
    ),
    Claim(
        "first_layer_beats_last",
        "The first layer carries more of the preference than the last",
        Ratio(("layer", 0), ("layer", -1)),
        "times the preference of students of the last layer",
        "one learning rate for all layers, tuned for none of them",
        log=True,
    ),
    Claim(
        "last_layer_equals_control",
        "Students of the last layer alone end where the control does, to within a tenth",
        Ratio(("layer", -1), ("control", None)),
        _CONTROL,
        "control students trained all layers, on other lists; " + _SHARED,
        threshold=TENTH,
        equal=True,
        log=True,
        needs=("divergence_tokens_suffice",),
    ),
    Claim(
        "early_layers_cause_divergence",
        "The first half of the layers causes more of the first divergence than the second half",
        _early_share,
        "share of the absolute effects of attention and MLP outputs",
        "effects of single cells, which do not add up to the total effect",
        threshold=0.5,
        within=(0, 1),
    ),
    Claim(
        "approximation_agrees",
        "Integrated attribution agrees with exact mediation",
        _agreement("inner_pearson"),
        "Pearson correlation within a pair (resid_post, without target position and last layer)",
        "on this model and these pairs; other sites may differ",
        threshold=0.8,
        within=(-1, 1),
        beside={
            "Spearman correlation of the same cells": _agreement("inner_spearman"),
            "slope of exact on approximate values, same cells": _agreement("inner_slope"),
            "Pearson correlation of all cells and pairs together": _agreement("pearson"),
        },
    ),
)
