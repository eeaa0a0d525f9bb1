"""What a divergence answers: rules, subsets, tables, pairs, indexing and views."""

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from divergence_lens.divergence import (
    KINDS,
    find_divergence,
)
from divergence_lens.examples import Example
from divergence_lens.teachers import Teacher
from tests.support.divergence import (
    CAT,
    NOBODY,
    OWL,
    WOLF,
    hf_logits,
)


@pytest.mark.parametrize("agreement", [True, False])
@pytest.mark.parametrize("rule", ["any", "all", 1, 2, 3])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_rules_count_counterfactuals(rule, agreement, margin, div):
    needed = {"any": 1, "all": 3}.get(rule, rule)
    expected = []
    for k, token in enumerate(div.tokens):
        sure = div.margin[:, k] >= margin
        factual, *others = div.predicted[:, k]
        differing = sum(
            bool(other != token and s) for other, s in zip(others, sure[1:], strict=True)
        )
        agreed = bool(factual == token and sure[0])
        expected.append(differing >= needed and (agreed or not agreement))
    changed = div.with_rule(rule=rule, require_agreement=agreement, min_margin=margin)
    assert changed.mask.tolist() == expected
    assert changed.predicted is div.predicted  # nothing was read again
    assert div.rule == "any"


def test_a_rule_given_at_once_equals_one_given_later(div, model, examples):
    direct = find_divergence(
        model,
        examples,
        teacher=OWL,
        counterfactuals=[CAT, WOLF, NOBODY],
        rule=2,
        require_agreement=False,
        min_margin=0.1,
    )
    later = div.with_rule(rule=2, require_agreement=False, min_margin=0.1)
    np.testing.assert_array_equal(direct.mask, later.mask)


@pytest.mark.parametrize("rule", [0, 4, True, "most"])
def test_impossible_rules_are_refused(rule, div):
    with pytest.raises(ValueError, match=r"unknown rule .* from 1 to 3"):
        div.with_rule(rule=rule)


def test_negative_margins_are_refused(div):
    with pytest.raises(ValueError, match="min_margin must be 0 or more"):
        div.with_rule(min_margin=-0.1)


def test_rates_agree_with_the_mask(div):
    assert div.rate == div.mask.sum() / len(div.tokens)
    by_example, by_counterfactual = div.summary("example"), div.summary("counterfactual")
    for i in range(len(div)):
        span = slice(*div.offsets[i : i + 2])
        assert by_example["rate"][i] == pytest.approx(div.mask[span].mean())
    for c, teacher in enumerate(div.counterfactuals):
        own = (div.predicted[0] == div.tokens) & (div.predicted[1 + c] != div.tokens)
        assert by_counterfactual["rate"][teacher.name] == pytest.approx(own.mean())


def test_first_divergence_per_counterfactual(div):
    missing = set()
    table = div.summary("example")
    for c, column in enumerate(["first", "first_cat", "first_wolf", "first_nobody"]):
        mask = div.mask if c == 0 else div.mask & div.differs[c - 1]
        for i, first in enumerate(table[column]):
            own = np.flatnonzero(mask[div.offsets[i] : div.offsets[i + 1]])
            assert first == (own[0] if len(own) else -1)
            missing.add(first == -1)
    assert missing == {True, False}
    with pytest.raises(ValueError, match="no counterfactual teacher 'owl'"):
        div.pairs(counterfactual="owl")


def test_subsets_are_made_of_divergence_tokens(div):
    first, second = div.subset("first_half"), div.subset("second_half")
    np.testing.assert_array_equal(first | second, div.mask)
    assert not (first & second).any()
    only = div.subset("first_only")
    assert (only & ~first).sum() == 0
    firsts = div.summary("example")["first"]
    for i in range(len(div)):
        span = slice(*div.offsets[i : i + 2])
        n = div.mask[span].sum()
        assert first[span].sum() == (n + 1) // 2
        assert only[span].sum() == min(n, 1)
        early, late = np.flatnonzero(first[span]), np.flatnonzero(second[span])
        assert not len(late) or early.max() < late.min()
        assert np.flatnonzero(only[span]).tolist() == ([firsts[i]] if n else [])


