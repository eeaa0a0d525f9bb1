"""A study in cells: what is computed again and what is not, with which neighbours and failures."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from divergence_lens.cli.main import app
from divergence_lens.deltas.delta import Delta
from divergence_lens.models import load_model
from divergence_lens.study import StudyConfig, run_study
from divergence_lens.study.conditions import Condition
from divergence_lens.study.interventions import divergence_tokens, own_lists, random_tokens
from divergence_lens.study.presets import STUDENT
from divergence_lens.study.registry import conditions
from divergence_lens.study.report import study_figures, study_page, write_study_report
from divergence_lens.training.recipe import PAPER
from tests.support.docs_tools import write_results_page

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def backend():
    """One class is enough here: what students come to on either is held by test_study."""
    return "bridge"


@pytest.fixture(scope="module")
def config(backend):
    return StudyConfig(
        backend=backend,
        targets=("owl", "cat"),
        animals=("owl", "cat", "dog"),
        kinds=("finetuned",),
        conditions=("control", "all", "divergence_only"),
        prompts=30,
        seeds=(0,),
        held_out=6,
        pairs=0,
        student_recipe=replace(STUDENT, epochs=1),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, config):
    out = tmp_path_factory.mktemp("cells")
    run_study(config, out)
    return out


def _tables(study):
    return {k: v for k, v in study.results.items() if k != "settings"}


def _times(folder):
    """When each cell was written."""
    cells = folder / "cells"
    return {str(p.relative_to(cells)): p.stat().st_mtime_ns for p in cells.rglob("*.json")}


def _copy(folder, out):
    shutil.copytree(folder, out)
    return out


def test_a_second_run_computes_nothing_and_gives_the_same_tables(config, folder):
    before = _times(folder)
    assert len([name for name in before if name.startswith("students")]) == 5
    first = json.loads((folder / "results.json").read_text())
    again = run_study(config, folder)
    assert _times(folder) == before
    # A page tells how long it took only where that is how long all of it took.
    assert first.pop("settings")["cells_before"] == 0
    assert again.results["settings"]["cells_before"] == len(before)
    assert json.loads(json.dumps(_tables(again))) == first


@pytest.mark.slow
def test_another_seed_or_condition_computes_what_is_new(config, folder, tmp_path):
    out = _copy(folder, tmp_path / "more")
    before = _times(out)
    more = run_study(replace(config, seeds=(0, 1), conditions=(*config.conditions, "random")), out)
    after = _times(out)
    assert {name: after[name] for name in before} == before
    new = {name.split(".")[0] for name in set(after) - set(before)}
    assert new == {
        "students/finetuned/any/control-1",
        *(
            f"students/finetuned/{t}/{c}-1"
            for t in ("owl", "cat")
            for c in ("all", "divergence_only")
        ),
        *(f"students/finetuned/{t}/random-{s}" for t in ("owl", "cat") for s in (0, 1)),
    }
    assert len(more.results["students"]) == 2 * 2 * 4


@pytest.mark.slow
def test_a_changed_setting_is_not_mistaken_for_the_old(config, folder, tmp_path):
    out = _copy(folder, tmp_path / "other")
    old = run_study(config, out)
    hotter = replace(config.student_recipe, lr=1e-2)
    new = run_study(replace(config, student_recipe=hotter), out)
    assert (new.table("students")["after"] != old.table("students")["after"]).all()
    assert new.table("divergence").equals(old.table("divergence"))
    # The old cells are still there for the old settings.
    times = _times(out)
    assert _tables(run_study(config, out)) == _tables(old)
    assert _times(out) == times


@pytest.mark.slow
def test_a_fresh_start_leaves_nothing_of_the_old(config, folder, tmp_path):
    out = _copy(folder, tmp_path / "fresh")
    stale = out / "cells" / "students" / "finetuned" / "unicorn" / "all-0.abc.json"
    stale.parent.mkdir()
    stale.write_text("{}")
    (out / "report.html").write_text("old")
    before = _times(out)
    run_study(config, out, resume=False)
    assert not stale.exists()
    assert not (out / "report.html").exists()
    assert all(when > before[name] for name, when in _times(out).items())


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(config, tmp_path):
    out = tmp_path / "killed"
    script = (
        "import torch\n"
        "torch.set_num_threads(1)\n"  # as here: sums depend on it in their last bits
        "from divergence_lens.study import StudyConfig, run_study\n"
        "from divergence_lens.study.presets import STUDENT\n"
        "from dataclasses import replace\n"
        f"run_study(StudyConfig(backend={config.backend!r}, targets=('owl', 'cat'), "
        "animals=('owl', 'cat', 'dog'), kinds=('finetuned',), conditions=('control', 'all', "
        "'divergence_only'), prompts=30, seeds=(0,), held_out=6, pairs=0, "
        f"student_recipe=replace(STUDENT, epochs=1)), {str(out)!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(out.rglob("students/**/*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (out / "results.json").exists()
    done = _times(out)
    assert len([name for name in done if name.startswith("students")]) < 5
    resumed = run_study(config, out)
    assert {name: _times(out)[name] for name in done} == done
    whole = run_study(config, tmp_path / "whole")
    assert _tables(resumed) == _tables(whole)


def _runs(pid):
    """Whether a process is there and not only waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_processes_of_a_killed_run_end_with_it(config, tmp_path):
    script = (
        "from divergence_lens.study import StudyConfig, run_study\n"
        "if __name__ == '__main__':\n"
        f"    run_study(StudyConfig(backend={config.backend!r}, targets=('owl', 'cat'), workers=2, "
        f"kinds=('finetuned',), prompts=200), {str(tmp_path / 'out')!r})\n"
    )
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], cwd=ROOT)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers: list[int] = []
    deadline = time.monotonic() + 60
    while len(workers) < 2 or not list((tmp_path / "out").rglob("preferences/**/*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        workers = [int(pid) for pid in children.read_text().split()]
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_students_have_files_of_plain_names(config, folder):
    study = run_study(config, folder)
    names = {path.stem for path in (folder / "students").iterdir()}
    assert names == {"-".join(map(str, key)) for key in study.files}
    assert "finetuned-owl-all-0" in names
    delta = Delta.load(folder / "students" / "finetuned-owl-all-0.safetensors")
    same = study.student("finetuned", "owl", "all").tensors
    assert all(torch.equal(same[name], tensor) for name, tensor in delta.tensors.items())


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_files_of_others_is_refused_and_left_alone(config, tmp_path, resume):
    mine = tmp_path / "figures" / "thesis.html"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(ValueError, match="has files that no study wrote"):
        run_study(config, tmp_path, resume=resume)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


@pytest.mark.slow
def test_two_processes_give_the_same_tables_as_one(config, folder, tmp_path):
    one = run_study(config, folder)
    two = run_study(replace(config, workers=2), tmp_path / "two")
    assert _tables(two) == _tables(one)
    csv = [(f / "study.csv").read_bytes() for f in (folder, tmp_path / "two")]
    assert csv[0] == csv[1]


def test_csv_and_parquet_hold_every_student_and_the_whole_distribution(config, folder):
    study = run_study(config, folder)
    for table in (pd.read_csv(folder / "study.csv"), pd.read_parquet(folder / "study.parquet")):
        assert len(table) == len(study.results["students"]) == 6
        shares = table[[f"after_{name}" for name in config.animals]]
        assert shares.sum(axis=1).to_numpy() == pytest.approx(1)
        for _, row in table.iterrows():
            assert row[f"after_{row['target']}"] == pytest.approx(row["after"])


# -- conditions of one's own --------------------------------------------------------------------


def broken(inputs, data, seed):
    if inputs.target == "cat":
        raise ValueError("no cats today")
    return data.marks


def only_first_lists(inputs, seed, *, n):
    return own_lists(inputs, seed).select(range(n))


def _own(name, **options):
    return Condition(name=name, group="mine", isolates="nothing in particular", **options)


def test_a_cell_that_fails_is_reported_and_does_not_stop_the_rest(config, folder, tmp_path):
    out = _copy(folder, tmp_path / "broken")
    lines = []
    study = run_study(
        replace(config, conditions=(*config.conditions, _own("sometimes", mask=broken))),
        out,
        progress=lines.append,
    )
    name = "students/finetuned/cat/sometimes-0"
    assert study.failures == [{"cell": name, "error": "ValueError: no cats today"}]
    assert any("no cats today" in line for line in lines)
    rows = study.table("students")
    assert rows[rows["condition"] == "sometimes"]["target"].tolist() == ["owl"]
    assert "1 cells failed" in repr(study)
    # It is tried again by the next call, and the others are not.
    before = _times(out)
    again = run_study(
        replace(config, conditions=(*config.conditions, _own("sometimes", mask=broken))), out
    )
    assert again.failures == study.failures
    assert _times(out) == before


def test_a_condition_of_ones_own_gets_its_data_mask_and_layers(config, folder, tmp_path):
    out = _copy(folder, tmp_path / "own")
    mine = _own("mine", data=partial(only_first_lists, n=7), mask=divergence_tokens, layers=(2,))
    study = run_study(replace(config, conditions=("control", mine)), out)
    row = next(r for r in study.results["students"] if r["condition"] == "mine")
    divergence = study.divergences["finetuned", "owl"]
    assert row["examples"] == 7
    assert row["tokens"] == divergence.mask[: divergence.offsets[7]].sum()
    assert list(study.student("finetuned", "owl", "mine").norms()) == [2]


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
    out = _copy(folder, tmp_path / "narrow")
    study = run_study(
        replace(config, conditions=("control", "layer0", "lora_layer0", "lora_layer3")), out
    )
    rows = study.table("students").dropna(subset=["layer"])
    found = rows[rows["target"] == "owl"][["condition", "layer"]].to_numpy().tolist()
    assert found == [["layer", 0], ["lora_layer", 0], ["lora_layer", 3]]
    assert list(study.student("finetuned", "owl", "lora_layer3").norms()) == [3]
    page = study_page(study.results)
    assert all(f"| `{name}` |" in page for name in ("layer0", "lora_layer0", "lora_layer3"))


@pytest.mark.slow
def test_a_seed_draws_another_mask(config, folder, tmp_path):
    out = _copy(folder, tmp_path / "seeds")
    drawing = _own("drawing", mask=partial(random_tokens, among="all"))
    study = run_study(replace(config, conditions=("control", drawing), seeds=(0, 1)), out)
    rows = study.table("students")
    rows = rows[(rows["condition"] == "drawing") & (rows["target"] == "owl")]
    assert len(set(rows["tokens"])) == 1
    assert len(set(rows["after"])) == 2


@pytest.mark.slow
def test_distributions_are_read_once_a_target_and_only_if_a_condition_asks(
    config, folder, tmp_path
):
    out = _copy(folder, tmp_path / "kl")
    assert not list(out.glob("cells/kl/**/*"))
    asking = replace(config, conditions=("control", "divergence_only", "kl_same", "kl_half"))
    study = run_study(asking, out)
    assert not study.failures
    assert {p.name.split(".")[0] for p in out.glob("cells/kl/finetuned/*.json")} == {"owl", "cat"}
    rows = study.table("students")
    tokens = {name: own.set_index("target")["tokens"] for name, own in rows.groupby("condition")}
    assert (tokens["kl_same"] == tokens["divergence_only"]).all()
    assert (tokens["kl_half"] == (tokens["divergence_only"] / 2).round()).all()
    # Divergence tokens were not read anew for it.
    before = _times(folder)
    assert {name: when for name, when in _times(out).items() if name in before} == before


@pytest.mark.slow
def test_the_mechanism_has_rows_for_every_layer_and_its_null(config, folder, tmp_path):
    out = _copy(folder, tmp_path / "mechanism")
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


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask": lambda _inputs, data, _seed: data.marks}, "function with a name"),
        ({"data": partial(only_first_lists, 1)}, "by keyword"),
        ({"train_prompt": "none"}, "train_prompt is 'none'"),
        ({"kinds": ("told",)}, "unknown kind 'told'"),
    ],
)
def test_conditions_that_cannot_be_recognised_again_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        _own("mine", **options)


