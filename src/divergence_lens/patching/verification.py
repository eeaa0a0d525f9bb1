"""Comparison of approximate effects with a sample of exactly computed cells."""

from typing import Any

import numpy as np

from divergence_lens.models import Model
from divergence_lens.patching.agreement import Agreement, agreement_of_cells
from divergence_lens.patching.effects import Effects
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.patching.request import PatchingRequest


def sampled_agreement(
    model: Model,
    request: PatchingRequest,
    effects: Effects,
    *,
    k: int,
    seed: int,
    batch_rows: int,
    accelerator: Any,
) -> Agreement | None:
    """Agreement with exact values of the `k` strongest cells and of `k` others.

    The others are drawn from all cells at or after the first position with an effect, including
    cells that the approximation sets to zero. Cells that are zero on both sides are not counted.
    None if fewer than two cells can be compared, as when the runs do not differ.
    """
    values = effects.values
    flat = values.ravel()
    if np.count_nonzero(np.nan_to_num(flat)) < 2:
        return None
    # Before the first difference every cell is zero on both sides, and would flatter the method.
    reached = np.maximum.accumulate(np.nan_to_num(values) != 0, axis=2).any(1, keepdims=True)
    present = np.flatnonzero((np.isfinite(values) & reached).ravel())
    order = present[np.argsort(-np.abs(flat[present]), kind="stable")]
    strongest, others = order[:k], order[k:]
    drawn = np.random.default_rng(seed).permutation(others)[:k]
    cells = np.zeros(flat.shape, dtype=bool)
    cells[strongest] = cells[drawn] = True
    exact = causal_mediation(
        model,
        request.pairs,
        site=effects.site,
        direction=request.direction,
        metric=request.metric,
        corruption=request.corruption,
        span=request.span,
        cells=cells.reshape(effects.values.shape),
        batch_rows=batch_rows,
        accelerator=accelerator,
    )
    return agreement_of_cells(flat[cells], exact.values.ravel()[cells], k)
