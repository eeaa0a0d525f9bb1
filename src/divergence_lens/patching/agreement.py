"""How far an approximation agrees with exact effects, apart from where it must.

At the target position, and in the last layer, integrated attribution is nearly exact by
construction: what is left of the model there is a norm and the unembedding, and integrated
gradients add up to the difference between the ends of their path (completeness). These cells also
hold the largest values, and pairs with a large total effect outweigh the others where all are
pooled. One correlation over all cells therefore says little about the rest. Here the rest is
compared by itself, pair by pair.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from divergence_lens.patching.effects import Agreement, Effects, agreement_of_cells

_FEWEST = 5  # cells of a pair below which a correlation says nothing


@dataclass(frozen=True)
class InnerAgreement:
    """Agreement over cells outside the target position and the last layer, mean over pairs.

    Attributes:
        pearson: Mean over pairs of the linear correlation within a pair.
        spearman: Mean over pairs of the rank correlation within a pair.
        slope: Mean over pairs of the least-squares slope of exact on approximate values; 1 is
            calibrated, below 1 the approximation exaggerates.
        pairs: How many pairs have enough such cells and a total effect that is not next to nothing.
        cells: How many cells of them were compared.
    """

    pearson: float
    spearman: float
    slope: float
    pairs: int
    cells: int


def inner_cells(effects: Effects) -> Bool[np.ndarray, "pairs layers pos *heads"]:
    """Which cells lie outside the target position (the last of each row) and the last layer."""
    inner = np.zeros(effects.values.shape, dtype=bool)
    for i, row in enumerate(effects.labels):
        inner[i, :-1, : len(row) - 1] = True
    return inner


def inner_agreement(approximate: Effects, exact: Effects) -> InnerAgreement:
    """The agreement over inner cells, pair by pair, and its mean over pairs.

    Correlations and slopes within a pair do not depend on the size of its total effect, so every
    pair has one vote. Pairs whose total effect is next to nothing (`Effects.near_zero`) have none,
    nor have those with fewer than five inner cells that are not zero on both sides.

    Raises:
        ValueError: If the two are not of the same pairs, site, direction and metric.
    """
    approximate.agreement(exact)  # refuses effects that cannot be compared
    inner = inner_cells(exact) & np.isfinite(exact.values) & np.isfinite(approximate.values)
    inner &= (exact.values != 0) | (approximate.values != 0)
    inner[exact.near_zero()] = False
    found: list[Agreement] = []
    for i in range(len(exact.values)):
        a, b = approximate.values[i][inner[i]], exact.values[i][inner[i]]
        if len(a) >= _FEWEST:
            found.append(agreement_of_cells(a, b))
    return InnerAgreement(
        pearson=_mean([one.pearson for one in found]),
        spearman=_mean([one.spearman for one in found]),
        slope=_mean([one.slope for one in found]),
        pairs=len(found),
        cells=sum(one.cells for one in found),
    )


def agreement_row(approximate: Effects, exact: Effects) -> dict[str, Any]:
    """What the `agreement` table of results.json holds of one target and method.

    Returns:
        `pearson`, `spearman`, `sign` and `slope` over all cells of all pairs, in units of the
        metric; `inner_pearson`, `inner_spearman`, `inner_slope`, see `inner_agreement`, with
        `inner_pairs` and `inner_cells`. What is not known is None.
    """
    pooled, inner = approximate.agreement(exact), inner_agreement(approximate, exact)
    row = {name: getattr(pooled, name) for name in ("pearson", "spearman", "sign", "slope")}
    row |= {f"inner_{name}": value for name, value in vars(inner).items()}
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def _mean(values: list[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan
