"""Token ids that no vocabulary has are refused where they enter, with the allowed range."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import divergence_lens as dl
from divergence_lens._utils.validation import token_ids

CASES = {
    "too large for 64 bits": (2**63, ValueError, r"holds 9223372036854775808; .* from "),
    "far too large": (10**30, ValueError, r"holds 10{30}; .* from "),
    "negative": (-7, ValueError, r"holds -7; .* from "),
    "a fraction": (1.5, TypeError, r"holds 1\.5; .* whole numbers from "),
    "text": ("1", TypeError, r"holds '1'; .* whole numbers from "),
    "none": (None, TypeError, r"holds None; .* whole numbers from "),
}

ENTRIES = {
    "an example": lambda model, bad: dl.Example("a", "b", (1, bad)),
    "a row": lambda model, bad: dl.load_examples([{"prompt": "a", "completion_ids": [1, bad]}]),
    "a row of ids": lambda model, bad: dl.load_examples([[1, 2, bad]]),
    "data for find_divergence": lambda model, bad: dl.find_divergence(
        model,
        [[1, 2, bad]],
        teacher=dl.Teacher("a"),
        counterfactuals=[dl.Teacher("b", model=model)],
    ),
    "a prompt of ids": lambda model, bad: dl.Example((1, bad), completion_ids=(1,)),
    "a clean row": lambda model, bad: dl.Pairs.from_tokens([[1, bad]], [[1, 2]]),
    "a corrupted row": lambda model, bad: dl.Pairs.from_tokens([[1, 2]], [[1, bad]]),
    "an answer": lambda model, bad: dl.Pairs.from_tokens(
        [[1, 2]], [[1, 3]], answers=[[bad, 3]], foils=[4]
    ),
    "a foil": lambda model, bad: dl.Pairs.from_tokens(
        [[1, 2]], [[1, 3]], answers=[4], foils=[[3, bad]]
    ),
    "an answer to a prompt": lambda model, bad: dl.Pairs.from_prompts(
        model, clean=["a"], corrupted=["b"], answers=[[3, bad]], foils=[1]
    ),
    "a row of two models": lambda model, bad: dl.Pairs.from_disagreements(
        model, model, [[1, 2, bad]]
    ),
}


@pytest.fixture(scope="module")
def model():
    """The bundled tiny model."""
    return dl.load_model("tiny")


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("case", CASES)
def test_an_impossible_id_is_named_with_the_allowed_range(entry, case, model):
    bad, error, message = CASES[case]
    # Runtime checks of annotations, which only tests have, may object to the type first.
    errors = error if error is ValueError else (TypeError,)
    with pytest.raises(errors) as caught:
        ENTRIES[entry](model, bad)
    if error is ValueError:
        assert caught.match(message)


@pytest.mark.parametrize("case", CASES)
def test_the_first_impossible_id_is_named(case):
    bad, error, message = CASES[case]
    with pytest.raises(error, match=f"the row {message}0 to 99"):
        token_ids([1, bad, -5], "the row", d_vocab=100)


@pytest.mark.parametrize("values", [5, "12", b"12", {"a": 1}, None])
def test_ids_are_a_flat_sequence(values):
    with pytest.raises(TypeError, match=r"the row is .*, not a flat list of token ids"):
        token_ids(values, "the row")


@pytest.mark.parametrize("values", [[[1, 2]], [[1], [2, 3]], torch.ones(2, 2).long(), [True, 1.0]])
def test_rows_of_rows_are_refused(values):
    with pytest.raises(TypeError, match=r"the row holds .*, in one flat list"):
        token_ids(values, "the row")


@given(ids=st.lists(st.integers(0, 2**31 - 1)))
def test_every_form_of_ids_is_read(ids):
    forms = [ids, tuple(ids), np.array(ids, np.int64), np.array(ids, np.uint32), iter(ids)]
    for form in [*forms, torch.tensor(ids, dtype=torch.int64), [np.int64(i) for i in ids]]:
        assert token_ids(form, "the row").tolist() == ids


def test_the_vocabulary_is_the_limit_where_a_model_is_known(model):
    vocabulary = len(model.tokenizer)
    with pytest.raises(ValueError, match=rf"row 0 holds {10**6}; .* from 0 to {vocabulary - 1}"):
        dl.Pairs.from_disagreements(model, model, [[1, 2, 10**6]])
