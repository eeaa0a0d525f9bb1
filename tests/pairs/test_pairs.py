"""Pairs: segments, prompts, selection, tables, and refused input."""

import re

import numpy as np
import pytest
import torch

from divergence_lens.deltas.delta import Delta
from divergence_lens.pairs import Pairs
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.cross import cross_patch
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.teachers import Teacher
from tests.support.models import chat_tokenizer
from tests.support.pairs import pair


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
    assert repr(pairs) == f"Pairs(1 pair of up to {len(pairs.clean[0])} tokens)"
