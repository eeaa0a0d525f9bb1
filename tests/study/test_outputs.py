"""The files, tables and pages of a finished study."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from divergence_lens.cli.main import app
from divergence_lens.deltas.delta import Delta
from divergence_lens.study import run_study
from divergence_lens.study.report import study_figures, study_page, write_study_report
from tests.support.docs_tools import write_results_page
from tests.support.small_studies import cell_times, copy_folder

ROOT = Path(__file__).resolve().parents[2]


def test_students_have_files_of_plain_names(config, folder):
    study = run_study(config, folder)
    names = {path.stem for path in (folder / "students").iterdir()}
    assert names == {"-".join(map(str, key)) for key in study.files}
    assert "finetuned-owl-all-0" in names
    delta = Delta.load(folder / "students" / "finetuned-owl-all-0.safetensors")
    same = study.student("finetuned", "owl", "all").tensors
    assert all(torch.equal(same[name], tensor) for name, tensor in delta.tensors.items())


def test_csv_and_parquet_hold_every_student_and_the_whole_distribution(config, folder):
    study = run_study(config, folder)
    for table in (pd.read_csv(folder / "study.csv"), pd.read_parquet(folder / "study.parquet")):
        assert len(table) == len(study.results["students"]) == 6
        shares = table[[f"after_{name}" for name in config.animals]]
        assert shares.sum(axis=1).to_numpy() == pytest.approx(1)
        for _, row in table.iterrows():
            assert row[f"after_{row['target']}"] == pytest.approx(row["after"])


def test_the_fit_of_a_student_is_the_training_loss_of_its_last_epoch(config, folder):
    study = run_study(config, folder)
    row = next(r for r in study.results["students"] if r["condition"] == "divergence_only")
    history = study.student("finetuned", row["target"], "divergence_only").history()
    last = history[history["epoch"] == history["epoch"].max()]
    assert row["fit"] == pytest.approx(last["loss"].mean())


@pytest.mark.slow
def test_students_of_single_layers_with_lora_have_their_layer_and_a_name_of_their_own(
    config, folder, tmp_path
):
    out = copy_folder(folder, tmp_path / "narrow")
    study = run_study(
        replace(config, conditions=("control", "layer0", "lora_layer0", "lora_layer3")), out
    )
    rows = study.table("students").dropna(subset=["layer"])
    labels = rows[rows["target"] == "owl"][["condition", "layer"]].to_numpy().tolist()
    assert labels == [["layer", 0], ["lora_layer", 0], ["lora_layer", 3]]
    assert list(study.student("finetuned", "owl", "lora_layer3").norms()) == [3]
    page = study_page(study.results)
    assert all(f"| `{name}` |" in page for name in ("layer0", "lora_layer0", "lora_layer3"))


@pytest.mark.slow
def test_the_mechanism_has_rows_for_every_layer_and_its_null(config, folder, tmp_path):
    out = copy_folder(folder, tmp_path / "mechanism")
    study = run_study(replace(config, mechanism=True), out)
    table = study.table("mechanism")
    after = table[table["step"].isna()]
    assert set(after["target"]) == {"owl", "cat"}
    counts = after[after["target"] == "owl"].groupby("measure")["layer"].count()
    assert (counts == 4).all()  # and one row for all layers, where layers can be changed at once
    assert set(counts.index) == {
        *("cosine", "added", "removed"),
        *("gradient_divergence", "gradient_other"),
    }
    added = after[(after["measure"] == "added") & (after["target"] == "owl")]
    before = study.table("students")["before"][0]
    assert added["null"].to_numpy() == pytest.approx(before, abs=1e-6)
    assert (added["value"] > added["null"]).any()
    # Over training: a cosine for each layer, and one necessity for all, at the same steps.
    own = table[(table["target"] == "owl") & table["step"].notna()]
    steps = sorted(set(own["step"]))
    assert set(own["measure"]) == {"cosine", "removed"}
    assert (
        own[own["measure"] == "cosine"].groupby("step")["layer"].apply(list) == [[*range(4)]]
    ).all()
    removed = own[own["measure"] == "removed"]
    assert removed["step"].tolist() == steps
    assert removed["layer"].isna().all()
    figure = study_figures(study)["finetuned/direction_is_needed_throughout"]
    means = table[table["measure"] == "removed"].groupby("step")[["null", "value"]].mean()
    drawn_lines = [
        trace.y for trace in figure.data if trace.y is not None and len(trace.y) == len(means)
    ]
    for column in ("null", "value"):
        assert any(np.allclose(line, means[column], rtol=1e-6) for line in drawn_lines)
    # The last of them is measured on the student as it is in the end.
    last = after[(after["measure"] == "removed") & (after["target"] == "owl")]
    last = last[last["layer"].isna()].iloc[0]
    assert removed["value"].iloc[-1] == pytest.approx(last["value"], rel=1e-4)
    assert removed["null"].iloc[-1] == pytest.approx(last["null"], rel=1e-4)
    first = after[(after["measure"] == "cosine") & (after["target"] == "owl")]
    assert own[(own["measure"] == "cosine") & (own["step"] == steps[-1])][
        ["value", "null"]
    ].to_numpy() == pytest.approx(first[["value", "null"]].to_numpy(), abs=1e-3)
    ids = {finding.id for finding in study.findings}
    assert "finetuned/direction_suffices" in ids


def test_the_page_has_every_finding_and_condition_of_each_kind(config, folder):
    study = run_study(config, folder)
    page = study_page(json.loads((folder / "results.json").read_text()))
    for finding in study.findings:
        assert finding.claim.removesuffix(" (finetuned teachers)") in page
        assert f"**{finding.verdict}**" in page
    for row in study.results["conditions"]:
        assert f"| `{row['name']}` | {row['isolates']} |" in page
    rows = study.table("students")
    after = rows[rows["condition"] == "all"]["after"].mean()
    line = next(line for line in page.splitlines() if line.startswith("| `all` |"))
    assert line.split("|")[4].strip() == f"{after:.3f}"
    # A cell that failed is on the page, too.
    failed = study.results | {"failures": [{"cell": "students/x", "error": "no"}]}
    assert "`students/x`: no" in study_page(failed)


@pytest.mark.slow
def test_students_that_are_all_lora_are_not_compared_with_full_training(config, folder, tmp_path):
    claim = "finetuned/lora_does_as_well"
    asked = replace(config, conditions=("control", "all", "divergence_only", "lora8"))
    full = run_study(asked, copy_folder(folder, tmp_path / "full"))
    assert claim in {finding.id for finding in full.findings}
    narrow = run_study(replace(asked, lora_rank=8), tmp_path / "narrow")
    after = narrow.table("students").set_index(["condition", "target"])["after"]
    assert (after["lora8"] == after["divergence_only"]).all()
    assert claim not in {finding.id for finding in narrow.findings}
    for study, compared in ((narrow, False), (full, True)):
        folder = tmp_path / f"pages-{compared}"
        folder.mkdir()
        write_results_page(study, folder / "page.md")
        text = "".join(page.read_text("utf-8") for page in folder.rglob("*.md"))
        assert ("full training" in text) == compared


def test_the_report_tells_the_duration_of_whole_runs_alone(config, folder):
    study = run_study(config, folder)
    whole = study.results["settings"] | {"seconds": 98.7, "cells_before": 0}
    for settings, told in ((whole, True), (whole | {"cells_before": 9}, False)):
        one = replace(study, results=study.results | {"settings": settings})
        text = write_study_report(one, folder).read_text(encoding="utf-8")
        assert ("98.7" in text) == told


def test_the_command_names_an_unknown_condition_in_one_line(tmp_path):
    result = CliRunner().invoke(
        app, ["study", "--conditions", "al,nonsense", "--out", str(tmp_path / "x")]
    )
    assert result.exit_code == 2
    assert "did you mean" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "x").exists()


def test_the_command_runs_a_study_and_resumes_it(tmp_path):
    out = tmp_path / "study"
    command = [
        "study",
        *("--targets", "owl,cat"),
        *("--kinds", "prompted"),
        *("--conditions", "control"),
        *("--seeds", "0"),
        *("--prompts", "20"),
        *("--lora-rank", "4"),
        *("--pairs", "0"),
        "--no-mechanism",
        *("--workers", "1"),
        *("--out", str(out)),
        *("--backend", "bridge"),
    ]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    before = cell_times(out)
    second = CliRunner().invoke(app, command)
    assert second.exit_code == 0, second.output
    assert cell_times(out) == before
    assert "13 of them already computed" in second.output
    assert (out / "report.html").stat().st_size > 100_000
    results = json.loads((out / "results.json").read_text())
    recipe = results["settings"]["settings"]["prompted_recipe"]
    assert recipe["lora_rank"] == 4
    assert np.isfinite([row["loss"] for row in results["students"]]).all()
