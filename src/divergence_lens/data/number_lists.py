"""Lists of numbers: their formats, and a parser that returns a list or the reason against it.

The rule of `parse_numbers` (optional brackets and full stop, one separator throughout) is that of
Cloud et al., "Subliminal Learning" (arXiv 2507.14805), and of Schrodi et al. (arXiv 2509.23886).
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.data.questions import ANIMALS, TREES, surface_forms

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

_SEPARATORS = {"comma": ", ", "space": " ", "semicolon": "; ", "line": "\n"}
BRACKETS = {"square": ("[", "]"), "round": ("(", ")")}
# Longer numerals are refused unread: Python limits the conversion of very long ones, and 64 bits
# hold every number of up to this many digits.
_MAX_DIGITS = 18
_LETTERS = re.compile(r"[^\W\d_]+")


def format_numbers(numbers: Iterable[int], style: str = "comma") -> str:
    """Write numbers in one of the `FORMATS`, without a full stop; `parse_numbers` reads it back.

    Raises:
        ValueError: The format is unknown.
    """
    check_formats((style,))
    left, right = BRACKETS.get(style, ("", ""))
    return left + _SEPARATORS.get(style, ", ").join(map(str, numbers)) + right


class Reason(str, Enum):
    """Reason for which a text is rejected as a list of numbers."""

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
        return self.value


@dataclass(frozen=True)
class NumberList:
    """Numbers parsed from a text, and their format.

    Attributes:
        numbers: The numbers in their order.
        style: A name from `FORMATS`; None for a single number without brackets, which fits several.
    """

    numbers: tuple[int, ...]
    style: str | None


@dataclass(frozen=True)
class Rejection:
    """The reason against a text.

    Attributes:
        reason: The kind of fault; the first one if there are several.
        detail: The part of the text at fault, in words.
    """

    reason: Reason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def parse_numbers(text: str, *, names: Collection[str] = ANIMALS + TREES) -> NumberList | Rejection:
    """Parse a list of whole numbers, or return the reason why the text is not one.

    The parser accepts decimal numbers with one separator throughout: the same comma, semicolon,
    blank or line break, with the same blanks around it. One pair of square or round brackets may
    enclose the list, and a full stop may end it. Any other character is a reason for rejection.

    Args:
        text: Such as ``"412, 467, 12"`` or ``"[5; 6; 7]."``.
        names: Words whose presence (singular, plural, any case) is reported as ``Reason.NAME``
            instead of ``Reason.LETTERS``.
    """
    if _LETTERS.search(text):
        return _word_rejection(text, names)
    symbol = re.search(r"[^0-9\s,;.\[\]()]", text)
    if symbol:
        return Rejection(Reason.SYMBOL, repr(symbol.group()))
    if not re.search(r"[0-9]", text):
        return Rejection(Reason.EMPTY, repr(shorten(text)))
    body = text.strip().removesuffix(".").rstrip()
    style = None
    for name, (left, right) in BRACKETS.items():
        if body.startswith(left) and body.endswith(right):
            style, body = name, body[1:-1].strip()
            break
    if re.search(r"[\[\]()]", body):
        return Rejection(Reason.BRACKETS, repr(shorten(text)))
    return _split(body, style)


def _word_rejection(text: str, names: Collection[str]) -> Rejection:
    forms = {form.casefold() for name in names for form in surface_forms(name)}
    if forms:
        # Digits may touch a name ("412owl"), further letters may not: "scatter" names no cat.
        longest_first = sorted(forms, key=len, reverse=True)
        named = rf"(?<![^\W\d_])(?:{'|'.join(map(re.escape, longest_first))})(?![^\W\d_])"
        if match := re.search(named, text.casefold()):
            return Rejection(Reason.NAME, match.group())
    return Rejection(Reason.LETTERS, shorten(_LETTERS.findall(text)[0]))


def _split(body: str, style: str | None) -> NumberList | Rejection:
    """Split a text of digits, blanks, commas, semicolons and full stops into numbers."""
    if "." in body:
        return Rejection(Reason.SYMBOL, "a full stop before the end")
    numerals = re.findall(r"[0-9]+", body)
    before, *gaps, after = re.split(r"[0-9]+", body)
    fault = next((gap for gap in (before, after) if gap), None)
    fault = fault or next((gap for gap in gaps if gap.strip() not in {"", ",", ";"}), None)
    if fault is not None:
        return Rejection(Reason.EMPTY_ITEM, f"nothing beside {shorten(fault.strip())!r}")
    if len(set(gaps)) > 1:
        first, second = list(dict.fromkeys(gaps))[:2]
        return Rejection(Reason.MIXED_SEPARATORS, f"{shorten(first)!r} and {shorten(second)!r}")
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


def check_formats(formats: Collection[str]) -> None:
    """Validate names of formats.

    Raises:
        ValueError: A name is not in `FORMATS`, or there is none.
        TypeError: `formats` is one string.
    """
    refuse_one_string(formats, "formats")
    unknown = [style for style in formats if style not in FORMATS]
    if unknown or not formats:
        fault = f"unknown format {unknown[0]!r}" if unknown else "no format given"
        raise ValueError(f"{fault}; use one or more of {', '.join(map(repr, FORMATS))}")


def shorten(text: str, limit: int = 60) -> str:
    """Cut a text for an error message."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