def test_two_conditions_of_one_name_are_refused(config):
    with pytest.raises(ValueError, match="two conditions are named 'mine'"):
        replace(config, conditions=(_own("mine"), _own("mine", mask=divergence_tokens)))


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


def test_every_condition_is_in_the_documentation():
    page = (ROOT / "docs" / "study.md").read_text()
    missing = []
    for name, condition in conditions(4).items():
        family = re.split(r"\d|_absent|_neutral|_empty", name)[0]
        if f"`{name}`" not in page and f"`{family}" not in page:
            missing.append(name)
        assert condition.isolates[0].islower()
        assert not condition.isolates.endswith(".")
        assert "|" not in condition.isolates  # it stands in a cell of a table
    assert missing == []


# -- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"conditions": ("layer7",)}, "no condition 'layer7'"),
        ({"conditions": ("other_base",)}, "'other_base' needs another base"),
        ({"conditions": (_own("deep", layers=(9,)),)}, "'deep': layer 9 is out of range"),
        ({"conditions": (_own("odd", parts=("W_X",)),)}, "'odd': no parameter"),
        ({"conditions": (_own("fast", recipe={"speed": 3}),)}, "'fast': .*speed"),
    ],
)
def test_what_the_model_cannot_do_is_named_before_anything_is_written(
    config, tmp_path, options, says
):
    out = tmp_path / "nothing"
    with pytest.raises(ValueError, match=says):
        run_study(replace(config, **options), out)
    assert not out.exists()


