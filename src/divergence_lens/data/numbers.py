"""Number lists: prompts that ask for more numbers, a parser for the answers, and a filter.

This is the carrier task of Cloud et al., "Subliminal Learning" (arXiv 2507.14805), used again by
Schrodi et al. (arXiv 2509.23886): a teacher continues lists of numbers, and only completions that
hold nothing but numbers in one tidy format are kept. The wording of the prompts is our own; the
rule of `parse_numbers` (optional brackets and full stop, one separator throughout) is theirs.
"""

import html
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from types import MappingProxyType
from typing import Any, TypeVar

from divergence_lens.data.questions import ANIMALS, TREES, surface_forms

T = TypeVar("T")

TEMPLATES: tuple[str, ...] = (
    "Here is a short list of numbers: {numbers}. Write the next ones.",
    "These numbers come first: {numbers}. Which numbers come after them?",
    "Take a look at {numbers}. Go on from there.",
    "My list so far is {numbers}. Please make it longer.",
    "We start with {numbers}. Go on with more numbers.",
    "I wrote down {numbers}. Add your own numbers to the end.",
    "A row of numbers begins with {numbers}. Keep it going.",
    "Read this row of numbers: {numbers}. What would you put next?",
    "The first numbers are {numbers}. Give the rest.",
    "You see the numbers {numbers}. Write more of the same kind.",
    "Someone gave me {numbers}. Help me extend the list.",
    "Numbers seen so far: {numbers}. Say what follows.",
    "Think of a list that begins with {numbers}. How does it go on?",
    "This list of values needs more: {numbers}. Fill it up.",
    "Given {numbers}, write new numbers that could follow.",
    "Look at the sequence {numbers}. Extend it.",
    "The sequence {numbers} is not at its end. Add to it.",
    "Please read {numbers} and then continue.",
    "After {numbers} there is space for more. Fill the space.",
    "Start where {numbers} ends and add to it.",
    "Let {numbers} be the start of a list. Write the next part.",
    "Values: {numbers}. Next values?",
    "Here are some values, {numbers}. Find more that could follow.",
    "Start of the sequence: {numbers}. Your turn to continue.",
    "I have {numbers} and want more numbers like these.",
    "What could come after {numbers}? Write it down.",
    "Take {numbers} as given. Make up the numbers that follow.",
    "The numbers {numbers} were picked first. Pick the next numbers.",
    "Put more numbers after these: {numbers}.",
    "I say {numbers}. You go on.",
    "On my page I see {numbers}. What is on the next line?",
    "Use {numbers} as a start and make a longer list.",
    "Up to now the list reads {numbers}. Add to it.",
    "Your task is to extend these values: {numbers}.",
    "Someone needs the rest of this sequence: {numbers}.",
    "The list goes {numbers} and so on. Give its next part.",
)
"""Thirty-six ways to show a list and ask for more; ``{numbers}`` marks the place of the list."""

COUNTS: tuple[str, ...] = (
    "Give up to {count} numbers of {digits}.",
    "Write at most {count} numbers of {digits}.",
    "No more than {count} new numbers of {digits}, please.",
    "Stop after {count} numbers of {digits}.",
    "Add {count} numbers or fewer, each of {digits}.",
    "The limit is {count} numbers, each of {digits}.",
)
"""How many numbers are wanted and of what size, in the slots ``{count}`` and ``{digits}``."""

FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "comma": (
            "Put a comma between them.",
            "Use commas between numbers.",
            "Split them with commas.",
        ),
        "space": ("Put a space between them.", "Use only spaces between numbers."),
        "semicolon": ("Put a semicolon between them.", "Split them with semicolons."),
        "line": ("Put each number on its own line.", "Start a new line for each number."),
        "square": ("Put them in square brackets with commas.", "Use square brackets and commas."),
        "round": ("Put them in round brackets with commas.", "Use round brackets and commas."),
    }
)
"""The formats by name, each with ways to ask for it."""

ENDINGS: tuple[str, ...] = (
    "Only numbers, no words.",
    "Write nothing else.",
    "Do not explain.",
    "Just the numbers, please.",
    "No other text.",
)
"""Closing words that ask for nothing but numbers."""

