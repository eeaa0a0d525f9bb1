"""The paper's claims, what measures each, and the rule that decides, fixed before anything runs.

Each claim has one number per target (an estimand that is positive where the claim holds, or is
compared with a threshold), a 95 % interval over targets, and one rule: *supported* if the whole
interval lies beyond the threshold, *not supported* if it lies on the other side, *unclear*
otherwise, also where nothing was measured. Claims are those of Schrodi et al. (arXiv 2509.23886)
and Cloud et al. (arXiv 2507.14805), put as they can be tested in miniature.

The intervals take targets as independent. They are not quite: all targets share the control
students, and the preferences of one student sum to one.

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
from typing import Any, Literal

import numpy as np
import pandas as pd

from divergence_lens._intervals import exact_interval, t_interval

__all__ = ["Finding", "decide", "decide_equal", "judge"]

Verdict = Literal["supported", "not supported", "unclear"]

TENTH = -math.log(0.9)
"""The one margin, of log ratios: 0.9 times is a tenth less, 1 / 0.9 = 1.11 times a tenth more."""

_SMALLEST = 1e-6


@dataclass(frozen=True)
class Finding:
    """One claim and what was measured.

    Attributes:
        id: A short name, with the kind of teacher before it.
        claim: The claim in words.
        measured: Mean of the estimand over targets; NaN if nothing was measured.
        interval: Its 95 % interval over targets (Student's t; exact binomial for shares of
            targets).
        verdict: What the rule says.
        rule: The rule in words.
        unit: What the number is.
        caveat: What to bear in mind with it.
        values: The estimand for every target.
        beside: Other figures that belong with it, by what they are; means over targets.
    """

    id: str
    claim: str
    measured: float
    interval: tuple[float, float]
    verdict: Verdict
    rule: str
    unit: str
    caveat: str
    values: Mapping[str, float]
    beside: Mapping[str, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """On how many targets it rests."""
        return sum(math.isfinite(value) for value in self.values.values())

    def to_dict(self) -> dict[str, Any]:
        """As `results.json` holds it; numbers that are missing become None."""
        return {
            "id": self.id,
            "claim": self.claim,
            "measured": _number(self.measured),
            "unit": self.unit,
            "interval": [_number(end) for end in self.interval],
            "n": self.n,
            "verdict": self.verdict,
            "rule": self.rule,
            "caveat": self.caveat,
            "values": {name: _number(value) for name, value in self.values.items()},
            "beside": {name: _number(value) for name, value in self.beside.items()},
        }


def decide(low: float, high: float, threshold: float, *, above: bool = True) -> Verdict:
    """The rule: where the interval lies against the threshold.

    Args:
        low: Lower end of the interval.
        high: Upper end.
        threshold: What it is compared with.
        above: Whether the claim says that the number lies above the threshold, or below it.

    Returns:
        "supported", "not supported", or "unclear", also where the interval is not known.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "unclear"
    if not above:
        low, high, threshold = -high, -low, -threshold
    if low > threshold:
        return "supported"
    return "not supported" if high < threshold else "unclear"


def decide_equal(low: float, high: float, margin: float) -> Verdict:
    """The rule of equivalence: whether the interval lies between -margin and margin.

    Returns:
        "supported" if the whole of it does, "not supported" if none of it does, "unclear"
        otherwise, also where the interval is not known. That no difference was seen is not enough.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "unclear"
    if -margin < low and high < margin:
        return "supported"
    return "not supported" if low > margin or high < -margin else "unclear"


def judge(tables: Mapping[str, pd.DataFrame], *, last_block: int) -> list[Finding]:
    """Decide every claim for every kind of teacher in the tables.

    Args:
        tables: `divergence`, `students`, `layers` and `agreement`, in the layout of `results.json`,
            and any others with a column `kind`. Empty ones may lack their columns.
        last_block: Number of the model's last block.

    Returns:
        One finding per claim and kind. A claim for which the tables hold nothing is "unclear".
    """
    filled = {name: table for name, table in tables.items() if "kind" in table.columns}
    kinds = dict.fromkeys(str(kind) for table in filled.values() for kind in table["kind"])
    findings: list[Finding] = []
    for kind in kinds:
        of_kind = {name: table[table["kind"] == kind] for name, table in filled.items()}
        own: dict[str, Finding] = {}
        for claim in _CLAIMS:
            own[claim.id] = _judged(claim, kind, of_kind, last_block, own)
        findings += own.values()
    return findings


Tables = Mapping[str, pd.DataFrame]
Estimand = Callable[[Tables, int], dict[str, float]]


@dataclass(frozen=True)
class _Claim:
    """One claim and its rule.

    Attributes:
        threshold: What the estimand is compared with; of an equivalence, the margin.
        above: Whether it is to lie above.
        log: Whether the estimand is a log ratio, shown as a ratio.
        equal: Whether the claim is that the estimand is zero to within `threshold`.
        count: Whether the claim is about the share of targets whose estimand is 1.
        within: Between which numbers the estimand lies by definition.
        needs: Claims that must be supported for this one to mean anything.
        beside: Columns of the agreement table that are shown beside it.
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
    needs: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """The rule in words."""
        shown = math.exp if self.log else float
        if self.equal:
            ends = f"{shown(-self.threshold):.3g} and {shown(self.threshold):.3g}"
            rule = f"supported if the whole interval lies between {ends}"
        else:
            direction = "above" if self.above else "below"
            rule = f"supported if the whole interval lies {direction} {shown(self.threshold):.3g}"
        for name in self.needs:
            needed = next(claim.claim for claim in _CLAIMS if claim.id == name)
            rule += f"; unclear unless this is supported: {needed[:1].lower()}{needed[1:]}"
        return rule

    def interval(self, values: Mapping[str, float]) -> tuple[float, float, float]:
        """Measured, lower and upper end, on the scale of the estimand."""
        found = [value for value in values.values() if math.isfinite(value)]
        if self.count and found:
            hits = sum(value >= 1 for value in found)
            return (hits / len(found), *exact_interval(hits, len(found)))
        mean, low, high = t_interval(found)
        if len(set(found)) == 1:
            # Values that do not differ at all say nothing about how they vary.
            low, high = -math.inf, math.inf
        smallest, largest = self.within
        return mean, max(low, smallest), min(high, largest)


