"""Ctrl-C in the middle of a command: exit code 130, complete files, and a resumed command."""

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
from divergence_lens.cli.files import checkpoint_folder
from divergence_lens.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def stopped(arguments: tuple[object, ...], folder: Path) -> None:
    """Run a command in a process of its own, and press Ctrl-C once it has stored something."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # bitwise equality needs the same number of threads as here
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "divergence_lens", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until = time.monotonic() + SECONDS
        while not stored_files(folder) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "run the same command again to resume" in output
    assert "Traceback" not in output


def stored_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Input files of the commands."""
    folder = tmp_path_factory.mktemp("data")
    run("generate", "--numbers", 100, "--teacher", "owl", "--out", folder / "owl.jsonl")
    run(
        *("find", folder / "owl.jsonl", "--teacher", "owl", "--counterfactual", "cat"),
        *("--out", folder / "owl.safetensors"),
    )
    return folder


def arrays(path: Path) -> list[object]:
    """The arrays of a file of results."""
    if path.suffix == ".jsonl":
        return [example.completion_ids for example in dl.load_examples(path)]
    name = path.stem
    if name == "find":
        divergence = dl.Divergence.load(path)
        return [divergence.mask, divergence.tokens]
    if name == "patch":
        return [dl.Effects.load(path).values]
    if name == "finetune":
        return list(dl.Delta.load(path).tensors.values())
    return [student.values["share"] for student in dl.Sweep.load(path).students]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "find", "patch", "finetune", "sweep"])
def test_a_stopped_command_resumes_to_the_same_result(command, data, tmp_path):
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
    parts = stored_files(tmp_path / "stopped")
    assert {path.relative_to(out.parent).parts[0] for path in parts} == {f"{out.name}.partial"}
    assert not [path for path in out.parent.rglob(".*") if path.is_file()]
    assert "Resuming from" in run(command, *arguments, "--out", out)
    assert stored_files(out.parent) == [out]
    assert "Resuming" not in run(command, *arguments, "--out", whole)
    for mine, theirs in zip(arrays(out), arrays(whole), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_checkpoints_are_deleted_when_the_command_succeeds(tmp_path):
    with checkpoint_folder(tmp_path / "out.jsonl") as folder:
        folder.mkdir()
        (folder / "shard-000000.safetensors").write_text("one")
    assert not list(tmp_path.iterdir())


def test_checkpoints_remain_when_the_command_fails(tmp_path, capsys):
    def failing():
        with checkpoint_folder(tmp_path / "out.jsonl") as folder:
            folder.mkdir(exist_ok=True)
            (folder / "shard-000000.safetensors").write_text("one")
            raise RuntimeError("out of memory")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            failing()
    assert (tmp_path / "out.jsonl.partial" / "shard-000000.safetensors").exists()
    assert capsys.readouterr().out == f"Resuming from {tmp_path / 'out.jsonl.partial'}\n"


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_refused(data, tmp_path):
    out = tmp_path / "find.safetensors"
    arguments = ("find", data / "owl.jsonl", "--teacher", "owl", "--out", out)
    stopped((*arguments, "--counterfactual", "cat", "--batch-tokens", 64), tmp_path)
    other = [*map(str, arguments), "--counterfactual", "wolf", "--batch-tokens", "64"]
    done = CliRunner().invoke(app, other)
    assert done.exit_code == 2
    assert "another run" in done.output
    assert not out.exists()


def test_other_files_in_the_partial_folder_remain(tmp_path):
    folder = tmp_path / "out.jsonl.partial"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "shard-000000.safetensors").write_bytes(b"ours")
    (folder / ".shard-000001.safetensors.x1.part").write_bytes(b"ours, unfinished")
    with checkpoint_folder(tmp_path / "out.jsonl"):
        pass
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
