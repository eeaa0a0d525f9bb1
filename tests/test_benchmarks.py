"""The benchmarks that check instead of measure, on the tiny models."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from divergence_lens.engine.base import Engine
from divergence_lens.tiny import tiny_folder
from tests.support.models import BACKENDS, random_hf_model

FOLDER = Path(__file__).parents[1] / "benchmarks"
QUICK = runpy.run_path(str(FOLDER / "quick.py"))
ARGUMENTS = ["--only", "tiny", "--backends", BACKENDS[0]]


def test_all_fast_paths_are_taken(capsys):
    assert QUICK["main"](ARGUMENTS) == 0
    shown = capsys.readouterr().out
    for name in ("fused", "divergence", "preference", "generation", "patching"):
        assert name in shown


def test_a_model_that_falls_off_the_fused_blocks_fails(capsys, monkeypatch):
    monkeypatch.setattr(Engine, "use_fused_blocks", lambda self, *_args: None)
    assert QUICK["main"](ARGUMENTS) >= 3
    assert "ran outside fused blocks" in capsys.readouterr().out


def test_a_result_that_differs_fails(capsys, monkeypatch):
    unembed = Engine.unembed
    monkeypatch.setattr(Engine, "unembed", lambda self, hidden: 1.01 * unembed(self, hidden))
    assert QUICK["main"](ARGUMENTS) >= 2
    assert "logits differ" in capsys.readouterr().out


def test_the_command_for_a_gpu_runs_on_a_cpu(tmp_path):
    path = tmp_path / "gpu.json"
    main = runpy.run_path(str(FOLDER / "gpu.py"))["main"]
    rows = main(["--shape", "tiny", "--device", "cpu", "--no-compile", "--json", str(path)])
    assert json.loads(path.read_text())["rows"] == rows
    # A CPU has no memory-efficient kernel; every other step runs.
    failed = {row["step"] for row in rows if "seconds" not in row}
    assert failed <= {"Hugging Face forward, memory-efficient"}
    steps = " ".join(row["step"] for row in rows)
    for name in ("find_divergence", "attribution_patch", "causal_mediation", "LoRA", "generate"):
        assert name in steps
    shares = [row["share"] for row in rows if "share" in row]
    assert len(shares) >= 4
    assert all(0 < share < 2 for share in shares)


def test_no_step_starts_after_the_time():
    gpu = runpy.run_path(str(FOLDER / "gpu.py"))
    bench = gpu["Bench"](gpu["SHAPES"]["tiny"], "cpu", 0)
    assert bench.step("late", pytest.fail) is None
    assert bench.rows == [{"step": "late", "skipped": "the time is over"}]


@pytest.fixture
def load(monkeypatch):
    """Run a benchmark's file as a script would, and return its names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))


def test_products_are_those_that_torch_counts(load):
    from torch.utils.flop_counter import FlopCounterMode

    products, hf = load("products")["Products"], random_hf_model("llama", vocab=50)
    ids = torch.arange(24).reshape(2, 12)
    with products() as ours:
        hf(ids).logits.sum().backward()
    with FlopCounterMode(display=False) as theirs:
        hf(ids).logits.sum().backward()
    attention = {shape: n for shape, n in ours.shapes.items() if shape[0] == "attention"}
    # FlopCounterMode omits the attention of a CPU: forward, and 2.5 times that backward.
    config, rows, length = hf.config, 2, 12
    layers = config.num_hidden_layers
    forward = 4 * layers * rows * length**2 * config.hidden_size
    assert sum(attention.values()) == 2 * layers
    assert ours.flops == theirs.get_total_flops() + 3.5 * forward
    assert 0 < ours.seconds() < 60


def test_a_table_goes_between_the_markers_of_its_page(load, tmp_path):
    tables, page = load("tables"), tmp_path / "page.md"
    page.write_text("Before\n<!-- x: begin -->\nold\n<!-- x: end -->\nafter\n")
    tables["write_section"](page, "x", tables["table"](["a", "b"], [[1, 2]]))
    rows = ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
    marked = ["<!-- x: begin -->", *rows, "<!-- x: end -->"]
    assert page.read_text().splitlines() == ["Before", *marked, "after"]
    with pytest.raises(SystemExit, match="lacks the markers <!-- y: begin"):
        tables["write_section"](page, "y", "")


def test_new_figures_leave_those_of_other_rows(load, tmp_path):
    merge, path = load("tables")["merge_figures"], tmp_path / "figures.json"
    merge(path, {"m": {"row": {"a": 1}, "other": {"a": 2}}})
    figures = merge(path, {"m": {"row": {"a": 3}}, "n": {}})
    assert figures == {"m": {"row": {"a": 3}, "other": {"a": 2}}, "n": {}}
    assert json.loads(path.read_text()) == figures


def test_the_difference_is_relative_to_the_largest_value(load, tmp_path):
    difference = load("peers")["difference"]
    for name, values in (("a", [1.0, -4.0]), ("b", [1.0, -4.4])):
        np.savez(tmp_path / name, values=values)
    apart, shown = difference(tmp_path / "a.npz", tmp_path / "b.npz")
    assert apart == pytest.approx(0.1)
    assert shown.startswith("1e-01")
    for name, tokens in (("a", [[1, 2, -1]]), ("b", [[1, 3, -1]])):
        np.savez(tmp_path / name, tokens=tokens)
    assert difference(tmp_path / "a.npz", tmp_path / "b.npz") == (1.0, "1 of 2 tokens")


@pytest.mark.slow
def test_a_peer_runs_in_turn_with_ours_and_writes_the_same_tokens(load, capsys):
    peers = load("peers")
    arguments = ["--peers", "huggingface", "--python", sys.executable, "--size", "3"]
    (row,) = peers["main"](
        [*arguments, "--model", str(tiny_folder("tiny-qwen2")), "--rounds", "2"]
    ).values()
    assert row["difference"].startswith("0 of ")
    assert [len(row[side]["cpu"]) for side in ("ours", "theirs")] == [2, 2]
    assert capsys.readouterr().out.startswith("| generate | transformers 5")


@pytest.mark.slow
def test_a_peer_that_fails_is_an_error_with_its_message(load, tmp_path):
    peers = load("peers")
    with pytest.raises(SystemExit, match=r"(?s)with_captum stopped:.*captum"):
        peers["main"](
            ["--peers", "captum", "--python", sys.executable, "--model", str(tiny_folder("tiny"))]
        )


@pytest.mark.slow
def test_time_grows_with_the_counted_arithmetic(load, capsys):
    rows = load("scaling")["main"](["--tasks", "gradient", "--axes", "layers", "--rounds", "1"])
    slopes = rows["gradient, layers"]["slopes"]
    assert slopes["ours"] == pytest.approx(1.0, abs=0.3)
    assert 0 < slopes["time"] < 2
    assert "| gradient | layers | 2 to 16 |" in capsys.readouterr().out


@pytest.mark.slow
def test_a_share_of_the_time_is_in_matrix_products(load, capsys):
    arguments = ["--model", str(tiny_folder("tiny-qwen2")), "--tasks", "answers", "--rounds", "1"]
    row = load("arithmetic")["main"](arguments)["answers"]
    assert 0 < row["seconds_of_products"] < row["times"]["float32"][0]
    assert set(row["times"]) == {"float32", "bfloat16"}
    assert "correlation" in row["agreement"]
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_candidates_are_names_that_the_tokenizer_writes(name, random_model):
    assert len(QUICK["candidates"](random_model(name).tokenizer)) == 3