def _judged(
    claim: _Claim, kind: str, tables: Tables, last_block: int, before: Mapping[str, Finding]
) -> Finding:
    values = claim.estimand(tables, last_block)
    mean, low, high = claim.interval(values)
    if claim.equal:
        verdict = decide_equal(low, high, claim.threshold)
    else:
        verdict = decide(low, high, claim.threshold, above=claim.above)
    if any(before[name].verdict != "supported" for name in claim.needs):
        verdict = "unclear"
    shown = _exponential if claim.log else float
    table = tables.get("agreement", pd.DataFrame())
    return Finding(
        id=f"{kind}/{claim.id}",
        claim=f"{claim.claim} ({kind} teachers)",
        measured=shown(mean),
        interval=(shown(low), shown(high)),
        verdict=verdict,
        rule=claim.rule,
        unit=claim.unit,
        caveat=claim.caveat if values else f"nothing was measured; {claim.caveat}",
        values={name: shown(value) for name, value in values.items()},
        beside={
            words: t_interval(list(_agreement_column(table, column).values()))[0]
            for words, column in claim.beside.items()
        },
    )


def _after(tables: Tables, condition: str, block: int | None = None) -> "pd.Series[float]":
    """Mean log preference after training per target, over seeds."""
    students = _filled(tables, "students")
    if students is None:
        return pd.Series(dtype=float)
    rows = students[students["condition"] == condition]
    if block is not None:
        rows = rows[rows["block"] == block]
    logs = np.log(rows["after"].astype(float).clip(lower=_SMALLEST))
    return logs.groupby(rows["target"], sort=False).mean()


def _ratio(over: tuple[str, int | None], under: tuple[str, int | None]) -> Estimand:
    """Log ratio of the preference after training under two conditions; -1 is the last block."""

    def estimand(tables: Tables, last_block: int) -> dict[str, float]:
        above, below = (
            _after(tables, condition, last_block if block == -1 else block)
            for condition, block in (over, under)
        )
        return _as_dict((above - below).dropna())

    return estimand


def _rate(tables: Tables, _last_block: int) -> dict[str, float]:
    table = _filled(tables, "divergence")
    return {} if table is None else _as_dict(table.set_index("target")["rate"])


def _rises_most(tables: Tables, _last_block: int) -> dict[str, float]:
    """The share of a target's students in which it rises most, and by a tenth at least."""
    students = _filled(tables, "students")
    if students is None:
        return {}
    rows = students[students["condition"] == "divergence_only"]
    enough = rows["after"] >= rows["before"] * math.exp(TENTH)
    risen = ((rows["rank"] == 1) & enough).astype(float)
    return _as_dict(risen.groupby(rows["target"], sort=False).mean())


def _early_share(tables: Tables, last_block: int) -> dict[str, float]:
    layers = _filled(tables, "layers")
    if layers is None:
        return {}
    early = layers["layer"] < (last_block + 1) / 2
    size = layers["absolute_effect"].abs()
    total = size.groupby(layers["target"], sort=False).sum()
    return _as_dict(
        (size[early].groupby(layers["target"][early], sort=False).sum() / total).dropna()
    )


