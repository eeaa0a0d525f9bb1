"""Alignment of the two rows of a pair: columns, units, and refused alignments."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens.pairs import Pairs, align
from divergence_lens.pairs.alignment import columns_of
from tests.support.pairs import pair


@pytest.mark.parametrize(
    ("clean", "corrupted", "expected"),
    [
        ([1, 2, 3, 4], [1, 9, 3, 4], [0, 1, 2, 3]),  # equal lengths: one to one
        ([1, 2, 5, 6, 7], [1, 2, 8, 9, 6, 7], [0, 1, -1, 4, 5]),  # owl, sea turtle
        ([1, 2, 8, 9, 6, 7], [1, 2, 5, 6, 7], [0, 1, -1, -1, 3, 4]),
        ([1, 2, 6, 7], [1, 2, 8, 6, 7], [0, -1, 3, 4]),  # an inserted token: with the one before it
        ([1, 2, 8, 6, 7], [1, 2, 6, 7], [0, -1, -1, 2, 3]),  # and a token left out
        ([6, 7], [8, 6, 7], [-1, 2]),  # at the start: with the one after it
        ([1, 2, 3], [1, 2, 3, 4], [0, -1, 3]),  # one is longer
        ([7], [3, 4, 5], [-1]),
        ([5, 1, 2, 3, 5, 9], [6, 6, 1, 2, 3, 6, 6, 9], [-1, 2, 3, 4, -1, 7]),  # named twice
        ([5, 1, 2, 5, 9], [6, 6, 1, 2, 6, 6, 9], [-1, -1, -1, -1, 6]),  # too short to be sure
        ([5, 1, 2, 3, 4, 9], [6, 6, 1, 2, 3, 7, 9], [-1, 2, 3, 4, 5, 6]),  # then one for one
    ],
)
def test_alignment_is_from_the_left_then_from_the_right(clean, corrupted, expected):
    assert align(clean, corrupted).tolist() == expected


@given(
    st.lists(st.integers(0, 5), max_size=6),
    st.lists(st.integers(6, 9), max_size=4),
    st.lists(st.integers(10, 13), max_size=4),
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
)
def test_tokens_before_and_after_the_difference_are_aligned(start, left, right, end):
    clean, corrupted = [*start, *left, *end], [*start, *right, *end]
    found = align(clean, corrupted)
    # A difference that is empty on one side takes in the token before it, or else the one after.
    one_sided = bool(left) != bool(right)
    before = len(start) - (one_sided and bool(start))
    assert found[:before].tolist() == list(range(before))
    after = len(end) - (one_sided and not start)
    counterparts = [i + len(right) - len(left) for i in range(len(clean) - after, len(clean))]
    assert found[len(clean) - after :].tolist() == counterparts
    if len(left) != len(right):
        assert (found[before : len(clean) - after] == -1).all()
    kept = found[found >= 0]
    assert (np.diff(kept) > 0).all()


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=9),
    st.lists(st.integers(0, 3), min_size=1, max_size=9),
)
def test_columns_divide_both_rows(clean, corrupted):
    columns = columns_of(align(clean, corrupted), len(corrupted))
    for side, row in (("clean", clean), ("corrupted", corrupted)):
        spans = [getattr(column, side) for column in columns]
        assert [position for span in spans for position in span] == list(range(len(row)))
        assert all(spans)
    units = [column for column in columns if column.is_unit]
    assert bool(units) == (len(clean) != len(corrupted))
    for column in columns:
        if not column.is_unit and column.clean[0] != column.corrupted[0]:
            assert units  # positions shift only after a unit


def test_a_unit_holds_the_text_of_both_sides_and_its_rows_lose_no_token():
    pairs = pair([1, 2, 5, 6, 7], [1, 2, 8, 9, 6, 7])
    (unit,) = pairs.units(0)
    assert (unit.clean, unit.corrupted) == (range(2, 3), range(2, 4))
    assert pairs.differs(0) == [False, False, True, False, False]
    assert pairs.corrupted_labels[0] == ("1", "2", "8", "9", "6", "7")
    assert pair([1, 2, 5], [1, 3, 5]).units(0) == ()


@pytest.mark.parametrize(
    ("given", "alignment", "units"),
    [
        ([0, 1, -1, 4, 5], [0, 1, -1, 4, 5], [(range(2, 3), range(2, 4))]),
        ([0, -1, -1, -1, 5], [0, -1, -1, -1, 5], [(range(1, 4), range(1, 5))]),
        ([0, 1, 3, 4, 5], [0, -1, 3, 4, 5], [(range(1, 2), range(1, 3))]),  # an insertion
        ([-1] * 5, [-1] * 5, [(range(5), range(6))]),
        (None, [0, 1, -1, 4, 5], [(range(2, 3), range(2, 4))]),
    ],
)
def test_an_alignment_can_be_given(given, alignment, units):
    pairs = pair([1, 2, 5, 6, 7], [1, 2, 8, 9, 6, 7], alignment=[given])
    assert pairs.alignment[0].tolist() == alignment
    assert [(unit.clean, unit.corrupted) for unit in pairs.units(0)] == units


def test_a_given_span_of_equal_length_is_a_unit_and_one_of_one_token_is_not():
    pairs = pair([1, 2, 5, 6, 7], [1, 3, 4, 6, 7], alignment=[[0, -1, -1, 3, 4]])
    assert [len(unit.clean) for unit in pairs.units(0)] == [2]
    single = pair([1, 2, 5], [1, 3, 5], alignment=[[0, -1, 2]])
    assert single.units(0) == ()
    assert single.alignment[0].tolist() == [0, 1, 2]


def test_from_prompts_takes_an_alignment(random_model):
    model = random_model("qwen2")
    options = {"clean": ["The cat"], "corrupted": ["The big owl"], "chat": False}
    whole = Pairs.from_prompts(model, **options)
    length = len(whole.clean[0])
    (unit,) = Pairs.from_prompts(model, **options, alignment=[[-1] * length]).units(0)
    assert (unit.clean, unit.corrupted) == (range(length), range(len(whole.corrupted[0])))


@pytest.mark.parametrize(
    ("alignment", "message"),
    [
        ([], "alignment has 0 entries, but there are 1 pairs"),
        ([[0, 1]], "alignment of pair 0 has 2 entries, but its clean row has 3 tokens"),
        ([[0, 1, 4]], "clean position 2 the counterpart 4; it is one of the 4 positions"),
        ([[0, -2, 3]], "clean position 1 the counterpart -2"),
        ([[0, 2, 1]], "positions 1 and 2 the counterparts 2 and 1; counterparts must increase"),
        ([[0, 1, 1]], "counterparts must increase"),
        ([[0.0, 1.0, 2.0]], "one whole number per clean position, got float64"),
        ([[[0], [1], [2]]], r"of shape \[3, 1\]"),
    ],
)
def test_an_alignment_that_does_not_fit_is_refused(alignment, message, unchecked):
    with pytest.raises(ValueError, match=message):
        pair([1, 2, 3], [1, 2, 4, 3], alignment=alignment)


def test_whole_rows_are_aligned_position_by_position(unchecked):
    with pytest.raises(ValueError, match="alignment cannot be given with whole_rows=True"):
        pair([1, 2, 3], [1, 4, 3], whole_rows=True, alignment=[[0, -1, 2]])


def test_pairs_put_together_by_hand_must_not_drop_tokens():
    pairs = pair([1, 2, 3], [1, 2, 4, 3])
    with pytest.raises(ValueError, match="leaves tokens of one side without text"):
        replace(pairs, alignment=(np.array([0, 1, 3]),))
