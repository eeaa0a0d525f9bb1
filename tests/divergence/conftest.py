"""Teachers' readings of one random model, shared by the tests of this package."""

from dataclasses import replace

import pytest

from divergence_lens.chat import encode_prompt
from divergence_lens.divergence import (
    find_divergence,
)
from divergence_lens.models import load_model
from tests.support.divergence import (
    CAT,
    NOBODY,
    OWL,
    WOLF,
    hf_logits,
    some_examples,
)
from tests.support.models import chat_tokenizer, random_hf_model


@pytest.fixture(scope="module")
def hf():
    """A random model whose embeddings are not tied, so that it does not just repeat its input."""
    return random_hf_model("qwen2", 3, vocab=len(chat_tokenizer()), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model(hf, backend):
    return load_model(hf, backend=backend, tokenizer=chat_tokenizer())


@pytest.fixture(scope="module")
def examples(hf):
    """Half of them what the model itself would write as the owl teacher, greedily."""
    tokenizer = chat_tokenizer()
    found = some_examples(12, 0, len(tokenizer))
    for i in range(6):
        prompt = encode_prompt(tokenizer, found[i].prompt, system_prompt=OWL.system_prompt).ids
        row = list(prompt)
        for _ in range(8):
            row.append(int(hf_logits(hf, row)[-1].argmax()))
        found[i] = replace(found[i], completion_ids=tuple(row[len(prompt) :]))
    return found


@pytest.fixture(scope="module")
def div(model, examples):
    return find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
