"""The paper's claims, what measures each, and the rule that decides, fixed before anything runs.

Each claim has one number per target (an estimand that is positive where the claim holds, or is
compared with a threshold), a 95 % interval over targets, and one rule: *supported* if the whole
interval lies beyond the threshold, *not supported* if it lies on the other side, *unclear*
otherwise. Claims are those of Schrodi et al. (arXiv 2509.23886) and Cloud et al. (arXiv
2507.14805), put as they can be tested in miniature.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from divergence_lens.claims import CLAIMS, SMALLEST, Claim, Ratio, Tables

Verdict = Literal["supported", "not supported", "unclear"]

LEVEL = 0.95
_RESAMPLES = 2000
_BESIDE = ("difference", "difference_interval", "resampled", "control")


@dataclass(frozen=True)
class Finding:
    """One claim and what was measured.

    Attributes:
        id: A short name, with the kind of teacher before it.
        claim: The claim in words.
        measured: Mean of the estimand over targets.
        interval: Its 95 % interval over targets (Student's t).
        verdict: What the rule says.
        rule: The rule in words.
        unit: What the number is.
        caveat: What it does not show.
        values: The estimand for every target.
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
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    resampled: tuple[float, float] | None = None
    control: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `results.json` holds it; numbers that are missing become None."""
        return {
            "id": self.id,
            "claim": self.claim,
            "measured": _number(self.measured),
            "interval": [_number(end) for end in self.interval],
            "verdict": self.verdict,
            "rule": self.rule,
            "unit": self.unit,
            "caveat": self.caveat,
            "values": {name: _number(value) for name, value in self.values.items()},
        } | {name: _plain(getattr(self, name)) for name in _BESIDE}


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


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Mean, and its interval by Student's t over the values.

    With few targets this is the honest choice: a bootstrap over four of them is far too narrow.

    Returns:
        Mean, lower and upper end; the ends are infinite for fewer than two values, and all are NaN
        for none.
    """
    found = np.asarray([value for value in values if math.isfinite(value)], dtype=float)
    if not len(found):
        return math.nan, math.nan, math.nan
    mean = float(found.mean())
    if len(found) < 2:
        return mean, -math.inf, math.inf
    reach = (
        _t_quantile(0.5 + level / 2, len(found) - 1) * float(found.std(ddof=1)) / len(found) ** 0.5
    )
    return mean, mean - reach, mean + reach


def judge(tables: Mapping[str, pd.DataFrame], *, last_block: int) -> list[Finding]:
    """Decide every claim for every kind of teacher in the tables.

    Args:
        tables: `divergence`, `students`, `layers` and `agreement`, in the layout of `results.json`.
        last_block: Number of the model's last block.

    Returns:
        One finding per claim and kind. A claim for which a table holds nothing is left out.
    """
    findings = []
    # A study of controls alone has no divergence.
    named = tables["divergence"] if len(tables["divergence"]) else tables["students"]
    for kind in dict.fromkeys(named["kind"]):
        of_kind = {
            name: table[table["kind"] == kind] for name, table in tables.items() if len(table)
        }
        for claim in CLAIMS:
            values = claim.estimand(of_kind, last_block)
            if values is None or not len(values):
                continue
            mean, low, high = t_interval(list(values.values()))
            difference = _difference(claim, of_kind, last_block)
            shown = math.exp if claim.log else float
            direction = "above" if claim.above else "below"
            threshold = shown(claim.threshold)
            findings.append(
                Finding(
                    id=f"{kind}/{claim.id}",
                    claim=f"{claim.claim} ({kind} teachers)",
                    measured=shown(mean),
                    interval=(shown(low), shown(high)),
                    verdict=decide(low, high, claim.threshold, above=claim.above),
                    rule=f"supported if the whole interval lies {direction} {threshold:.3g}",
                    unit=claim.unit,
                    caveat=claim.caveat,
                    values={name: shown(value) for name, value in values.items()},
                    **difference,
                )
            )
    return findings


def _t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t with whole degrees of freedom, by halving the interval."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        if _t_cumulative(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_cumulative(t: float, freedom: int) -> float:
    """P(T <= t) for t >= 0; Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(freedom))
    cosine = math.cos(angle)
    term, total = 1.0, 1.0
    if freedom % 2:
        term = total = cosine
        for k in range(3, freedom, 2):
            term *= cosine**2 * (k - 1) / k
            total += term
        body = angle + (math.sin(angle) * total if freedom > 1 else 0.0)
        return 0.5 + body / math.pi
    for k in range(2, freedom, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 0.5 + math.sin(angle) * total / 2


def _difference(claim: Claim, tables: Tables, last_block: int) -> dict[str, Any]:
    """What stands beside a ratio of preferences; nothing for another estimand."""
    if not isinstance(claim.estimand, Ratio):
        return {}
    sides = claim.estimand.seeds(tables, last_block)
    if sides is None:
        return {}
    over, under = sides
    targets = [target for target in over if target in under]
    mean, low, high = t_interval(
        [float(np.mean(over[target]) - np.mean(under[target])) for target in targets]
    )
    control = Ratio((claim.estimand.control, None), (claim.estimand.control, None))
    controls = control.seeds(tables, last_block)
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
    random = np.random.default_rng(0)
    drawn = random.integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    gains = np.empty((_RESAMPLES, len(pairs)))
    for place, (over, under) in enumerate(pairs):
        logs = [np.log(np.maximum(side, SMALLEST)) for side in (over, under)]
        draws = [random.integers(len(s), size=(_RESAMPLES, len(pairs), len(s))) for s in logs]
        if len(over) == len(under):  # students of one seed saw the lists in one order: a pair
            draws[1] = draws[0]
        means = [side[drawing].mean(-1) for side, drawing in zip(logs, draws, strict=True)]
        gains = np.where(drawn == place, means[0] - means[1], gains)
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(np.exp(gains.mean(1)), [tail, 100 - tail])
    return float(low), float(high)


def _plain(value: float | tuple[float, float] | None) -> Any:
    if isinstance(value, tuple):
        return [_number(end) for end in value]
    return None if value is None else _number(value)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
