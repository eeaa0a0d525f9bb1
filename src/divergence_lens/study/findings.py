"""Findings: every claim with its estimate, its interval over targets, and its verdict.

A claim is *supported* if the whole interval is beyond its threshold, *not supported* if the whole
interval is on the other side, and *unclear* otherwise, also if nothing was measured. The claims and
thresholds are fixed in `claims` and `further_claims`.

The intervals treat targets as independent. They are not quite: all targets share the control
students, and the preferences of one student sum to one.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from divergence_lens._utils.statistics import (
    LEVEL,
    bootstrap_interval,
    exact_interval,
    t_interval,
)
from divergence_lens._utils.tables import preview
from divergence_lens.study.claims import CLAIMS, Claim
from divergence_lens.study.estimands import SMALLEST, Ratio, Tables, after
from divergence_lens.study.further_claims import FURTHER_CLAIMS

Verdict = Literal["supported", "not supported", "unclear"]

ALL_CLAIMS = (*CLAIMS, *FURTHER_CLAIMS)
_RESAMPLES = 2000


@dataclass(frozen=True, repr=False)
class Finding:
    """A claim with its estimate and verdict.

    Attributes:
        id: The kind of teachers and the claim's id, such as "finetuned/transfer".
        claim: The claim in words.
        measured: Mean of the estimand over targets; NaN if nothing was measured.
        interval: Its 95 % interval over targets (Student's t, or exact binomial for shares of
            targets).
        verdict: The verdict.
        rule: The rule in words.
        unit: The unit of the estimand.
        caveat: A limitation to keep in mind.
        values: The estimand of every target.
        related: Other figures for the claim, as means over targets.
        difference: For a ratio of preferences: the same comparison as a difference, mean over
            targets.
        difference_interval: Its 95 % interval over targets (Student's t).
        bootstrap_interval: For a ratio: its 95 % bootstrap interval over targets and, within them,
            seeds. The verdict does not use it, because it is too narrow with few targets.
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
    related: Mapping[str, float] = field(default_factory=dict)
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    bootstrap_interval: tuple[float, float] | None = None
    control: float | None = None

    def __repr__(self) -> str:
        """The verdict, the estimate, and the claim."""
        low, high = self.interval
        return (
            f"Finding({self.id!r}, {self.verdict}: {self.measured:.3g} [{low:.3g}, {high:.3g}], "
            f"{self.n} targets; {self.claim})"
        )

    def _repr_html_(self) -> str:
        return preview(self, pd.DataFrame({self.unit: dict(self.values)}))

    @property
    def n(self) -> int:
        """Number of targets with a finite estimand."""
        return sum(math.isfinite(value) for value in self.values.values())

    def to_dict(self) -> dict[str, Any]:
        """The finding as in `results.json`; numbers that are not finite become None."""
        names = (
            *("id", "claim", "measured", "unit", "interval", "n", "verdict", "rule", "caveat"),
            *("values", "related", "difference", "difference_interval", "bootstrap_interval"),
            "control",
        )
        return {name: _to_json(getattr(self, name)) for name in names}


def decide(low: float, high: float, threshold: float, *, above: bool = True) -> Verdict:
    """Compare an interval with a threshold.

    Args:
        low: Lower end of the interval.
        high: Upper end.
        threshold: The threshold.
        above: Whether the claim says that the number is above the threshold, or below it.

    Returns:
        "unclear" if the threshold is inside the interval, or if the interval is not finite.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "unclear"
    if not above:
        low, high, threshold = -high, -low, -threshold
    if low > threshold:
        return "supported"
    return "not supported" if high < threshold else "unclear"


def decide_equal(low: float, high: float, margin: float) -> Verdict:
    """Test equivalence: whether the interval is between -margin and margin.

    Returns:
        "supported" if all of it is, "not supported" if none of it is, "unclear" otherwise. An
        interval that contains zero is not sufficient.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "unclear"
    if -margin < low and high < margin:
        return "supported"
    return "not supported" if low > margin or high < -margin else "unclear"


def judge(
    tables: Mapping[str, pd.DataFrame],
    *,
    last_layer: int,
    lora: Collection[str] = (),
    claims: Sequence[Claim] = ALL_CLAIMS,
    required: int = 0,
) -> list[Finding]:
    """Judge every claim for every kind of teacher in the tables.

    Args:
        tables: `divergence`, `students`, `layers`, `agreement` and `mechanism`, with the columns of
            `results.json`, and any others with a column `kind`. Empty ones may lack columns.
        last_layer: Index of the model's last layer.
        lora: Kinds of teachers whose students all train with LoRA; see `config.lora_kinds`. Claims
            that compare LoRA with full training are omitted for them.
        claims: The claims.
        required: Number of targets without which a claim is unclear, whatever its interval.

    Returns:
        One finding per claim and kind. A claim without data is "unclear", or omitted if it is
        optional.
    """
    nonempty = {name: table for name, table in tables.items() if "kind" in table.columns}
    kinds = dict.fromkeys(str(kind) for table in nonempty.values() for kind in table["kind"])
    findings: list[Finding] = []
    for kind in kinds:
        of_kind = {name: table[table["kind"] == kind] for name, table in nonempty.items()}
        own: dict[str, Finding] = {}
        for claim in claims:
            if claim.full_training and kind in lora:
                continue
            finding = _judge_claim(claim, kind, of_kind, last_layer, own, claims)
            if 0 < finding.n < required:
                partly = f"measured for {finding.n} of {required} targets"
                caveat = f"{partly}, so it is unclear; {finding.caveat}"
                finding = replace(finding, verdict="unclear", caveat=caveat)
            if finding.n or not claim.optional:
                own[claim.id] = finding
        findings += own.values()
    return findings


def _judge_claim(  # noqa: PLR0917 - the loop variables of `judge`
    claim: Claim,
    kind: str,
    tables: Tables,
    last_layer: int,
    earlier: Mapping[str, Finding],
    claims: Sequence[Claim],
) -> Finding:
    """Judge one claim, given the findings of the claims that it needs."""
    values = claim.estimand(tables, last_layer)
    mean, low, high = _interval(claim, values)
    if claim.equal:
        verdict = decide_equal(low, high, claim.threshold)
    else:
        verdict = decide(low, high, claim.threshold, above=claim.above)
    caveat = claim.caveat
    for name in claim.needs:
        needed = earlier[name].verdict
        if needed != "supported":
            verdict = "unclear"
            caveat = (
                f"it presupposes a claim that is {needed} here ({_words(name, claims)}); {caveat}"
            )
    # Intervals are computed on the log scale and shown as ratios.
    shown = _exp if claim.log else float
    return Finding(
        id=f"{kind}/{claim.id}",
        claim=f"{claim.claim} ({kind} teachers)",
        measured=shown(mean),
        interval=(shown(low), shown(high)),
        verdict=verdict,
        rule=_rule(claim, claims),
        unit=claim.unit,
        caveat=caveat if values else f"nothing was measured; {claim.caveat}",
        values={name: shown(value) for name, value in values.items()},
        related={
            words: t_interval(list(estimand(tables, last_layer).values()))[0]
            for words, estimand in claim.related.items()
        },
        **_difference(claim, tables, last_layer),
    )


def _rule(claim: Claim, claims: Sequence[Claim]) -> str:
    """The rule in words."""
    shown = math.exp if claim.log else float
    if claim.equal:
        place = f"between {shown(-claim.threshold):.3g} and {shown(claim.threshold):.3g}"
    else:
        place = f"{'above' if claim.above else 'below'} {shown(claim.threshold):.3g}"
    conditions = [
        f"; unclear unless this is supported: {_words(name, claims)}" for name in claim.needs
    ]
    return f"supported if the whole interval is {place}{''.join(conditions)}"


def _words(name: str, claims: Sequence[Claim]) -> str:
    """A claim in words, for use inside a sentence."""
    claim = next(other.claim for other in claims if other.id == name)
    return f"{claim[:1].lower()}{claim[1:]}"


def _interval(claim: Claim, values: Mapping[str, float]) -> tuple[float, float, float]:
    """Mean, lower and upper end, on the scale of the estimand."""
    finite = [value for value in values.values() if math.isfinite(value)]
    if claim.count and finite:
        hits = sum(value >= 1 for value in finite)
        return (hits / len(finite), *exact_interval(hits, len(finite)))
    mean, low, high = t_interval(finite)
    if len(set(finite)) == 1:
        # Identical values say nothing about their spread, and t would give a width of zero.
        low, high = -math.inf, math.inf
    smallest, largest = claim.within
    return mean, max(low, smallest), min(high, largest)


def _difference(claim: Claim, tables: Tables, last_layer: int) -> dict[str, Any]:
    """The fields of a finding about a ratio of preferences; empty for other estimands."""
    if not isinstance(claim.estimand, Ratio):
        return {}
    over, under = claim.estimand.seeds(tables, last_layer)
    pairs = [(over[target], under[target]) for target in over if target in under]
    if not pairs:
        return {}
    mean, low, high = t_interval([float(np.mean(a) - np.mean(b)) for a, b in pairs])
    controls = [np.mean(seeds) for seeds in after(tables, "control").values()]
    return {
        "difference": mean,
        "difference_interval": (low, high),
        "bootstrap_interval": _bootstrap(pairs),
        "control": float(np.mean(controls)) if controls else None,
    }


def _bootstrap(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Bootstrap interval of a ratio of geometric means: resample targets, then their seeds.

    Args:
        pairs: For each target the preferences of the numerator and of the denominator, `[seeds]`.
    """

    def resample(generator: np.random.Generator) -> np.ndarray:
        targets = generator.integers(len(pairs), size=(_RESAMPLES, len(pairs)))
        ratios = np.empty((_RESAMPLES, len(pairs)))  # log ratios
        for index, (over, under) in enumerate(pairs):
            logs = [np.log(np.maximum(side, SMALLEST)) for side in (over, under)]
            drawn = [
                generator.integers(len(side), size=(_RESAMPLES, len(pairs), len(side)))
                for side in logs
            ]
            # Students of one seed saw the lists in the same order, so seeds are paired.
            if len(over) == len(under):
                drawn[1] = drawn[0]
            means = [side[seeds].mean(-1) for side, seeds in zip(logs, drawn, strict=True)]
            # A target that is drawn twice gets its own seeds each time.
            ratios = np.where(targets == index, means[0] - means[1], ratios)  # [resamples, targets]
        result: np.ndarray = np.exp(ratios.mean(1))  # [resamples]
        return result

    low, high = bootstrap_interval(resample, level=LEVEL, seed=0)
    return float(low), float(high)


def _exp(value: float) -> float:
    """The exponential, infinite instead of an overflow."""
    return math.inf if value > 700 else math.exp(value)


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _to_json(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
