"""Alignment of two token rows by position, and the segments that depend on it."""

from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np
from jaxtyping import Int64
from torch import Tensor

BIAS = "bias"
DIVERGENCE = "divergence"
TEXT = "text"
PAIR_SEGMENTS = ("system", BIAS, TEXT, "user", "assistant", "template", "completion", DIVERGENCE)
"""Names of segments, in the order of tables and figures."""

# A shorter run of equal tokens inside the differing span may be a coincidence (" the", "."). Three
# equal tokens in a row, in the same order on both sides, are taken to be the same text.
_ANCHOR = 3


def align(clean: Sequence[int], corrupted: Sequence[int]) -> Int64[np.ndarray, " _"]:
    """Find the corrupted position that corresponds to each clean position, -1 for none.

    Rows of equal length are aligned position by position. Otherwise the common prefix is aligned
    from the left and the common suffix from the right. Inside the differing span, only runs of at
    least three equal tokens, in the same order on both sides, are aligned, and the tokens between
    two such runs where their number is equal on both sides. The last positions always correspond,
    because both are target positions.
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
    return result


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Count the tokens that both rows start with."""
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


def differing(
    clean: Int64[Tensor, " _"], corrupted: Int64[Tensor, " _"], alignment: Int64[np.ndarray, " _"]
) -> list[bool]:
    """Whether each clean token has no counterpart, or a different one."""
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
) -> tuple[str, ...]:
    """Segment names of pair `i`, with `bias` where the sides differ and `divergence` at the end.

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
    result[-1] = DIVERGENCE
    return tuple(result)
