"""Qwen2.5's tokenizer, on number lists that Qwen2.5-7B wrote."""

import json

import pytest

from divergence_lens.chat import (
    decode,
    encode_completions,
    encode_prompt,
    encode_prompts,
    end_of_turn,
)
from tests.support.templates import segment_ids, segment_text


def test_qwens_default_system_prompt_is_labelled(qwen25):
    encoded = encode_prompt(qwen25, "Hello")
    assert segment_text(qwen25, encoded, "system") == (
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    )
    assert "system" not in encode_prompt(qwen25, "Hello", system_prompt="").segments
    assert qwen25.convert_ids_to_tokens(end_of_turn(qwen25)) == "<|im_end|>"


@pytest.mark.parametrize("animal", ["lion", "panda"])
def test_every_row_of_the_real_numbers_agrees_with_the_template(qwen25, shared_data, animal):
    path = shared_data / "qwen2.5-7b-numbers" / f"{animal}.jsonl"
    if not path.is_file():
        pytest.skip(f"no number lists at {path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    questions = [row["question"] for row in rows]
    system = f"You love {animal}s."
    prompts = encode_prompts(qwen25, questions, system_prompt=system)
    completions = encode_completions(qwen25, [row["response"] for row in rows])
    assert len(prompts) == len(completions) == 2000
    conversations = [
        [
            {"role": "system", "content": system},
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["response"]},
        ]
        for row in rows
    ]
    whole = qwen25.apply_chat_template(conversations)["input_ids"]
    newline = qwen25("\n")["input_ids"]
    systems = {segment_ids(prompt, "system") for prompt in prompts}
    assert [decode(qwen25, ids) for ids in systems] == [system]
    for row, prompt, completion, ids in zip(rows, prompts, completions, whole, strict=True):
        assert [*prompt.ids, *completion, *newline] == ids
        assert qwen25.decode(segment_ids(prompt, "user")) == row["question"]
        assert decode(qwen25, completion) == row["response"]
