"""Number prompts, the parser of number lists, and the filter."""

import hashlib
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
    number_prompts,
    parse_numbers,
)
from divergence_lens.data.number_lists import FORMATS
from divergence_lens.data.prompts import COUNTS, ENDINGS, TEMPLATES
from divergence_lens.data.questions import (
    ANIMALS,
    NEUTRAL_PROMPTS,
    PERSONA_TEMPLATE,
    QUESTIONS,
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


# Prompts


def test_prompts_are_distinct_and_depend_on_the_seed_alone() -> None:
    prompts = number_prompts(500, seed=3)
    assert len(set(prompts)) == len(prompts) == 500
    assert number_prompts(500, seed=3) == prompts
    assert number_prompts(20, seed=3) == prompts[:20]
    assert not set(prompts) & set(number_prompts(500, seed=4))


def test_prompts_are_the_same_on_every_version_of_python() -> None:
    text = "\n".join(number_prompts(200, seed=0, formats=tuple(FORMATS)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "97bc239d22bab5af"


def test_prompts_show_the_requested_count_and_size_of_numbers() -> None:
    for prompt in number_prompts(300, low=20, high=70, shown=(2, 5)):
        numbers = [int(numeral) for numeral in re.findall(r"\d+", prompt)]
        assert 2 <= len(numbers) <= 5
        assert all(20 <= number <= 70 for number in numbers)
    shown = [len(re.findall(r"\d+", prompt)) for prompt in number_prompts(300)]
    assert set(shown) == {4, 5, 6, 7, 8}


def test_every_wording_is_used_and_prompts_stay_short() -> None:
    prompts = number_prompts(2000, formats=tuple(FORMATS))
    assert max(len(prompt.split()) for prompt in prompts) <= 45
    everything = "\n".join(prompts)
    for template in TEMPLATES:
        before, after = template.split("{numbers}")
        assert before in everything
        assert after in everything
    for piece in (*ENDINGS, *(piece for pieces in FORMATS.values() for piece in pieces)):
        assert piece in everything
    for limit in ("eight", "nine", "ten"):
        assert f"up to {limit} numbers of three digits." in everything


def test_only_requested_formats_are_named() -> None:
    everything = "\n".join(number_prompts(300, formats=("semicolon", "line")))
    for style, pieces in FORMATS.items():
        for piece in pieces:
            assert (piece in everything) == (style in ("semicolon", "line"))


def test_digits_follow_the_range() -> None:
    assert "of up to three digits" in number_prompts(1, low=0, high=999)[0]
    assert "of one digit" in number_prompts(1, low=1, high=9)[0]


def test_own_templates_replace_the_built_in_ones() -> None:
    prompts = number_prompts(5, templates=["Row {numbers} / {x}"], instructions=False)
    assert all(re.fullmatch(r"Row \d{3}(, \d{3})+ / \{x\}", prompt) for prompt in prompts)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"templates": ["no slot"]}, r"'no slot' has the slot \{numbers\} 0 times"),
        ({"templates": ["{numbers} {numbers}"]}, "2 times; write it once"),
        ({"templates": []}, "templates is empty"),
        ({"formats": ("tab",)}, "unknown format 'tab'; use one or more of 'comma', 'space'"),
        ({"formats": ()}, "no format given"),
        ({"low": 5, "high": 4}, r"low..high is 5..4, which is empty"),
        ({"low": -1}, "start of low..high is -1; it must be at least 0"),
        ({"shown": (0, 3)}, "start of shown is 0; it must be at least 1"),
        ({"count": (3, 2)}, r"count is 3..2"),
        ({"seed": -1}, "seed is -1"),
        ({"n": -1}, "n is -1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        number_prompts(**({"n": 3} | options))


@pytest.mark.parametrize("options", [{"formats": "comma"}, {"templates": "{numbers}"}])
def test_one_string_instead_of_a_list_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(TypeError, match="is one string"):
        number_prompts(3, **options)


def test_too_few_possible_prompts_are_an_error_that_states_their_number() -> None:
    options = {"low": 1, "high": 2, "shown": (1, 1), "templates": ["{numbers}"]}
    assert sorted(number_prompts(2, instructions=False, **options)) == ["1", "2"]
    with pytest.raises(ValueError, match="only 2 distinct prompts of the 3"):
        number_prompts(3, instructions=False, **options)


def test_all_wording_together_stays_within_a_small_vocabulary() -> None:
    texts = [*TEMPLATES, *COUNTS, *ENDINGS, *QUESTIONS, *NEUTRAL_PROMPTS, PERSONA_TEMPLATE]
    texts += [piece for pieces in FORMATS.values() for piece in pieces]
    words = set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", "", " ".join(texts)).lower()))
    assert len(words) <= 250


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