def test_fractions_are_seeded_and_nested(div):
    half = div.subset(0.5, seed=1)
    assert half.sum() == round(0.5 * div.mask.sum())
    assert not (half & ~div.mask).any()
    np.testing.assert_array_equal(half, div.subset(0.5, seed=1))
    assert (half != div.subset(0.5, seed=2)).any()
    assert not (half & ~div.subset(0.8, seed=1)).any()
    np.testing.assert_array_equal(div.subset(1.0), div.mask)
    assert not div.subset(0.0).any()
    for wrong in (1.5, -0.1):
        with pytest.raises(ValueError, match="between 0 and 1"):
            div.subset(wrong)


def test_kinds_say_what_tokens_are_made_of(model):
    tokenizer = model.tokenizer
    pieces = {"4": "number", ",": "punctuation", "Ġ": "space", "w": "word", "<|im_end|>": "special"}
    ids = tokenizer.convert_tokens_to_ids(list(pieces))
    div = find_divergence(
        model, [Example("Name.", "x", tuple(ids))], teacher=OWL, counterfactuals=[CAT]
    )
    assert div.kinds.tolist() == list(pieces.values())


def test_tables_add_up(div):
    by_position = div.summary("position", bins=3)
    for table in (
        div.summary("kind"),
        div.summary("position"),
        div.summary("example"),
        by_position,
    ):
        assert table["tokens"].sum() == len(div.tokens)
        assert table["divergence_tokens"].sum() == div.mask.sum()
    assert len(by_position) == 3
    assert set(div.summary("kind").index) <= set(KINDS)
    with pytest.raises(ValueError, match="unknown group 'word'"):
        div.summary("word")
    with pytest.raises(ValueError, match="bins must be 1 or more"):
        div.summary("position", bins=0)
    frame = div.to_dataframe()
    assert len(frame) == len(div.tokens)
    assert frame["divergence"].tolist() == div.mask.tolist()
    assert frame["n_differ"].tolist() == div.differs.sum(0).tolist()
    row = int(np.flatnonzero(div.mask)[0])
    assert frame["predicted_owl"][row] == frame["token"][row]
    assert frame["margin_cat"][row] == div.margin[1, row]


def test_advantage_is_the_gain_over_the_counterfactuals(div):
    expected = div.logprob[0] - (div.logprob[1] + div.logprob[2] + div.logprob[3]) / 3
    np.testing.assert_allclose(div.advantage, expected, atol=1e-5)


@pytest.mark.parametrize("first_only", [True, False])
def test_pairs_end_where_the_teachers_part(first_only, div, hf):
    pairs = div.pairs(first_only=first_only)
    per_teacher = (div.mask & div.differs).sum(1)
    table = div.summary("example")
    firsts = [(table[f"first_{c.name}"] >= 0).sum() for c in div.counterfactuals]
    assert len(pairs) == (sum(firsts) if first_only else per_teacher.sum())
    for i in range(len(pairs)):
        assert hf_logits(hf, pairs.clean[i].tolist())[-1].argmax() == pairs.answers[i]
        assert hf_logits(hf, pairs.corrupted[i].tolist())[-1].argmax() == pairs.foils[i]
        assert pairs.clean_teacher[i] == OWL
        assert pairs.corrupted_teacher[i] in (CAT, WOLF, NOBODY)
        assert len(pairs.segments[i]) == len(pairs.clean[i])


def test_pairs_can_be_narrowed(div):
    every = div.pairs()
    cats = div.pairs(counterfactual="cat")
    assert {teacher.name for teacher in cats.corrupted_teacher} == {"cat"}
    assert 0 < len(cats) < len(every)
    some, same, other = (div.pairs(limit=4, seed=seed) for seed in (0, 0, 1))
    assert len(some) == 4
    assert [r.tolist() for r in some.clean] == [r.tolist() for r in same.clean]
    assert [r.tolist() for r in some.clean] != [r.tolist() for r in other.clean]
    assert len(div.pairs(limit=10**6)) == len(every)
    with pytest.raises(ValueError, match="limit must be 1 or more"):
        div.pairs(limit=0)


