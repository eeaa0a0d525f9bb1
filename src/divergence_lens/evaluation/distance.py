"""Distance between two sets of answers, with a permutation test paired by question."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

# Permutations evaluated at a time, to bound the memory of [permutations, candidates].
_BLOCK = 4096


@dataclass(frozen=True)
class Distance:
    """Total-variation distance between the answers of two preferences.

    Attributes:
        value: From 0 (the same answers) to 1 (none in common).
        p_value: Fraction of permutations with at least this distance, the observed one included.
        null: Mean distance of the permutations. Distances are never negative, so equal models have
            this distance on average, not 0.
        questions: Number of questions compared. With n questions, `p_value` is at least 2^(1 - n).
    """

    value: float
    p_value: float
    null: float
    questions: int


def permuted_distance(
    first: Float64[np.ndarray, "questions answers"],
    second: Float64[np.ndarray, "questions answers"],
    *,
    permutations: int,
    seed: int,
) -> Distance:
    """Compare the mean distributions of two models over the same questions.

    The distance is 1/2 sum_a |mean_q d_qa| with d = first - second. Exchanging the two models at
    question q flips the sign of d_q, and changes nothing about the distribution of d if they answer
    alike. So the test compares with random signs, or with all 2^n signs where those are fewer.

    Raises:
        ValueError: `permutations` is below 1.
    """
    if permutations < 1:
        raise ValueError(f"permutations is {permutations}; it must be 1 or more")
    known = np.isfinite(first).all(1) & np.isfinite(second).all(1)
    difference = (first - second)[known]  # [questions, answers]
    n = len(difference)
    if not n:
        return Distance(np.nan, np.nan, np.nan, 0)
    value = 0.5 * float(np.abs(difference.mean(0)).sum())
    exhaustive = n < 63 and 2**n <= permutations + 1
    count = 2**n if exhaustive else permutations
    random = np.random.default_rng(seed)
    at_least, total = 0, 0.0
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        if exhaustive:
            # Question q is exchanged where bit q of the permutation's number is set.
            bits = (np.arange(start, start + size)[:, None] >> np.arange(n)) & 1
        else:
            bits = random.integers(0, 2, size=(size, n))
        signs = 1.0 - 2.0 * bits  # [permutations, questions]
        distances = 0.5 * np.abs(signs @ difference / n).sum(1)  # [permutations]
        # Rounding must not separate a permutation from the observed order that it repeats.
        at_least += int((distances >= value - 1e-12).sum())
        total += float(distances.sum())
    p_value = at_least / count if exhaustive else (1 + at_least) / (1 + count)
    return Distance(value, p_value, total / count, n)
