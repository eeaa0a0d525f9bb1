"""Missing cells of a grid, counted and explained for tables and figures."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

NOT_REQUESTED = "not requested"
NO_TOTAL = "of pairs with a total effect near zero"
NOT_MEASURED = "not measured"


def missing_cells(
    values: Float[np.ndarray, "pairs layers col *heads"],
    widths: Sequence[int],
    total: Float[np.ndarray, " pairs"],
    *,
    all_requested: bool,
) -> dict[str, int]:
    """Count the missing cells by reason; reasons without a cell are left out.

    Args:
        values: The grid; NaN where a cell is missing.
        widths: For each pair its number of columns; entries to the right are padding, not cells.
        total: For each pair the total effect; NaN if it is too small to divide by.
        all_requested: Whether every cell was to be computed.
    """
    counts = dict.fromkeys((NOT_REQUESTED, NO_TOTAL, NOT_MEASURED), 0)
    for own, width, whole in zip(values, widths, total, strict=True):
        missing = int(np.isnan(own[:, :width]).sum())
        if np.isnan(whole):
            counts[NO_TOTAL] += missing
        else:
            counts[NOT_MEASURED if all_requested else NOT_REQUESTED] += missing
    return {reason: count for reason, count in counts.items() if count}


def missing_note(missing: Mapping[str, int], cells: int) -> str:
    """State the missing cells among all, such as "12 of 840 cells missing: not requested"."""
    if not missing:
        return ""
    count = sum(missing.values())
    reasons = (
        list(missing)
        if len(missing) == 1
        else [f"{number:,} {reason}" for reason, number in missing.items()]
    )
    return f"{count:,} of {cells:,} cells missing: {', '.join(reasons)}"
