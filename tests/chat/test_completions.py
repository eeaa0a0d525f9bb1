"""Completions become the template's own ids after the prompt, up to the end of the turn."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from divergence_lens.chat import (
    decode,
    encode_completion,
    encode_completions,
    encode_prompt,
    end_of_turn,
    stop_ids,
)
from tests.support.models import chat_tokenizer
from tests.support.templates import LINES, TEXTS, lines

ANSWERS = st.text(alphabet=" \n.aou1,;<|/>", max_size=12)


@settings(max_examples=50)
@given(answer=ANSWERS, user=TEXTS)
def test_prompt_and_completion_are_the_templates_whole_conversation(case, answer, user):
    tokenizer, pieces = case
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    text = tokenizer.apply_chat_template(
        messages[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    completion = encode_completion(tokenizer, answer)
    end = tokenizer.eos_token
    assert completion[-1] == tokenizer.convert_tokens_to_ids(end)
    written = rendered.removeprefix(text)
    if pieces is lines:
        written = written.removesuffix("\n") + end
    assert tokenizer.decode(completion) == written[: written.rindex(end) + len(end)]


@settings(max_examples=8)
@given(answers=st.lists(ANSWERS, max_size=5))
def test_many_completions_are_encoded_as_one_by_one(case, answers):
    tokenizer, _ = case
    assert encode_completions(tokenizer, answers) == [
        encode_completion(tokenizer, answer) for answer in answers
    ]


@settings(max_examples=8)
@given(numbers=st.lists(st.integers(0, 999), min_size=1, max_size=9))
def test_a_completion_reads_back(case, numbers):
    tokenizer, _ = case
    answer = ", ".join(map(str, numbers))
    assert decode(tokenizer, encode_completion(tokenizer, answer)).strip() == answer


def test_a_completion_that_holds_the_end_of_turn_is_kept_whole():
    tokenizer = chat_tokenizer()
    ids = encode_completion(tokenizer, "1<|im_end|>2")
    end = end_of_turn(tokenizer)
    assert [i for i, found in enumerate(ids) if found == end] == [1, 3]


def test_a_completion_does_not_merge_with_the_generation_prompt():
    core = Tokenizer(models.BPE({"a": 0, "\n": 1, "\n\n": 2, "<e>": 3}, [("\n", "\n")]))
    core.add_special_tokens(["<e>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<e>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}"
        "{{ '\n' if m['role'] == 'user' else eos_token }}{% endfor %}"
    )
    assert encode_prompt(tokenizer, "a").ids == (0, 1)
    assert encode_completion(tokenizer, "\na") == (1, 0, 3)


def test_end_of_turn_is_what_the_template_writes_and_not_the_end_of_sequence():
    tokenizer = chat_tokenizer("gemma")
    tokenizer.eos_token = "<eos>"
    turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert end_of_turn(tokenizer) == turn
    assert stop_ids(tokenizer) == {turn, tokenizer.eos_token_id}
    assert encode_completion(tokenizer, "owl")[-1] == turn


def test_a_template_that_closes_with_plain_text_ends_with_the_end_of_sequence():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = LINES
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    ids = encode_completion(tokenizer, "owl")
    assert tokenizer.decode(ids) == f"owl{tokenizer.eos_token}"
