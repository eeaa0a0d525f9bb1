"""Pairs: alignment, segments, and what is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens.deltas.delta import Delta
from divergence_lens.pairs import Pairs, align
from divergence_lens.pairs.alignment import columns_of
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.cross import cross_patch
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.teachers import Teacher
from tests.support.models import chat_tokenizer


def pair(clean, corrupted, **options):
    return Pairs.from_tokens([clean], [corrupted], **{"answers": [1], "foils": [2]} | options)


@pytest.mark.parametrize(
    ("clean", "corrupted", "expected"),
    [
        ([1, 2, 3, 4], [1, 9, 3, 4], [0, 1, 2, 3]),  # equal lengths: one to one
        ([1, 2, 5, 6, 7], [1, 2, 8, 9, 6, 7], [0, 1, -1, 4, 5]),  # owl, sea turtle
        ([1, 2, 8, 9, 6, 7], [1, 2, 5, 6, 7], [0, 1, -1, -1, 3, 4]),
        ([1, 2, 6, 7], [1, 2, 8, 6, 7], [0, -1, 3, 4]),  # a token put in: with the one before it
        ([1, 2, 8, 6, 7], [1, 2, 6, 7], [0, -1, -1, 2, 3]),  # and a token left out
        ([6, 7], [8, 6, 7], [-1, 2]),  # at the start: with the one after it
        ([1, 2, 3], [1, 2, 3, 4], [0, -1, 3]),  # one goes on
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
def test_what_stands_before_and_after_the_difference_is_aligned(start, left, right, end):
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


def test_segments_mark_the_differing_system_tokens_and_the_target():
    names = ["template", "system", "system", "system", "user", "template", "completion"]
    pairs = pair(
        [9, 1, 2, 3, 4, 5, 6],
        [9, 1, 7, 7, 3, 4, 5, 6],
        segments=[names],
    )
    assert pairs.segments[0] == (
        "template",
        "system",
        "bias",
        "system",
        "user",
        "template",
        "divergence",
    )


def test_a_differing_user_token_keeps_its_segment():
    pairs = pair([1, 2, 3], [1, 4, 3], segments=[["user", "user", "template"]])
    assert pairs.segments[0] == ("user", "user", "divergence")


def test_rows_are_cut_at_the_target_and_padding_is_dropped():
    clean = torch.tensor([[1, 2, 3, 4, 0, 0], [1, 2, 3, 4, 5, 6]])
    corrupted = torch.tensor([[1, 7, 3, 4, 0, 0], [1, 7, 3, 4, 5, 6]])
    pairs = Pairs.from_tokens(
        clean, corrupted, answers=[1, 1], foils=[2, 2], target_position=[3, 2], pad_id=0
    )
    assert [row.tolist() for row in pairs.clean] == [[1, 2, 3, 4], [1, 2, 3]]
    assert [row.tolist() for row in pairs.corrupted] == [[1, 7, 3, 4], [1, 7, 3]]
    assert pairs.target_position.tolist() == [3, 2]
    assert pairs.corrupted_target_position.tolist() == [3, 2]


def test_first_difference_is_where_the_runs_part():
    assert pair([1, 2, 3, 4], [1, 2, 9, 4]).first_difference(0) == 2
    assert pair([1, 2], [1, 2, 3]).first_difference(0) == 1
    assert pair([1, 2, 3, 4], [1, 2]).first_difference(0) == 1
    other = Teacher("other", delta=Delta({"W": torch.ones(1)}, base="some model"))
    assert pair([1, 2], [1, 2], corrupted_teacher=other).first_difference(0) == 0


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (1, [1]),
        (-1, [2]),
        (np.int64(0), [0]),
        (slice(2), [0, 1]),
        (slice(None, None, -1), [2, 1, 0]),
        ([2, 0], [2, 0]),
        (np.array([1, 1]), [1, 1]),
        (torch.tensor([2, -3]), [2, 0]),
        ([True, False, True], [0, 2]),
        (np.array([False, True, False]), [1]),
        (torch.tensor([False, True, True]), [1, 2]),
    ],
)
def test_an_index_selects_pairs_in_its_order(index, expected):
    teachers = [Teacher(name) for name in "abc"]
    pairs = Pairs.from_tokens(
        [[1, 2], [3, 4, 5], [6, 7]],
        [[6, 2], [3, 7, 5], [8, 7]],
        answers=[1, 2, 3],
        foils=[4, 5, 6],
        clean_teacher=teachers,
    )
    chosen = pairs[index]
    assert isinstance(chosen, Pairs)
    assert len(chosen) == len(expected)
    assert chosen.answers.tolist() == [[[1, 2, 3][i]] for i in expected]
    for name in ("clean", "corrupted", "segments", "alignment", "labels", "clean_teacher"):
        rows, whole = getattr(chosen, name), getattr(pairs, name)
        assert all(a is whole[i] for a, i in zip(rows, expected, strict=True))


def test_pairs_iterate_as_single_pairs_and_refuse_a_bad_index(unchecked):
    pairs = Pairs.from_tokens(
        [[1, 2], [3, 4, 5]], [[6, 2], [3, 7, 5]], answers=[1, 2], foils=[3, 4]
    )
    assert [one.answers.tolist() for one in pairs] == [[[1]], [[2]]]
    with pytest.raises(IndexError, match="no pair 2; they are numbered 0 to 1"):
        pairs[2]
    with pytest.raises(IndexError, match="no pair -3"):
        pairs[[0, -3]]
    with pytest.raises(IndexError, match="mask has 3 entries for 2 pairs"):
        pairs[[True, False, True]]
    with pytest.raises(ValueError, match="selects none of the 2 pairs"):
        pairs[2:]
    for index in (1.5, "0", True, None, [[0]]):
        with pytest.raises(TypeError, match="cannot index pairs"):
            pairs[index]


def test_table_and_notebook_view_escape_and_count():
    pairs = pair([1, 2, 5, 6], [1, 8, 9, 5, 6], clean_teacher=Teacher("owl"))
    table = pairs.to_dataframe()
    assert table.loc[0, "units"] == 1
    assert table.loc[0, "clean_teacher"] == "owl"

    class Tokenizer:
        def __len__(self):
            return 10

        def convert_ids_to_tokens(self, ids):
            return ["<script>" for _ in ids]

        def decode(self, _):
            return "<script>"

    html = pair([1, 2], [3, 2], tokenizer=Tokenizer())._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_from_prompts_takes_the_chat_template(random_model):
    model = random_model("qwen2")
    tokenizer = chat_tokenizer()
    pairs = Pairs.from_prompts(
        model,
        clean=["Name your favorite animal"],
        corrupted=["Name your favorite animal"],
        answers=["a"],
        foils=[int(tokenizer("b", add_special_tokens=False)["input_ids"][0])],
        system_prompt="You love owls.",
        corrupted_system_prompt="You love wolf.",
    )
    kinds = set(pairs.segments[0])
    assert {"system", "bias", "user", "template", "divergence"} <= kinds
    text = "".join(pairs.labels[0])
    assert "You love owls." in text
    assert text.endswith("assistant\n")
    biased = [
        label
        for label, kind in zip(*(pairs.labels[0], pairs.segments[0]), strict=True)
        if kind == "bias"
    ]
    assert "love" not in "".join(biased)
    assert biased


def test_one_side_alone_can_have_a_system_prompt(random_model):
    model = random_model("qwen2")
    pairs = Pairs.from_prompts(
        model,
        clean=["Name your favorite animal"],
        clean_teacher=Teacher("owl", system_prompt="You love owls."),
        corrupted_teacher=Teacher("nobody"),
    )
    assert "You love owls." in "".join(pairs.labels[0])
    corrupted = "".join(model.tokenizer.decode([i]) for i in pairs.corrupted[0].tolist())
    assert "You love owls." not in corrupted
    assert pairs.to_dataframe()[["clean_teacher", "corrupted_teacher"]].to_numpy().tolist() == [
        ["owl", "nobody"]
    ]
    with pytest.raises(ValueError, match="give teachers or system prompts, not both"):
        Pairs.from_prompts(
            model, clean=["a"], system_prompt="x", clean_teacher=Teacher("owl", system_prompt="y")
        )


def test_two_checkpoints_are_compared_on_the_same_texts(random_model):
    model, other = random_model("qwen2"), random_model("qwen2", 1)
    pairs = Pairs.from_prompts(
        model, clean=["Name one", "Say one"], corrupted_teacher=Teacher("other", model=other)
    )
    effects = causal_mediation(model, pairs, metric="kl")
    row = pairs.clean[0][None]
    with torch.no_grad():
        logits = [
            m(row, attention_mask=torch.ones_like(row))[0, -1].log_softmax(-1)
            for m in (model, other)
        ]
    expected = (logits[0].exp() * (logits[0] - logits[1])).sum()
    assert effects.corrupted_metric[0] == pytest.approx(float(expected), abs=1e-4)
    assert effects.values[0, -1, -1] > 0  # the other model's last state, read by this one


@pytest.mark.parametrize(
    "metric", ["logit_difference", "probability_difference", "log_probability"]
)
def test_a_metric_that_reads_tokens_asks_for_them(metric, random_model):
    model = random_model("qwen2")
    pairs = Pairs.from_prompts(model, clean=["Name one"], corrupted=["Name two"])
    with pytest.raises(ValueError, match=rf"pair 0 has no answer, which metric='{metric}' reads"):
        causal_mediation(model, pairs, metric=metric)
    other = random_model("qwen2", 1)
    same = Pairs.from_tokens(pairs.clean, pairs.clean, corrupted_teacher=Teacher("x", model=other))
    with pytest.raises(ValueError, match="pair 0 has no answer, which cross_patch reads"):
        cross_patch(model, other, same)


def test_a_metric_of_ones_own_and_kl_need_no_answers(random_model):
    model = random_model("qwen2")
    pairs = Pairs.from_prompts(model, clean=["Name one"], corrupted=["Name two"])

    def entropy(logits, _pairs):
        return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)

    for patch in (causal_mediation, attribution_patch):
        found = patch(model, pairs, metric=entropy)
        assert np.isfinite(found.values).all()
        assert np.abs(found.values).max() > 0
    assert causal_mediation(model, pairs, metric="kl").values.max() > 0


def test_from_prompts_takes_plain_text(random_model):
    model = random_model("qwen2")
    pairs = Pairs.from_prompts(
        model, clean=["The cat"], corrupted=["The owl"], answers=["a"], foils=["b"], chat=False
    )
    assert "".join(pairs.labels[0]).endswith("The cat")
    assert "bias" in pairs.segments[0]
    with pytest.raises(ValueError, match="needs the chat template"):
        Pairs.from_prompts(
            model,
            clean=["a"],
            corrupted=["b"],
            answers=["a"],
            foils=["b"],
            system_prompt="x",
            chat=False,
        )


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


@pytest.mark.parametrize(
    ("clean", "corrupted", "options", "message"),
    [
        ([], [], {"answers": [], "foils": []}, "no pairs"),
        ([[1]], [[1], [2]], {}, "they come in pairs"),
        ([[1, 2]], [[3, 2]], {"answers": [5], "foils": [5]}, "same token id 5"),
        ([[1, 2]], [[3, 2]], {"answers": [1, 2]}, "answers has 2 entries"),
        ([[1, 2]], [[1, 2]], {}, "pair 0 are identical"),
        ([[1, 2, 0]], [[3, 2, 0]], {"pad_id": 0, "target_position": [2]}, "padding"),
        ([[1, 2]], [[3, 2]], {"target_position": [2]}, "target position 2"),
        ([[0, 0]], [[3, 2]], {"pad_id": 0}, "clean row of pair 0 is empty"),
        ([[1, -2]], [[3, 2]], {}, "clean row of pair 0 holds -2; token ids are whole"),
        ([[1, 2]], [[3, 2]], {"segments": [["user"]]}, "name 1 positions"),
        ([[1, 2]], [[3, 2]], {"clean_teacher": [None, None]}, "clean_teacher has 2 entries"),
    ],
)
def test_bad_pairs_are_refused(clean, corrupted, options, message):
    options = {"answers": [1], "foils": [2]} | options
    with pytest.raises(ValueError, match=message):
        Pairs.from_tokens(clean, corrupted, **options)


def test_a_notebook_underlines_what_differs_and_the_target(tiny):
    pairs = Pairs.from_prompts(
        tiny,
        clean=["which animal do you love ?"],
        corrupted=["which color do you love ?"],
        answers=["owl"],
        foils=["red"],
    )
    marked = re.findall(r"text-decoration:underline[^>]*>([^<]*)<", pairs._repr_html_())
    assert marked == ["animal", pairs.labels[0][-1]]
    assert repr(pairs) == f"Pairs(1 pairs of up to {len(pairs.clean[0])} tokens)"
