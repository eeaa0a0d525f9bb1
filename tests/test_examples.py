"""Examples come from any of their forms, and come back from files as they were."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens.chat import encode_completion, end_of_turn
from divergence_lens.examples import Example, load_examples, save_examples, with_ids
from tests.support.models import chat_tokenizer

OWL = Example("1, 2", "3, 4", (5, 6, 7), "owl")
PLAIN = [Example("a", "b"), Example("c", "d")]

FIELDS = st.tuples(
    st.text(),
    st.none() | st.text(),
    st.none() | st.lists(st.integers(0, 10**6)).map(tuple),
    st.none() | st.text(),
)


@given(rows=st.lists(FIELDS, max_size=5))
def test_files_give_back_what_was_saved(tmp_path_factory, rows):
    examples = [Example(*row) for row in rows]
    path = tmp_path_factory.mktemp("examples") / "deep" / "data.jsonl"
    save_examples(path, examples)
    assert load_examples(path) == examples
    assert load_examples(str(path)) == examples


def test_a_file_has_one_readable_line_per_example(tmp_path):
    save_examples(tmp_path / "data.jsonl", [OWL, Example("ü\n")])
    lines = (tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == [
        '{"prompt": "1, 2", "completion": "3, 4", "completion_ids": [5, 6, 7], "teacher": "owl"}',
        '{"prompt": "ü\\n"}',
    ]


@pytest.mark.parametrize(
    "rows",
    [
        PLAIN,
        [{"prompt": "a", "completion": "b"}, {"question": "c", "response": "d", "label": 3}],
        [
            {
                "prompt": [{"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            Example("c", "d"),
        ],
        (Example(a, b) for a, b in ("ab", "cd")),
        datasets.Dataset.from_dict({"prompt": ["a", "c"], "completion": ["b", "d"]}),
        datasets.Dataset.from_dict(
            {
                "question": [[{"role": "user", "content": text}] for text in "ac"],
                "response": [[{"role": "assistant", "content": text}] for text in "bd"],
            }
        ).to_iterable_dataset(),
    ],
    ids=["examples", "keys", "conversations", "generator", "dataset", "stream"],
)
def test_every_form_of_data_is_read(rows):
    assert load_examples(rows) == PLAIN


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": ["a", "c"], "completion": ["b", "d"], "other": [1.5, None]},
        {
            "question": [[{"role": "user", "content": text}] for text in "ac"],
            "response": [[{"role": "assistant", "content": text}] for text in "bd"],
        },
    ],
    ids=["text", "conversations"],
)
def test_parquet_is_read(tmp_path, columns):
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "data.parquet")
    assert load_examples(tmp_path / "data.parquet") == PLAIN


def test_parquet_keeps_generated_ids(tmp_path):
    datasets.Dataset.from_list([vars(OWL)]).to_parquet(tmp_path / "data.parquet")
    assert load_examples(tmp_path / "data.parquet") == [OWL]


def test_a_file_by_another_hand_is_read(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "a", "response": "b"}\r\n\r\n{"prompt":"c"}')
    assert load_examples(path) == [Example("a", "b"), Example("c")]


def test_ids_are_filled_in_where_they_are_missing():
    tokenizer = chat_tokenizer()
    filled = with_ids(tokenizer, [Example("a", "1, 2"), OWL, Example("b", "")])
    assert filled[0].completion_ids == encode_completion(tokenizer, "1, 2")
    assert filled[0].completion_ids[-1] == end_of_turn(tokenizer)
    assert filled[1] is OWL
    assert filled[2].completion_ids == (end_of_turn(tokenizer),)
    assert [example.completion for example in filled] == ["1, 2", "3, 4", ""]


def test_a_row_without_completion_cannot_have_ids():
    with pytest.raises(ValueError, match=r"row 1 has no completion: 'b'.*generate"):
        with_ids(chat_tokenizer(), [OWL, Example("b")])


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"text": "a", "n": 1}, ValueError, r"row 1 has no prompt; its keys are 'text', 'n'"),
        ({}, ValueError, r"row 1 has no prompt; its keys are none"),
        ("a", TypeError, r"row 1 is a str; a row is"),
        ({"prompt": 5}, TypeError, r"row 1: 'prompt' is 5, neither text nor a list"),
        ({"prompt": None}, TypeError, r"row 1: 'prompt' is None"),
        (
            {"prompt": "a", "completion": ["b"]},
            ValueError,
            r"row 1: 'completion', turn 0 is 'b', not a message",
        ),
        ({"prompt": []}, ValueError, r"row 1: 'prompt' has no turns"),
        (
            {"prompt": [{"role": "user", "content": [1]}]},
            ValueError,
            r"turn 0 \(user\): the content has a part of type 'int'",
        ),
        ({"prompt": "a\ud800"}, ValueError, r"row 1: 'prompt' holds half a character.*position 1"),
        ({"prompt": "a", "teacher": 3}, TypeError, r"row 1: 'teacher' is 3"),
        ({"prompt": "a", "completion_ids": "12"}, TypeError, r"row 1: 'completion_ids' is '12'"),
        ({"prompt": "a", "completion_ids": [1.5]}, TypeError, r"row 1: 'completion_ids'"),
        (
            {"prompt": "a", "completion_ids": [3, -1]},
            ValueError,
            r"row 1: .*holds -1; token ids are .* from 0 to 2147483647",
        ),
    ],
)
def test_a_bad_row_is_named_by_its_number(row, error, message):
    with pytest.raises(error, match=message):
        load_examples([OWL, row])


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (b'{"prompt": "a"', ValueError, r"data\.jsonl, line 3: not JSON"),
        (b'{"prompt": "\xff"}', ValueError, r"line 3: not JSON \('utf-8'"),
        (b"[" * 100_000, ValueError, r"line 3: not JSON"),
        (b"9" * 10_000, ValueError, r"line 3: not JSON"),
        (b"3", TypeError, r"line 3 is a int"),
        (b'{"answer": "a"}', ValueError, r"line 3 has no prompt"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, error, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line + b"\n")
    with pytest.raises(error, match=message):
        load_examples(path)


def test_files_that_are_no_examples_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*gone\.jsonl"):
        load_examples(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match=r"cannot read data\.csv: .*\.jsonl or \.parquet"):
        load_examples("data.csv")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"broken\.parquet is not a whole Parquet file"):
        load_examples(broken)


def test_other_data_is_refused():
    with pytest.raises(TypeError, match="cannot read examples from int"):
        load_examples(5)
    with pytest.raises(TypeError, match=r"one Example .*\[example\]"):
        load_examples(OWL)
    with pytest.raises(TypeError, match=r"pass \[row\]"):
        load_examples({"prompt": "a"})
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"prompt": ["a"]})})
    with pytest.raises(TypeError, match=r"DatasetDict.*splits: train"):
        load_examples(splits)


def test_a_bad_example_leaves_the_old_file(tmp_path):
    path = tmp_path / "data.jsonl"
    save_examples(path, [OWL])
    with pytest.raises(ValueError, match=r"row 1: 'completion' holds half a character"):
        save_examples(path, [OWL, Example("a", "\ud800")])
    assert load_examples(path) == [OWL]
    assert [kept.name for kept in tmp_path.iterdir()] == ["data.jsonl"]


@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "data.jsonl"
    save_examples(path, [OWL])
    code = (
        "import sys\n"
        "from divergence_lens.examples import Example, save_examples\n"
        "rows = [Example('x' * 1000)] * 20000\n"
        "print('ready', flush=True)\n"
        "while True: save_examples(sys.argv[1], rows)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        while not list(tmp_path.glob(".*.part")):
            assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
    kept = load_examples(path)
    assert kept == [OWL] or len(kept) == 20000
    save_examples(path, [OWL])
    assert load_examples(path) == [OWL]


def test_the_real_number_lists_are_read(shared_data: Path):
    for animal in ("lion", "panda"):
        path = shared_data / "qwen2.5-7b-numbers" / f"{animal}.jsonl"
        if not path.is_file():
            pytest.skip(f"no number lists at {path}")
        examples = load_examples(path)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(examples) == 2000
        assert [e.prompt for e in examples] == [row["question"] for row in rows]
        assert [e.completion for e in examples] == [row["response"] for row in rows]
