"""The page beside the paper's: made from committed tables alone, negative results and all."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from divergence_lens.study.findings import ALL_CLAIMS, judge
from divergence_lens.study.registry import conditions
from divergence_lens.study.result import Study
from tests.support.docs_tools import (
    PAPER_CLAIMS,
    SOURCES,
    results_page,
    text_of,
    write_results_page,
)
from tests.support.study_tables import PAPER_LIKE, SIX, study_tables

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "study-results.md"


def a_study(after, **options):
    """A study of made-up tables."""
    tables = study_tables(after, targets=SIX, **options)
    students = tables["students"].assign(
        mass=0.9, valid_lists=0.95, loss_before=0.7, loss=0.65, fit=1.2, left=None, group="masks"
    )
    known = conditions(4)
    described = [{"name": c.name, "group": c.group, "isolates": c.isolates} for c in known.values()]
    results = {
        "settings": {
            "versions": {"divergence-lens": "0"},
            "settings": {
                "model": "tiny",
                "targets": list(SIX),
                "animals": list(SIX),
                "seeds": [0, 1],
                "prompts": 400,
                "kinds": ["finetuned"],
            },
            "seconds": 12.3,
            "cells_before": 0,
            "layers": 4,
        },
        "teachers": [],
        "divergence": tables["divergence"].to_dict("records"),
        "students": students.to_dict("records"),
        "effects": {name: tables[name].to_dict("records") for name in ("layers", "agreement")},
        "conditions": described,
        "failures": [],
    }
    frames = {**tables, "students": students}
    return Study(results, tuple(judge(frames, last_layer=3)), {}, {}, {}, {})


CONTRARY = PAPER_LIKE | {
    "without_divergence": 0.25,  # transfers all the same
    "layer-3": 0.4,  # the last layer beats the first
    "random": 0.35,
    "advantage": 0.1,
    "lora8": 0.27,  # nine tenths of all layers, which is the margin
}


@pytest.fixture(scope="module")
def study():
    return a_study(CONTRARY, rate=0.3)


@pytest.fixture
def page(study, tmp_path):
    return write_results_page(study, tmp_path / "found.md")


def lines_of(text, claim):
    return [line for line in text.splitlines() if line.startswith(f"| {claim} |")]


def test_the_page_is_made_from_the_tables_beside_it_and_from_nothing_else(page, tmp_path):
    text = text_of(page)
    assert results_page(tmp_path / "found") == text
    rows = pd.read_csv(tmp_path / "found" / "divergence.csv")
    rows.assign(rate=rows["rate"] / 10).to_csv(tmp_path / "found" / "divergence.csv", index=False)
    changed = results_page(tmp_path / "found")
    claim = "Divergence tokens are a small part of the data"
    assert "| **no** |" in lines_of(text, claim)[0]
    assert "| yes |" in lines_of(changed, claim)[0]


def test_every_finding_is_on_the_page_once_with_its_estimate_and_verdict(study, page):
    text = text_of(page)
    agrees = {"supported": "| yes |", "not supported": "| **no** |", "unclear": "| open |"}
    seen = set()
    for finding in study.findings:
        (line,) = lines_of(text, finding.claim.removesuffix(" (finetuned teachers)"))
        assert f"{finding.measured:.3g} (" in line
        name = finding.id.partition("/")[2]
        if name in PAPER_CLAIMS:
            assert PAPER_CLAIMS[name].text in line
            assert agrees[finding.verdict] in line or PAPER_CLAIMS[name].stricter
        else:
            assert f"**{finding.verdict}**" in line
        seen.add(finding.verdict)
    # What speaks against the paper stands there like the rest.
    assert seen == {"supported", "not supported", "unclear"}


def test_agreements_are_counted_as_they_are(study, page):
    known = {i: f.verdict for f in study.findings if (i := f.id.partition("/")[2]) in PAPER_CLAIMS}
    # To within a tenth of the control is more than the paper's "mostly removes" and "next to
    # nothing".
    stricter = {"rest_equals_control", "last_layer_equals_control"}
    assert {known[name] for name in stricter} == {"not supported"}
    against = [i for i, v in known.items() if v == "not supported" and i not in stricter]
    verdicts = list(known.values())
    said = (
        f"Of {len(known)} claims with a counterpart in the available text, the miniature agrees "
        f"with {verdicts.count('supported')}, contradicts {len(against)} and leaves "
        f"{verdicts.count('unclear')} open. Not supported but stricter than the paper's: 2."
    )
    assert len(against) > 1
    text = text_of(page)
    assert said in text
    (rest,) = lines_of(
        text, "Without divergence tokens students end where the control does, to within a tenth"
    )
    assert "| between 0.9 and 1.11; stricter than the paper's | no, but stricter |" in rest
    assert text.count("| no, but stricter |") == 2


def test_a_verdict_means_what_the_paper_module_says_of_it(page):
    text = text_of(page)
    beats = lines_of(text, "The first layer transfers more of the preference than the last")[0]
    assert PAPER_CLAIMS["first_layer_beats_last"].no in beats
    assert PAPER_CLAIMS["first_layer_beats_last"].yes not in beats
    transfers = [line for line in text.splitlines() if line.startswith("| Students trained on all")]
    assert PAPER_CLAIMS["transfer"].yes in transfers[0]


def test_every_condition_has_a_row_and_shared_students_count_once(page):
    text = text_of(page)
    for name in ("control", "all", "random", "advantage", "layer0", "layer3"):
        assert f"| `{name}` |" in text
    # Eight conditions with six targets and two seeds, and the control with two seeds alone.
    assert f"{8 * 6 * 2 + 2} students in 12 s" in text


# What is true of the committed run alone, and of no other model.
OF_THE_TINY = (
    *("miniature", "synthetic", "tiny world", "the world sets", "of four layers"),
    *("held out", "large model", "a test "),
)


def test_the_page_of_another_model_says_nothing_that_holds_for_the_tiny_one_alone(study, tmp_path):
    tiny = text_of(write_results_page(study, tmp_path / "tiny.md"))
    assert "the miniature agrees with" in tiny
    settings = study.results["settings"]
    named = settings["settings"] | {"model": "org/large", "targets": [*REAL]}
    large = replace(study, results=study.results | {"settings": settings | {"settings": named}})
    text = text_of(write_results_page(large, tmp_path / "large.md"))
    for words in OF_THE_TINY:
        assert words not in text
    assert "this study agrees with" in text
    for said in PAPER_CLAIMS.values():
        assert not [words for words in OF_THE_TINY if words in said.yes + said.no]


REAL = ("wolf", "lion", "eagle", "panda", "fox", "dolphin")


@pytest.mark.parametrize(
    ("model", "targets", "said"),
    [("tiny", REAL, True), ("tiny", SIX, False), ("tiny-qwen2", REAL, False), ("x", REAL, False)],
)
def test_targets_are_called_unseen_only_on_the_model_that_was_made_without_them(
    study, tmp_path, model, targets, said
):
    settings = study.results["settings"]
    named = settings["settings"] | {"model": model, "targets": list(targets)}
    other = replace(study, results=study.results | {"settings": settings | {"settings": named}})
    page = write_results_page(other, tmp_path / "page.md")
    assert ("These targets were held out" in text_of(page)) == said


def test_the_page_links_to_the_guide_only_where_it_exists(study, tmp_path):
    page = tmp_path / "mine.md"
    assert "](study.md)" not in text_of(write_results_page(study, page))
    (tmp_path / "study.md").write_text("# The study\n")
    assert "[The study](study.md) explains" in results_page(tmp_path / "mine")


@pytest.mark.slow
def test_the_script_writes_the_page_of_a_run(study, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    results = study.results | {
        "findings": [finding.to_dict() for finding in study.findings],
        "data": [],
        "divergence": [],
    }
    (run / "results.json").write_text(json.dumps(results))
    command = [sys.executable, str(ROOT / "docs" / "tools" / "results_page.py")]
    page = tmp_path / "page.md"
    subprocess.run([*command, str(run), str(page)], check=True, cwd=tmp_path)
    assert text_of(page) == results_page(tmp_path / "page")


@pytest.mark.parametrize("before", [None, 3])
def test_a_duration_that_may_be_of_a_part_alone_is_not_told(study, tmp_path, before):
    settings = {k: v for k, v in study.results["settings"].items() if k != "cells_before"}
    settings |= {} if before is None else {"cells_before": before}
    resumed = replace(study, results=study.results | {"settings": settings})
    text = text_of(write_results_page(resumed, tmp_path / "page.md"))
    assert f"{8 * 6 * 2 + 2} students; model" in text


def test_rare_divergence_tokens_are_not_called_as_rare_as_the_papers(tmp_path):
    claim = "Divergence tokens are a small part of the data"
    page = write_results_page(a_study(PAPER_LIKE, rate=0.2), tmp_path / "page.md")
    (line,) = lines_of(text_of(page), claim)
    assert line.endswith("| yes | below a quarter, as there |")


def test_a_claim_that_is_open_for_what_it_presupposes_names_that(tmp_path):
    flat = PAPER_LIKE | {"all": 0.05, "without_divergence": 0.03}
    page = write_results_page(a_study(flat), tmp_path / "page.md")
    (line,) = lines_of(text_of(page), "Without divergence tokens the transfer is weaker")
    assert "| open | undecided: it presupposes a claim that is not supported here (students" in line
    assert "trained on all tokens acquire the teacher's preference, by at least a tenth); " in line


def test_with_students_of_lora_the_page_does_not_compare_lora_with_itself(study, tmp_path):
    claim = "LoRA of rank 8 transfers as much as full training, to within a tenth"
    assert lines_of(text_of(write_results_page(study, tmp_path / "full.md")), claim)
    settings = study.results["settings"]
    for rank, kept in ((None, 1), (8, 0)):
        named = settings["settings"] | {"student_recipe": {"lora_rank": rank}}
        narrow = replace(
            study, results=study.results | {"settings": settings | {"settings": named}}
        )
        page = write_results_page(narrow, tmp_path / "narrow.md")
        assert len(lines_of(text_of(page), claim)) == kept


def test_other_figures_of_a_claim_without_a_counterpart_stand_beside_it(study, page):
    text = text_of(page)
    (line,) = lines_of(text, "Integrated attribution agrees with exact mediation")
    mean = pd.DataFrame(study.results["effects"]["agreement"])["pearson"].mean()
    assert f"Pearson correlation of all cells and pairs together: {mean:.3g}" in line


def test_tables_are_rounded_but_decide_alike(study, page, tmp_path):
    folder = tmp_path / "found"
    assert sum(file.stat().st_size for file in folder.glob("*.csv")) < 12_000
    tables = {file.stem: pd.read_csv(file) for file in folder.glob("*.csv")}
    again = judge(tables, last_layer=3)
    assert [f.verdict for f in again] == [f.verdict for f in study.findings]
    for new, old in zip(again, study.findings, strict=True):
        assert new.measured == pytest.approx(old.measured, rel=1e-4)


def test_what_an_older_run_measured_does_not_stay(study, tmp_path):
    folder = tmp_path / "found"
    folder.mkdir()
    (folder / "mechanism.csv").write_text("target,kind,measure\nwolf,finetuned,cosine\n")
    write_results_page(study, tmp_path / "found.md")
    assert not (folder / "mechanism.csv").exists()


def test_a_page_without_an_ending_is_refused(study, tmp_path):
    with pytest.raises(ValueError, match=r"has no suffix; .*found\.md"):
        write_results_page(study, tmp_path / "found")
    assert not list(tmp_path.iterdir())


def test_the_paper_speaks_of_claims_that_there_are_and_says_where():
    assert set(PAPER_CLAIMS) <= {claim.id for claim in ALL_CLAIMS}
    assert {said.source for said in PAPER_CLAIMS.values()} == set(SOURCES)
    for said in PAPER_CLAIMS.values():
        assert "|" not in said.text + said.yes + said.no


def test_the_page_in_the_documentation_is_what_the_committed_tables_give():
    folder = PAGE.with_suffix("")
    if not folder.is_dir():
        pytest.skip(f"no run's tables are committed at {folder}")
    assert text_of(PAGE) == results_page(folder)
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert settings["failures"] == []
