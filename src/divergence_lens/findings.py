"""The paper's claims, what measures each, and the rule that decides, fixed before anything runs.

Each claim has one number per target (an estimand that is positive where the claim holds, or is
compared with a threshold), a 95 % interval over targets, and one rule: *supported* if the whole
interval lies beyond the threshold, *not supported* if it lies on the other side, *unclear*
otherwise. Claims are those of Schrodi et al. (arXiv 2509.23886) and Cloud et al. (arXiv
2507.14805), put as they can be tested in miniature.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

Verdict = Literal["supported", "not supported", "unclear"]

LEVEL = 0.95
_SMALLEST = 1e-6


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
    for kind in dict.fromkeys(tables["divergence"]["kind"]):
        of_kind = {
            name: table[table["kind"] == kind] for name, table in tables.items() if len(table)
        }
        for claim in _CLAIMS:
            values = claim.estimand(of_kind, last_block)
            if values is None or not len(values):
                continue
            mean, low, high = t_interval(list(values.values()))
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
                )
            )
    return findings


Tables = Mapping[str, pd.DataFrame]
Estimand = Callable[[Tables, int], dict[str, float] | None]


@dataclass(frozen=True)
class _Claim:
    id: str
    claim: str
    estimand: Estimand
    unit: str
    caveat: str
    threshold: float = 0.0
    above: bool = True
    log: bool = False


def _after(tables: Tables, condition: str, block: int | None = None) -> pd.Series | None:
    """Mean log preference after training per target, over seeds."""
    students = tables.get("students")
    if students is None:
        return None
    rows = students[students["condition"] == condition]
    if block is not None:
        rows = rows[rows["block"] == block]
    if not len(rows):
        return None
    logs = np.log(rows["after"].clip(lower=_SMALLEST))
    return logs.groupby(rows["target"], sort=False).mean()


def _ratio(over: tuple[str, int | None], under: tuple[str, int | None]) -> Estimand:
    """Log ratio of the preference after training under two conditions; -1 is the last block."""

    def estimand(tables: Tables, last_block: int) -> dict[str, float] | None:
        sides = [
            _after(tables, condition, last_block if block == -1 else block)
            for condition, block in (over, under)
        ]
        if sides[0] is None or sides[1] is None:
            return None
        return _as_dict((sides[0] - sides[1]).dropna())

    return estimand


def _rate(tables: Tables, _last_block: int) -> dict[str, float] | None:
    return _as_dict(tables["divergence"].set_index("target")["rate"])


def _first_rank(tables: Tables, _last_block: int) -> dict[str, float] | None:
    students = tables.get("students")
    if students is None:
        return None
    rows = students[students["condition"] == "divergence_only"]
    return _as_dict((rows["rank"] == 1).groupby(rows["target"], sort=False).mean().astype(float))


def _early_share(tables: Tables, last_block: int) -> dict[str, float] | None:
    layers = tables.get("layers")
    if layers is None:
        return None
    early = layers["layer"] < (last_block + 1) / 2
    size = layers["absolute_effect"].abs()
    total = size.groupby(layers["target"], sort=False).sum()
    return _as_dict(
        (size[early].groupby(layers["target"][early], sort=False).sum() / total).dropna()
    )


def _agreement(tables: Tables, _last_block: int) -> dict[str, float] | None:
    agreement = tables.get("agreement")
    if agreement is None:
        return None
    rows = agreement[agreement["method"] == "integrated"]
    return _as_dict(rows.set_index("target")["pearson"])


def _as_dict(series: pd.Series) -> dict[str, float]:
    return {str(name): float(value) for name, value in series.items()}


_TIMES = "times the preference of the other students"
_CLAIMS = (
    _Claim(
        "few_divergence_tokens",
        "Divergence tokens are a small part of the data",
        _rate,
        "share of completion tokens",
        "how small depends on how often the next number is a near-tie, which the world sets",
        threshold=0.25,
        above=False,
    ),
    _Claim(
        "transfer",
        "Students trained on all tokens take over the teacher's preference",
        _ratio(("all", None), ("control", None)),
        _TIMES.replace("the other", "control"),
        "a rise over the control student, not a preference that a reader would notice",
        log=True,
    ),
    _Claim(
        "divergence_tokens_suffice",
        "Training on divergence tokens alone transfers the preference",
        _ratio(("divergence_only", None), ("control", None)),
        _TIMES.replace("the other", "control"),
        "the loss is on fewer tokens, so the same steps weigh each of them more",
        log=True,
    ),
    _Claim(
        "divergence_tokens_do_as_well",
        "Divergence tokens alone transfer at least as much as all tokens, to within a tenth",
        _ratio(("divergence_only", None), ("all", None)),
        "times the preference of students of all tokens",
        "the same steps and learning rate for both, neither tuned for either",
        threshold=math.log(0.9),
        log=True,
    ),
    _Claim(
        "rest_transfers_less",
        "Without divergence tokens the transfer is weaker",
        _ratio(("without_divergence", None), ("all", None)),
        "times the preference of students of all tokens",
        "whether anything is left is read off the table, against the control",
        above=False,
        log=True,
    ),
    _Claim(
        "target_rises_most",
        "Of all candidates the target rises most in students of divergence tokens",
        _first_rank,
        "share of students in which it does",
        "chance is one in the number of candidates",
        threshold=0.5,
    ),
    _Claim(
        "first_block_suffices",
        "Training the first block alone, on divergence tokens, transfers the preference",
        _ratio(("block", 0), ("control", None)),
        _TIMES.replace("the other", "control"),
        "control students trained all blocks",
        log=True,
    ),
    _Claim(
        "first_block_beats_last",
        "The first block carries more of the preference than the last",
        _ratio(("block", 0), ("block", -1)),
        "times the preference of students of the last block",
        "one learning rate for all blocks",
        log=True,
    ),
    _Claim(
        "early_layers_cause_divergence",
        "The first half of the layers causes more of the first divergence than the second half",
        _early_share,
        "share of the absolute effects of attention and MLP outputs",
        "effects of single cells, which do not add up to the total effect",
        threshold=0.5,
    ),
    _Claim(
        "approximation_agrees",
        "Integrated attribution agrees with exact mediation",
        _agreement,
        "Pearson correlation over cells (resid_post)",
        "on this model and these pairs; other sites may differ",
        threshold=0.8,
    ),
)


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


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
