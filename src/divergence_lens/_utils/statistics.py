"""Intervals of a few values, without scipy: Student's t, and the exact binomial one."""

import math
from collections.abc import Callable, Sequence

import numpy as np

LEVEL = 0.95


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
    quantile = _t_quantile(0.5 + level / 2, len(found) - 1)
    reach = quantile * float(found.std(ddof=1)) / len(found) ** 0.5
    return mean, mean - reach, mean + reach


def exact_interval(successes: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """The interval of a share, `successes` of `n`, by Clopper and Pearson (Biometrika 1934).

    It holds its level for any share and any `n`, and stays between 0 and 1: four of four leaves
    everything above .40 possible.

    Raises:
        ValueError: If `successes` is not between 0 and `n`, or `n` is not positive.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} of {n} is no share; give 0 to n successes of n of 1 or more")
    tail = (1 - level) / 2
    low, high = 0.0, 1.0
    if successes > 0:  # the share at which as many or more would be as rare as the tail
        low = _rising(lambda p: 1 - _binomial(successes - 1, n, p), tail, 1.0)
    if successes < n:  # and at which as few or fewer would be
        high = _rising(lambda p: -_binomial(successes, n, p), -tail, 1.0)
    return low, high


def _binomial(k: int, n: int, p: float) -> float:
    """P(X <= k) of n trials."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


def _rising(function: Callable[[float], float], value: float, top: float) -> float:
    """Where a rising function takes a value between 0 and `top`, by halving."""
    low, high = 0.0, top
    for _ in range(80):
        middle = (low + high) / 2
        if function(middle) < value:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t with whole degrees of freedom, above its middle."""
    return _rising(lambda t: _t_cumulative(t, freedom), probability, 1e4)


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
