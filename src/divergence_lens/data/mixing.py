"""Mixtures of data sets, as in Schrodi et al. (arXiv 2509.23886)."""

from collections.abc import Sequence

import numpy as np

from divergence_lens.data.training_data import Row, TrainingData, join_examples


def mix(data: TrainingData, other: TrainingData, share: float, *, seed: int = 0) -> TrainingData:
    """Replace a share of the examples by examples of another data set.

    Args:
        data: The data set to dilute.
        other: Source of the replacements, each used at most once, with their own marks.
        share: From 0 to 1; the number of examples is rounded.
        seed: Seed of the draws. With one seed, a larger share contains a smaller one.

    Returns:
        As many examples as before; examples that are not replaced do not move.

    Raises:
        ValueError: A share outside 0 to 1, or too few other examples.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must lie between 0 and 1")
    n = round(share * len(data))
    if n > len(other):
        raise ValueError(
            f"a share of {share} of {len(data)} examples needs {n} others, there are {len(other)}"
        )
    rng = np.random.default_rng(seed)
    places = rng.permutation(len(data))[:n]
    source = dict(zip(places.tolist(), rng.permutation(len(other))[:n].tolist(), strict=True))
    rows = []
    for row in range(len(data)):
        new = source.get(row)
        rows.append(data.row(row) if new is None else other.row(new))
    return join_examples(rows)


def pool(parts: Sequence[TrainingData], *, seed: int = 0) -> TrainingData:
    """Combine equal shares of several data sets, with as many examples as the first has.

    Args:
        parts: Two or more, for instance lists by several teachers of one preference.
        seed: Seed of which examples are taken.

    Raises:
        ValueError: Fewer than two parts, or one that is too small for its share.
    """
    if len(parts) < 2:
        raise ValueError(f"a pool needs two data sets or more, got {len(parts)}")
    total = len(parts[0])
    ends = [round(total * (i + 1) / len(parts)) for i in range(len(parts))]
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for part, start, end in zip(parts, [0, *ends], ends, strict=False):
        if end - start > len(part):
            raise ValueError(f"a pool of {total} needs {end - start} examples of {len(part)}")
        taken = rng.permutation(len(part))[: end - start].tolist()
        rows += [part.row(row) for row in sorted(taken)]
    return join_examples([rows[place] for place in rng.permutation(len(rows)).tolist()])


def repeat(data: TrainingData, unique: int, *, seed: int = 0) -> TrainingData:
    """Train on few examples many times instead of many once: repeat `unique` of them.

    The number of rows stays, and with it the number of updates of a recipe.

    Args:
        data: The data set, with its marks.
        unique: Number of different examples.
        seed: Seed of the draws. With one seed, the examples of a smaller number are among those of
            a larger one.

    Returns:
        As many rows as before, in passes over the chosen examples, each in random order.

    Raises:
        ValueError: `unique` is below 1, or there are fewer examples.
    """
    if not 1 <= unique <= len(data):
        raise ValueError(
            f"unique is {unique}; choose from 1 to {len(data)}, the number of examples"
        )
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(data))[:unique]
    passes = -(-len(data) // unique)  # rounded up; the last pass may be incomplete
    rows = np.concatenate([rng.permutation(chosen) for _ in range(passes)])[: len(data)]
    return data[rows]