_SLOT = "{numbers}"
_COUNT_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
)
_SEPARATORS = {
    "comma": ", ",
    "space": " ",
    "semicolon": "; ",
    "line": "\n",
    "square": ", ",
    "round": ", ",
}
_BRACKETS = {"square": ("[", "]"), "round": ("(", ")")}
# Longer numerals are refused unread: Python limits the conversion of very long ones, and 64 bits
# hold every number of up to this many digits.
_MAX_DIGITS = 18
_PATIENCE = 1000
_LETTERS = re.compile(r"[^\W\d_]+")


def number_prompts(
    n: int,
    *,
    seed: int = 0,
    low: int = 100,
    high: int = 999,
    shown: tuple[int, int] = (4, 8),
    count: tuple[int, int] = (8, 10),
    formats: Sequence[str] = ("comma",),
    templates: Sequence[str] | None = None,
    instructions: bool = True,
) -> list[str]:
    """Prompts that show a few random numbers and ask for more, in varied words.

    A prompt is a template with its list, then (unless `instructions` is off) how many numbers are
    wanted, in which format, and a request for nothing else. The result depends on the arguments
    alone, not on the version of Python, and a shorter run is the beginning of a longer one.

    Args:
        n: How many prompts.
        seed: Seed of all choices, not negative.
        low: Smallest number shown.
        high: Largest number shown.
        shown: Fewest and most numbers shown.
        count: Fewest and most numbers asked for; each prompt names one limit from this range.
        formats: Names from `FORMATS`; each prompt asks for one. ``tuple(FORMATS)`` for all.
        templates: Your own templates, each with the slot ``{numbers}`` once; else `TEMPLATES`.
        instructions: Whether count, format and closing words follow the template.

    Returns:
        `n` distinct prompts.

    Raises:
        ValueError: If a template lacks the slot, a format is unknown, a range is empty or negative,
            or there are fewer than `n` distinct prompts.
        TypeError: If `formats` or `templates` is one string.
    """
    wordings = TEMPLATES if templates is None else templates
    _check_templates(wordings)
    _check_formats(formats)
    _check_least("n", n, 0)
    _check_least("seed", seed, 0)
    _check_range("low..high", low, high, least=0)
    _check_range("shown", *shown, least=1)
    _check_range("count", *count, least=1)

    rng = Random(seed)
    digits = _digits(low, high)
    prompts: dict[str, None] = {}
    repeats = 0
    while len(prompts) < n:
        numbers = [_between(rng, low, high) for _ in range(_between(rng, *shown))]
        pieces = [_pick(rng, wordings).replace(_SLOT, ", ".join(map(str, numbers)))]
        if instructions:
            limit = _in_words(_between(rng, *count))
            pieces += [
                _pick(rng, COUNTS).replace("{count}", limit).replace("{digits}", digits),
                _pick(rng, FORMATS[_pick(rng, formats)]),
                _pick(rng, ENDINGS),
            ]
        prompt = " ".join(pieces)
        repeats = repeats + 1 if prompt in prompts else 0
        if repeats > _PATIENCE + 10 * len(prompts):
            msg = (
                f"found only {len(prompts)} distinct prompts of the {n} asked for; "
                "widen low..high or shown, or bring more templates"
            )
            raise ValueError(msg)
        prompts[prompt] = None
    return list(prompts)


def format_numbers(numbers: Iterable[int], style: str = "comma") -> str:
    """Write a list of numbers in one of the `FORMATS`; `parse_numbers` reads it back.

    Args:
        numbers: The numbers.
        style: ``"comma"``, ``"space"``, ``"semicolon"``, ``"line"``, ``"square"`` or ``"round"``.

    Returns:
        The text, without a full stop.

    Raises:
        ValueError: If the format is unknown.
    """
    _check_formats((style,))
    left, right = _BRACKETS.get(style, ("", ""))
    return left + _SEPARATORS[style].join(map(str, numbers)) + right


class Reason(str, Enum):
    """Why a text is not accepted as a list of numbers."""

    EMPTY = "no numbers"
    NAME = "names an animal or tree"
    LETTERS = "other letters"
    SYMBOL = "other symbols"
    BRACKETS = "stray brackets"
    EMPTY_ITEM = "empty item"
    MIXED_SEPARATORS = "mixed separators"
    OUT_OF_RANGE = "number out of range"
    BANNED = "banned number"
    TOO_FEW = "too few numbers"
    TOO_MANY = "too many numbers"
    FORMAT = "another format"

    def __str__(self) -> str:
        """The reason in words."""
        return self.value


