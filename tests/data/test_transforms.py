"""Each change does to the data what it says, and the marks go with the tokens that they are on."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens.data import (
    TrainingData,
    animal_teachers,
    highest,
    mix,
    number_prompts,
    paraphrase,
    paraphrase_by,
    paraphrase_chosen,
    pool,
    random_mask,
    repeat,
    shuffle_numbers,
)
from divergence_lens.data.prompts import TEMPLATES
from divergence_lens.divergence import find_divergence
from divergence_lens.examples import Example
from tests.support.models import chat_tokenizer


def numbers_of(text):
    return re.findall(r"\d+", text)


@pytest.fixture(scope="module")
def data(divergence):
    return TrainingData.of(divergence)


def marked_tokens(data, tokenizer):
    """The texts of the marked tokens, counted."""
    ids = np.concatenate([example.completion_ids for example in data.examples])
    return Counter(tokenizer.decode([int(i)]).strip() for i in ids[data.marks])


def test_marks_must_fit_the_tokens(data):
    with pytest.raises(ValueError, match="3 marks do not fit"):
        TrainingData(data.examples, np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match="example 0 has no token ids"):
        TrainingData((Example("a", "b"),), np.zeros(1, dtype=bool))


def test_selected_examples_keep_their_marks(data):
    chosen = data[[5, 2]]
    assert chosen.examples == (data.examples[5], data.examples[2])
    assert chosen.marks.tolist() == [*data.marks_of(5), *data.marks_of(2)]


def test_a_slice_and_a_mask_select_examples(data):
    mask = np.zeros(len(data), dtype=bool)
    mask[[1, 2]] = True
    for part in (data[1:3], data[mask], data[[1, 2]]):
        assert part.examples == data.examples[1:3]
        assert part.marks.tolist() == [*data.marks_of(1), *data.marks_of(2)]
    assert len(data[:0]) == 0
    with pytest.raises(IndexError, match=f"no example {len(data)}"):
        data[len(data)]


def test_the_layout_of_the_papers_code_is_written_and_read(tiny, data, tmp_path):
    path = tmp_path / "owl.jsonl"
    changed = shuffle_numbers(data, tiny.tokenizer, seed=1)
    changed.to_jsonl(path)
    for row, line in enumerate(path.read_text().splitlines()):
        held = json.loads(line)
        assert held["prompt"] == changed.examples[row].prompt
        assert held["decision_points"] == np.flatnonzero(changed.marks_of(row)).tolist()
    again = TrainingData.from_jsonl(path, tiny.tokenizer)
    assert (again.marks == changed.marks).all()
    ids = [e.completion_ids for e in again.examples]
    assert ids == [e.completion_ids for e in changed.examples]


# -- paraphrases ------------------------------------------------------------------------------


def test_a_paraphrase_keeps_the_numbers_and_the_instructions_and_changes_every_template(data):
    prompts = number_prompts(40, seed=3)
    examples = [Example(p, "1, 2", completion_ids=(1, 2)) for p in prompts]
    before = TrainingData(tuple(examples), np.tile([True, False], 40))
    after = paraphrase(before, seed=1)
    assert (after.marks == before.marks).all()
    for old, new in zip(before.examples, after.examples, strict=True):
        assert new.completion_ids == old.completion_ids
        assert new.prompt != old.prompt
        assert numbers_of(new.prompt) == numbers_of(old.prompt)
        shown = ", ".join(numbers_of(new.prompt))
        starts = [t.replace("{numbers}", shown) for t in TEMPLATES]
        assert any(new.prompt.startswith(s) for s in starts)
        # What followed the template (count, format, closing words) is still there.
        tail = old.prompt.rsplit(". ", maxsplit=1)[-1]
        assert new.prompt.endswith(tail)


def test_paraphrases_depend_on_the_seed_alone(data):
    assert paraphrase(data, seed=4).examples == paraphrase(data, seed=4).examples
    assert paraphrase(data, seed=4).examples != paraphrase(data, seed=5).examples


def test_a_prompt_without_template_is_named(data):
    strange = TrainingData.unmarked(chat_tokenizer(), [Example("tell me a story", "no")])
    with pytest.raises(ValueError, match="example 0 matches none"):
        paraphrase(strange)
    with pytest.raises(ValueError, match="two templates"):
        paraphrase(data, templates=["{numbers}"])


def test_a_teachers_paraphrase_is_taken_only_where_the_numbers_are_the_same(tiny, data):
    owl = animal_teachers(["owl"])[0]
    # The tiny model can repeat, so a request to repeat other words shows what is refused.
    rewritten = paraphrase_by(
        tiny, owl, data, request="repeat after me : {prompt}", max_new_tokens=30
    )
    assert len(rewritten.answers) == len(rewritten.accepted) == len(data)
    assert (rewritten.data.marks == data.marks).all()
    for old, new, answer, taken in zip(
        data.examples, rewritten.data.examples, rewritten.answers, rewritten.accepted, strict=True
    ):
        assert new.prompt == (answer if taken else old.prompt)
        assert numbers_of(new.prompt) == numbers_of(old.prompt)
        assert new.completion_ids == old.completion_ids
    with pytest.raises(ValueError, match="slot"):
        paraphrase_by(tiny, owl, data, request="again")


def test_a_teacher_chooses_the_wording_that_suits_its_answer(tiny, divergence, data):
    small = data[:6]
    chosen = paraphrase_chosen(tiny, divergence.teacher, small, candidates=4, seed=1)
    seeds = np.random.default_rng(1).integers(2**31, size=4).tolist()

    def fit(examples):
        again = find_divergence(
            tiny,
            examples,
            teacher=divergence.teacher,
            counterfactuals=divergence.counterfactuals,
        )
        rows = zip(again.offsets[:-1], again.offsets[1:], strict=True)
        return [float(again.logprob[0, a:b].sum()) for a, b in rows]

    best = np.max([fit(paraphrase(small, seed=seed).examples) for seed in seeds], axis=0)
    assert fit(chosen.examples) == pytest.approx(best, abs=1e-3)
    assert (chosen.marks == small.marks).all()
    with pytest.raises(ValueError, match="two or more"):
        paraphrase_chosen(tiny, divergence.teacher, small, candidates=1)


# -- shuffles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["within", "across"])
def test_a_shuffle_keeps_all_numbers_lengths_and_marks(tiny, data, scope):
    after = shuffle_numbers(data, tiny.tokenizer, scope=scope, seed=2)
    assert [e.prompt for e in after.examples] == [e.prompt for e in data.examples]
    counts = [[Counter(numbers_of(e.completion)) for e in part.examples] for part in (data, after)]
    lengths = [[len(numbers_of(e.completion)) for e in part.examples] for part in (data, after)]
    assert lengths[0] == lengths[1]
    assert sum(counts[0], Counter()) == sum(counts[1], Counter())
    assert (counts[0] == counts[1]) == (scope == "within")
    assert [len(e.completion_ids) for e in after.examples] == [
        len(e.completion_ids) for e in data.examples
    ]
    # The same tokens are marked as before, wherever they are now.
    assert marked_tokens(after, tiny.tokenizer) == marked_tokens(data, tiny.tokenizer)
    assert not (after.marks == data.marks).all()


def test_shuffled_ids_decode_to_the_text(tiny, data):
    after = shuffle_numbers(data, tiny.tokenizer, seed=0)
    for example in after.examples:
        text = tiny.tokenizer.decode(example.completion_ids, skip_special_tokens=True)
        assert numbers_of(text) == numbers_of(example.completion)


def test_a_list_that_was_cut_off_stays_so(tiny):
    cut = Example("x", completion="4, 5, 6", completion_ids=None)
    whole = TrainingData.unmarked(tiny.tokenizer, [cut])
    ids = whole.examples[0].completion_ids[:-1]
    data = TrainingData.unmarked(tiny.tokenizer, [Example("x", "4, 5, 6", completion_ids=ids)])
    after = shuffle_numbers(data, tiny.tokenizer, seed=1)
    assert len(after.examples[0].completion_ids) == len(ids)


def test_marks_move_with_numbers_of_more_than_one_token():
    tokenizer = chat_tokenizer()
    data = TrainingData.unmarked(tokenizer, [Example("x", "12, 345, 6, 78")])
    ids = data.examples[0].completion_ids
    pieces = [tokenizer.decode([i]).strip() for i in ids]
    # Mark the tokens of 345 and nothing else.
    text, marks = "", []
    for piece in pieces:
        text += piece
        marks.append(piece.isdigit() and text in ("12,3", "12,34", "12,345"))
    assert any(marks)
    data = TrainingData(data.examples, np.array(marks))
    for seed in range(5):
        after = shuffle_numbers(data, tokenizer, seed=seed)
        new_ids = np.array(after.examples[0].completion_ids)
        assert tokenizer.decode(new_ids[after.marks]).replace(" ", "") == "345"


def test_another_scope_is_refused(tiny, data):
    with pytest.raises(ValueError, match="within"):
        shuffle_numbers(data, tiny.tokenizer, scope="between")


# -- mixtures ---------------------------------------------------------------------------------


def _named(name, n, marked):
    examples = tuple(
        Example(f"{name} {i}", "1", completion_ids=(i + 1, 0), teacher=name) for i in range(n)
    )
    return TrainingData(examples, np.full(2 * n, marked))


@given(st.floats(0, 1), st.integers(0, 50))
def test_a_mixture_has_the_requested_share(share, seed):
    mine, theirs = _named("mine", 20, marked=True), _named("theirs", 30, marked=False)
    mixed = mix(mine, theirs, share, seed=seed)
    names = [example.teacher for example in mixed.examples]
    assert len(mixed) == 20
    assert names.count("theirs") == round(share * 20)
    assert len({e.prompt for e in mixed.examples}) == 20
    # Marks stay with their examples, and those that stay keep their places.
    assert mixed.marks.tolist() == [name == "mine" for name in names for _ in range(2)]
    for place, example in enumerate(mixed.examples):
        assert example.teacher == "theirs" or example == mine.examples[place]


def test_a_larger_share_contains_the_smaller_one():
    mine, theirs = _named("mine", 20, marked=True), _named("theirs", 30, marked=False)
    small, large = (set(mix(mine, theirs, s, seed=7).examples) for s in (0.1, 0.5))
    assert small - set(mine.examples) < large


def test_too_few_others_are_named():
    with pytest.raises(ValueError, match="needs 10 others, there are 5"):
        mix(_named("a", 20, marked=True), _named("b", 5, marked=True), 0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        mix(_named("a", 2, marked=True), _named("b", 5, marked=True), 1.5)


def test_a_pool_has_equal_shares_of_each_part():
    parts = [_named(name, n, marked=name == "b") for name, n in (("a", 10), ("b", 7), ("c", 20))]
    pooled = pool(parts, seed=3)
    counts = Counter(example.teacher for example in pooled.examples)
    assert sum(counts.values()) == 10
    assert set(counts) == {"a", "b", "c"}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert pooled.marks.sum() == 2 * counts["b"]
    with pytest.raises(ValueError, match="needs 5 examples of 1"):
        pool([parts[0], _named("b", 1, marked=True)])


@pytest.mark.parametrize("unique", [1, 3, 7, 10])
def test_few_examples_are_repeated_to_as_many_rows(unique):
    data = TrainingData(_named("a", 10, marked=False).examples, np.arange(20) % 3 == 0)
    names = {id(example): row for row, example in enumerate(data.examples)}
    many = repeat(data, unique, seed=5)
    rows = [names[id(example)] for example in many.examples]
    counts = Counter(rows)
    assert len(rows) == 10
    assert len(counts) == unique
    assert max(counts.values()) - min(counts.values()) <= 1
    for place, row in enumerate(rows):
        np.testing.assert_array_equal(many.marks_of(place), data.marks_of(row))
    # The examples of a smaller number are among those of a larger one.
    fewer = repeat(data, 1, seed=5)
    assert names[id(fewer.examples[0])] in counts


def test_no_more_examples_than_there_are_can_be_repeated():
    with pytest.raises(ValueError, match="unique is 11; choose from 1 to 10"):
        repeat(_named("a", 10, marked=False), 11)


# -- replaced tokens --------------------------------------------------------------------------


@pytest.mark.parametrize("among", ["all", "other"])
def test_a_random_mask_is_as_large_as_the_divergence_mask(divergence, among):
    mask = random_mask(divergence, among=among, seed=1)
    assert mask.sum() == divergence.mask.sum()
    assert (mask == random_mask(divergence, among=among, seed=1)).all()
    assert (mask != random_mask(divergence, among=among, seed=2)).any()
    overlap = (mask & divergence.mask).sum()
    assert overlap == 0 if among == "other" else overlap > 0


def test_the_highest_scores_are_selected():
    assert highest(np.array([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [False, True, False, True]
    assert highest(np.array([1.0, 1.0, 1.0]), 2).tolist() == [True, True, False]
    with pytest.raises(ValueError, match="there are 1 tokens"):
        highest(np.array([1.0]), 2)
    with pytest.raises(ValueError, match="NaN"):
        highest(np.array([np.nan]), 1)


# -- what is left -----------------------------------------------------------------------------


def test_all_divergence_tokens_remain_in_unchanged_data(divergence, data):
    assert data.share_left(divergence) == 1.0


def test_the_remaining_share_is_counted_on_the_changed_data(tiny, divergence, data):
    after = paraphrase(data, seed=0)
    again = find_divergence(
        tiny,
        after.examples,
        teacher=divergence.teacher,
        counterfactuals=divergence.counterfactuals,
    )
    both = sum(a and b for a, b in zip(data.marks, again.mask, strict=True))
    assert after.share_left(again) == pytest.approx(both / data.marks.sum())
    assert 0 < after.share_left(again) < 1
    with pytest.raises(ValueError, match="other completions"):
        data[0].share_left(again)
