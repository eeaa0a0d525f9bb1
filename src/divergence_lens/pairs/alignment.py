"""Alignment of two token rows, and the segments that depend on it.

An alignment gives each clean position its corrupted position, or -1 inside a unit: a differing span
whose two sides have different numbers of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from divergence_lens.pairs.inputs import check_count

BIAS = "bias"
DIVERGENCE = "divergence"
TEXT = "text"
PAIR_SEGMENTS = ("system", BIAS, TEXT, "user", "assistant", "template", "completion", DIVERGENCE)
"""Names of segments, in the order of tables and figures."""

# A shorter run of equal tokens inside the differing span may be a coincidence (" the", "."). Three
# equal tokens in a row, in the same order on both sides, are taken to be the same text.
_ANCHOR = 3


@dataclass(frozen=True)
class Column:
    """A span of the clean row and the span of the corrupted row that corresponds to it.

    The columns of a pair divide both rows, from left to right, and no span is empty. Most columns
    are one position on each side. A *unit* is a column of any other size: tokens that differ in
    number ("Tom" as two tokens, "Lily" as one), and are therefore patched together.

    Attributes:
        clean: Positions in the clean row.
        corrupted: Positions in the corrupted row.
    """

    clean: range
    corrupted: range

    @property
    def is_unit(self) -> bool:
        """Whether it is more than one position on one side."""
        return len(self.clean) > 1 or len(self.corrupted) > 1


def align(clean: Sequence[int], corrupted: Sequence[int]) -> Int64[np.ndarray, " _"]:
    """Find the corrupted position that corresponds to each clean position, -1 inside a unit.

    Rows of equal length are aligned position by position. Otherwise the common prefix is aligned
    from the left and the common suffix from the right. Inside the differing span, only runs of at
    least three equal tokens, in the same order on both sides, are aligned, and the tokens between
    two such runs where their number is equal on both sides. All other tokens are in units, see
    `close_gaps`.
    """
    n, m = len(clean), len(corrupted)
    if n == m:
        return np.arange(n, dtype=np.int64)
    result = np.full(n, -1, dtype=np.int64)
    result[-1] = m - 1
    left, right = list(clean[:-1]), list(corrupted[:-1])
    start = common_prefix(left, right)
    end = common_prefix(left[start:][::-1], right[start:][::-1])
    result[:start] = np.arange(start)
    for offset in range(1, end + 1):
        result[n - 1 - offset] = m - 1 - offset
    inner = left[start : len(left) - end], right[start : len(right) - end]
    blocks = [
        (a, b, size)
        for a, b, size in SequenceMatcher(None, *inner, autojunk=False).get_matching_blocks()
        if size >= _ANCHOR
    ]
    a_end = b_end = 0
    for a, b, size in [*blocks, (len(inner[0]), len(inner[1]), 0)]:
        # Tokens between two runs are aligned one to one if both sides have the same number.
        between = a - a_end if a - a_end == b - b_end else 0
        span = np.arange(-between, size)
        result[start + a + span] = start + b + span
        a_end, b_end = a + size, b + size
    return close_gaps(result, m)


def close_gaps(
    alignment: Int64[np.ndarray, " _"], corrupted_length: int
) -> Int64[np.ndarray, " _"]:
    """Extend gaps that are empty on one side, so that every gap is a unit with text on both sides.

    A gap lies between two aligned positions (or the ends of the rows) that are not neighbors on
    both sides. Where one side has no token in it (an insertion or a deletion), the gap takes in the
    aligned token on its left: up to there both runs often agree, so that it adds no effect of its
    own. At the start of the rows it takes in the token on its right. A gap of one token on each
    side is an ordinary position.
    """
    result = alignment.copy()
    while True:
        # Aligned positions, between two sentinels outside the rows.
        here = np.flatnonzero(result >= 0)
        clean = np.concatenate([[-1], here, [len(result)]])
        corrupted = np.concatenate([[-1], result[here], [corrupted_length]])
        sizes = np.stack([np.diff(clean), np.diff(corrupted)]) - 1  # tokens in each gap, by side
        one_sided = np.flatnonzero((sizes.min(0) == 0) & (sizes.max(0) > 0))
        if not len(one_sided):
            single = np.flatnonzero((sizes == 1).all(0))
            result[clean[single] + 1] = corrupted[single] + 1
            return result
        gap = one_sided[0]
        result[clean[gap] if gap else clean[1]] = -1


def columns_of(alignment: Int64[np.ndarray, " _"], corrupted_length: int) -> tuple[Column, ...]:
    """The columns of a pair, from left to right, of an alignment without one-sided gaps."""
    columns: list[Column] = []
    clean_end = corrupted_end = 0
    for position in [*np.flatnonzero(alignment >= 0).tolist(), len(alignment)]:
        counterpart = int(alignment[position]) if position < len(alignment) else corrupted_length
        if position > clean_end:
            columns.append(Column(range(clean_end, position), range(corrupted_end, counterpart)))
        if position < len(alignment):
            columns.append(
                Column(range(position, position + 1), range(counterpart, counterpart + 1))
            )
        clean_end, corrupted_end = position + 1, counterpart + 1
    return tuple(columns)


def given_alignment(
    i: int, given: Sequence[int] | Int64[np.ndarray, " _"], clean_length: int, corrupted_length: int
) -> Int64[np.ndarray, " _"]:
    """Check the alignment of pair `i` that a user supplies, and close its gaps.

    Raises:
        ValueError: It is not one whole number per clean position, a counterpart lies outside the
            corrupted row, or counterparts do not increase from left to right.
    """
    alignment = np.asarray(given)
    if alignment.ndim != 1 or not np.issubdtype(alignment.dtype, np.integer):
        raise ValueError(
            f"the alignment of pair {i} must be one whole number per clean position, got "
            f"{alignment.dtype} of shape {list(alignment.shape)}"
        )
    if len(alignment) != clean_length:
        raise ValueError(
            f"the alignment of pair {i} has {len(alignment)} entries, but its clean row has "
            f"{clean_length} tokens"
        )
    for position, counterpart in enumerate(alignment.tolist()):
        if not -1 <= counterpart < corrupted_length:
            raise ValueError(
                f"the alignment of pair {i} gives clean position {position} the counterpart "
                f"{counterpart}; it is one of the {corrupted_length} positions of the corrupted "
                "row, or -1 for a token in a differing span"
            )
    here = np.flatnonzero(alignment >= 0)
    falling = np.flatnonzero(np.diff(alignment[here]) <= 0)
    if len(falling):
        first, second = here[falling[0]], here[falling[0] + 1]
        raise ValueError(
            f"the alignment of pair {i} gives clean positions {first} and {second} the "
            f"counterparts {alignment[first]} and {alignment[second]}; counterparts must increase "
            "from left to right"
        )
    return close_gaps(alignment.astype(np.int64), corrupted_length)


def alignments(
    clean: Sequence[Int64[Tensor, " _"]],
    corrupted: Sequence[Int64[Tensor, " _"]],
    given: Sequence[Sequence[int] | None] | None,
) -> tuple[Int64[np.ndarray, " _"], ...]:
    """The given alignment of each pair, checked, or the library's own."""
    given = [None] * len(clean) if given is None else given
    check_count("alignment", len(given), len(clean))
    return tuple(
        align(a.tolist(), b.tolist()) if own is None else given_alignment(i, own, len(a), len(b))
        for i, (a, b, own) in enumerate(zip(clean, corrupted, given, strict=True))
    )