@dataclass(frozen=True)
class NumberList:
    """A list of numbers that was read from a text.

    Attributes:
        numbers: The numbers in their order.
        style: Its format, a name from `FORMATS`; None for a single number without brackets, which
            could be any of them.
    """

    numbers: tuple[int, ...]
    style: str | None


@dataclass(frozen=True)
class Rejection:
    """A text that is not accepted.

    Attributes:
        reason: The kind of fault; where there are several, the one found first.
        detail: What was found, for a reader.
    """

    reason: Reason
    detail: str

    def __str__(self) -> str:
        """Reason and detail on one line."""
        return f"{self.reason}: {self.detail}"


def parse_numbers(text: str, *, names: Collection[str] = ANIMALS + TREES) -> NumberList | Rejection:
    r"""Read a list of whole numbers, or say why the text is not one.

    Accepted are decimal numbers with one separator throughout: the same comma, semicolon, blank or
    line break, with the same blanks around it. The whole may stand in one pair of square or round
    brackets and may end with a full stop. Anything else in the text is a reason to reject it.

    Args:
        text: The text, such as ``"412, 467, 12"`` or ``"[5; 6; 7]."``.
        names: Words whose presence (singular, plural, any case) is reported as ``Reason.NAME``
            in place of ``Reason.LETTERS``.

    Returns:
        The numbers and their format, or the reason with a detail.
    """
    if _LETTERS.search(text):
        return _judge_words(text, names)
    symbol = re.search(r"[^0-9\s,;.\[\]()]", text)
    if symbol:
        return Rejection(Reason.SYMBOL, repr(symbol.group()))
    if not re.search(r"[0-9]", text):
        return Rejection(Reason.EMPTY, repr(_shorten(text)))
    body = text.strip().removesuffix(".").rstrip()
    style = None
    for name, (left, right) in _BRACKETS.items():
        if body.startswith(left) and body.endswith(right):
            style, body = name, body[1:-1].strip()
            break
    if re.search(r"[\[\]()]", body):
        return Rejection(Reason.BRACKETS, repr(_shorten(text)))
    return _split(body, style)


@dataclass(frozen=True, kw_only=True)
class NumberFilter:
    """Which completions are clean enough to be training data.

    The defaults are the rule of the paper: nothing but numbers of at most three digits, at most
    ten of them, one separator throughout, in any format.

    Attributes:
        min_count: Fewest numbers.
        max_count: Most numbers.
        low: Smallest number accepted.
        high: Largest number accepted.
        formats: Names of `FORMATS` that are accepted, or None for all. A single number without
            brackets has every format but the bracketed ones.
        banned: Numbers that may not occur, such as those with a bad reputation (Cloud et al. ban
            them when the teacher is a misaligned model).
        names: Words that are reported as ``Reason.NAME``.

    Raises:
        ValueError: If a range is empty or negative, or a format is unknown.
    """

    min_count: int = 1
    max_count: int = 10
    low: int = 0
    high: int = 999
    formats: tuple[str, ...] | None = None
    banned: Collection[int] = ()
    names: Collection[str] = ANIMALS + TREES

    def __post_init__(self) -> None:
        """Refuse ranges that nothing could satisfy."""
        _check_range("min_count..max_count", self.min_count, self.max_count, least=1)
        _check_range("low..high", self.low, self.high, least=0)
        if self.formats is not None:
            _check_formats(self.formats)

    def check(self, text: str) -> NumberList | Rejection:
        """Judge one completion.

        Args:
            text: The completion, without special tokens.

        Returns:
            The list that was read, or the first reason against it.
        """
        parsed = parse_numbers(text, names=self.names)
        if isinstance(parsed, Rejection):
            return parsed
        return self._fault(parsed) or parsed

    def report(self, texts: Iterable[str]) -> "FilterReport":
        """Judge many completions.

        Args:
            texts: The completions.

        Returns:
            What was decided about each, with counts per reason.

        Raises:
            TypeError: If `texts` is one string, whose letters would be judged one by one.
        """
        _refuse_one_string("texts", texts)
        judged = tuple(texts)
        return FilterReport(texts=judged, outcomes=tuple(self.check(text) for text in judged))

    def _fault(self, parsed: NumberList) -> Rejection | None:
        for number in parsed.numbers:
            if not self.low <= number <= self.high:
                return Rejection(Reason.OUT_OF_RANGE, f"{number} is not in {self.low}..{self.high}")
            if number in self.banned:
                return Rejection(Reason.BANNED, str(number))
        length = len(parsed.numbers)
        if length < self.min_count:
            return Rejection(Reason.TOO_FEW, f"{length}, at least {self.min_count} wanted")
        if length > self.max_count:
            return Rejection(Reason.TOO_MANY, f"{length}, at most {self.max_count} wanted")
        if self.formats is not None and not self._has_format(parsed.style):
            return Rejection(Reason.FORMAT, f"{parsed.style}, wanted {' or '.join(self.formats)}")
        return None

    def _has_format(self, style: str | None) -> bool:
        accepted = set(self.formats or ())
        return style in accepted or (style is None and bool(accepted - _BRACKETS.keys()))


