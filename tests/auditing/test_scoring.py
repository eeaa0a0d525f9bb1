"""Scores, p-values and power, against scipy, written-out sums and simulations."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from divergence_lens.auditing.scoring import (
    SHIFT,
    Null,
    Power,
    bias_strength,
    false_discovery,
    fit_null,
    holm,
    independent_rows,
    score_rows,
)

NONE = None


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_p_values_are_those_of_a_one_sample_t_test():
    rows = draws(1, 5, 40) + 0.2
    scores = score_rows(rows, NONE)
    for c in range(5):
        test = stats.ttest_1samp(rows[0, c], 0, alternative="greater")
        assert scores.z[c] == pytest.approx(test.statistic)
        assert scores.p[c] == pytest.approx(test.pvalue)
    np.testing.assert_allclose(scores.score, rows[0].mean(-1))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_corrections_follow_their_definitions(values):
    p = np.array(values)
    n, order = len(p), np.argsort(p)
    for place, test in enumerate(order):
        smaller = max((n - k) * p[order[k]] for k in range(place + 1))
        assert holm(p)[test] == pytest.approx(min(1, smaller))
    np.testing.assert_allclose(false_discovery(p), stats.false_discovery_control(p), atol=1e-12)


def test_unbiased_rows_are_called_biased_at_most_at_the_level():
    alarms = [
        score_rows(draws(2, 12, 60, seed=seed), NONE).holm.min() < 0.05 for seed in range(400)
    ]
    # 5 % of 400 is 20; four standard deviations more are 37.
    assert sum(alarms) <= 37


def test_rows_equal_to_the_baseline_score_nothing():
    scores = score_rows(np.zeros((1, 4, 10)), NONE)
    np.testing.assert_array_equal(scores.z, 0)
    assert (scores.p >= 0.5).all()


def test_copies_of_rows_add_no_evidence():
    rows = draws(1, 5, 40) + 0.2
    once = score_rows(rows)
    copies = score_rows(np.tile(rows, 20), independent=independent_rows(np.full(40, 20)))
    np.testing.assert_allclose(copies.z, once.z)
    np.testing.assert_allclose(copies.p, once.p)
    assert independent_rows(np.ones(7, int)) == 7
    # Of a mean in which one of four rows counts three times: variance (9 + 1 + 1 + 1) / 36.
    assert independent_rows(np.array([3, 1, 1, 1])) == pytest.approx(36 / 12)
    same = score_rows(rows[..., :1].repeat(9, -1), independent=1.0)
    assert np.isnan(same.z).all()
    assert (same.p == 1).all()


def test_the_better_kind_counts_and_its_p_value_is_doubled():
    rows = draws(2, 4, 50)
    rows[1, 2] += 1.0
    scores = score_rows(rows, NONE)
    assert scores.kind[2] == 1
    single = stats.ttest_1samp(rows[1, 2], 0, alternative="greater").pvalue
    assert scores.p[2] == pytest.approx(2 * single)


def test_the_spread_of_style_is_recovered_and_zero_without_one():
    ones = np.ones((1, 12))
    lists = draws(1, 12, 40, 50, seed=2)
    style = 0.3 * draws(1, 12, 40, 1, seed=1)
    # 2,000 lists leave little of the shift unknown, so the error is that of the style.
    assert fit_null(lists + style, ones).error(ones)[0] == pytest.approx(0.3, rel=0.15)
    assert fit_null(lists, ones).error(ones)[0] < 0.1


def test_lists_in_the_style_of_the_data_have_no_spread_of_style():
    ones = np.ones((1, 12))
    lists = draws(1, 12, 1, 50, seed=4) * [1.6, *(49 * [1.0])]
    # The prior, and 50 lists that say something about it, bound the error.
    assert fit_null(lists, ones, same_style=True).error(ones)[0] < SHIFT
    far = lists + 1.0
    assert fit_null(far, ones).error(ones)[0] > 0.9
    assert fit_null(far, ones, same_style=True).error(ones)[0] < SHIFT


def test_the_shift_is_the_posterior_mean_of_a_normal_prior():
    ones = np.ones((1, 4))
    lists = draws(1, 4, 1, 50) + 0.2
    null = fit_null(lists, ones)
    noise = lists.var(-1, ddof=1)[..., 0] / 50
    precision = 1 / SHIFT**2 + 1 / noise
    np.testing.assert_allclose(null.shift, lists.mean((2, 3)) / noise / precision)
    assert (null.variance >= 1 / precision - 1e-12).all()
    unknown = fit_null(lists[..., :0], ones)
    np.testing.assert_array_equal(unknown.shift, 0)
    np.testing.assert_allclose(unknown.variance, SHIFT**2)
    exact = fit_null(np.zeros((1, 4, 1, 50)), ones)
    np.testing.assert_array_equal(exact.variance, 0)


def test_the_error_of_the_null_limits_z_however_many_rows_there_are():
    rows = draws(1, 4, 10_000) + 0.5
    assert score_rows(rows, NONE).z.min() > 40
    null = Null(np.zeros((1, 4)), np.full((1, 4), 0.25**2))
    assert score_rows(rows, null).z.max() < 2.2
    shifted = Null(np.full((1, 4), 0.5), np.zeros((1, 4)))
    assert np.abs(score_rows(rows, shifted).z).max() < 4


def test_the_rows_needed_detect_the_share_with_the_stated_power():
    power = Power(strength=1.2, tau=0.0, alpha=0.05, tests=12)
    rows = power.rows_needed(0.25)
    assert power.detectable(rows) == pytest.approx(0.25, rel=0.01)
    detected = 0
    for seed in range(400):
        draw = draws(1, 12, rows, seed=seed)
        draw[0, 0] += 1.2 * (np.random.default_rng(seed).random(rows) < 0.25)
        detected += score_rows(draw, NONE).holm[0] < 0.05
    assert 0.7 < detected / 400 < 0.9


def test_power_says_when_nothing_can_be_known():
    assert Power(1.0, 0.5, 0.05, 12).rows_needed(0.1) == math.inf
    assert math.isnan(Power(math.nan, 0.0, 0.05, 12).rows_needed(0.5))
    assert math.isnan(Power(math.nan, 0.0, 0.05, 12).detectable(100))
    assert Power(-0.2, 0.0, 0.05, 12).detectable(100) == math.inf
    with pytest.raises(ValueError, match="share is 0"):
        Power(1.0, 0.0, 0.05, 12).rows_needed(0.0)
    with pytest.raises(ValueError, match="power is 1"):
        Power(1.0, 0.0, 0.05, 12).rows_needed(0.5, power=1.0)


def test_strength_is_in_units_of_the_spread_of_rows():
    own = draws(1, 6, 200) + 1.5
    assert bias_strength(own, np.ones((1, 6)))[0] == pytest.approx(1.5, rel=0.05)
    assert bias_strength(own, np.full((1, 6), 3.0))[0] == pytest.approx(0.5, rel=0.05)
    assert np.isnan(bias_strength(own[..., :1], np.ones((1, 6)))[0])
