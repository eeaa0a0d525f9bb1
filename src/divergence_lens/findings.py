"""The paper's claims, what measures each, and the rule that decides, fixed before anything runs.

Each claim has one number per target (an estimand that is positive where the claim holds, or is
compared with a threshold), a 95 % interval over targets, and one rule: *supported* if the whole
interval lies beyond the threshold, *not supported* if it lies on the other side, *unclear*
otherwise, also where nothing was measured. Claims are those of Schrodi et al. (arXiv 2509.23886)
and Cloud et al. (arXiv 2507.14805), put as they can be tested in miniature.

The intervals take targets as independent. They are not quite: all targets share the control
students, and the preferences of one student sum to one.

What has changed in the rules since the first run, and why, is told in `claims`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from divergence_lens._intervals import exact_interval, t_interval
from divergence_lens.claims import CLAIMS, Claim, Tables, agreement_column

__all__ = ["Finding", "decide", "decide_equal", "judge", "t_interval"]

Verdict = Literal["supported", "not supported", "unclear"]


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
        One finding per claim and kind. A claim for which the tables hold nothing is "unclear",
        or left out if it is optional.
    """
    filled = {name: table for name, table in tables.items() if "kind" in table.columns}
    kinds = dict.fromkeys(str(kind) for table in filled.values() for kind in table["kind"])
    findings: list[Finding] = []
    for kind in kinds:
        of_kind = {name: table[table["kind"] == kind] for name, table in filled.items()}
        own: dict[str, Finding] = {}
        for claim in CLAIMS:
            found = _judged(claim, kind, of_kind, last_block, own)
            if found.n or not claim.optional:
                own[claim.id] = found
        findings += own.values()
    return findings


def _judged(
    claim: Claim, kind: str, tables: Tables, last_block: int, before: Mapping[str, Finding]
) -> Finding:
    values = claim.estimand(tables, last_block) or {}
    mean, low, high = _interval(claim, values)
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
        rule=_rule(claim),
        unit=claim.unit,
        caveat=claim.caveat if values else f"nothing was measured; {claim.caveat}",
        values={name: shown(value) for name, value in values.items()},
        beside={
            words: t_interval(list(agreement_column(table, column).values()))[0]
            for words, column in claim.beside.items()
        },
    )


def _rule(claim: Claim) -> str:
    """The rule in words."""
    shown = math.exp if claim.log else float
    if claim.equal:
        ends = f"{shown(-claim.threshold):.3g} and {shown(claim.threshold):.3g}"
        rule = f"supported if the whole interval lies between {ends}"
    else:
        direction = "above" if claim.above else "below"
        rule = f"supported if the whole interval lies {direction} {shown(claim.threshold):.3g}"
    for name in claim.needs:
        needed = next(other.claim for other in CLAIMS if other.id == name)
        rule += f"; unclear unless this is supported: {needed[:1].lower()}{needed[1:]}"
    return rule


def _interval(claim: Claim, values: Mapping[str, float]) -> tuple[float, float, float]:
    """Measured, lower and upper end, on the scale of the estimand."""
    found = [value for value in values.values() if math.isfinite(value)]
    if claim.count and found:
        hits = sum(value >= 1 for value in found)
        return (hits / len(found), *exact_interval(hits, len(found)))
    mean, low, high = t_interval(found)
    if len(set(found)) == 1:
        # Values that do not differ at all say nothing about how they vary.
        low, high = -math.inf, math.inf
    smallest, largest = claim.within
    return mean, max(low, smallest), min(high, largest)


def _exponential(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
