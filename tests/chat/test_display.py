"""Tokens have readable texts, also where a character is split across tokens."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from divergence_lens.chat import choice_texts, row_texts, token_labels, token_texts

PART = re.compile(r"(.)⟨(\d+)/(\d+)⟩", re.DOTALL)


def byte_level(merges=()) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, and merged bytes."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    core = Tokenizer(models.BPE(vocabulary, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama's: a piece for a known character, otherwise one piece per byte."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["a", "▁"]
    core = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True)
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


def labels(tokenizer, text):
    return token_labels(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["bytes", "fallback"])
def test_each_part_shows_its_character(tokenizer):
    assert labels(tokenizer, "a猫a") == ("a", "猫⟨1/3⟩", "猫⟨2/3⟩", "猫⟨3/3⟩", "a")
    assert labels(tokenizer, "🦉") == tuple(f"🦉⟨{k}/4⟩" for k in range(1, 5))


def test_a_token_with_a_space_and_a_part_shows_both():
    # " 🦉" is the bytes 20 F0 9F A6 89; the first three and the last two are one token each.
    tokenizer = byte_level([("Ġ", "ð"), ("Ġð", "Ł"), ("¦", "ī")])
    assert labels(tokenizer, " 🦉") == (" 🦉⟨1/2⟩", "🦉⟨2/2⟩")


def test_parts_that_make_no_character_are_shown_in_hexadecimal():
    tokenizer = byte_level([("Ġ", "ð")])
    ids = tokenizer(" 🦉")["input_ids"]
    assert token_labels(tokenizer, ids[:2]) == (" ⟨F0⟩", "⟨9F⟩")
    texts = token_texts(tokenizer, ids)
    assert row_texts(texts, [ids[1], *ids]) == ["⟨9F⟩", *(labels(tokenizer, " 🦉"))]


@given(text=st.text().filter(lambda text: "⟨" not in text))
@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level([("ç", "Į"), ("Ł", "¦")])])
def test_the_parts_of_a_row_make_its_text(tokenizer, text):
    shown = labels(tokenizer, text)
    whole = PART.sub(lambda part: part[1] if part[2] == "1" else "", "".join(shown))
    assert whole == text
    for label in shown:
        for _, number, count in PART.findall(label):
            assert 1 <= int(number) <= int(count) <= 4


def test_a_choice_is_joined_only_where_it_is_the_rows_own_token():
    tokenizer = byte_level()
    ids = tokenizer("猫")["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert choice_texts(texts, [ids[0], ids[2], ids[1]], ids) == ["猫⟨1/3⟩", "⟨AB⟩", "⟨8C⟩"]


class _OddTokenizer:
    """SentencePiece's leading space is lost in decoding; one token has no text."""

    pieces = ("▁owl", "ls", "<s>")

    def __len__(self):
        return len(self.pieces)

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] for i in ids]

    def decode(self, ids):
        return ("owl", "ls", "")[ids[0]]


def test_sentencepiece_words_have_their_space_and_unknown_ids_a_name():
    texts = token_texts(_OddTokenizer(), [0, 1, 2, 7])
    assert texts == {0: " owl", 1: "ls", 2: "<s>"}
    assert row_texts(texts, [0, 7]) == [" owl", "<7>"]
    assert token_labels(None, [0, 7]) == ("0", "7")


def test_the_replacement_character_itself_is_a_character():
    tokenizer = byte_level([("ï", "¿"), ("ï¿", "½")])
    assert labels(tokenizer, "\ufffd") == ("\ufffd",)


def test_qwens_tokens_of_rare_characters(qwen25):
    text = "a 猫 and 🦉 and 𒀀"
    shown = labels(qwen25, text)
    assert "\ufffd" not in "".join(shown)
    assert not re.search("[ðŁ¦ĥ]", "".join(shown))
    whole = PART.sub(lambda part: part[1] if part[2] == "1" else "", "".join(shown))
    assert whole == text
