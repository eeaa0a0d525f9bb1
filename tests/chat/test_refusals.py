"""Prompts and templates that cannot be encoded are refused with the reason."""

import pytest
from transformers import PreTrainedTokenizer

from divergence_lens.chat import (
    Encoded,
    check_length,
    encode_completions,
    encode_prompt,
    encode_prompts,
)
from tests.support.models import chat_tokenizer


def test_a_system_prompt_without_a_template_is_refused():
    tokenizer = chat_tokenizer(None)
    with pytest.raises(ValueError, match=r"no chat template.*You love owls.*chat_template"):
        encode_prompt(tokenizer, "Hi", system_prompt="You love owls.")


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        encode_prompts(chat_tokenizer(None), ["Hi", ""])


def test_texts_that_are_no_text_are_refused_with_their_number():
    tokenizer = chat_tokenizer()
    with pytest.raises(ValueError, match=r"prompt 1 holds half a character.*position 2"):
        encode_prompts(tokenizer, ["Hi", "Hi\ud800"])
    with pytest.raises(ValueError, match="completion 0 holds half a character"):
        encode_completions(tokenizer, ["\ud800"])


def test_templates_that_refuse_hide_or_rewrite_are_named():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no turns today') }}"
    with pytest.raises(ValueError, match=r"does not take.*turns user: no turns today"):
        encode_prompt(tokenizer, "Hi")
    tokenizer.chat_template = "Hello"
    with pytest.raises(ValueError, match="leaves the user's text out"):
        encode_prompt(tokenizer, "cat")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | replace('cat', 'dog') }}|"
    tokenizer.chat_template += "{% endfor %}"
    assert encode_prompt(tokenizer, "a wolf").segments[-1] == "template"
    tokenizer.chat_template = "{{ messages[0]['content'] | length }}"
    with pytest.raises(ValueError, match=r"leaves the user's text out|rewrites the prompt"):
        encode_prompt(tokenizer, "cat")


def test_a_tokenizer_without_offsets_is_refused():
    class Slow(PreTrainedTokenizer):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(TypeError, match=r"is a Slow, which gives no offsets.*use_fast=True"):
        encode_prompt(Slow(), "a")


def test_check_length_names_the_row_and_both_lengths():
    encoded = Encoded((1, 2, 3), ("user",) * 3)
    check_length(encoded, 3)
    check_length([1, 2, 3], 5, new_tokens=2)
    with pytest.raises(ValueError, match=r"the prompt has 3 tokens, but .* holds 2"):
        check_length(encoded, 2)
    with pytest.raises(ValueError, match=r"prompt 7 has 3 tokens and 2 more must follow.* 4"):
        check_length((1, 2, 3), 4, new_tokens=2, row=7)