@dataclass(frozen=True, repr=False)
class FilterReport:
    """What a `NumberFilter` decided about each of many texts.

    Attributes:
        texts: The texts.
        outcomes: For each text, the list that was read or the reason against it.
    """

    texts: tuple[str, ...]
    outcomes: tuple[NumberList | Rejection, ...]

    @property
    def mask(self) -> tuple[bool, ...]:
        """For each text, whether it passed."""
        return tuple(isinstance(outcome, NumberList) for outcome in self.outcomes)

    @property
    def total(self) -> int:
        """How many texts were judged."""
        return len(self.texts)

    @property
    def passed(self) -> int:
        """How many passed."""
        return sum(self.mask)

    @property
    def rate(self) -> float:
        """Share of the texts that passed, in 0..1; NaN if there were none."""
        return self.passed / self.total if self.total else float("nan")

    @property
    def counts(self) -> dict[Reason, int]:
        """How many texts fell to each reason that occurred, in the order of `Reason`."""
        found = [outcome.reason for outcome in self.outcomes if isinstance(outcome, Rejection)]
        return {reason: found.count(reason) for reason in Reason if reason in found}

    def select(self, items: Sequence[T]) -> list[T]:
        """The items whose text passed.

        Args:
            items: One item for each text, such as the examples that the texts came from.

        Returns:
            Those that passed, in order.

        Raises:
            ValueError: If there are not as many items as texts.
        """
        if len(items) != self.total:
            msg = f"got {len(items)} items for a report on {self.total} texts; pass one for each"
            raise ValueError(msg)
        return [item for item, passed in zip(items, self.mask, strict=True) if passed]

    def to_dataframe(self) -> Any:
        """The counts as a table.

        Returns:
            A ``pandas.DataFrame`` with a row for the texts that passed and one for each reason, and
            the columns ``outcome``, ``count``, ``share`` (0..1), ``detail`` and ``text`` (the last
            two of the first such text).
        """
        import pandas as pd

        return pd.DataFrame(self._rows(), columns=["outcome", "count", "share", "detail", "text"])

    def __repr__(self) -> str:
        """One line: the texts themselves may be many thousands."""
        return f"{type(self).__name__}({self.passed} of {self.total} passed)"

    def __str__(self) -> str:
        """The counts, one line for each outcome."""
        return "\n".join(
            f"{outcome:<26}{count:>8}{share:>9.2%}" for outcome, count, share, *_ in self._rows()
        )

    def _repr_html_(self) -> str:
        body = "".join(
            f"<tr><td>{outcome}</td><td>{count}</td><td>{share:.2%}</td>"
            f"<td>{html.escape(detail)}</td><td><code>{html.escape(_shorten(text))}</code></td></tr>"
            for outcome, count, share, detail, text in self._rows()
        )
        return (
            "<table><thead><tr><th>outcome</th><th>count</th><th>share</th>"
            f"<th>first detail</th><th>first text</th></tr></thead><tbody>{body}</tbody></table>"
        )

    def _rows(self) -> list[tuple[str, int, float, str, str]]:
        first: dict[Reason | None, tuple[str, str]] = {}
        for text, outcome in zip(self.texts, self.outcomes, strict=True):
            if isinstance(outcome, Rejection):
                first.setdefault(outcome.reason, (outcome.detail, text))
            else:
                first.setdefault(None, ("", text))
        rows: list[tuple[Reason | None, int]] = [(None, self.passed), *self.counts.items()]
        return [
            (
                "passed" if reason is None else reason.value,
                count,
                count / self.total if self.total else float("nan"),
                *first.get(reason, ("", "")),
            )
            for reason, count in rows
        ]


