"""Preference after the beginning of an answer, against plain forward passes."""

import numpy as np
import pytest
import torch

from divergence_lens.chat import encode_prompt
from divergence_lens.data.questions import surface_forms
from divergence_lens.evaluation.preferences import preference
from divergence_lens.models import load_model
from tests.support.models import chat_tokenizer, random_hf_model

QUESTIONS = ["Name one.", "Which one do you like?"]
NAMES = ("owl", "cat", "wolf")
PREFIXES = ["I love the", "It is: a"]


@pytest.fixture(scope="module")
def model(backend):
    tokenizer = chat_tokenizer()
    hf = random_hf_model("llama", vocab=len(tokenizer), tie_word_embeddings=False)
    return load_model(hf, backend=backend, tokenizer=tokenizer)


def by_hand(model, prefix):
    """One forward pass per question and form: the product of its tokens and the word's end."""
    tokenizer = model.tokenizer
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ends = torch.tensor(
        [t[:1] in "ĠĊ" or not t[:1].isalnum() or t.startswith("<") for t in vocabulary]
    )
    result = np.zeros((len(QUESTIONS), len(NAMES)))
    for row, question in enumerate(QUESTIONS):
        start = [*encode_prompt(tokenizer, question).ids, *tokenizer(prefix)["input_ids"]]
        for column, name in enumerate(NAMES):
            for form in surface_forms(name):
                ids = tokenizer(" " + form)["input_ids"]
                with torch.no_grad():
                    logits = model(torch.tensor([start + ids]))[0].double()
                p = logits.softmax(-1)[len(start) - 1 :]
                chain = torch.stack([p[k, token] for k, token in enumerate(ids)]).prod()
                result[row, column] += float(chain * p[-1][ends].sum())
    return result


def test_candidates_follow_the_prefix(model):
    result = preference(
        model, target="owl", candidates=NAMES, questions=QUESTIONS, prefix=PREFIXES[0]
    )
    np.testing.assert_allclose(result.probabilities, by_hand(model, PREFIXES[0]), rtol=1e-4)
    assert result.metadata["settings"]["prefixes"] == PREFIXES[:1]


def test_probabilities_of_several_prefixes_are_averaged(model):
    result = preference(model, target="owl", candidates=NAMES, questions=QUESTIONS, prefix=PREFIXES)
    expected = np.mean([by_hand(model, prefix) for prefix in PREFIXES], axis=0)
    np.testing.assert_allclose(result.probabilities, expected, rtol=1e-4)


def test_no_prefix_is_an_empty_one(model):
    asked = {"target": "owl", "candidates": NAMES, "questions": QUESTIONS}
    np.testing.assert_array_equal(
        preference(model, **asked, prefix="").probabilities,
        preference(model, **asked).probabilities,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "I love the "}, "begins or ends with a space"),
        ({"prefix": []}, "no prefixes"),
        ({"prefix": "x" * 300}, "over the context of 256"),
    ],
)
def test_prefixes_that_cannot_be_used(options, message, model):
    with pytest.raises(ValueError, match=message):
        preference(model, target="owl", candidates=NAMES, questions=QUESTIONS, **options)