def target_column(segments: Sequence[str]) -> int:
    """The column of the target position: the last, unless a model reads tokens after it."""
    return segments.index(DIVERGENCE) if DIVERGENCE in segments else len(segments) - 1


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Count the tokens that both rows start with."""
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


def differing(
    clean: Int64[Tensor, " _"], corrupted: Int64[Tensor, " _"], alignment: Int64[np.ndarray, " _"]
) -> list[bool]:
    """Whether each clean token is in a unit, or has another token as its counterpart."""
    return [
        bool(counterpart < 0 or clean[position] != corrupted[int(counterpart)])
        for position, counterpart in enumerate(alignment)
    ]


def pair_segments(
    i: int,
    names: Sequence[str],
    clean: Int64[Tensor, " _"],
    corrupted: Int64[Tensor, " _"],
    alignment: Int64[np.ndarray, " _"],
    *,
    target: int = -1,
) -> tuple[str, ...]:
    """Segment names of pair `i`: `bias` where the sides differ, `divergence` at the target.

    Raises:
        ValueError: There are fewer names than positions.
    """
    if len(names) < len(clean):
        raise ValueError(
            f"segments of pair {i} name {len(names)} positions, but its row has {len(clean)}"
        )
    result = list(names[: len(clean)])
    for position, differs in enumerate(differing(clean, corrupted, alignment)):
        if differs and result[position] in ("system", TEXT):
            result[position] = BIAS
    result[target] = DIVERGENCE
    return tuple(result)
