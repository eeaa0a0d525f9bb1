"""The report: complete, escaped, self-contained, and well-behaved in a browser."""

import html.parser
import itertools
import json
import re

import pytest

from divergence_lens.study.html import Answer, write_report
from tests.support.browser import check_in_a_browser
from tests.support.figures import FIGURES, RATES, TEACHERS, students

EVIL = "<script>alert(1)</script>"


class Page(html.parser.HTMLParser):
    """The elements of a page, and the words of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]


class Shown:
    def _repr_html_(self) -> str:
        return "<p class='mine'>tokens</p>"


def findings() -> list[dict[str, object]]:
    row = {"measured": 3.4, "interval": [2.9, 3.8], "rule": "above 1.5", "caveat": "tiny model",
           "unit": "times the control", "n": 2, "values": {"owl": 3.125, "cat": 3.675},
           "related": {"all cells together": 0.9595}}  # fmt: skip
    return [
        {**row, "id": "rate", "claim": "Few tokens diverge", "verdict": "supported"},
        {**row, "id": "early", "claim": f"Early {EVIL}", "verdict": "unclear"},
        {
            **row,
            "id": "late",
            "claim": "Late blocks too",
            "verdict": "not supported",
            "figure_of": "early",
            "difference": -0.0625,
            "difference_interval": [-0.125, 0.5],
            "bootstrap_interval": [3.1, 3.5],
            "control": 0.0653,
        },
    ]


def results() -> dict[str, object]:
    return {
        "settings": {"model": f"tiny {EVIL}", "seeds": [0, 1], "seconds": 113.2,
                     "versions": {"torch": "2.13.0"}},
        "teachers": TEACHERS,
        "divergence": RATES,
        "students": students(),
        "effects": {"layers": [{"layer": 0, "effect": 0.9, EVIL: EVIL}],
                    "agreement": {"pearson": 0.93, "cells": 12_345, "nothing": float("nan")}},
        "findings": findings(),
        "failures": [],
    }  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    figures = {
        "rate": FIGURES["rate_per_teacher"](),
        "early: heat": FIGURES["effects_heatmap"](),
        "early-sweep": FIGURES["layer_sweep"](),
        "other": FIGURES["agreement_scatter"](),
        "transfer": FIGURES["transfer_bars"](),
    }
    return write_report(
        tmp_path_factory.mktemp("report") / "deep" / "report.html",
        results(),
        figures,
        {f"Example {EVIL}": Shown(), "As text": "<p>made by a library</p>"},
        setting=["Four targets.", f"No prompt. {EVIL}"],
    )


def test_the_page_says_everything_in_order(report):
    text = report.read_text()
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert headings == [
        "The answer",
        "Examples",
        "Claims",
        "Claim by claim",
        "Further figures",
        "The setting",
        "Tables",
        "Provenance",
    ]
    words = " ".join(Page(text).words)
    for said in (
        *("Four targets.", "above 1.5", "tiny model", "2.9 to 3.8", "not supported", "unclear"),
        *("times the control", "2 targets", "owl: 3.125; cat: 3.675", "Caveat:"),
        *("-0.062 (-0.125 to +0.500); mean preference of control students 0.0653", "3.1 to 3.5"),
        *("all cells together: 0.9595", "12,345", "versions.torch", "2.13.0", "made by a library"),
    ):
        assert said in words
    assert "<p class='mine'>tokens</p>" in text
    assert "3 claims: 1 supported, 1 not supported, 1 unclear." in words


def test_figures_are_shown_with_their_finding(report):
    text = report.read_text()
    articles = re.findall(r'<article id="([^"]*)">(.*?)</article>', text, flags=re.DOTALL)
    assert [(name, body.count('class="dl-plot"')) for name, body in articles] == [
        ("finding-rate", 1),
        ("finding-early", 2),
        ("finding-late", 0),
    ]
    # One without a figure of its own leads to the one that shows it.
    links = re.findall(r'href="#([^"]*)">the figure of another finding', text)
    assert links == ["finding-early"]
    assert "<h3>Failures</h3><p>none</p>" in text
    further = text[text.index('<section id="figures"') : text.index('<section id="setting"')]
    assert further.count('class="dl-plot"') == 2


def test_text_from_results_is_escaped(report):
    text = report.read_text()
    assert EVIL not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 6
    scripts = Page(text).all("script")
    # Ours: one for buttons and printing, one that draws, plotly; the rest is data.
    kinds = [attributes.get("type") for attributes in scripts]
    assert kinds.count("application/json") == 5 + 1
    assert kinds.count("text/plain") == 1
    assert kinds.count(None) == 2


def test_only_the_pages_own_scripts_may_run_and_nothing_is_loaded(report):
    text = report.read_text()
    page = Page(text)
    (policy,) = [a["content"] for a in page.all("meta") if "http-equiv" in a]
    assert "default-src 'none'" in policy
    (nonce,) = re.findall(r"script-src 'nonce-([0-9a-f]+)'", policy)
    assert [a.get("nonce") for a in page.all("script") if a.get("type") is None] == [nonce] * 2
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#"), tag
        assert tag not in {"link", "iframe", "object", "embed", "base"}
    (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_mails_well(report):
    assert report.stat().st_size < 6_000_000
    assert report.read_text().count('id="dl-plotly"') == 1


def test_a_report_without_figures_carries_no_plotly(tmp_path):
    page = write_report(tmp_path / "report.html", {"findings": findings()})
    assert page.stat().st_size < 50_000
    assert "dl-plotly" not in page.read_text()


def test_headings_tables_and_landmarks_are_accessible(report):
    page = Page(report.read_text())
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(attributes.get("scope") in {"row", "col"} for attributes in page.all("th"))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("main")) == 1
    for plot in [a for a in page.all("div") if a.get("class") == "dl-plot"]:
        assert plot["role"] == "img"
        assert plot["aria-label"]
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    links = {(a["href"] or "")[1:] for a in page.all("a")}
    assert links <= set(ids)


def test_long_tables_are_folded(report):
    text = report.read_text()
    assert "<summary>students: 36 rows</summary>" in text
    # One for each claim in the table, one for each by itself, the long table, provenance.
    assert text.count("<details>") == 3 + 3 + 1 + 1


def test_the_first_screen_has_the_answer_its_figures_and_verdicts_of_each_kind(tmp_path):
    rows = [
        {**row, "id": f"{kind}/{row['id']}", "figure_of": None}
        for kind in ("prompted", "finetuned")
        for row in findings()[:2]
    ]
    figures = {
        "prompted/rate": FIGURES["rate_per_teacher"](),
        "finetuned/early: x": FIGURES["layer_sweep"](),
    }
    answers = [
        Answer(
            heading="Prompted teachers",
            sentences=["It is <so>."],
            findings="prompted/",
            figures=["prompted/rate"],
        ),
        Answer(heading="Finetuned teachers", sentences=["Not so."], findings="finetuned/"),
    ]
    page = write_report(tmp_path / "r.html", {"findings": rows}, figures, answers=answers)
    text = page.read_text()
    first = text[text.index('<section id="answer"') : text.index('<section id="findings"')]
    assert "It is &lt;so&gt;." in first
    assert first.count("2 claims: 1 supported, 0 not supported, 1 unclear.") == 2
    strips = re.findall(r'<ul class="strip".*?</ul>', first, flags=re.DOTALL)
    assert [re.findall('href="#([^"]*)"', strip) for strip in strips] == [
        [f"finding-{kind}-{name}" for name in ("rate", "early")]
        for kind in ("prompted", "finetuned")
    ]
    assert first.count('class="dl-plot"') == 1
    # The figure is not repeated below; its finding leads to it.
    assert text.count('class="dl-plot"') == 2
    assert text.count('<a href="#answer">the figure at the top</a>') == 1
    # A claim of both kinds is one row of the table.
    (table,) = re.findall(r'<table class="claims">.*?</table>', text, flags=re.DOTALL)
    assert table.count("<tr>") == 1 + 2
    assert table.count("3.40") == table.count("2.90 to 3.80") == 4
    assert "above 1.5" in table


def test_all_tables_are_in_the_page_for_download_with_missing_values_as_null(report):
    (data,) = re.findall(
        r'<script type="application/json" id="dl-results">(.*?)</script>', report.read_text()
    )
    stored = json.loads(data)
    assert stored["students"] == json.loads(json.dumps(students()))
    assert stored["effects"]["agreement"]["nothing"] is None
    assert 'data-save="students.csv"' in report.read_text()


def test_a_finding_without_a_verdict_or_claim_is_refused_and_nothing_written(tmp_path):
    bad = {**findings()[0], "verdict": "proved"}
    with pytest.raises(ValueError, match="'proved'; it is one of 'supported', 'not supported'"):
        write_report(tmp_path / "report.html", {"findings": [bad]})
    with pytest.raises(ValueError, match="finding 0 has no claim"):
        write_report(tmp_path / "report.html", {"findings": [{"verdict": "supported"}]})
    assert not list(tmp_path.iterdir())


def test_in_a_browser_figures_draw_and_answer_and_nothing_overflows(report, tmp_path):
    assert check_in_a_browser(report, tmp_path) == 5


def test_every_kind_of_figure_does_so_in_a_browser(tmp_path):
    page = write_report(
        tmp_path / "report.html",
        {"findings": findings()},
        {f"{i}": make() for i, make in enumerate(FIGURES.values())},
    )
    assert check_in_a_browser(page, tmp_path) == len(FIGURES)
