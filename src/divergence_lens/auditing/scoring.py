"""From contributions of rows to scores, p-values, a verdict, and power.

For each kind of auditor and candidate, with row contributions D_i (see `reading`):

    score = mean of D over the rows - shift,   z = score / sqrt(s^2 / n + e^2)

where s is the standard deviation over the n rows. Lists by the base model give shift and e:

1. Unbiased lists that were filtered (say, to lists of numbers) differ a little from what the base
   writes. This difference is taken to be normal with a standard deviation of `SHIFT` s. Its mean
   given m lists of the base, w times their mean D, is the shift; its variance remains in e^2.
2. If the prompt of the data is unknown, the base writes under other unbiased prompts. These lists
   scatter beyond sampling error: style alone moves the scores. The variance of that is in e^2.
3. p-values are one-sided (Student's t, n - 1 degrees of freedom).
4. Several kinds of auditors: the smallest p-value times their number (Bonferroni).
5. Several candidates: Holm's correction, and Benjamini and Hochberg's false discovery rate.
6. Data that the base model could not have written have no null of this kind, and no verdict (see
   `baseline`).
7. Rows that occur more than once add no evidence, see `independent_rows`.
"""

import math
import warnings
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64

Verdict = Literal["biased", "nothing found", "inconclusive"]

SHIFT = 0.03
"""Typical difference of filtered unbiased lists from the baseline, in units of the spread of rows.
Measured on the bundled tiny model."""


