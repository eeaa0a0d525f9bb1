"""Plain `model.to_tokens` works on every loaded model, with or without a pad token."""

import pytest
import torch

from divergence_lens.models import load_model
from tests.support.models import random_hf_model
from tests.support.tokenizers import byte_level_tokenizer

TEXTS = ["ab", "a longer text", "\n"]


def tokenizer_with(**tokens):
    tokenizer = byte_level_tokenizer()
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    assert tokenizer.pad_token is None
    return tokenizer


@pytest.mark.parametrize(
    ("tokens", "pad"),
    [
        ({}, 0),
        ({"bos_token": "a"}, "a"),
        ({"eos_token": "b", "bos_token": "a"}, "b"),
        ({"unk_token": "c", "eos_token": "b"}, "c"),
    ],
)
def test_a_missing_pad_token_is_added(tokens, pad, backend):
    tokenizer = tokenizer_with(**tokens)
    hf_model = random_hf_model("llama", vocab=256)
    model = load_model(hf_model, tokenizer=tokenizer, backend=backend)
    ids = model.to_tokens(TEXTS)
    pad_id = pad if isinstance(pad, int) else tokenizer.convert_tokens_to_ids(pad)
    assert model.tokenizer.pad_token_id == pad_id
    for text, row in zip(TEXTS, ids.tolist(), strict=True):
        expected = tokenizer(text)["input_ids"]
        assert row == expected + [pad_id] * (len(row) - len(expected))
    # Padding changes nothing before it.
    short = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = hf_model(short).logits
        torch.testing.assert_close(model(ids)[:1, : short.shape[1]], expected, atol=2e-5, rtol=1e-4)


def test_the_callers_tokenizer_is_left_as_it_was():
    tokenizer = tokenizer_with(eos_token="b")
    model = load_model(random_hf_model("gpt2", vocab=256), tokenizer=tokenizer)
    assert tokenizer.pad_token is None
    assert len(model.tokenizer) == len(tokenizer) == 256


def test_an_existing_pad_token_stays():
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = "z"
    model = load_model(random_hf_model("gpt2", vocab=256), tokenizer=tokenizer)
    assert model.tokenizer is tokenizer
    assert model.tokenizer.pad_token == "z"
