"""Tokenizers without a chat template, and tokenizers of other kinds."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from divergence_lens.chat import (
    Encoded,
    decode,
    encode_completion,
    encode_prompt,
    end_of_turn,
    stop_ids,
)
from tests.support.models import chat_tokenizer
from tests.support.templates import segment_text


def sentencepiece_like(*, bos: bool) -> PreTrainedTokenizerFast:
    """As Llama's: a space before every text, spaces as "▁", a beginning-of-sequence token."""
    vocabulary = {"<s>": 0, "</s>": 1, "▁": 2, "\n": 3, "a": 4, "b": 5, "▁a": 6, "<unk>": 7}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_without_a_template_the_text_is_taken_as_it_is():
    tokenizer = sentencepiece_like(bos=True)
    encoded = encode_prompt(tokenizer, "a b")
    assert encoded == Encoded((0, 6, 2, 5), ("template", "user", "user", "user"))
    assert list(encoded.ids) == tokenizer("a b")["input_ids"]
    assert encode_prompt(tokenizer, "").ids == (0,)
    assert end_of_turn(tokenizer) == 1


def test_a_beginning_of_sequence_is_neither_added_nor_doubled():
    assert encode_prompt(sentencepiece_like(bos=False), "b").segments == ("user", "user")
    written = encode_prompt(sentencepiece_like(bos=True), "<s>b")
    assert written.ids.count(0) == 1
    assert written.segments[0] == "template"


@pytest.mark.parametrize("text", [" a b", "a b", "b", "", " ", "\nb", "b\n"])
def test_without_a_template_a_completion_continues_the_text(text):
    tokenizer = sentencepiece_like(bos=True)
    ids = encode_completion(tokenizer, text)
    assert ids[-1] == 1
    assert decode(tokenizer, ids) == text
    whole = encode_prompt(tokenizer, "b" + text).ids
    assert encode_prompt(tokenizer, "b").ids + ids[:-1] == whole


def test_without_an_end_of_sequence_a_completion_has_no_end():
    tokenizer = sentencepiece_like(bos=True)
    tokenizer.eos_token = None
    assert encode_completion(tokenizer, "b") == (5,)
    assert stop_ids(tokenizer) == frozenset()
    with pytest.raises(ValueError, match=r"no token that ends a turn.*eos_token"):
        end_of_turn(tokenizer)


def test_white_space_tokens_are_labelled_where_a_tokenizer_trims_its_offsets():
    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    encoded = encode_prompt(tokenizer, "owl \n", system_prompt="\n\ncat")
    assert segment_text(tokenizer, encoded, "user") == "owl \n"
    assert segment_text(tokenizer, encoded, "system") == "\n\ncat"


def test_a_tokenizer_that_lower_cases_and_drops_white_space_is_labelled():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "owl": 1, "cat": 2, "<t>": 3}, "<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(["<t>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<t>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<t>\n' }}{% endfor %}"
    )
    encoded = encode_prompt(tokenizer, "CAT", system_prompt="Owl cat")
    assert encoded == Encoded(
        (0, 1, 2, 3, 0, 2, 3),
        ("template", "system", "system", "template", "template", "user", "template"),
    )


def test_characters_of_several_bytes_are_labelled_whole():
    alphabet = {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    core = Tokenizer(models.BPE(alphabet, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.chat_template = "é{{ messages[-1]['content'] }}é"
    encoded = encode_prompt(tokenizer, "🦉")
    assert encoded.segments == ("template",) * 2 + ("user",) * 4 + ("template",) * 2
