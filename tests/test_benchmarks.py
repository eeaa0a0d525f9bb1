"""The benchmarks that check instead of measure, on the tiny models."""

import json
import runpy
from pathlib import Path

import pytest

from divergence_lens.engine.base import Engine
from tests.support.models import BACKENDS

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


def test_scores_are_log_likelihoods_and_the_table_goes_into_its_page(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("Before\n<!-- scoring: begin -->\nold\n<!-- scoring: end -->\nafter\n")
    main = runpy.run_path(str(FOLDER / "scoring.py"))["main"]
    main(["--backend", BACKENDS[0], "--questions", "3", "--repeats", "1", "--docs", str(page)])
    before, *table, after = page.read_text().splitlines()
    assert (before, after) == ("Before", "after")
    assert table[1:-1] == capsys.readouterr().out.splitlines()[-4:]
    assert [row.split(" | ")[0] for row in table[-3:-1]] == ["| answers", "| lists"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_candidates_are_names_that_the_tokenizer_writes(name, random_model):
    assert len(QUICK["candidates"](random_model(name).tokenizer)) == 3
