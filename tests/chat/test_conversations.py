"""Conversations of more turns become the template's own ids, with a label for every turn."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_lens.chat import (
    Conversation,
    Encoded,
    as_prompt,
    encode_prompt,
    encode_prompts,
    prompt_ids,
)
from tests.support.models import chat_tokenizer
from tests.support.templates import (
    CASES,
    TEXTS,
    lines,
    segment_text,
    template_tokenizer,
)

WORDS = TEXTS.filter(str.strip)
EARLIER = st.lists(st.tuples(WORDS, WORDS), max_size=2)


def messages_of(earlier, user, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, answered in earlier:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": user}]


def template_ids(tokenizer, messages):
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=False
    )["input_ids"]


@settings(max_examples=25)
@given(earlier=EARLIER, user=WORDS)
def test_ids_are_those_of_apply_chat_template(case, earlier, user):
    tokenizer, _ = case
    messages = messages_of(earlier, user)
    assert list(encode_prompt(tokenizer, messages).ids) == template_ids(tokenizer, messages)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("given_as", ["turn", "argument"])
def test_a_system_turn_is_a_system_prompt(name, given_as):
    tokenizer = template_tokenizer(name)
    earlier, system = [("a cat", "No.")], "You love owls."
    if given_as == "turn":
        encoded = encode_prompt(tokenizer, messages_of(earlier, "and now", system))
    else:  # the teacher's system prompt replaces the conversation's
        messages = messages_of(earlier, "and now", None if name == "lines" else "You are a cat.")
        encoded = encode_prompt(tokenizer, messages, system_prompt=system)
    if name in ("gemma", "lines"):
        messages = messages_of([(f"{system}\n\na cat", "No.")], "and now")
    else:
        messages = messages_of(earlier, "and now", system)
    assert list(encoded.ids) == template_ids(tokenizer, messages)
    assert segment_text(tokenizer, encoded, "system") == system
    # A token of a space and a word has the word's label, also where the template writes the space.
    assert segment_text(tokenizer, encoded, "user").replace(" ", "") == "acatandnow"
    if CASES[name][2] is not lines:
        assert segment_text(tokenizer, encoded, "assistant") == "No."


@settings(max_examples=10)
@given(
    rows=st.lists(st.tuples(EARLIER, WORDS, st.none() | WORDS), min_size=1, max_size=3),
    systems=st.lists(st.none() | WORDS, min_size=2, max_size=3),
)
def test_ids_under_many_system_prompts_are_those_under_each(rows, systems):
    tokenizer = chat_tokenizer("qwen")
    prompts = [messages_of(*row) for row in rows]
    together = prompt_ids(tokenizer, prompts, systems)
    for system, ids in zip(systems, together, strict=True):
        for prompt, row in zip(prompts, ids, strict=True):
            assert row == encode_prompt(tokenizer, prompt, system_prompt=system).ids


def test_one_user_turn_is_the_same_prompt_as_its_text():
    tokenizer = chat_tokenizer()
    assert encode_prompt(tokenizer, messages_of([], "a cat")) == encode_prompt(tokenizer, "a cat")


def test_other_roles_are_rendered_where_the_template_takes_them():
    tokenizer = chat_tokenizer()
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "tool", "content": "12:00"},
    ]
    encoded = encode_prompt(tokenizer, messages)
    assert isinstance(encoded, Encoded)
    assert "<|im_start|>tool\n12:00<|im_end|>" in tokenizer.decode(encoded.ids)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "system", "content": "a"}], "prompt 1: .*no turn besides the system turn"),
        ([], "prompt 1 has no turns"),
        (messages_of([("a", "b")], "c")[:2], r"prompt 1: .*ends with a turn of 'assistant'"),
        ([{"content": "a"}], "prompt 1, turn 0 has no role; its keys are 'content'"),
        ([{"role": "user", "content": None}], r"prompt 1, turn 0 \(user\) has no content"),
        ([{"role": "user", "content": "\ud800"}], r"turn 0 \(user\) holds half a character"),
        (
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
                {"role": "tool", "content": "b"},
            ],
            r"turn 1 \(assistant\) has 'tool_calls', which is not supported",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            r"turn 0 \(user\): the content has a part of type 'image_url'; only text parts",
        ),
    ],
)
def test_conversations_that_cannot_be_written_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        encode_prompts(chat_tokenizer(), ["a", messages])


def test_a_single_conversation_is_no_list_of_prompts():
    with pytest.raises(TypeError, match=r"prompt 0 is .*neither text nor a list of messages"):
        as_prompt(messages_of([], "a")[0], "prompt 0")


def test_templates_that_refuse_or_leave_out_a_turn_are_named():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% elif m.role != 'note' %}{{ m.role }}:{{ m.content }}|{% endif %}{% endfor %}"
    )
    first = {"role": "user", "content": "a"}
    with pytest.raises(ValueError, match=r"prompt 0: .*of the turns user, tool: no tools"):
        encode_prompt(tokenizer, [first, {"role": "tool", "content": "b"}])
    with pytest.raises(ValueError, match=r"leaves the text of turn 1 \(note\) out"):
        encode_prompt(tokenizer, [first, {"role": "note", "content": "b"}, first])


def test_without_a_template_a_conversation_is_refused():
    with pytest.raises(ValueError, match=r"prompt 0 is a conversation, but .* no chat template"):
        encode_prompt(chat_tokenizer(None), messages_of([("a", "b")], "c"))


def test_a_conversation_reads_as_its_turns():
    conversation = as_prompt(messages_of([("a", "b")], "c", "s"), "prompt")
    assert isinstance(conversation, Conversation)
    assert str(conversation) == "system: s\nuser: a\nassistant: b\nuser: c"
    assert conversation.system == "s"
    assert conversation.messages() == messages_of([("a", "b")], "c", "s")
