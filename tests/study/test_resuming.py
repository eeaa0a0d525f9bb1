"""A study in cells: which cells a further run computes, and how failures and stops are handled."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from divergence_lens.study import run_study
from tests.support.small_studies import cell_times, copy_folder, own_condition, tables_of

ROOT = Path(__file__).resolve().parents[2]


def test_a_second_run_computes_nothing_and_gives_the_same_tables(config, folder):
    before = cell_times(folder)
    assert len([name for name in before if name.startswith("students")]) == 5
    first = json.loads((folder / "results.json").read_text())
    again = run_study(config, folder)
    assert cell_times(folder) == before
    # A page tells how long it took only where that is how long all of it took.
    assert first.pop("settings")["cells_before"] == 0
    assert again.results["settings"]["cells_before"] == len(before)
    assert json.loads(json.dumps(tables_of(again))) == first


@pytest.mark.slow
def test_another_seed_or_condition_computes_what_is_new(config, folder, tmp_path):
    out = copy_folder(folder, tmp_path / "more")
    before = cell_times(out)
    more = run_study(replace(config, seeds=(0, 1), conditions=(*config.conditions, "random")), out)
    after = cell_times(out)
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
    out = copy_folder(folder, tmp_path / "other")
    old = run_study(config, out)
    hotter = replace(config.student_recipe, lr=1e-2)
    new = run_study(replace(config, student_recipe=hotter), out)
    assert (new.table("students")["after"] != old.table("students")["after"]).all()
    assert new.table("divergence").equals(old.table("divergence"))
    # The old cells are still there for the old settings.
    times = cell_times(out)
    assert tables_of(run_study(config, out)) == tables_of(old)
    assert cell_times(out) == times


@pytest.mark.slow
def test_a_fresh_start_leaves_nothing_of_the_old(config, folder, tmp_path):
    out = copy_folder(folder, tmp_path / "fresh")
    stale = out / "cells" / "students" / "finetuned" / "unicorn" / "all-0.abc.json"
    stale.parent.mkdir()
    stale.write_text("{}")
    (out / "report.html").write_text("old")
    before = cell_times(out)
    run_study(config, out, resume=False)
    assert not stale.exists()
    assert not (out / "report.html").exists()
    assert all(when > before[name] for name, when in cell_times(out).items())


@pytest.mark.slow
def test_a_run_that_was_killed_resumes(config, tmp_path):
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
    done = cell_times(out)
    assert len([name for name in done if name.startswith("students")]) < 5
    resumed = run_study(config, out)
    assert {name: cell_times(out)[name] for name in done} == done
    whole = run_study(config, tmp_path / "whole")
    assert tables_of(resumed) == tables_of(whole)


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


@pytest.mark.slow
def test_two_processes_give_the_same_tables_as_one(config, folder, tmp_path):
    one = run_study(config, folder)
    two = run_study(replace(config, workers=2), tmp_path / "two")
    assert tables_of(two) == tables_of(one)
    csv = [(f / "study.csv").read_bytes() for f in (folder, tmp_path / "two")]
    assert csv[0] == csv[1]


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_with_files_of_others_is_refused_and_left_alone(config, tmp_path, resume):
    mine = tmp_path / "figures" / "thesis.html"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(ValueError, match="has files that no study wrote"):
        run_study(config, tmp_path, resume=resume)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def broken(inputs, data, seed):
    if inputs.target == "cat":
        raise ValueError("no cats today")
    return data.marks


def test_a_cell_that_fails_is_reported_and_does_not_stop_the_rest(config, folder, tmp_path):
    out = copy_folder(folder, tmp_path / "broken")
    lines = []
    study = run_study(
        replace(config, conditions=(*config.conditions, own_condition("sometimes", mask=broken))),
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
    before = cell_times(out)
    again = run_study(
        replace(config, conditions=(*config.conditions, own_condition("sometimes", mask=broken))),
        out,
    )
    assert again.failures == study.failures
    assert cell_times(out) == before


@pytest.mark.slow
def test_distributions_are_read_once_a_target_and_only_if_a_condition_asks(
    config, folder, tmp_path
):
    out = copy_folder(folder, tmp_path / "kl")
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
    before = cell_times(folder)
    assert {name: when for name, when in cell_times(out).items() if name in before} == before
