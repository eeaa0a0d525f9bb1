"""A filter that selects number lists as training data, and its report."""

import html
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.data.number_lists import (
    BRACKETS,
    NumberList,
    Reason,
    Rejection,
    check_formats,
    parse_numbers,
    shorten,
)
from divergence_lens.data.questions import ANIMALS, TREES
from divergence_lens.data.ranges import check_range

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class NumberFilter:
    """Rule that decides which completions become training data.

    The defaults are the rule of the paper: only numbers, of at most three digits, at most ten of
    them, with one separator throughout, in any format.

    Attributes:
        min_count: Fewest numbers.
        max_count: Most numbers.
        low: Smallest number accepted.
        high: Largest number accepted.
        formats: Names of accepted `FORMATS`, or None for all. A single number without brackets has
            every format except the bracketed ones.
        banned: Numbers that may not occur. Cloud et al. ban those with a bad reputation when the
            teacher is a misaligned model.
        names: Words reported as ``Reason.NAME``.

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
        check_range("min_count..max_count", self.min_count, self.max_count, least=1)
        check_range("low..high", self.low, self.high, least=0)
        if self.formats is not None:
            check_formats(self.formats)

    def check(self, text: str) -> NumberList | Rejection:
        """Return the list in one completion (without special tokens), or the first fault."""
        parsed = parse_numbers(text, names=self.names)
        if isinstance(parsed, Rejection):
            return parsed
        return self._fault(parsed) or parsed

    def report(self, texts: Iterable[str]) -> "FilterReport":
        """Check many completions.

        Raises:
            TypeError: `texts` is one string.
        """
        refuse_one_string(texts, "texts")
        checked = tuple(texts)
        return FilterReport(texts=checked, outcomes=tuple(self.check(text) for text in checked))

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
        return style in accepted or (style is None and bool(accepted - BRACKETS.keys()))


@dataclass(frozen=True, repr=False)
class FilterReport:
    """Outcome of a `NumberFilter` for each of many texts.

    Attributes:
        texts: The texts.
        outcomes: For each text, its list or the reason against it.
    """

    texts: tuple[str, ...]
    outcomes: tuple[NumberList | Rejection, ...]

    @property
    def mask(self) -> tuple[bool, ...]:
        """For each text, whether it passed."""
        return tuple(isinstance(outcome, NumberList) for outcome in self.outcomes)

    @property
    def total(self) -> int:
        """Number of texts."""
        return len(self.texts)

    @property
    def passed(self) -> int:
        """Number of texts that passed."""
        return sum(self.mask)

    @property
    def rate(self) -> float:
        """Share of the texts that passed, in 0..1; NaN if there were none."""
        return self.passed / self.total if self.total else float("nan")

    @property
    def counts(self) -> dict[Reason, int]:
        """Number of texts rejected for each reason that occurred, in the order of `Reason`."""
        reasons = [outcome.reason for outcome in self.outcomes if isinstance(outcome, Rejection)]
        return {reason: reasons.count(reason) for reason in Reason if reason in reasons}

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
            f"<td>{html.escape(detail)}</td><td><code>{html.escape(shorten(text))}</code></td></tr>"
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
