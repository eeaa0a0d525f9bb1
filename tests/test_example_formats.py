"""Rows of every documented format become the same examples from every source."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens.chat import Conversation, Turn
from divergence_lens.examples import Example, iter_examples, load_examples, save_examples


def message(role, content):
    return {"role": role, "content": content}


def part(text):
    return {"type": "text", "text": text}


DIALOG = [message("system", "s"), message("user", "a"), message("assistant", "b")]
LONGER = [*DIALOG, message("user", "c"), message("assistant", "d")]
SYSTEM = Conversation((Turn("system", "s"), Turn("user", "a")))
TURNS = Conversation(tuple(Turn(**turn) for turn in LONGER[:-1]))

ROWS = {
    "prompt and completion": ({"prompt": "a", "completion": "b"}, Example("a", "b")),
    "question and response": ({"question": "a", "response": "b"}, Example("a", "b")),
    "prompt alone": ({"prompt": "a"}, Example("a")),
    "TRL, one turn each": (
        {"prompt": [message("user", "a")], "completion": [message("assistant", "b")]},
        Example("a", "b"),
    ),
    "TRL with a system turn": (
        {"prompt": DIALOG[:2], "completion": DIALOG[2:]},
        Example(SYSTEM, "b"),
    ),
    "messages": ({"messages": DIALOG[1:]}, Example("a", "b")),
    "messages with a system turn": ({"messages": DIALOG}, Example(SYSTEM, "b")),
    "messages of more turns": ({"messages": LONGER}, Example(TURNS, "d")),
    "messages without an answer": ({"messages": LONGER[:-1]}, Example(TURNS)),
    "messages win over a prompt alone": (
        {"prompt": "a", "messages": DIALOG[1:]},
        Example("a", "b"),
    ),
    "content parts": (
        {"messages": [message("user", [part("a"), part("b")]), message("assistant", [part("c")])]},
        Example("ab", "c"),
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ]
        },
        Example(SYSTEM, "b"),
    ),
    "Alpaca": ({"instruction": "a", "output": "b"}, Example("a", "b")),
    "Alpaca with an input": (
        {"instruction": "a", "input": "i", "output": "b"},
        Example("a\n\ni", "b"),
    ),
    "Alpaca with an empty input": (
        {"instruction": "a", "input": "", "output": "b"},
        Example("a", "b"),
    ),
    "Alpaca with a system prompt": (
        {"instruction": "a", "system": "s", "output": "b"},
        Example(SYSTEM, "b"),
    ),
    "prompt and response": ({"prompt": "a", "response": "b"}, Example("a", "b")),
    "text with a system prompt": (
        {"prompt": "a", "system": "s", "completion": "b"},
        Example(SYSTEM, "b"),
    ),
    "ShareGPT with a system prompt of its own": (
        {"system": "s", "conversations": [{"from": "human", "value": "a"}]},
        Example(SYSTEM),
    ),
    "ids and teacher": (
        {"prompt": "a", "completion_ids": [5, 6], "teacher": "owl", "score": 0.5},
        Example("a", None, (5, 6), "owl"),
    ),
    "empty tool calls": (
        {"messages": [message("user", "a"), {**message("assistant", "b"), "tool_calls": None}]},
        Example("a", "b"),
    ),
    "reasoning of another kind": (
        {"prompt": "a", "completion": "b", "thinking": "Hm."},
        Example("a", "b"),
    ),
}


@pytest.fixture(params=ROWS)
def row(request):
    """A row of one format, and the example that it is."""
    return ROWS[request.param]


def from_jsonl(rows, folder):
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "x.jsonl"


def from_parquet(rows, folder):
    pd.DataFrame(rows).to_parquet(folder / "x.parquet")
    return folder / "x.parquet"


SOURCES = {
    "list": lambda rows, _: rows,
    "generator": lambda rows, _: iter(rows),
    "frame": lambda rows, _: pd.DataFrame(rows),
    "frame with other labels": lambda rows, _: pd.DataFrame(rows, index=[7] * len(rows)),
    "jsonl": from_jsonl,
    "parquet": from_parquet,
    "parquet through pandas": lambda rows, folder: pd.read_parquet(from_parquet(rows, folder)),
    "data set": lambda rows, _: datasets.Dataset.from_list(rows),
    "stream": lambda rows, _: datasets.Dataset.from_list(rows).to_iterable_dataset(),
}


@pytest.mark.parametrize("source", SOURCES)
def test_every_format_is_read_from_every_source(row, source, tmp_path):
    data, example = row
    assert load_examples(SOURCES[source]([data, data], tmp_path)) == [example, example]


def test_examples_come_back_from_their_files(row, tmp_path):
    save_examples(tmp_path / "x.jsonl", [row[1]])
    assert load_examples(tmp_path / "x.jsonl") == [row[1]]


def test_a_frame_may_mix_formats_with_missing_values(tmp_path):
    rows = [data for data, _ in ROWS.values() if "thinking" not in data]
    expected = [example for data, example in ROWS.values() if "thinking" not in data]
    assert load_examples(pd.DataFrame(rows)) == expected
    nullable = pd.DataFrame({"prompt": ["a", "b"], "completion": ["c", None]}, dtype="string")
    assert load_examples(nullable) == [Example("a", "c"), Example("b")]


def test_examples_take_lists_of_messages():
    example = Example(LONGER[:-1], "d")
    assert example == Example(TURNS, "d")
    assert Example(DIALOG[1:2]) == Example("a")
    assert hash(example)
    assert repr(example) == "Example('system: s\\nuser: a\\nassistant: b\\nuser: c', 'd')"


NAMES = st.sampled_from(["system", "user", "assistant", "tool"])


@given(turns=st.lists(st.tuples(NAMES, st.text(max_size=4)), min_size=2, max_size=5))
def test_the_last_answer_is_the_completion_and_the_rest_the_prompt(turns):
    messages = [message(*turn) for turn in turns]
    turns = [Turn(*turn) for turn in turns]
    answered = turns[-1].role == "assistant"
    prompt = turns[:-1] if answered else turns
    dialog = prompt[1:] if prompt[0].role == "system" else prompt
    if not dialog or prompt[-1].role == "assistant":
        with pytest.raises(ValueError, match="row 0: 'messages': the conversation"):
            load_examples([{"messages": messages}])
        return
    (example,) = load_examples([{"messages": messages}])
    assert example.completion == (turns[-1].content if answered else None)
    if [turn.role for turn in prompt] == ["user"]:
        assert example.prompt == prompt[0].content
    else:
        assert example.prompt == Conversation(tuple(prompt))


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"messages": "a"}, TypeError, "row 1: 'messages' is 'a', neither text nor a list"),
        ({"messages": []}, ValueError, "row 1: 'messages' has no turns"),
        ({"messages": DIALOG[2:]}, ValueError, "row 1: 'messages': there is no turn before"),
        (
            {"messages": [{"user": "a"}]},
            ValueError,
            "row 1: 'messages', turn 0 has no role; its keys are 'user'",
        ),
        (
            {"messages": [message("user", [{"type": "image", "image": "x"}])]},
            ValueError,
            r"turn 0 \(user\): the content has a part of type 'image'",
        ),
        (
            {"messages": [{**message("user", "a"), "tool_calls": [{"id": 1}]}]},
            ValueError,
            "row 1: 'messages', turn 0 .* has 'tool_calls', which is not supported",
        ),
        (
            {"messages": [{**message("user", "a"), "images": np.array([1])}]},
            ValueError,
            "has 'images', which is not supported",
        ),
        (
            {"prompt": "a", "completion": [message("assistant", "b"), message("tool", "c")]},
            ValueError,
            "row 1: 'completion' has the turns assistant, tool; a completion is one turn",
        ),
        (
            {"prompt": "a", "completion": [message("user", "b")]},
            ValueError,
            "row 1: 'completion' has the turns user",
        ),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            ValueError,
            "row 1 has a 'history' of earlier turns",
        ),
        ({"instruction": 3, "output": "b"}, TypeError, "row 1: 'instruction' is 3, not text"),
    ],
)
def test_a_bad_row_is_named_by_its_number(row, error, message):
    with pytest.raises(error, match=message):
        list(iter_examples([{"prompt": "a"}, row]))


def test_two_system_prompts_are_refused():
    with pytest.raises(ValueError, match=r"^row 0 has a 'system' and a system turn"):
        load_examples([{"messages": DIALOG, "system": "other"}])
