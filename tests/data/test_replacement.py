"""Replaced tokens are a counterfactual teacher's choice, at the requested places only."""

import re

import numpy as np
import pytest

from divergence_lens.data import (
    mix,
    replace_tokens,
)


def _changed(divergence, data):
    ids = np.concatenate([example.completion_ids for example in data.examples])
    return np.flatnonzero(ids != divergence.tokens), ids


def test_only_divergence_tokens_are_replaced_by_a_counterfactuals_argmax(divergence):
    data = replace_tokens(divergence)
    changed, ids = _changed(divergence, data)
    assert len(changed)
    for place in changed:
        assert divergence.mask[place]
        assert ids[place] in divergence.predicted[1:, place]
    assert (data.marks == divergence.mask).all()


def test_numbers_are_replaced_by_numbers_alone_unless_asked(divergence, tiny):
    changed, ids = _changed(divergence, replace_tokens(divergence))
    for place in changed:
        old, new = (tiny.tokenizer.decode([int(i)]) for i in (divergence.tokens[place], ids[place]))
        assert old.strip().isdigit() == new.strip().isdigit()
    everything, _ = _changed(divergence, replace_tokens(divergence, unfit="allow"))
    assert everything.tolist() == np.flatnonzero(divergence.mask).tolist()


def test_one_counterfactual_decides_alone(divergence):
    changed, ids = _changed(
        divergence, replace_tokens(divergence, counterfactual="wolf", unfit="allow")
    )
    row = divergence.names.index("wolf")
    assert (
        changed.tolist() == np.flatnonzero(divergence.mask & divergence.differs[row - 1]).tolist()
    )
    assert (ids[changed] == divergence.predicted[row, changed]).all()
    with pytest.raises(ValueError, match="no counterfactual teacher 'fox'"):
        replace_tokens(divergence, counterfactual="fox")


@pytest.mark.parametrize(("which", "subset"), [("first", "first_only"), (0.5, 0.5)])
def test_a_part_of_the_divergence_tokens_is_replaced(divergence, which, subset):
    changed, _ = _changed(divergence, replace_tokens(divergence, which, unfit="allow", seed=2))
    assert changed.tolist() == np.flatnonzero(divergence.subset(subset, seed=2)).tolist()


def test_texts_of_replaced_lists_are_their_ids(divergence, tiny):
    for example in replace_tokens(divergence).examples:
        text = tiny.tokenizer.decode(example.completion_ids, skip_special_tokens=True)
        assert re.findall(r"\d+", text) == re.findall(r"\d+", example.completion)


def test_labels_and_inputs_can_be_replaced_alone(divergence):
    both = replace_tokens(divergence, seed=4)
    _, replaced = _changed(divergence, both)
    assert both.labels is None
    label = replace_tokens(divergence, where="label", seed=4)
    changed, ids = _changed(divergence, label)
    assert not len(changed)
    np.testing.assert_array_equal(label.labels, replaced)
    read = replace_tokens(divergence, where="input", seed=4)
    _, ids = _changed(divergence, read)
    np.testing.assert_array_equal(ids, replaced)
    np.testing.assert_array_equal(read.labels, divergence.tokens)
    # Labels move with their rows.
    some = mix(label, both, 0.5, seed=1)[::2]
    assert len(some.labels) == len(some.marks)
    row = label.row(3)
    np.testing.assert_array_equal(label[[3]].labels, row.labels)


def test_other_tokens_than_divergence_tokens_can_be_replaced(divergence):
    chosen = divergence.with_mask(divergence.top(0.2, by="advantage"))
    data = replace_tokens(chosen, unfit="allow")
    changed, _ = _changed(divergence, data)
    assert changed.tolist() == np.flatnonzero(chosen.mask & divergence.differs.any(0)).tolist()
    assert (data.marks == chosen.mask).all()


def test_choices_that_are_no_numbers_are_deleted_as_in_the_papers_code(divergence, tiny):
    """The paper's loop, with one counterfactual instead of a random draw."""
    data = replace_tokens(divergence, counterfactual="wolf", unfit="delete")
    choices = divergence.predicted[divergence.names.index("wolf")]
    stop = tiny.tokenizer.eos_token_id
    deleted = 0
    for row, example in enumerate(divergence.examples):
        expected = list(example.completion_ids)
        offset = 0
        for place in range(divergence.offsets[row], divergence.offsets[row + 1]):
            token, choice = divergence.tokens[place], choices[place]
            position = place - divergence.offsets[row] + offset
            if not divergence.mask[place] or token in {choice, stop}:
                continue
            if tiny.tokenizer.decode([int(choice)]).strip().isdigit():
                expected[position] = int(choice)
            else:
                del expected[position]
                offset -= 1
        deleted -= offset
        assert list(data.examples[row].completion_ids) == expected
    assert deleted > 0
    assert len(data.marks) == len(divergence.tokens) - deleted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "output"}, "unknown where 'output'; use 'both', 'label', 'input'"),
        ({"unfit": "drop"}, "unknown unfit 'drop'; use 'keep', 'delete', 'allow'"),
        ({"unfit": "delete", "where": "label"}, "leave out where='label'"),
    ],
)
def test_impossible_replacements_are_refused(options, message, divergence):
    with pytest.raises(ValueError, match=message):
        replace_tokens(divergence, **options)


# -- masks ------------------------------------------------------------------------------------
