"""Agreement of approximate effects with exact ones, cell by cell."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from divergence_lens._utils.statistics import correlation, rank_correlation


@dataclass(frozen=True, repr=False)
class Agreement:
    """Agreement of approximate effects with exact ones.

    Computed over the cells present in both, except those that are exactly zero in both: positions
    before the first difference are zero by construction and would flatter every method.

    Attributes:
        pearson: Linear correlation; NaN where one side is constant.
        spearman: Rank correlation.
        sign: Share of cells with the same sign, weighted by the exact value's magnitude, so
            that noise around zero does not count.
        recall: Share of the `k` cells with the largest exact magnitude that are among the `k` with
            the largest approximate magnitude.
        slope: Least-squares slope of the exact values on the approximate ones; 1 is calibrated,
            below 1 the approximation exaggerates.
        k: The number of strongest cells that `recall` compares.
        cells: The number of compared cells.
    """

    pearson: float
    spearman: float
    sign: float
    recall: float
    slope: float
    k: int
    cells: int

    def __repr__(self) -> str:
        return f"Agreement({', '.join(f'{k}={v:.4g}' for k, v in vars(self).items())})"

    def _repr_html_(self) -> str:
        return (
            f"<p>agreement over {self.cells} cells: Pearson {self.pearson:.3f}, "
            f"Spearman {self.spearman:.3f}, sign {self.sign:.1%}, "
            f"recall of the top {self.k} {self.recall:.1%}, slope {self.slope:.3f}</p>"
        )


def agreement_of_cells(
    approximate: Sequence[float] | Float[np.ndarray, " cells"],
    exact: Sequence[float] | Float[np.ndarray, " cells"],
    k: int = 20,
) -> Agreement:
    """Compare two lists of values of the same cells, see `Agreement`.

    Raises:
        ValueError: Fewer than two cells are present in both.
    """
    approximate, exact = np.asarray(approximate), np.asarray(exact)
    both = np.isfinite(approximate) & np.isfinite(exact)
    both &= (approximate != 0) | (exact != 0)
    a, b = approximate[both].astype(np.float64), exact[both].astype(np.float64)
    if len(a) < 2:
        raise ValueError(f"only {len(a)} cells can be compared; an agreement needs at least 2")
    k = max(1, min(k, len(a)))
    strongest = [set(np.argsort(-np.abs(x), kind="stable")[:k].tolist()) for x in (a, b)]
    weight = np.abs(b).sum()
    spread = ((a - a.mean()) ** 2).sum()
    return Agreement(
        pearson=correlation(a, b),
        spearman=rank_correlation(a, b),
        sign=float(np.abs(b)[np.sign(a) == np.sign(b)].sum() / weight) if weight else float("nan"),
        recall=len(strongest[0] & strongest[1]) / k,
        slope=float(((a - a.mean()) * (b - b.mean())).sum() / spread) if spread else float("nan"),
        k=k,
        cells=len(a),
    )


def agreement_to_json(agreement: Agreement) -> dict[str, Any]:
    """Convert an agreement to JSON, with null for NaN (as for correlations of constants)."""
    return {k: v if np.isfinite(v) else None for k, v in vars(agreement).items()}


def agreement_from_json(entries: dict[str, Any]) -> Agreement:
    """Convert the result of `agreement_to_json` back."""
    values: dict[str, Any] = {k: float("nan") if v is None else v for k, v in entries.items()}
    return Agreement(**values)
