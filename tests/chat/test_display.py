"""Tokens have readable texts, also where a character is split across tokens."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import divergence_lens as dl
from divergence_lens.chat import choice_texts, row_texts, token_labels, token_texts
from tests.support.models import random_hf_model
from tests.support.tokenizers import byte_fallback_tokenizer, byte_level_tokenizer

PART = re.compile(r"(.)⟨(\d+)/(\d+)⟩", re.DOTALL)


def labels(tokenizer, text):
    return token_labels(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    "tokenizer", [byte_level_tokenizer(), byte_fallback_tokenizer()], ids=["bytes", "fallback"]
)
def test_each_part_shows_its_character(tokenizer):
    assert labels(tokenizer, "a猫a") == ("a", "猫⟨1/3⟩", "猫⟨2/3⟩", "猫⟨3/3⟩", "a")
    assert labels(tokenizer, "🦉") == tuple(f"🦉⟨{k}/4⟩" for k in range(1, 5))


def test_a_token_with_a_space_and_a_part_shows_both():
    # " 🦉" is the bytes 20 F0 9F A6 89; the first three and the last two are one token each.
    tokenizer = byte_level_tokenizer([("Ġ", "ð"), ("Ġð", "Ł"), ("¦", "ī")])
    assert labels(tokenizer, " 🦉") == (" 🦉⟨1/2⟩", "🦉⟨2/2⟩")


def test_parts_that_make_no_character_are_shown_in_hexadecimal():
    tokenizer = byte_level_tokenizer([("Ġ", "ð")])
    ids = tokenizer(" 🦉")["input_ids"]
    assert token_labels(tokenizer, ids[:2]) == (" ⟨F0⟩", "⟨9F⟩")
    texts = token_texts(tokenizer, ids)
    assert row_texts(texts, [ids[1], *ids]) == ["⟨9F⟩", *(labels(tokenizer, " 🦉"))]


@given(text=st.text().filter(lambda text: "⟨" not in text))
@pytest.mark.parametrize(
    "tokenizer", [byte_level_tokenizer(), byte_level_tokenizer([("ç", "Į"), ("Ł", "¦")])]
)
def test_the_parts_of_a_row_make_its_text(tokenizer, text):
    shown = labels(tokenizer, text)
    whole = PART.sub(lambda part: part[1] if part[2] == "1" else "", "".join(shown))
    assert whole == text
    for label in shown:
        for _, number, count in PART.findall(label):
            assert 1 <= int(number) <= int(count) <= 4


def test_a_choice_is_joined_only_where_it_is_the_rows_own_token():
    tokenizer = byte_level_tokenizer()
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
    tokenizer = byte_level_tokenizer([("ï", "¿"), ("ï¿", "½")])
    assert labels(tokenizer, "\ufffd") == ("\ufffd",)


def test_qwens_tokens_of_rare_characters(qwen25):
    text = "a 猫 and 🦉 and 𒀀"
    shown = labels(qwen25, text)
    assert "\ufffd" not in "".join(shown)
    assert not re.search("[ðŁ¦ĥ]", "".join(shown))
    whole = PART.sub(lambda part: part[1] if part[2] == "1" else "", "".join(shown))
    assert whole == text


def test_every_view_shows_characters_and_not_their_bytes(tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    model = dl.load_model(
        random_hf_model("qwen2", 3, vocab=len(tokenizer)), tokenizer=tokenizer, backend="bridge"
    )
    owl, cat = (dl.Teacher(name, system_prompt=f"{name} 猫") for name in ("owl", "cat"))
    div = dl.find_divergence(
        model,
        [dl.Example("Say 猫.", "猫 a"), dl.Example("Say 猫.", "猫")],
        teacher=owl,
        counterfactuals=[cat],
        require_agreement=False,
    )
    table = div.to_dataframe()
    parts = [f"猫⟨{k}/3⟩" for k in (1, 2, 3)]
    assert table["token"].tolist() == [*parts, " ", "a", *parts]
    pairs = div.pairs(first_only=False)
    effects = dl.attribution_patch(model, pairs)
    figure = effects.plot(pair=0).to_json().encode().decode("unicode_escape")
    div.to_jsonl(tmp_path / "x.jsonl")
    views = {
        "text": str(div[0]),
        "notebook": div[0]._repr_html_(),
        "table": table.to_csv(),
        "pairs": pairs._repr_html_(),
        "effects": effects.to_dataframe().to_csv(),
        "figure of tokens": div[0].plot().to_json() if hasattr(div[0], "plot") else "猫",
        "jsonl": (tmp_path / "x.jsonl").read_text(encoding="utf-8"),
    }
    for name, view in views.items():
        assert not re.search("[\ufffdçĮ«]", view), name
        assert "猫" in view, name
    assert "\ufffd" not in figure