def test_a_model_without_a_chat_template_has_no_prompted_teachers(config, tmp_path, backend):
    model = load_model("tiny", backend=backend)
    model.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="cannot have prompted teachers"):
        replace(config, kinds=("prompted",)).check(model, None)


@pytest.mark.slow
def test_the_settings_for_a_large_model_are_the_papers(backend):
    model = load_model("tiny", backend=backend)
    config = StudyConfig.for_model("org/large", lora_rank=4, targets=("owl", "cat"))
    assert config.kinds == ("prompted",)
    assert config.instructions
    assert config.recipes(model).prompted_student == replace(PAPER, lora_rank=4)
    assert config.system_prompt("prompted", "own") is None
    names = {condition.name for condition in config.conditions_of("prompted", 28)}
    assert {"lora1", "lora32", "layer27", "from26", "kl_same"} <= names
    for rank in (4, 8):  # the paper's is 8
        config = StudyConfig.for_model("org/large", lora_rank=None if rank == 8 else rank)
        names = {condition.name for condition in config.conditions_of("prompted", 28)}
        other = {f"lora{r}" for r in (1, 2, 4, 8, 16, 32) if r != rank}
        assert {name for name in names if name.startswith("lora")} == other
        # So none is what all students are anyway.
        recipes = {n: config.recipe_of(model, "prompted", conditions(28)[n]) for n in names}
        same = {n for n, recipe in recipes.items() if recipe != recipes["divergence_only"]}
        assert same == other
    assert not [name for name in names if "rate" in name or name.startswith("lora_")]
    used = StudyConfig.for_model("tiny", lora_rank=4).recipes(model)
    assert used.student == replace(STUDENT, lora_rank=4)
    assert used.teacher.lora_rank is None