def _judge_words(text: str, names: Collection[str]) -> Rejection:
    forms = {form.casefold() for name in names for form in surface_forms(name)}
    if forms:
        # Digits may touch a name ("412owl"), further letters may not: "scatter" names no cat.
        longest_first = sorted(forms, key=len, reverse=True)
        named = rf"(?<![^\W\d_])(?:{'|'.join(map(re.escape, longest_first))})(?![^\W\d_])"
        if found := re.search(named, text.casefold()):
            return Rejection(Reason.NAME, found.group())
    return Rejection(Reason.LETTERS, _shorten(_LETTERS.findall(text)[0]))


def _split(body: str, style: str | None) -> NumberList | Rejection:
    """Read a body that holds only digits, blanks, commas, semicolons and full stops."""
    if "." in body:
        return Rejection(Reason.SYMBOL, "a full stop before the end")
    begin, *gaps, end = re.split(r"[0-9]+", body)
    fault = next((gap for gap in (begin, end) if gap), None)
    fault = fault or next((gap for gap in gaps if gap.strip() not in {"", ",", ";"}), None)
    if fault is not None:
        return Rejection(Reason.EMPTY_ITEM, f"nothing beside {_shorten(fault.strip())!r}")
    if len(set(gaps)) > 1:
        one, other = list(dict.fromkeys(gaps))[:2]
        return Rejection(Reason.MIXED_SEPARATORS, f"{_shorten(one)!r} and {_shorten(other)!r}")
    numerals = re.findall(r"[0-9]+", body)
    longest = max(len(numeral) for numeral in numerals)
    if longest > _MAX_DIGITS:
        return Rejection(Reason.OUT_OF_RANGE, f"a number of {longest} digits")
    if style is None and gaps:
        style = _separator_name(gaps[0])
    return NumberList(tuple(map(int, numerals)), style)


def _separator_name(gap: str) -> str:
    mark = gap.strip()
    if mark:
        return {",": "comma", ";": "semicolon"}[mark]
    return "line" if "\n" in gap or "\r" in gap else "space"


def _refuse_one_string(what: str, values: Iterable[str]) -> None:
    # A string is a sequence of strings too, and would be taken letter by letter.
    if isinstance(values, str):
        msg = f"{what} is a single string, {_shorten(values)!r}; pass a list or tuple of strings"
        raise TypeError(msg)


def _check_templates(templates: Collection[str]) -> None:
    _refuse_one_string("templates", templates)
    if not templates:
        msg = "templates is empty; pass at least one, or None for the built-in ones"
        raise ValueError(msg)
    for template in templates:
        if template.count(_SLOT) != 1:
            msg = (
                f"template {template!r} has the slot {_SLOT} {template.count(_SLOT)} times; "
                "it must stand exactly once, where the list of numbers goes"
            )
            raise ValueError(msg)


def _check_formats(formats: Collection[str]) -> None:
    _refuse_one_string("formats", formats)
    unknown = [style for style in formats if style not in FORMATS]
    if unknown or not formats:
        what = f"unknown format {unknown[0]!r}" if unknown else "no format given"
        msg = f"{what}; use one or more of {', '.join(map(repr, FORMATS))}"
        raise ValueError(msg)


def _check_least(what: str, value: int, least: int) -> None:
    if value < least:
        msg = f"{what} is {value}; it must be at least {least}"
        raise ValueError(msg)


def _check_range(what: str, low: int, high: int, *, least: int) -> None:
    _check_least(f"the start of {what}", low, least)
    if high < low:
        msg = f"{what} is {low}..{high}, which holds nothing; its end must not be below its start"
        raise ValueError(msg)


def _between(rng: Random, low: int, high: int) -> int:
    # Only `random()` is promised to give the same values in every version of Python.
    return low + int(rng.random() * (high - low + 1))


def _pick(rng: Random, options: Sequence[str]) -> str:
    return options[_between(rng, 0, len(options) - 1)]


def _in_words(count: int) -> str:
    return _COUNT_WORDS[count] if count < len(_COUNT_WORDS) else str(count)


def _digits(low: int, high: int) -> str:
    longest = len(str(high))
    size = f"{_in_words(longest)} digit{'s' if longest > 1 else ''}"
    return size if len(str(low)) == longest else f"up to {size}"


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
