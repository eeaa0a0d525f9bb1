"""Ctrl-C in the middle of a command: exit code 130, no half-written file, and it goes on later."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import divergence_lens as dl
from divergence_lens.cli.main import app
from divergence_lens.cli.partial import Parts, written_in_parts

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def stopped(arguments: tuple[object, ...], folder: Path) -> None:
    """Run a command in a process of its own, and press Ctrl-C once it has kept something."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # as here: the same bits need the same number of threads
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "divergence_lens.cli.main", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + SECONDS
        while not kept(folder) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "the same command goes on" in output
    assert "Traceback" not in output


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What the commands read."""
    folder = tmp_path_factory.mktemp("data")
    run("generate", "--numbers", 100, "--teacher", "owl", "--out", folder / "owl.jsonl")
    run(
        *("find", folder / "owl.jsonl", "--teacher", "owl", "--counterfactual", "cat"),
        *("--out", folder / "owl.safetensors"),
    )
    return folder


def arrays(path: Path) -> list[object]:
    """What a file of results holds, to be compared."""
    if path.suffix == ".jsonl":
        return [example.completion_ids for example in dl.load_examples(path)]
    name = path.stem
    if name == "find":
        found = dl.Divergence.load(path)
        return [found.mask, found.tokens]
    if name == "patch":
        return [dl.Effects.load(path).values]
    if name == "finetune":
        return list(dl.Delta.load(path).tensors.values())
    return [student.preference.probabilities for student in dl.Sweep.load(path).students]


@pytest.mark.parametrize("command", ["generate", "find", "patch", "finetune", "sweep"])
def test_a_command_that_was_stopped_goes_on_to_the_same_end(command, data, tmp_path):
    owl = data / "owl.jsonl"
    arguments = {
        "generate": ("--numbers", 1100, "--max-new-tokens", 8, "--temperature", 1),
        "find": (owl, "--teacher", "owl", "--counterfactual", "cat", "--batch-tokens", 64),
        "patch": (data / "owl.safetensors", "--limit", 48),
        "finetune": (owl, "--epochs", 6, "--batch-size", 2, "--layers", "3"),
        "sweep": (owl, "--target", "owl", "--layers", "2,3"),
    }[command]
    suffix = ".jsonl" if command == "generate" else ".safetensors"
    whole = tmp_path / "whole" / f"{command}{suffix}"
    out = tmp_path / "stopped" / f"{command}{suffix}"
    stopped((command, *arguments, "--out", out), tmp_path / "stopped")
    assert not out.exists()
    parts = kept(tmp_path / "stopped")
    assert {path.relative_to(out.parent).parts[0] for path in parts} == {f"{out.name}.partial"}
    assert not [path for path in out.parent.rglob(".*") if path.is_file()]
    assert "going on with what is in" in run(command, *arguments, "--out", out)
    assert kept(out.parent) == [out]
    assert "going on" not in run(command, *arguments, "--out", whole)
    for mine, theirs in zip(arrays(out), arrays(whole), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_parts_of_other_settings_are_passed_by_and_deleted_in_the_end(tmp_path):
    old = Parts(tmp_path / "out.jsonl", {"seed": 0})
    new = Parts(tmp_path / "out.jsonl", {"seed": 1})
    old.folder.mkdir()
    old.path("000000.jsonl").write_text("old")
    assert (old.count(), new.count()) == (1, 0)
    new.drop()
    assert not old.folder.exists()


def test_files_of_somebody_else_are_left_alone(tmp_path):
    parts = Parts(tmp_path / "out.jsonl", {})
    parts.folder.mkdir()
    (parts.folder / "mine.txt").write_text("mine")
    parts.drop()
    assert (parts.folder / "mine.txt").exists()


def test_prompts_of_one_text_stay_in_one_part(tmp_path):
    """A sampled answer depends on how often its text came before."""
    seen = []

    def write(texts, _bar):
        seen.append(list(texts))
        return [dl.Example(text, completion=f"{text}!") for text in texts]

    asked = ["a", "b", "a", "c", "b", "d"]
    parts = Parts(tmp_path / "out.jsonl", {})
    found = written_in_parts(asked, write, parts, texts=2)
    assert seen == [["a", "b", "a", "b"], ["c", "d"]]
    assert [example.prompt for example in found] == asked
    parts.path("000001.jsonl").unlink()
    assert written_in_parts(asked, write, parts, texts=2) == found
    assert seen[2:] == [["c", "d"]]
