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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from divergence_lens._utils.statistics import (
    LEVEL,
    bootstrap_interval,
    exact_interval,
    t_interval,
)
from divergence_lens.study.claims import CLAIMS, SMALLEST, Claim, Ratio, Tables
from divergence_lens.study.further_claims import FURTHER_CLAIMS

__all__ = ["Finding", "decide", "decide_equal", "judge", "t_interval"]

Verdict = Literal["supported", "not supported", "unclear"]

ALL_CLAIMS = (*CLAIMS, *FURTHER_CLAIMS)
_RESAMPLES = 2000
_OF_RATIOS = ("difference", "difference_interval", "resampled", "control")


@dataclass(frozen=True, repr=False)
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
        difference: For a ratio of preferences: the same comparison as a difference, mean over
            targets.
        difference_interval: Its 95 % interval over targets (Student's t).
        resampled: For a ratio: its 95 % bootstrap interval over targets and, within them, seeds. It
            is shown beside the other and decides nothing: with few targets it is too narrow.
        control: For a ratio: mean preference of the control students.
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
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    resampled: tuple[float, float] | None = None
    control: float | None = None

    def __repr__(self) -> str:
        """The verdict, what was measured, and the claim."""
        low, high = self.interval
        return (
            f"Finding({self.id!r}, {self.verdict}: {self.measured:.3g} [{low:.3g}, {high:.3g}], "
            f"{self.n} targets; {self.claim})"
        )

    def _repr_html_(self) -> str:
        import pandas as pd

        from divergence_lens._utils.tables import preview

        return preview(self, pd.DataFrame({self.unit: dict(self.values)}))

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
        } | {name: _plain(getattr(self, name)) for name in _OF_RATIOS}


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


def judge(
    tables: Mapping[str, pd.DataFrame], *, last_layer: int, lora: Collection[str] = ()
) -> list[Finding]:
    """Decide every claim for every kind of teacher in the tables.

    Args:
        tables: `divergence`, `students`, `layers`, `agreement` and `mechanism`, in the layout of
            `results.json`, and any others with a column `kind`. Empty ones may lack their columns.
        last_layer: Number of the model's last layer.
        lora: Kinds of teachers whose students are trained with LoRA where no condition says
            otherwise; see `study_config.lora_kinds`. Claims that compare LoRA with full training
            are left out for them: both sides would be LoRA.

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
        for claim in ALL_CLAIMS:
            if claim.full_training and kind in lora:
                continue
            found = _judged(claim, kind, of_kind, last_layer, own)
            if found.n or not claim.optional:
                own[claim.id] = found
        findings += own.values()
    return findings


def _judged(
    claim: Claim, kind: str, tables: Tables, last_layer: int, before: Mapping[str, Finding]
) -> Finding:
    values = claim.estimand(tables, last_layer) or {}
    mean, low, high = _interval(claim, values)
    if claim.equal:
        verdict = decide_equal(low, high, claim.threshold)
    else:
        verdict = decide(low, high, claim.threshold, above=claim.above)
    caveat = claim.caveat
    for name in claim.needs:
        if before[name].verdict != "supported":
            verdict = "unclear"
            caveat = (
                f"it presupposes what is {before[name].verdict} here ({_words(name)}); {caveat}"
            )
    shown = _exponential if claim.log else float
    return Finding(
        id=f"{kind}/{claim.id}",
        claim=f"{claim.claim} ({kind} teachers)",
        measured=shown(mean),
        interval=(shown(low), shown(high)),
        verdict=verdict,
        rule=_rule(claim),
        unit=claim.unit,
        caveat=caveat if values else f"nothing was measured; {claim.caveat}",
        values={name: shown(value) for name, value in values.items()},
        beside={
            words: t_interval(list((figure(tables, last_layer) or {}).values()))[0]
            for words, figure in claim.beside.items()
        },
        **_difference(claim, tables, last_layer),
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
        rule += f"; unclear unless this is supported: {_words(name)}"
    return rule


def _words(name: str) -> str:
    """A claim in words, to be put into a sentence."""
    claim = next(other.claim for other in ALL_CLAIMS if other.id == name)
    return f"{claim[:1].lower()}{claim[1:]}"


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


def _difference(claim: Claim, tables: Tables, last_layer: int) -> dict[str, Any]:
    """What stands beside a ratio of preferences; nothing for another estimand."""
    if not isinstance(claim.estimand, Ratio):
        return {}
    sides = claim.estimand.seeds(tables, last_layer)
    if sides is None:
        return {}
    over, under = sides
    targets = [target for target in over if target in under]
    if not targets:
        return {}
    mean, low, high = t_interval(
        [float(np.mean(over[target]) - np.mean(under[target])) for target in targets]
    )
    control = Ratio((claim.estimand.control, None), (claim.estimand.control, None))
    controls = control.seeds(tables, last_layer)
    return {
        "difference": mean,
        "difference_interval": (low, high),
        "resampled": _resampled([(over[target], under[target]) for target in targets]),
        "control": None
        if controls is None
        else float(np.mean([np.mean(found) for found in controls[0].values()])),
    }


def _resampled(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Bootstrap interval of a ratio of geometric means: targets are drawn, then seeds."""

    def resample(generator: np.random.Generator) -> np.ndarray:
        targets = generator.integers(len(pairs), size=(_RESAMPLES, len(pairs)))
        gains = np.empty((_RESAMPLES, len(pairs)))
        for index, (over, under) in enumerate(pairs):
            logs = [np.log(np.maximum(side, SMALLEST)) for side in (over, under)]
            seeds = [
                generator.integers(len(side), size=(_RESAMPLES, len(pairs), len(side)))
                for side in logs
            ]
            # Students of one seed saw the lists in one order, so they are drawn as pairs.
            if len(over) == len(under):
                seeds[1] = seeds[0]
            means = [side[drawn].mean(-1) for side, drawn in zip(logs, seeds, strict=True)]
            gains = np.where(targets == index, means[0] - means[1], gains)
        ratios: np.ndarray = np.exp(gains.mean(1))
        return ratios

    low, high = bootstrap_interval(resample, level=LEVEL, seed=0)
    return float(low), float(high)


def _exponential(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)


def _plain(value: float | tuple[float, float] | None) -> Any:
    if isinstance(value, tuple):
        return [_number(end) for end in value]
    return None if value is None else _number(value)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