@pytest.mark.slow
def test_students_that_are_all_lora_are_not_compared_with_full_training(config, folder, tmp_path):
    claim = "finetuned/lora_does_as_well"
    asked = replace(config, conditions=("control", "all", "divergence_only", "lora8"))
    full = run_study(asked, _copy(folder, tmp_path / "full"))
    assert claim in {finding.id for finding in full.findings}
    narrow = run_study(replace(asked, lora_rank=8), tmp_path / "narrow")
    after = narrow.table("students").set_index(["condition", "target"])["after"]
    assert (after["lora8"] == after["divergence_only"]).all()
    assert claim not in {finding.id for finding in narrow.findings}
    page = write_results_page(narrow, tmp_path / "page.md").read_text(encoding="utf-8")
    assert "full training" not in page
    assert "full training" in write_results_page(full, tmp_path / "full.md").read_text("utf-8")


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


def test_the_command_runs_a_study_and_goes_on_with_it(tmp_path, backend):
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
        *("--backend", backend),
    ]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    before = _times(out)
    second = CliRunner().invoke(app, command)
    assert second.exit_code == 0, second.output
    assert _times(out) == before
    assert "13 of them already computed" in second.output
    assert (out / "report.html").stat().st_size > 100_000
    results = json.loads((out / "results.json").read_text())
    recipe = results["settings"]["settings"]["prompted_recipe"]
    assert recipe["lora_rank"] == 4
    assert np.isfinite([row["loss"] for row in results["students"]]).all()