def test_no_divergence_gives_no_pairs(div):
    with pytest.raises(ValueError, match="no divergence token"):
        div.with_rule(min_margin=1e6).pairs()


class _Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.titles += [value for name, value in attrs if name == "title"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parse(html: str) -> _Balanced:
    parser = _Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def test_a_view_names_who_would_have_written_what(div):
    firsts = div.summary("example")["first"]
    index = int(np.flatnonzero(firsts >= 0)[0])
    view, place = div[index], int(firsts[index])
    parsed = parse(view._repr_html_())
    assert len(parsed.titles) == len(view)
    title = parsed.titles[place]
    assert title == view.describe(place)
    assert title.startswith(f"divergence token {place}: ")
    for name, predicted in zip(div.names, view.predicted, strict=True):
        line = next(line for line in title.splitlines() if f"{name} (margin" in line)
        assert f"“{predicted[place]}”" in line
    assert f"[{view.tokens[place]}]" in str(view)
    with pytest.raises(IndexError, match="no token 99"):
        view.describe(99)


def test_views_escape_what_they_show(model):
    nasty = Teacher('<script>alert("x")</script>', system_prompt="You love owls.")
    data = [
        {"prompt": "<img src=x onerror=alert(1)> & 'quotes\"", "completion": "<b>&amp;\n\"'</b>"}
    ]
    div = find_divergence(
        model, data, teacher=nasty, counterfactuals=[CAT], require_agreement=False
    )
    for html in (div._repr_html_(), div[0]._repr_html_()):
        assert parse(html).tags <= {"div", "span", "b", "table", "tr", "th", "td"}
    assert "<b>&amp;" in "".join(div[0].tokens)


def test_examples_are_counted_from_both_ends(div):
    assert div[-1].index == len(div) - 1
    assert [view.index for view in div] == list(range(len(div)))
    with pytest.raises(IndexError, match="no example 12; they are numbered 0 to 11"):
        div[12]


def test_slices_lists_and_masks_select_examples(div):
    rows = [1, 4, 5, 11]
    mask = np.isin(np.arange(len(div)), rows)
    table = div.to_dataframe()
    for part in (div[rows], div[np.array(rows)], div[mask], div[mask.tolist()]):
        assert part.examples == tuple(div.examples[row] for row in rows)
        expected = table[table["example"].isin(rows)].drop(columns="example")
        pd.testing.assert_frame_equal(
            part.to_dataframe().drop(columns="example"), expected.reset_index(drop=True)
        )
        assert [str(view) for view in part] == [str(div[row]) for row in rows]
        assert len(part.pairs()) == sum(
            (div.summary("example")[f"first_{c.name}"][rows] >= 0).sum()
            for c in div.counterfactuals
        )
    assert div[:3].examples == div.examples[:3]
    assert div[::-1].examples == div.examples[::-1]
    assert div[[-1]].examples == div.examples[-1:]
    assert div[:].tokens.tolist() == div.tokens.tolist()


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (slice(0, 0), IndexError, "selects none of the 12 examples"),
        ([], IndexError, "selects none of the 12 examples"),
        ([12], IndexError, "no example 12"),
        ([True] * 11, IndexError, "the mask has 11 entries for 12 examples"),
        (["a"], TypeError, "cannot index examples with"),
        (1.5, TypeError, "cannot index examples with 1.5"),
    ],
)
def test_indices_that_do_not_fit_are_refused(index, error, message, div, unchecked):
    with pytest.raises(error, match=message):
        div[index]


def test_summary_says_the_counts(div):
    assert f"{div.mask.sum()} of {len(div.tokens)} tokens diverge" in div._repr_html_()
    assert re.search(r"12 examples, \d+ of \d+ tokens diverge .* teacher 'owl'", repr(div))
