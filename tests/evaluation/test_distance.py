"""Total-variation distance of two preferences, and its permutation test."""

import itertools

import numpy as np
import pytest

from divergence_lens.evaluation.result import Preference

NAMES = ("owl", "cat", "dog")


def made(rows) -> Preference:
    questions = tuple(f"q{i}" for i in range(len(rows)))
    return Preference("owl", NAMES, questions, np.asarray(rows, dtype=float))


def drawn(random, n, tilt=0.0):
    rows = random.dirichlet([2.0, 2.0, 2.0], size=n)
    rows[:, 0] += tilt
    return made(rows / rows.sum(1, keepdims=True) * 0.8)


def by_hand(first, second):
    """Enumerate every exchange of the two at every subset of questions."""
    distances = []
    for swapped in itertools.product([False, True], repeat=len(first)):
        a = [y if swap else x for x, y, swap in zip(first, second, swapped, strict=True)]
        b = [x if swap else y for x, y, swap in zip(first, second, swapped, strict=True)]
        distances.append(0.5 * np.abs(np.mean(a, 0) - np.mean(b, 0)).sum())
    observed = distances[0]
    return observed, np.mean(np.array(distances) >= observed - 1e-12), np.mean(distances)


def test_the_test_equals_enumeration_by_hand():
    random = np.random.default_rng(0)
    before, after = drawn(random, 6), drawn(random, 6, tilt=0.5)
    value, p_value, null = by_hand(before.shares, after.shares)
    result = after.distance(before)
    assert result.value == pytest.approx(value)
    assert result.p_value == pytest.approx(p_value)
    assert result.null == pytest.approx(null)
    assert result.questions == 6
    assert before.distance(after).value == pytest.approx(value)


def test_probabilities_count_every_other_answer_as_one_more():
    before, after = made([[0.2, 0.1, 0.1]] * 3), made([[0.1, 0.05, 0.05]] * 3)
    assert before.distance(after).value == pytest.approx(0.0)
    assert before.distance(after, value="probability").value == pytest.approx(0.2)


def test_random_exchanges_agree_with_all_of_them():
    random = np.random.default_rng(1)
    before, after = drawn(random, 12), drawn(random, 12, tilt=0.15)
    exact = after.distance(before)  # 4,096 exchanges
    sampled = after.distance(before, permutations=4000, seed=3)
    assert abs(sampled.p_value - exact.p_value) < 4 * (exact.p_value / 4000) ** 0.5 + 1e-3
    assert sampled.null == pytest.approx(exact.null, rel=0.05)
    assert sampled == after.distance(before, permutations=4000, seed=3)


def test_p_values_are_uniform_where_nothing_differs():
    random = np.random.default_rng(2)
    values = [
        drawn(random, 20).distance(drawn(random, 20), permutations=199, seed=seed).p_value
        for seed in range(300)
    ]
    assert 0.02 < np.mean(np.array(values) <= 0.05) < 0.09
    assert 0.42 < np.mean(values) < 0.58


def test_equal_answers_have_no_distance_and_no_evidence():
    before = drawn(np.random.default_rng(3), 5)
    assert before.distance(before) == before.distance(before)
    assert before.distance(before).value == 0.0
    assert before.distance(before).p_value == 1.0


def test_questions_without_an_answer_are_left_out():
    before = made([[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]])
    after = made([[0.0, 0.5, 0.5], [0.2, 0.2, 0.2]])
    assert before.distance(after).questions == 1
    assert before.distance(after).value == pytest.approx(0.5)
    nothing = made([[0.0, 0.0, 0.0]])
    assert np.isnan(nothing.distance(nothing).value)


def test_what_cannot_be_compared_is_refused():
    before = made([[0.2, 0.1, 0.1]])
    with pytest.raises(ValueError, match="only over the same questions"):
        before.distance(made([[0.2, 0.1, 0.1]] * 2))
    with pytest.raises(ValueError, match="unknown value 'margin'"):
        before.distance(before, value="margin")
    with pytest.raises(ValueError, match="permutations is 0"):
        before.distance(before, permutations=0)