@dataclass(frozen=True, eq=False)
class Null:
    """What unbiased data score.

    Attributes:
        shift: Expected score, in nats.
        variance: Variance of the score beyond sampling error, in nats squared.
    """

    shift: Float64[np.ndarray, "kinds candidates"]
    variance: Float64[np.ndarray, "kinds candidates"]

    def error(
        self, spread: Float64[np.ndarray, "kinds candidates"]
    ) -> Float64[np.ndarray, " kinds"]:
        """Root mean square of the error, in units of the spread of rows."""
        squared = _ratio(self.variance, spread**2)
        root: np.ndarray = np.sqrt(np.where(np.isfinite(squared), squared, 0.0).mean(-1))
        return root


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of all candidates, each with its best kind of auditor.

    Attributes:
        kind: Index of the kind with the largest z.
        score: Mean contribution of a row, minus the shift, in nats.
        z: The score over its standard error.
        p: One-sided p-value, corrected for the number of kinds.
        holm: p corrected by Holm's method for the number of candidates.
        fdr: p corrected by Benjamini and Hochberg's method.
    """

    kind: Int64[np.ndarray, " candidates"]
    score: Float64[np.ndarray, " candidates"]
    z: Float64[np.ndarray, " candidates"]
    p: Float64[np.ndarray, " candidates"]
    holm: Float64[np.ndarray, " candidates"]
    fdr: Float64[np.ndarray, " candidates"]


def score_rows(
    rows: Float64[np.ndarray, "kinds candidates rows"],
    null: Null | None = None,
    *,
    independent: float | None = None,
) -> Scores:
    """Score every candidate.

    Args:
        rows: Contributions of rows, two rows or more.
        null: What unbiased data score; None for zero.
        independent: See `independent_rows`; None for all rows. At 1, z is NaN and p is 1.
    """
    from scipy import stats

    n_kinds, n_candidates, n = rows.shape
    count = n if independent is None else independent
    if null is None:
        null = Null(*np.zeros((2, n_kinds, n_candidates)))
    score = rows.mean(-1) - null.shift  # [kinds, candidates]
    if count > 1:
        # The unbiased variance of weighted rows; with no row twice, that of n - 1.
        variance = rows.var(-1) / (1 - 1 / count)
        z = _ratio(score, np.sqrt(variance / count + null.variance))
        p = stats.t.sf(z, count - 1)
    else:
        z, p = np.full_like(score, np.nan), np.ones_like(score)
    kind = p.argmin(0) if n_kinds > 1 else np.zeros(n_candidates, dtype=np.int64)
    # Where two p-values underflow, or are both 1, the larger z decides.
    kind = np.where(p.min(0) == p.max(0), z.argmax(0), kind)
    best = (kind, np.arange(n_candidates))
    corrected = np.minimum(1.0, n_kinds * p[best])
    return Scores(
        kind.astype(np.int64),
        score[best],
        z[best],
        corrected,
        holm(corrected),
        false_discovery(corrected),
    )


def independent_rows(copies: Int64[np.ndarray, " distinct"]) -> float:
    """Return how many independent rows a mean is worth in which rows occur more than once.

    The mean of n rows, of which m_i are copies of row i, has the variance s^2 sum(m_i^2) / n^2, as
    the mean of n^2 / sum(m_i^2) rows would (Kish, Survey Sampling, 1965).
    """
    total = float(copies.sum())
    return total**2 / float((copies.astype(np.float64) ** 2).sum()) if total else 0.0


def row_spread(
    rows: Float64[np.ndarray, "kinds candidates rows"],
) -> Float64[np.ndarray, "kinds candidates"]:
    """Return the standard deviation over rows."""
    spread: np.ndarray = rows.std(-1, ddof=1)
    return spread


def fit_null(
    neutral: Float64[np.ndarray, "kinds candidates styles lists"],
    spread: Float64[np.ndarray, "kinds candidates"],
    *,
    same_style: bool = False,
) -> Null:
    """Estimate what unbiased data score, from lists of the base model.

    Args:
        neutral: Contributions of these lists, under each of one or more unbiased prompts.
        spread: Standard deviation of the data's rows.
        same_style: Whether these lists were written under the condition of the data. They then
            scatter by sampling error alone, and any excess is noise.
    """
    lists = neutral.shape[-1]
    prior = (SHIFT * spread) ** 2  # [kinds, candidates]
    if lists < 2:
        return Null(np.zeros_like(spread), prior)
    own = neutral.std(-1, ddof=1)  # [kinds, candidates, styles]
    # Normal prior and normal likelihood: the weight of the lists' mean, and what remains unknown.
    noise = (own**2).mean(-1) / (lists * neutral.shape[2])
    weight = np.divide(prior, prior + noise, out=np.ones_like(prior), where=prior + noise > 0)
    scale = np.maximum(spread[..., None], own)
    excess = _ratio(neutral.mean(-1), scale) ** 2 - _ratio(own, scale) ** 2 / lists
    style = np.maximum(0.0 if same_style else excess.mean((1, 2)), np.zeros(len(own)))  # [kinds]
    return Null(
        weight * neutral.mean((2, 3)),
        weight * noise + style[:, None] * scale.max(-1) ** 2,
    )


def bias_strength(
    own: Float64[np.ndarray, "kinds candidates own_rows"],
    spread: Float64[np.ndarray, "kinds candidates"],
) -> Float64[np.ndarray, " kinds"]:
    """Return the mean contribution of a row by a biased teacher, in units of the spread of rows.

    Args:
        own: Contributions of lists by each candidate's own teacher to that candidate.
        spread: Standard deviation of the data's rows.

    Returns:
        One number for each kind, NaN without lists. Where the lists of teachers vary more than the
        data, their spread is the unit.
    """
    if own.shape[-1] < 2:
        return np.full(len(own), np.nan)
    # Few lists for each candidate, so their variance is pooled.
    with warnings.catch_warnings():  # candidates without two lists are left out
        warnings.simplefilter("ignore", RuntimeWarning)
        pooled = np.sqrt(np.nanmean(np.nanvar(own, -1, ddof=1), -1, keepdims=True))  # [kinds, 1]
        unit = np.fmax(spread, pooled)
        strength: np.ndarray = np.nanmean(_ratio(np.nanmean(own, -1), unit), -1)
    return strength


def holm(p: Float64[np.ndarray, " tests"]) -> Float64[np.ndarray, " tests"]:
    """Correct p-values for the family-wise error (Holm, Scand. J. Stat. 6, 1979)."""
    order = np.argsort(p)
    steps = (len(p) - np.arange(len(p))) * p[order]
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected


def false_discovery(p: Float64[np.ndarray, " tests"]) -> Float64[np.ndarray, " tests"]:
    """Correct p-values for the false discovery rate (Benjamini and Hochberg, JRSS B 57, 1995)."""
    order = np.argsort(p)[::-1]
    ranks = np.arange(len(p), 0, -1)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.minimum.accumulate(p[order] * len(p) / ranks))
    return corrected


@dataclass(frozen=True)
class Power:
    """How strong a bias an audit can detect.

    Attributes:
        strength: Mean contribution of a row by an auditor's own teacher to its own candidate, in
            units of the spread of single rows; NaN if it was not measured.
        tau: Error of the null beyond sampling error, see `Null.error`.
        alpha: Level of the family of tests.
        tests: Number of tests, candidates times kinds.
    """

    strength: float
    tau: float
    alpha: float
    tests: int

    def rows_needed(self, share: float, *, power: float = 0.8) -> float:
        """Number of rows needed to detect data of which `share` is by a biased teacher.

        Returns:
            A whole number; infinite if the spread of style hides such a bias in any number of
            rows; NaN if the strength is unknown.

        Raises:
            ValueError: A share or power outside 0 to 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; it must lie above 0 and at most at 1")
        effect = share * max(self.strength, 0.0)
        # The share varies from sample to sample, which adds to the spread of rows.
        spread = 1 + share * (1 - share) * self.strength**2
        # Solve effect / sqrt(spread / n + tau^2) = quantile for n.
        left = (effect / self._quantile(power)) ** 2 - self.tau**2
        if math.isnan(left):
            return math.nan
        return math.ceil(spread / left) if left > 0 else math.inf

    def detectable(self, rows: int, *, power: float = 0.8) -> float:
        """Smallest share of rows by a biased teacher that this many rows reveal; it may exceed 1.

        Raises:
            ValueError: A power outside 0 to 1.
        """
        if math.isnan(self.strength):
            return math.nan
        if self.strength <= 0:
            return math.inf
        # The same equation, solved for the share s: a s^2 - b s - c = 0.
        squared = self.strength**2
        a = squared * (1 / self._quantile(power) ** 2 + 1 / rows)
        b, c = squared / rows, 1 / rows + self.tau**2
        return (b + math.sqrt(b * b + 4 * a * c)) / (2 * a)

    def _quantile(self, power: float) -> float:
        if not 0 < power < 1:
            raise ValueError(f"power is {power}; it must lie between 0 and 1, such as 0.8")
        normal = NormalDist()
        return normal.inv_cdf(1 - self.alpha / self.tests) + normal.inv_cdf(power)


def least_power(
    own: Float64[np.ndarray, "kinds candidates own_rows"],
    spread: Float64[np.ndarray, "kinds candidates"],
    null: Null,
    alpha: float,
    rows: int,
) -> Power:
    """Return the power of the kind of auditor that detects least; unknown if that of any kind is.

    Args:
        own: See `bias_strength`.
        spread: Standard deviation of the data's rows.
        null: What unbiased data score.
        alpha: Level of the family of tests.
        rows: Number of rows.
    """
    powers = [
        Power(float(strength), float(error), alpha, spread.size)
        for strength, error in zip(bias_strength(own, spread), null.error(spread), strict=True)
    ]
    unknown = [power for power in powers if math.isnan(power.strength)]
    return unknown[0] if unknown else max(powers, key=lambda power: power.detectable(rows))


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide; 0 over 0 is 0, as for data that the baseline wrote to the letter."""
    far = np.where(a > 0, np.inf, np.where(a < 0, -np.inf, 0.0))
    safe: np.ndarray = np.divide(a, b, out=far, where=b > 0)
    return safe
