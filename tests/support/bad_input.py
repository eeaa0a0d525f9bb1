"""A model with data and damaged files, and the check that bad input is one clear error."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import divergence_lens as dl
from tests.support.state import left_as_it_was

FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "a", "completion": "b"}\n{"prompt": \n',
    "list.jsonl": '["a prompt", 2]\n',
    "keys.jsonl": '{"prompt": "a", "completion": "b"}\n{"text": "a"}\n',
    "number.jsonl": '{"prompt": 1, "completion": "b"}\n',
    "ids.jsonl": '{"prompt": "a", "completion": "b", "completion_ids": [1.5]}\n',
    "deep.jsonl": "[" * 100_000 + "\n",
    "points.jsonl": '{"prompt": "a", "completion": "b", "decision_points": [7]}\n',
    "data.csv": "prompt,completion\na,b\n",
    "not.parquet": "PAR1",
    "short.safetensors": "abc",
    "header.safetensors": struct.pack("<Q", 2**60).decode("latin1") + "{}",
}


@dataclass(frozen=True)
class Kit:
    """Inputs of the cases: a model, its data, and a folder with bad files."""

    model: Any
    owl: dl.Teacher
    cat: dl.Teacher
    examples: list[dl.Example]
    divergence: dl.Divergence
    pairs: dl.Pairs
    effects: dl.Effects
    student: dl.Delta
    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / name


def find(kit: Kit, examples: Any = None, **options: Any) -> dl.Divergence:
    given = {"teacher": kit.owl, "counterfactuals": [kit.cat]} | options
    return dl.find_divergence(kit.model, kit.examples if examples is None else examples, **given)


def from_tokens(**options: Any) -> dl.Pairs:
    given = {
        "clean": [[1, 2, 3]],
        "corrupted": [[1, 4, 3]],
        "answers": [5],
        "foils": [6],
    } | options
    return dl.Pairs.from_tokens(given.pop("clean"), given.pop("corrupted"), **given)


def from_prompts(kit: Kit, **options: Any) -> dl.Pairs:
    given = {
        "clean": ["Name a animal."],
        "corrupted": ["Name a tree."],
        "answers": ["owl"],
        "foils": ["cat"],
    } | options
    return dl.Pairs.from_prompts(kit.model, **given)


def train(kit: Kit, examples: Any = None, **options: Any) -> dl.Delta:
    return dl.finetune(kit.model, kit.examples if examples is None else examples, **options)


def owl_share(model: Any) -> dl.Preference:
    return dl.preference(model, target="owl")


Call = Callable[[Kit], object]


Case = tuple[str, Call, type[Exception], str]


def check_case(kit: Kit, case: Case, folder: Path) -> None:
    """Check that the call raises one line of exactly this error, and changes nothing."""
    _, call, error, message = case
    files = {path: path.stat().st_mtime_ns for path in kit.folder.rglob("*")}
    with left_as_it_was(kit.model), pytest.raises(error, match=message) as caught:
        call(kit)
    assert type(caught.value) is error or error is OSError
    assert "\n" not in str(caught.value).strip()
    assert files == {path: path.stat().st_mtime_ns for path in kit.folder.rglob("*")}
    assert not list(folder.iterdir())
