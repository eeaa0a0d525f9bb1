"""Regular expressions over tokens: against the `regex` package's partial matching."""

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from divergence_lens import load_model
from divergence_lens.chat import decode, stop_ids
from divergence_lens.patterns import TokenPattern, ascii_classes, token_bytes
from tests.support.models import chat_tokenizer

LISTS = r"\d{1,3}(, \d{1,3}){2,4}"


@pytest.fixture(scope="module")
def word_tokenizer():
    return load_model("tiny").tokenizer


@pytest.fixture(scope="module")
def byte_tokenizer():
    return chat_tokenizer("chatml")


@pytest.mark.parametrize("name", ["word_tokenizer", "byte_tokenizer"])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_every_walk_ends_in_a_match(name, request, data):
    tokenizer = request.getfixturevalue(name)
    ends = stop_ids(tokenizer)
    pattern = TokenPattern(LISTS, tokenizer, d_vocab=len(tokenizer), end_tokens=ends)
    state, ids = pattern.start, []
    while not ids or ids[-1] not in ends:
        token = data.draw(st.sampled_from(pattern.allowed([state])[0].nonzero()[:, 0].tolist()))
        ids.append(token)
        state = pattern.next_state(state, token)
    assert regex.fullmatch(LISTS, decode(tokenizer, ids[:-1]))


@pytest.mark.parametrize("name", ["word_tokenizer", "byte_tokenizer"])
def test_allowed_tokens_are_those_that_keep_a_partial_match(name, request):
    tokenizer = request.getfixturevalue(name)
    ends = stop_ids(tokenizer)
    pattern = TokenPattern(LISTS, tokenizer, d_vocab=len(tokenizer) + 5, end_tokens=ends)
    ids = tokenizer("12, 7, 40, 5, 6", add_special_tokens=False)["input_ids"]
    allowed = pattern.allowed(pattern.states([*ids, min(ends)]))
    assert not allowed[:, len(tokenizer) :].any()  # the padding of the logits
    for position in range(len(ids) + 1):
        before = decode(tokenizer, ids[:position])
        complete = regex.fullmatch(LISTS, before) is not None
        assert allowed[position, sorted(ends)].tolist() == [complete] * len(ends)
        for token in token_bytes(tokenizer):
            text = decode(tokenizer, [*ids[:position], token])
            expected = regex.fullmatch(LISTS, text, partial=True) is not None
            assert bool(allowed[position, token]) == expected, (before, token, text)


def test_a_token_that_is_not_allowed_is_refused(word_tokenizer):
    ends = sorted(stop_ids(word_tokenizer))
    pattern = TokenPattern("12|12, 7", word_tokenizer, d_vocab=len(word_tokenizer), end_tokens=ends)
    twelve, comma, seven = word_tokenizer("12, 7", add_special_tokens=False)["input_ids"]
    rows = pattern.allowed(pattern.states([twelve, comma, seven, ends[0]]))
    assert rows[:, ends].all(-1).tolist() == [False, True, False, True]
    with pytest.raises(ValueError, match=f"token {seven} cannot continue"):
        pattern.next_state(pattern.start, seven)
    with pytest.raises(ValueError, match=f"token {seven} cannot continue"):
        pattern.states([twelve, ends[0], seven])


def test_characters_of_several_bytes():
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    pattern = TokenPattern(
        "🦉+", tokenizer, d_vocab=len(tokenizer), end_tokens=[tokenizer.eos_token_id]
    )
    ids = tokenizer("🦉🦉", add_special_tokens=False)["input_ids"]
    assert len(ids) == 8
    states = pattern.states([*ids, tokenizer.eos_token_id])
    assert pattern.allowed(states)[torch.arange(8), torch.tensor(ids)].all()


def test_tokens_into_a_dead_end_are_not_allowed(word_tokenizer):
    pattern = TokenPattern(
        r"\d{3}", word_tokenizer, d_vocab=len(word_tokenizer), end_tokens=stop_ids(word_tokenizer)
    )
    allowed = pattern.allowed([pattern.start])[0].nonzero()[:, 0].tolist()
    # Numbers are single tokens, so no token continues "4" to "412".
    assert sorted(decode(word_tokenizer, [token]) for token in allowed) == [
        str(number) for number in range(100, 1000)
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"\d{3}", "[0-9]{3}"),
        (r"[\d,]+\D", "[0-9,]+[^0-9]"),
        (r"\\d\.\w", r"\\d\.[0-9A-Za-z_]"),
        (r"\s[^\s]", r"[ \t\n\r\f\v][^ \t\n\r\f\v]"),
    ],
)
def test_classes_are_ascii(pattern, expected):
    assert ascii_classes(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "cannot be compiled"),
        ("(?=1)2", "look-around"),
        ("é+", "no tokens to write"),
    ],
)
def test_patterns_that_cannot_be_written(word_tokenizer, pattern, message):
    with pytest.raises(ValueError, match=message):
        TokenPattern(pattern, word_tokenizer, d_vocab=len(word_tokenizer), end_tokens=[3])
