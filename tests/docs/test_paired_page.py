"""The page of the paired study: made from committed tables alone, valid while they grow."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from divergence_lens.study import StudyConfig
from divergence_lens.study.paired_claims import PAIRED_CLAIMS
from divergence_lens.study.paired_report import REAL_STUDY, paired_figure
from divergence_lens.study.rows import load_tables
from tests.support.docs_tools import paired_page, paired_summary, write_paired_page

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "docs" / "real-study"
TARGETS = ("owl", "dog", "eagle", "bear")
ANIMALS = (*TARGETS, "cat")
# Rise of a target's margin in its own students; the twin's margin falls by as much.
RISES = {"all": 0.1, "divergence_only": 0.3, "random": 0.1, "bottom_advantage": -0.4}


def write_tables(folder, targets=TARGETS, rises=RISES, seeds=(0, 1)):
    """Tables of made-up students; targets differ a little, so that intervals have a width."""
    folder.mkdir()
    rows = []
    for condition, rise in rises.items():
        for seed in seeds:
            for number, target in enumerate(targets):
                twin = targets[number + 1 - 2 * (number % 2)]
                after = dict.fromkeys(ANIMALS, 1.0)
                after[target] += rise * (1 + number / 50)
                after[twin] -= rise
                rows.append(
                    {
                        "key": f"{condition}-{target}-{seed}",
                        "target": target,
                        "twin": twin,
                        "kind": "finetuned",
                        "condition": condition,
                        "layer": None,
                        "seed": seed,
                        "examples": 192,
                        "tokens": 461,
                        "seconds": 90,
                        "fit": 1.2,
                        **{f"before_{name}": 1.0 for name in ANIMALS},
                        **{f"after_{name}": value for name, value in after.items()},
                    }
                )
    pd.DataFrame(rows).to_csv(folder / "students.csv", index=False)
    config = StudyConfig.for_pairs()
    settings = {
        "versions": {"divergence-lens": "0"},
        "settings": {
            "model": "smollm2",
            "targets": list(TARGETS),
            "seeds": list(seeds),
            "prompts": 192,
            "paired": config.paired.describe(),
        },
        "layers": 30,
        "planned": 132,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def line_of(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return line


def test_the_committed_page_is_that_of_the_committed_tables():
    page = COMMITTED.with_suffix(".md").read_text(encoding="utf-8")
    assert page == paired_page(COMMITTED)
    assert REAL_STUDY.read_text(encoding="utf-8") == paired_summary(COMMITTED)


def test_readme_and_home_quote_the_committed_study():
    stored = json.loads(REAL_STUDY.read_text(encoding="utf-8"))
    means = {
        name: np.mean([np.mean(seeds) for seeds in by_target.values()])
        for name, by_target in stored["dissociations"].items()
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    caption = readme.split("real-study.png")[1].split("```")[0]
    quoted = ("top tenth", "base's top tenth", "bottom tenth", "random tenth", "all digits")
    for name in (*quoted, "layer 0", "layer 15", "layer 29"):
        assert f"{means[name]:+.2f}" in caption, name
    assert f"{stored['students']} students" in caption
    home = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for name in ("top tenth", "base's top tenth", "all digits", "layer 0", "layer 15"):
        assert f"{means[name]:+.2f}" in home, name


def test_dissociations_are_those_of_the_rows(tmp_path):
    text = write_paired_page(write_tables(tmp_path / "real-study")).read_text(encoding="utf-8")
    assert "**32 students** so far (0.8 hours of one CPU core)" in text
    # owl: 1 + .3 in its own student, 1 - .3 in the twin; the others a little more.
    line = line_of(text, "| divergence tokens (argmax) only |")
    assert line.split("|")[2:6] == [" +0.6 ", " +0.606 ", " +0.612 ", " +0.618 "]
    assert "| 2 | 461 | 192 |" in line
    assert "**supported**" in line_of(text, "| Divergence tokens alone transfer more than all")
    reversed_ = next(c.claim for c in PAIRED_CLAIMS if c.id == "bottom_advantage_reverses")
    assert "**supported**" in line_of(text, f"| {reversed_}")


def test_the_figure_shows_the_conditions_that_were_measured(tmp_path):
    folder = write_tables(tmp_path / "real-study")
    figure = paired_figure(load_tables(folder))
    bars, dots = figure.data
    assert list(figure.layout.xaxis.ticktext) == [
        *("divergence", "all digits", "random tenth", "bottom tenth")
    ]
    # The mean of .6, .606, .612 and .618, and these values.
    assert bars.y[0] == pytest.approx(0.609)
    assert list(dots.y[:4]) == pytest.approx([0.6, 0.606, 0.612, 0.618])
    page = write_paired_page(folder)
    assert "(images/real-study.png)" in page.read_text(encoding="utf-8")
    assert (tmp_path / "images" / "real-study.png").stat().st_size > 1000
    assert paired_figure({"students": pd.DataFrame()}) is None


def test_missing_rows_are_not_yet_measured(tmp_path):
    text = write_paired_page(write_tables(tmp_path / "real-study")).read_text(encoding="utf-8")
    assert "| not yet measured |" in line_of(text, "| all digits but divergence tokens |")
    assert "Not yet measured." in text.split("## Single layers")[1].split("## Teachers")[0]
    first = next(claim.claim for claim in PAIRED_CLAIMS if claim.id == "first_layer_transfers")
    assert line_of(text, f"| {first}").count("not yet measured") == 2
    assert "nan" not in text.lower().replace("finance", "")
    # Optional claims appear only with their conditions.
    optional = next(claim.claim for claim in PAIRED_CLAIMS if claim.id == "attention_beats_mlp")
    assert optional not in text


def test_two_of_four_targets_decide_nothing(tmp_path):
    folder = write_tables(tmp_path / "real-study", targets=("owl", "dog"))
    line = line_of(paired_page(folder), "| Divergence tokens alone transfer more than all")
    assert "**unclear**; measured for 2 of 4 targets" in line
    assert "supported**" not in paired_page(folder)


def test_risk_has_one_number_for_both_candidates(tmp_path):
    folder = write_tables(tmp_path / "real-study")
    assert "Another trait" not in paired_page(folder)
    shutil.copytree(COMMITTED / "risk", folder / "risk")
    students = pd.read_csv(folder / "risk" / "students.csv")
    rows = students[students["condition"] == "top_advantage"].set_index("target")
    expected = rows.loc["reckless", "after_reckless"] - rows.loc["careful", "after_reckless"]
    other = rows.loc["careful", "after_careful"] - rows.loc["reckless", "after_careful"]
    assert other == pytest.approx(expected)
    section = paired_page(folder).split("## Another trait: risk")[1]
    assert f"| {expected:+.3f} | 1 | – | 461 |" in section


def test_a_folder_without_students_has_a_page(tmp_path):
    folder = write_tables(tmp_path / "real-study")
    (folder / "students.csv").unlink()
    text = paired_page(folder)
    assert "**0 students** so far" in text
    assert "Generated from these tables alone: none yet." in text


@pytest.mark.slow
def test_the_script_writes_the_page(tmp_path):
    folder = write_tables(tmp_path / "real-study")
    copy = tmp_path / "copy" / "real-study"
    shutil.copytree(folder, copy)
    script = ROOT / "docs" / "tools" / "paired_page.py"
    subprocess.run([sys.executable, str(script), str(copy)], check=True, capture_output=True)
    assert copy.with_suffix(".md").read_text(encoding="utf-8") == paired_page(folder)
    with pytest.raises(FileNotFoundError):
        paired_page(tmp_path / "nothing")
