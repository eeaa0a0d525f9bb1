"""The end of a color scale, which a few outliers do not move."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from divergence_lens._utils.wording import plural


def color_limit(
    panels: Sequence[Float[np.ndarray, "layers items"]], *, floor: float = 0.0
) -> tuple[float, int]:
    """The end of a symmetric color scale, and the number of cells beyond it.

    The scale ends at the largest absolute value, unless that is more than twice the 99th percentile
    of the values other than zero (and more than twice `floor`). The scale then ends at the
    percentile, but not below a fifth of the largest value (or below `floor`, if there is one).
    Without a floor, fewer than 100 values are too few to call one of them an outlier.
    """
    values = np.concatenate([np.abs(panel[np.isfinite(panel)]) for panel in panels])
    values = values[values > 0]
    if not len(values):
        return 1.0, 0
    largest = float(values.max())
    usual = max(float(np.quantile(values, 0.99, method="lower")), floor)
    if largest <= 2 * usual or (not floor and len(values) < 100):
        return largest, 0
    limit = usual if floor else max(usual, largest / 5)
    return limit, int((values > limit).sum())


def color_bar(
    panels: Sequence[Float[np.ndarray, "layers items"]],
    unit: str,
    limit: float | None,
    floor: float,
) -> tuple[float, str]:
    """The end of the color scale, and the title of its bar, which states the cells beyond."""
    end, beyond = color_limit(panels, floor=floor)
    if limit is not None:
        end, beyond = limit, sum(int((np.abs(panel) > limit).sum()) for panel in panels)
    if not beyond:
        return end, unit
    return end, f"{unit}<br>colors end at ±{end:.2g}: {plural(beyond, 'cell')} beyond"
