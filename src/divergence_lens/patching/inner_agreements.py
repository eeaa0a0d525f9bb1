"""Agreement over inner cells, where an approximation is not nearly exact by construction.

At the target position, and in the last layer, integrated attribution is nearly exact: only a norm
and the unembedding follow, and integrated gradients sum to the difference between the ends of
their path (completeness). These cells also hold the largest values, and if all pairs are pooled,
pairs with a large total effect dominate. A correlation over all cells therefore says little about
the others. This module compares the others alone, pair by pair.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from divergence_lens.pairs import target_column
from divergence_lens.patching.agreement import Agreement, agreement_of_cells
from divergence_lens.patching.effects import Effects

_MIN_CELLS = 5  # a correlation over fewer cells of a pair is not meaningful


@dataclass(frozen=True)
class InnerAgreement:
    """Agreement over inner cells (outside the target position and last layer), mean over pairs.

    Attributes:
        pearson: Mean over pairs of the linear correlation within a pair.
        spearman: Mean over pairs of the rank correlation within a pair.
        slope: Mean over pairs of the least-squares slope of exact on approximate values; 1 is
            calibrated, below 1 the approximation exaggerates.
        pairs: The number of pairs with enough inner cells and a total effect not near zero.
        cells: The number of compared cells.
    """

    pearson: float
    spearman: float
    slope: float
    pairs: int
    cells: int


def inner_cells(effects: Effects) -> Bool[np.ndarray, "pairs layers pos *heads"]:
    """Mask of cells outside the target position and the last layer."""
    inner = np.zeros(effects.values.shape, dtype=bool)
    for i, row in enumerate(effects.segments):
        inner[i, :-1, : len(row)] = True
        inner[i, :, target_column(row)] = False
    return inner


def inner_agreement(approximate: Effects, exact: Effects) -> InnerAgreement:
    """Agreement over inner cells, computed pair by pair and averaged over pairs.

    Correlations and slopes within a pair do not depend on the size of its total effect, so every
    pair counts once. Pairs whose total effect is near zero (`Effects.near_zero`) are excluded, and
    so are pairs with fewer than five inner cells that are not zero on both sides.

    Raises:
        ValueError: If the two are not of the same pairs, site, direction and metric.
    """
    approximate.agreement(exact)  # raises if the two cannot be compared
    inner = inner_cells(exact) & np.isfinite(exact.values) & np.isfinite(approximate.values)
    inner &= (exact.values != 0) | (approximate.values != 0)
    inner[exact.near_zero()] = False
    agreements: list[Agreement] = []
    for i in range(len(exact.values)):
        a, b = approximate.values[i][inner[i]], exact.values[i][inner[i]]
        if len(a) >= _MIN_CELLS:
            agreements.append(agreement_of_cells(a, b))
    return InnerAgreement(
        pearson=_mean([one.pearson for one in agreements]),
        spearman=_mean([one.spearman for one in agreements]),
        slope=_mean([one.slope for one in agreements]),
        pairs=len(agreements),
        cells=sum(one.cells for one in agreements),
    )


def agreement_row(approximate: Effects, exact: Effects) -> dict[str, Any]:
    """One row of the `agreement` table of results.json.

    Returns:
        `pearson`, `spearman`, `sign` and `slope` over all cells of all pairs, in units of the
        metric; `inner_pearson`, `inner_spearman`, `inner_slope`, see `inner_agreement`, with
        `inner_pairs` and `inner_cells`. Undefined values are None.
    """
    pooled, inner = approximate.agreement(exact), inner_agreement(approximate, exact)
    row = {name: getattr(pooled, name) for name in ("pearson", "spearman", "sign", "slope")}
    row |= {f"inner_{name}": value for name, value in vars(inner).items()}
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def _mean(values: list[float]) -> float:
    defined = [value for value in values if math.isfinite(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan
