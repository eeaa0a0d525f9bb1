"""Intervals of means and proportions, against published tables and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens._utils.statistics import exact_interval, t_interval


def test_exact_interval_against_published_values():
    # Clopper and Pearson's intervals, 95 %, as printed in tables of binomial confidence limits.
    published = {
        (0, 4): (0.0, 0.6024),
        (3, 4): (0.1941, 0.9937),
        (4, 4): (0.3976, 1.0),
        (5, 5): (0.4782, 1.0),
        (6, 6): (0.5407, 1.0),
        (8, 10): (0.4439, 0.9748),
    }
    for (successes, n), ends in published.items():
        assert exact_interval(successes, n) == pytest.approx(ends, abs=1e-4)
    with pytest.raises(ValueError, match="5 of 4"):
        exact_interval(5, 4)


@pytest.mark.slow
@given(st.integers(1, 30), st.floats(0.02, 0.98))
def test_the_exact_interval_never_misses_more_often_than_it_says(n, share):
    missed = sum(
        math.comb(n, k) * share**k * (1 - share) ** (n - k)
        for k in range(n + 1)
        if not exact_interval(k, n)[0] <= share <= exact_interval(k, n)[1]
    )
    assert missed <= 0.05 + 1e-9


def test_t_interval_against_published_quantiles():
    # Student's t at 97.5 %: 12.706, 4.303, 3.182, 2.776, 2.228 for 1, 2, 3, 4, 10
    # degrees of freedom.
    for freedom, quantile in {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 10: 2.228}.items():
        values = np.arange(freedom + 1.0)
        mean, low, high = t_interval(values.tolist())
        unit = float(values.std(ddof=1)) / math.sqrt(freedom + 1)
        assert mean == values.mean()
        assert (high - mean) / unit == pytest.approx(quantile, rel=2e-4)
        assert (mean - low) / unit == pytest.approx(quantile, rel=2e-4)


def test_one_value_has_no_interval_and_none_no_mean():
    assert t_interval([0.5]) == (0.5, -math.inf, math.inf)
    assert all(math.isnan(x) for x in t_interval([math.nan]))


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.floats(-5, 5))
def test_a_shift_moves_the_interval_with_it(values, shift):
    plain, moved = t_interval(values), t_interval([v + shift for v in values])
    assert moved == pytest.approx([end + shift for end in plain], abs=1e-6)


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = sum(
        low < 0 < high for _, low, high in map(t_interval, random.normal(size=(4000, 4)).tolist())
    )
    assert hits / 4000 == pytest.approx(0.95, abs=0.015)
