"""The page beside the paper's: made from committed tables alone, negative results and all."""

import json
from pathlib import Path

import pandas as pd
import pytest

from divergence_lens.conditions import conditions
from divergence_lens.findings import ALL_CLAIMS, judge
from divergence_lens.paper import PAPER, SOURCES
from divergence_lens.results_page import results_page, write_results_page
from divergence_lens.study import Study
from tests.test_findings import PAPER_LIKE, SIX, _tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "study-results.md"


def a_study(after, **options):
    """A study of made-up tables."""
    tables = _tables(after, targets=SIX, **options)
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
            "blocks": 4,
        },
        "teachers": [],
        "divergence": tables["divergence"].to_dict("records"),
        "students": students.to_dict("records"),
        "effects": {name: tables[name].to_dict("records") for name in ("layers", "agreement")},
        "conditions": described,
        "failures": [],
    }
    frames = {**tables, "students": students}
    return Study(results, tuple(judge(frames, last_block=3)), {}, {}, {}, {})


CONTRARY = PAPER_LIKE | {
    "without_divergence": 0.25,  # transfers all the same
    "block-3": 0.4,  # the last block beats the first
    "random": 0.35,
    "advantage": 0.1,
    "lora8": 0.27,  # nine tenths of all blocks, which is the margin
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
    text = page.read_text(encoding="utf-8")
    assert results_page(tmp_path / "found") == text
    rows = pd.read_csv(tmp_path / "found" / "divergence.csv")
    rows.assign(rate=rows["rate"] / 10).to_csv(tmp_path / "found" / "divergence.csv", index=False)
    changed = results_page(tmp_path / "found")
    claim = "Divergence tokens are a small part of the data"
    assert "| **no** |" in lines_of(text, claim)[0]
    assert "| yes |" in lines_of(changed, claim)[0]


def test_every_finding_is_on_the_page_once_with_its_estimate_and_verdict(study, page):
    text = page.read_text(encoding="utf-8")
    agrees = {"supported": "| yes |", "not supported": "| **no** |", "unclear": "| open |"}
    seen = set()
    for finding in study.findings:
        (line,) = lines_of(text, finding.claim.removesuffix(" (finetuned teachers)"))
        assert f"{finding.measured:.3g} (" in line
        name = finding.id.partition("/")[2]
        if name in PAPER:
            assert PAPER[name].text in line
            assert agrees[finding.verdict] in line
        else:
            assert f"**{finding.verdict}**" in line
        seen.add(finding.verdict)
    # What speaks against the paper stands there like the rest.
    assert seen == {"supported", "not supported", "unclear"}


def test_agreements_are_counted_as_they_are(study, page):
    known = [f.verdict for f in study.findings if f.id.partition("/")[2] in PAPER]
    said = (
        f"Of {len(known)} claims with a counterpart in the text at hand the miniature agrees with "
        f"{known.count('supported')}, contradicts {known.count('not supported')} and leaves "
        f"{known.count('unclear')} open."
    )
    assert known.count("not supported") > 1
    assert said in page.read_text(encoding="utf-8")


def test_a_verdict_means_what_the_paper_module_says_of_it(page):
    text = page.read_text(encoding="utf-8")
    beats = lines_of(text, "The first block carries more of the preference than the last")[0]
    assert PAPER["first_block_beats_last"].no in beats
    assert PAPER["first_block_beats_last"].yes not in beats
    transfers = [line for line in text.splitlines() if line.startswith("| Students trained on all")]
    assert PAPER["transfer"].yes in transfers[0]


def test_every_condition_has_a_row_and_shared_students_count_once(page):
    text = page.read_text(encoding="utf-8")
    for name in ("control", "all", "random", "advantage", "block0", "block3"):
        assert f"| `{name}` |" in text
    # Eight conditions with six targets and two seeds, and the control with two seeds alone.
    assert f"{8 * 6 * 2 + 2} students in 12 s" in text


def test_tables_are_rounded_but_decide_alike(study, page, tmp_path):
    folder = tmp_path / "found"
    assert sum(file.stat().st_size for file in folder.glob("*.csv")) < 12_000
    tables = {file.stem: pd.read_csv(file) for file in folder.glob("*.csv")}
    again = judge(tables, last_block=3)
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
    with pytest.raises(ValueError, match=r"has no ending; .*found\.md"):
        write_results_page(study, tmp_path / "found")
    assert not list(tmp_path.iterdir())


def test_the_paper_speaks_of_claims_that_there_are_and_says_where():
    assert set(PAPER) <= {claim.id for claim in ALL_CLAIMS}
    assert {said.source for said in PAPER.values()} == set(SOURCES)
    for said in PAPER.values():
        assert "|" not in said.text + said.yes + said.no


def test_the_page_in_the_documentation_is_what_the_committed_tables_give():
    folder = PAGE.with_suffix("")
    if not folder.is_dir():
        pytest.skip(f"no run's tables are committed at {folder}")
    assert PAGE.read_text(encoding="utf-8") == results_page(folder)
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert settings["failures"] == []
