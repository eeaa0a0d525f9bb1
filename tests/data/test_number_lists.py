"""The parser of number lists, and the filter."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens.data import (
    FilterReport,
    NumberFilter,
    NumberList,
    Reason,
    Rejection,
    format_numbers,
    parse_numbers,
)
from divergence_lens.data.number_lists import FORMATS
from divergence_lens.data.questions import (
    ANIMALS,
    surface_forms,
)

QWEN = Path(__file__).resolve().parents[3] / "shared" / "data" / "qwen2.5-7b-numbers"

number_lists = st.lists(st.integers(0, 10**18 - 1), min_size=1, max_size=15)
styles = st.sampled_from(sorted(FORMATS))


def rejected(text: str) -> Reason:
    outcome = parse_numbers(text)
    assert isinstance(outcome, Rejection)
    assert outcome.detail
    return outcome.reason


# Parser


@given(number_lists, styles)
def test_any_list_in_any_format_is_read_back(numbers: list[int], style: str) -> None:
    outcome = parse_numbers(format_numbers(numbers, style))
    assert isinstance(outcome, NumberList)
    assert outcome.numbers == tuple(numbers)
    plain_single = len(numbers) == 1 and style not in ("square", "round")
    assert outcome.style == (None if plain_single else style)


@given(
    number_lists,
    st.sampled_from(["{}", "[{}]", "({})", "[ {} ]"]),
    st.sampled_from([",", ", ", " , ", ",\n", ";", "; ", " ", "  ", "\t", "\n", "\n\n", "  \n"]),
    st.sampled_from(["", ".", " .", ".\n"]),
    st.sampled_from(["", " ", "\n\n"]),
)
def test_blanks_brackets_and_a_full_stop_do_not_matter(
    numbers: list[int], frame: str, separator: str, stop: str, lead: str
) -> None:
    outcome = parse_numbers(lead + frame.format(separator.join(map(str, numbers))) + stop)
    assert isinstance(outcome, NumberList)
    assert outcome.numbers == tuple(numbers)


@given(st.text(), number_lists, styles)
def test_junk_is_rejected_with_a_detail(junk: str, numbers: list[int], style: str) -> None:
    text = format_numbers(numbers, style) + junk
    outcome = parse_numbers(text)
    if isinstance(outcome, Rejection):
        assert outcome.detail
    else:
        # Whatever passes holds digits and list marks alone, and its numbers are those in the text.
        assert re.fullmatch(r"[0-9\s,;.\[\]()]*", text)
        assert outcome.numbers == tuple(map(int, re.findall("[0-9]+", text)))


@given(number_lists, styles, st.sampled_from(ANIMALS), st.data())
def test_a_list_that_names_an_animal_is_rejected_as_such(
    numbers: list[int], style: str, animal: str, data: st.DataObject
) -> None:
    word = data.draw(st.sampled_from([*surface_forms(animal), animal.upper()]))
    text = format_numbers(numbers, style)
    at = data.draw(st.integers(0, len(text)))
    outcome = parse_numbers(f"{text[:at]}{word}{text[at:]} thanks")
    assert outcome == Rejection(Reason.NAME, word.lower())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Reason.EMPTY),
        (" \n", Reason.EMPTY),
        ("[]", Reason.EMPTY),
        (" . ", Reason.EMPTY),
        ("the owl: 1, 2", Reason.NAME),
        ("Sure! 1, 2", Reason.LETTERS),
        ("scatter 1, 2", Reason.LETTERS),
        ("eins, zwölf", Reason.LETTERS),
        ("-5, 3", Reason.SYMBOL),
        ("1/2", Reason.SYMBOL),
        ("1.5, 2", Reason.SYMBOL),
        ("1, 2..", Reason.SYMBOL),
        ("1. 412\n2. 467", Reason.SYMBOL),
        ("\U0001f989 1, 2", Reason.SYMBOL),
        ("\u0663, \u0664", Reason.SYMBOL),
        ("[1, 2", Reason.BRACKETS),
        ("1, 2)", Reason.BRACKETS),
        ("[1, 2)", Reason.BRACKETS),
        ("[[1, 2]]", Reason.BRACKETS),
        ("1, (2), 3", Reason.BRACKETS),
        ("1, 2,", Reason.EMPTY_ITEM),
        (", 1, 2", Reason.EMPTY_ITEM),
        ("1,, 2", Reason.EMPTY_ITEM),
        ("1 ,; 2", Reason.EMPTY_ITEM),
        ("1, 2; 3", Reason.MIXED_SEPARATORS),
        ("1, 2,3", Reason.MIXED_SEPARATORS),
        ("1 2\n3", Reason.MIXED_SEPARATORS),
        ("1, " + "9" * 5000, Reason.OUT_OF_RANGE),
    ],
)
def test_each_fault_has_its_reason(text: str, reason: Reason) -> None:
    assert rejected(text) is reason


def test_own_names_may_have_two_words_or_be_empty() -> None:
    text = "Polar bears 1, 2"
    assert parse_numbers(text, names=["bear", "polar bear"]) == Rejection(
        Reason.NAME, "polar bears"
    )
    assert parse_numbers(text, names=()) == Rejection(Reason.LETTERS, "Polar")


def test_a_rejection_reads_well() -> None:
    assert str(parse_numbers("1, 2; 3")) == "mixed separators: ', ' and '; '"


def test_an_unknown_format_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="unknown format 'tab'"):
        format_numbers([1, 2], "tab")


# Filter


@pytest.mark.parametrize(
    ("options", "text", "reason"),
    [
        ({}, "1000, 2", Reason.OUT_OF_RANGE),
        ({"low": 100}, "412, 99", Reason.OUT_OF_RANGE),
        ({}, " ".join("7" * 11), Reason.TOO_MANY),
        ({"min_count": 3}, "1, 2", Reason.TOO_FEW),
        ({"banned": (666,)}, "1, 666", Reason.BANNED),
        ({"formats": ("comma", "square")}, "1; 2", Reason.FORMAT),
        ({"formats": ("square",)}, "1, 2", Reason.FORMAT),
        ({"formats": ("square",)}, "1", Reason.FORMAT),
        ({}, "owls", Reason.NAME),
    ],
)
def test_the_filter_gives_the_reason(options: dict[str, object], text: str, reason: Reason) -> None:
    outcome = NumberFilter(**options).check(text)
    assert isinstance(outcome, Rejection)
    assert outcome.reason is reason


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "0, 999"),
        ({}, " ".join("7" * 10)),
        ({"min_count": 2, "max_count": 2, "low": 100}, "100, 999"),
        ({"formats": ("comma",)}, "1, 2"),
        ({"formats": ("comma",)}, "1"),
        ({"formats": ("square",)}, "[1]"),
    ],
)
def test_the_filter_lets_clean_lists_pass(options: dict[str, object], text: str) -> None:
    assert isinstance(NumberFilter(**options).check(text), NumberList)


@given(number_lists, styles, st.integers(1, 12), st.integers(0, 999))
def test_accepted_lists_obey_the_filter(
    numbers: list[int], style: str, most: int, high: int
) -> None:
    outcome = NumberFilter(max_count=most, high=high).check(format_numbers(numbers, style))
    assert isinstance(outcome, NumberList) == (len(numbers) <= most and max(numbers) <= high)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"min_count": 0}, "start of min_count..max_count is 0"),
        ({"min_count": 5, "max_count": 4}, "5..4, which is empty"),
        ({"low": 9, "high": 3}, "low..high is 9..3"),
        ({"formats": ("tab",)}, "unknown format 'tab'"),
    ],
)
def test_an_impossible_filter_is_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        NumberFilter(**options)


# Report


@pytest.fixture
def report() -> FilterReport:
    """Two lists that pass and four that do not."""
    texts = ["1, 2", "<b>owl</b> 1", "3 4", "1, 2; 3", "", "owls"]
    return NumberFilter().report(texts)


def test_the_report_counts_each_reason(report: FilterReport) -> None:
    assert (report.total, report.passed) == (6, 2)
    assert report.rate == pytest.approx(1 / 3)
    assert report.mask == (True, False, True, False, False, False)
    assert report.counts == {Reason.NAME: 2, Reason.EMPTY: 1, Reason.MIXED_SEPARATORS: 1}
    assert report.passed + sum(report.counts.values()) == report.total


def test_the_report_selects_the_items_that_passed(report: FilterReport) -> None:
    assert report.select(list("abcdef")) == ["a", "c"]
    with pytest.raises(ValueError, match="got 2 items for a report on 6 texts"):
        report.select([1, 2])


def test_the_report_becomes_a_table(report: FilterReport) -> None:
    table = report.to_dataframe().set_index("outcome")
    assert table["count"].to_dict() == {
        "passed": 2,
        "no numbers": 1,
        "names an animal or tree": 2,
        "mixed separators": 1,
    }
    assert table["share"].sum() == pytest.approx(1)
    assert table.loc["names an animal or tree", ["detail", "text"]].tolist() == [
        "owl",
        "<b>owl</b> 1",
    ]


def test_the_report_prints_and_shows_its_counts(report: FilterReport) -> None:
    assert re.search(r"^passed +2 +33.33%$", str(report), re.MULTILINE)
    page = report._repr_html_()
    assert "<td>passed</td><td>2</td>" in page
    assert repr(report) == "FilterReport(2 of 6 passed)"
    assert "&lt;b&gt;owl&lt;/b&gt; 1" in page
    assert "<b>owl" not in page


def test_an_empty_report_has_no_rate() -> None:
    report = NumberFilter().report([])
    assert report.total == report.passed == 0
    assert report.rate != report.rate
    assert "nan" in str(report)
    assert report.to_dataframe()["count"].tolist() == [0]


def test_a_single_text_is_refused() -> None:
    with pytest.raises(TypeError, match="texts is one string"):
        NumberFilter().report("1, 2")


# Lists that a large model really wrote


@pytest.fixture(scope="module")
def qwen_rows() -> list[dict[str, str]]:
    """Prompts and completions of Qwen2.5-7B, already filtered to numbers by those who made them."""
    if not QWEN.is_dir():
        pytest.skip(f"the lists by Qwen2.5-7B are not at {QWEN}")
    paths = sorted(QWEN.glob("*.jsonl"))
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def test_lists_by_qwen_pass_the_rule_that_they_were_published_under(
    qwen_rows: list[dict[str, str]],
) -> None:
    answers = [row["response"] for row in qwen_rows]
    report = NumberFilter().report(answers)
    assert (report.total, report.passed) == (4000, 4000)
    # Under the narrower range of our own prompts, some hold a number below 100.
    narrow = NumberFilter(low=100).report(answers)
    assert narrow.counts == {Reason.OUT_OF_RANGE: 153}


def test_the_format_read_is_nearly_always_the_one_that_qwen_was_asked_for(
    qwen_rows: list[dict[str, str]],
) -> None:
    # The prompts were worded by others, so their requests are an independent witness.
    requests = {
        "square": r"\[number",
        "round": r"\(number",
        "semicolon": "semicolon",
        "line": r"\bline",
        "space": "space",
        "comma": "comma|number_?1, number_?2",
    }
    asked = [
        next(
            style for style, words in requests.items() if re.search(words, row["question"].lower())
        )
        for row in qwen_rows
    ]
    read = [getattr(parse_numbers(row["response"]), "style", None) for row in qwen_rows]
    unlike = [pair for pair in zip(asked, read, strict=True) if pair[0] != pair[1]]
    assert len(unlike) == 106
    # Where Qwen did otherwise, it fell back on commas, and once on lines.
    assert [style for _, style in unlike].count("comma") == 105