def _agreement(tables: Tables, _last_block: int) -> dict[str, float]:
    return _agreement_column(tables.get("agreement", pd.DataFrame()), "inner_pearson")


def _agreement_column(table: pd.DataFrame, column: str) -> dict[str, float]:
    if not len(table) or column not in table.columns:
        return {}
    rows = table[table["method"] == "integrated"]
    return _as_dict(rows.set_index("target")[column].astype(float).dropna())


def _filled(tables: Tables, name: str) -> pd.DataFrame | None:
    table = tables.get(name)
    return table if table is not None and len(table) else None


def _as_dict(series: "pd.Series[float]") -> dict[str, float]:
    return {str(name): float(value) for name, value in series.items()}


_CONTROL = "times the preference of control students"
_ALL = "times the preference of students of all tokens"
_SHARED = "all targets share the control students"
_CLAIMS = (
    _Claim(
        "few_divergence_tokens",
        "Divergence tokens are a small part of the data",
        _rate,
        "share of completion tokens",
        "how small depends on how often the next number is a near-tie, which the world sets, and "
        "on the number of counterfactual teachers",
        threshold=0.25,
        above=False,
        within=(0, 1),
    ),
    _Claim(
        "transfer",
        "Students trained on all tokens take over the teacher's preference, by a tenth at least",
        _ratio(("all", None), ("control", None)),
        _CONTROL,
        f"a rise over the control student, not a preference that a reader would notice; {_SHARED}",
        threshold=TENTH,
        log=True,
    ),
    _Claim(
        "divergence_tokens_suffice",
        "Training on divergence tokens alone transfers the preference, by a tenth at least",
        _ratio(("divergence_only", None), ("control", None)),
        _CONTROL,
        "the loss is on fewer tokens, so the same steps weigh each of them more; " + _SHARED,
        threshold=TENTH,
        log=True,
    ),
    _Claim(
        "divergence_tokens_do_as_well",
        "Divergence tokens alone transfer at least as much as all tokens, to within a tenth",
        _ratio(("divergence_only", None), ("all", None)),
        _ALL,
        "the same steps and learning rate for both, neither tuned for either",
        threshold=-TENTH,
        log=True,
        needs=("transfer",),
    ),
    _Claim(
        "rest_transfers_less",
        "Without divergence tokens the transfer is weaker",
        _ratio(("without_divergence", None), ("all", None)),
        _ALL,
        "whether anything is left is the next claim",
        above=False,
        log=True,
        needs=("transfer",),
    ),
    _Claim(
        "rest_equals_control",
        "Without divergence tokens students end where the control does, to within a tenth",
        _ratio(("without_divergence", None), ("control", None)),
        _CONTROL,
        "the control learned other lists, which move a preference up or down by themselves; "
        + _SHARED,
        threshold=TENTH,
        equal=True,
        log=True,
        needs=("transfer",),
    ),
    _Claim(
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
    _Claim(
        "first_block_suffices",
        "Training the first block alone, on divergence tokens, transfers the preference, by a "
        "tenth at least",
        _ratio(("block", 0), ("control", None)),
        _CONTROL,
        "control students trained all blocks; " + _SHARED,
        threshold=TENTH,
        log=True,
    ),
    _Claim(
        "first_block_beats_last",
        "The first block carries more of the preference than the last",
        _ratio(("block", 0), ("block", -1)),
        "times the preference of students of the last block",
        "one learning rate for all blocks, tuned for none of them",
        log=True,
    ),
    _Claim(
        "last_block_equals_control",
        "Students of the last block alone end where the control does, to within a tenth",
        _ratio(("block", -1), ("control", None)),
        _CONTROL,
        "control students trained all blocks, on other lists; " + _SHARED,
        threshold=TENTH,
        equal=True,
        log=True,
        needs=("divergence_tokens_suffice",),
    ),
    _Claim(
        "early_layers_cause_divergence",
        "The first half of the layers causes more of the first divergence than the second half",
        _early_share,
        "share of the absolute effects of attention and MLP outputs",
        "effects of single cells, which do not add up to the total effect",
        threshold=0.5,
        within=(0, 1),
    ),
    _Claim(
        "approximation_agrees",
        "Integrated attribution agrees with exact mediation",
        _agreement,
        "Pearson correlation within a pair (resid_post, without target position and last layer)",
        "on this model and these pairs; other sites may differ",
        threshold=0.8,
        within=(-1, 1),
        beside={
            "Spearman correlation of the same cells": "inner_spearman",
            "slope of exact on approximate values, same cells": "inner_slope",
            "Pearson correlation of all cells and pairs together": "pearson",
        },
    ),
)


def _exponential(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
