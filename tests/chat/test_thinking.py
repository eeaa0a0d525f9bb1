"""Prompt and completion are the template's own conversation, with and without think blocks."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_lens.chat import Conversation, Turn, encode_completion, encode_prompt, end_of_turn
from divergence_lens.examples import Example, load_examples, save_examples, with_ids
from tests.support.models import CHATML, chat_tokenizer
from tests.support.templates import segment_text
from tests.support.thinking_templates import (
    CHANNELS,
    DEEPSEEK_R1,
    DEEPSEEK_V31,
    GLM,
    QWEN3,
    SMOLLM3,
)

TEMPLATES = {
    "chatml": CHATML,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "glm": GLM,
    "channels": CHANNELS,
}
THOUGHT = "<think>\nHm, owls.\n</think>\n\n"

WORDS = st.text(alphabet="aou1,é", min_size=1, max_size=5)
ANSWERS = st.tuples(st.sampled_from(["", THOUGHT, "<think>so</think>"]), WORDS).map("".join)


def message(role, content):
    return {"role": role, "content": content}


def tokenizer_with(template):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def conversation_ids(tokenizer, messages, *, thinking):
    """The template's own ids of a conversation, up to the end of its last turn."""
    ids = tokenizer.apply_chat_template(messages, enable_thinking=thinking)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return ids[: len(ids) - ids[::-1].index(end)]


def both_ids(tokenizer, example):
    """The ids of an example's prompt and completion, and whether its template thinks."""
    (filled,) = with_ids(tokenizer, [example])
    thinking = isinstance(filled.prompt, Conversation) and filled.prompt.thinking
    return [*encode_prompt(tokenizer, filled.prompt).ids, *filled.completion_ids], thinking


@settings(max_examples=40)
@given(
    system=st.none() | WORDS,
    earlier=st.lists(st.tuples(WORDS, ANSWERS), max_size=2),
    user=WORDS,
    answer=ANSWERS,
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_completion_are_the_templates_conversation(name, system, earlier, user, answer):
    tokenizer = tokenizer_with(TEMPLATES[name])
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in earlier:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    (example,) = load_examples([{"messages": messages}])
    ids, thinking = both_ids(tokenizer, example)
    assert ids == conversation_ids(tokenizer, messages, thinking=thinking)
    if name in ("qwen3", "smollm3", "glm"):
        assert thinking == ("<think>" in answer)


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_a_prompt_that_thinks_leaves_the_think_block_to_the_completion(name):
    tokenizer = tokenizer_with(TEMPLATES[name])
    (example,) = with_ids(tokenizer, [Example("Best?", THOUGHT + "Owl.")])
    assert example.prompt == Conversation((Turn("user", "Best?"),), thinking=True)
    assert tokenizer.decode(example.completion_ids) == THOUGHT + "Owl.<|im_end|>"
    prompt = tokenizer.decode(encode_prompt(tokenizer, example.prompt).ids)
    assert prompt.endswith("<|im_start|>user\nBest?<|im_end|>\n<|im_start|>assistant\n")


def test_an_answer_without_a_thought_follows_the_empty_think_block():
    tokenizer = tokenizer_with(QWEN3)
    (example,) = with_ids(tokenizer, [Example("Best?", "Owl.")])
    assert example.prompt == "Best?"
    assert tokenizer.decode(example.completion_ids) == "Owl.<|im_end|>"
    prompt = tokenizer.decode(encode_prompt(tokenizer, "Best?").ids)
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")


def test_an_earlier_thought_that_the_template_drops_is_no_part_of_the_prompt():
    tokenizer = tokenizer_with(QWEN3)
    messages = [
        {"role": "user", "content": "Best?"},
        {"role": "assistant", "content": THOUGHT + "Owl."},
        {"role": "user", "content": "Why?"},
    ]
    encoded = encode_prompt(tokenizer, messages)
    assert segment_text(tokenizer, encoded, "assistant") == "Owl."
    assert segment_text(tokenizer, encoded, "user") == "Best?Why?"


@pytest.mark.parametrize("answer", ["Owl.", THOUGHT + "Owl."])
def test_a_template_whose_conversations_lose_their_thoughts_is_refused(answer):
    tokenizer = tokenizer_with(DEEPSEEK_R1)
    with pytest.raises(ValueError, match=r"row 1: the chat template .*<think>.*completion_ids"):
        with_ids(tokenizer, [Example("Best?", "", (1,)), Example("Best?", answer)])
    with pytest.raises(ValueError, match=r"completion 0: .*cannot equal the conversation"):
        encode_completion(tokenizer, answer)
    # Ids that the model itself wrote follow its prompt, so they need no rendering.
    (generated,) = with_ids(tokenizer, [Example("Best?", "hm", (5, 6))])
    assert generated.completion_ids == (5, 6)
    assert tokenizer.decode(end_of_turn(tokenizer)) == "<|im_end|>"


def test_a_thought_that_the_template_drops_from_the_last_answer_is_refused():
    tokenizer = tokenizer_with(DEEPSEEK_V31)
    ids, thinking = both_ids(tokenizer, Example("Best?", "Owl."))
    messages = [{"role": "user", "content": "Best?"}, {"role": "assistant", "content": "Owl."}]
    assert ids == conversation_ids(tokenizer, messages, thinking=False)
    assert not thinking
    with pytest.raises(ValueError, match=r"rewrites the completion '<think>.*' as 'Owl\.'"):
        with_ids(tokenizer, [Example("Best?", "<think>so</think>Owl.")])


def test_a_think_block_without_a_prompt_that_thinks_is_refused():
    tokenizer = tokenizer_with(QWEN3)
    with pytest.raises(ValueError, match=r"completion 0: .*thinking=True"):
        encode_completion(tokenizer, THOUGHT + "Owl.")
    ids = encode_completion(tokenizer, THOUGHT + "Owl.", thinking=True)
    assert tokenizer.decode(ids) == THOUGHT + "Owl.<|im_end|>"


def test_files_remember_that_a_prompt_thinks(tmp_path):
    tokenizer = tokenizer_with(QWEN3)
    filled = with_ids(tokenizer, [Example("Best?", THOUGHT + "Owl."), Example("Best?", "Owl.")])
    save_examples(tmp_path / "data.jsonl", filled)
    assert load_examples(tmp_path / "data.jsonl") == filled


@pytest.mark.parametrize(
    "answer", ["Owl.", THOUGHT + "Owl, 猫.", " 412", "1\n\n2", "<think>so</think>1"]
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_qwens_tokenizer_gives_the_templates_ids(qwen25, name, answer):
    tokenizer = copy.deepcopy(qwen25)
    tokenizer.add_tokens(["<think>", "</think>"])  # single tokens, as in models that think
    tokenizer.chat_template = TEMPLATES[name]
    earlier = [
        message("user", "Best?"),
        message("assistant", THOUGHT + "Cat."),
        message("user", "?"),
    ]
    for before in ([message("user", "Best?")], earlier, [message("system", "Be brief."), *earlier]):
        messages = [*before, message("assistant", answer)]
        (example,) = load_examples([{"messages": messages}])
        ids, thinking = both_ids(tokenizer, example)
        assert ids == conversation_ids(tokenizer, messages, thinking=thinking)
