"""Intervals and correlations. Heavy parts of scipy are imported when they are needed."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

LEVEL = 0.95


def check_level(level: float) -> None:
    """Refuse a coverage that is not between 0 and 1.

    Raises:
        ValueError: With the value.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it must lie between 0 and 1, such as 0.95")


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """Mean and Student's t interval of a few values; NaN and infinity are left out.

    Used for values per target: a bootstrap over four of them is far too narrow.

    Returns:
        Mean, lower and upper end. The ends are infinite for fewer than two values, and all three
        are NaN for none.
    """
    finite = np.asarray([value for value in values if math.isfinite(value)], dtype=float)
    if not len(finite):
        return math.nan, math.nan, math.nan
    mean = float(finite.mean())
    if len(finite) < 2:
        return mean, -math.inf, math.inf
    from scipy import stats

    quantile = float(stats.t.ppf(0.5 + level / 2, len(finite) - 1))
    margin = quantile * float(finite.std(ddof=1)) / len(finite) ** 0.5
    return mean, mean - margin, mean + margin


def exact_interval(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Clopper and Pearson's interval (Biometrika 1934) of the proportion `successes` / `n`.

    It covers at its level for any proportion and any `n`, and stays between 0 and 1. Four of four
    leaves every proportion above .40 possible.

    Raises:
        ValueError: `successes` is not between 0 and `n`, or `n` is not positive.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(
            f"{successes} of {n} is not a proportion; give 0 to n successes, and n of 1 or more"
        )
    from scipy import stats

    interval = stats.binomtest(successes, n).proportion_ci(level, method="exact")
    return float(interval.low), float(interval.high)


def wilson_interval(rate: float, n: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval (J. Am. Stat. Assoc. 22, 1927) of a rate counted over `n` draws.

    scipy's takes counts; the rate here may be a mean over questions.

    Raises:
        ValueError: `level` does not lie between 0 and 1.
    """
    check_level(level)
    z = NormalDist().inv_cdf(0.5 + level / 2)
    center = (rate + z * z / (2 * n)) / (1 + z * z / n)
    margin = z / (1 + z * z / n) * np.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2)
    return max(0.0, float(center - margin)), min(1.0, float(center + margin))


def bootstrap_interval(
    resample: Callable[[np.random.Generator], Float[np.ndarray, " resamples *rest"]],
    *,
    level: float,
    seed: int,
) -> tuple[Float[np.ndarray, "*rest"], Float[np.ndarray, "*rest"]]:
    """Percentile bootstrap interval of a statistic.

    Args:
        resample: Draws data sets with the generator and returns the statistic of each. What is
            drawn with replacement (pairs, questions, seeds within targets) differs between
            callers; see `resampled_means` for the usual case.
        level: Coverage.
        seed: Seed of the generator.

    Returns:
        Lower and upper end; NaN where the statistic of every resample is NaN.

    Raises:
        ValueError: `level` does not lie between 0 and 1.
    """
    check_level(level)
    drawn = resample(np.random.default_rng(seed))  # [resamples, *rest]
    flat = drawn.reshape(len(drawn), -1)
    ends = np.full((2, flat.shape[1]), np.nan)
    known = np.isfinite(flat).any(0)
    if known.any():
        ends[:, known] = np.nanquantile(flat[:, known], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends[0].reshape(drawn.shape[1:]), ends[1].reshape(drawn.shape[1:])


def resampled_means(
    values: Float[np.ndarray, " n *rest"], resamples: int
) -> Callable[[np.random.Generator], Float[np.ndarray, " resamples *rest"]]:
    """Resampling of the mean over the first axis, NaN left out, for `bootstrap_interval`.

    Raises:
        ValueError: `resamples` is not positive.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; at least 1 is needed")

    def resample(generator: np.random.Generator) -> Float[np.ndarray, " resamples *rest"]:
        n = len(values)
        # Drawing with replacement is weighting each item by how often it was drawn.
        weights = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        flat = values.reshape(n, -1)
        finite = np.isfinite(flat)
        total = weights @ np.where(finite, flat, 0)  # [resamples, rest]
        count = weights @ finite
        means = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return means.reshape(resamples, *values.shape[1:])

    return resample


def correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Pearson's correlation; NaN, without scipy's warning, where one side is constant."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum() / scale) if scale else math.nan


def rank_correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Spearman's correlation, equal values sharing their mean rank; NaN as in `correlation`."""
    from scipy import stats

    # Counted from 0, so that the products stay small.
    return correlation(stats.rankdata(a) - 1.0, stats.rankdata(b) - 1.0)
