"""Prompts become the template's own ids, and every label names its text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_lens.chat import SEGMENTS, encode_prompt, encode_prompts
from tests.support.models import CHATML, chat_tokenizer
from tests.support.templates import (
    CASES,
    DEFAULT,
    TEXTS,
    expected_segments,
    gemma,
    lines,
    segment_text,
    template_tokenizer,
)


@given(system=st.none() | TEXTS, user=TEXTS)
def test_ids_are_the_templates_and_each_label_names_what_it_says(case, system, user):
    tokenizer, pieces = case
    encoded = encode_prompt(tokenizer, user, system_prompt=system)
    ids, covered = expected_segments(tokenizer, pieces(system, user))
    assert encoded.ids == ids
    assert len(encoded.segments) == len(ids)
    for label, labels in zip(encoded.segments, covered, strict=True):
        contents = labels - {"template"}
        assert label in (contents or {"template"})


@settings(max_examples=25)
@given(system=TEXTS, user=TEXTS)
def test_ids_are_those_of_apply_chat_template(case, system, user):
    tokenizer, pieces = case
    if pieces in (gemma, lines):
        messages = [{"role": "user", "content": f"{system}\n\n{user}" if system else user}]
    else:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    expected = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False
    )["input_ids"]
    assert list(encode_prompt(tokenizer, user, system_prompt=system).ids) == expected


@settings(max_examples=8)
@given(prompts=st.lists(TEXTS, min_size=1, max_size=5), system=st.none() | TEXTS)
def test_many_prompts_are_encoded_as_one_by_one(case, prompts, system):
    tokenizer, _ = case
    together = encode_prompts(tokenizer, prompts, system_prompt=system)
    assert together == [encode_prompt(tokenizer, p, system_prompt=system) for p in prompts]


def test_segments_read_back_as_the_texts_they_name():
    tokenizer = chat_tokenizer("chatml")
    encoded = encode_prompt(tokenizer, "Name a cat.", system_prompt="You love owls.")
    assert segment_text(tokenizer, encoded, "system") == "You love owls."
    assert segment_text(tokenizer, encoded, "user") == "Name a cat."
    assert segment_text(tokenizer, encoded, "template") == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert set(encoded.segments) < set(SEGMENTS)
    assert len(encoded) == len(encoded.ids)


@pytest.mark.parametrize("name", CASES)
def test_a_system_prompt_that_the_prompt_repeats_is_told_from_it(name):
    tokenizer = template_tokenizer(name)
    said = "You love owls."
    encoded = encode_prompt(tokenizer, f"{said} {said} user", system_prompt=said)
    assert segment_text(tokenizer, encoded, "system") == said
    assert segment_text(tokenizer, encoded, "user") == f"{said} {said} user"
    order = [label for label in encoded.segments if label != "template"]
    assert order == sorted(order), "the system prompt comes first"


def test_the_templates_own_system_prompt_is_a_system_prompt():
    tokenizer = chat_tokenizer("qwen")
    assert segment_text(tokenizer, encode_prompt(tokenizer, "Hi"), "system") == DEFAULT
    empty = encode_prompt(tokenizer, "Hi", system_prompt="")
    assert "system" not in empty.segments
    assert segment_text(tokenizer, empty, "template").startswith("<|im_start|>system\n<|im_end|>")
    same = encode_prompt(tokenizer, "Hi", system_prompt=DEFAULT)
    assert same == encode_prompt(tokenizer, "Hi")


def test_no_system_prompt_gives_no_system_tokens_where_the_template_has_no_default():
    for name in ("chatml", "gemma", "gemma3", "llama3", "llama2", "lines", "thinking"):
        tokenizer = template_tokenizer(name)
        assert "system" not in encode_prompt(tokenizer, "Hi").segments


def test_a_prompt_that_a_template_judges_by_its_beginning_is_still_found():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "{{ message['content'] }}",
        "{% if message['content'].startswith('cat') %}(a cat) {% endif %}{{ message['content'] }}",
    )
    encoded = encode_prompt(tokenizer, "cat or wolf")
    assert segment_text(tokenizer, encoded, "user") == "cat or wolf"
    assert "(a cat) " in segment_text(tokenizer, encoded, "template")


def test_a_template_that_repeats_the_prompt_has_it_labelled_twice():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "A:{{ messages[-1]['content'] }}\n{{ messages[-1]['content'] }}\n"
    encoded = encode_prompt(tokenizer, "owl")
    assert segment_text(tokenizer, encoded, "user") == "owlowl"
