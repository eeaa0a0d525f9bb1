"""The figure of approximate against exact effects."""

import numpy as np
import plotly.graph_objects as go

from divergence_lens._utils.wording import plural
from divergence_lens.patching import Effects, inner_agreement, inner_cells
from divergence_lens.plots import scatters, style
from divergence_lens.plots.labels import metric_words, site_words, titled


def agreement_scatter(
    approximate: Effects, exact: Effects, *, name: str | None = None
) -> go.Figure:
    """Draw approximate against exact effects, one point per cell, with their agreement.

    Cells at the target position and in the last layer agree almost by construction. They have their
    own color, and the caption first states the agreement without them.

    Args:
        approximate: Effects by attribution.
        exact: Effects of the same pairs by causal mediation.
        name: Added to the title, such as the target of the pairs.

    Raises:
        ValueError: The two differ in pairs, site, direction or metric.
    """
    agreement, within = approximate.agreement(exact), inner_agreement(approximate, exact)
    x, y = exact.values, approximate.values
    both = np.isfinite(x) & np.isfinite(y) & ((x != 0) | (y != 0))
    places = np.argwhere(both)
    hover = [
        f"pair {pair}, layer {layer}, position {p}"
        + (f", head {rest[0]}" if rest else "")
        + f", token “{approximate.labels[pair][p]}”"
        for pair, layer, p, *rest in places.tolist()
    ]
    pairs = len(np.unique(places[:, 0]))
    detail = f"{site_words(exact.site)}; {plural(pairs, 'pair')}"
    if within.pairs:
        detail += (
            f"; without target position and last layer ({plural(within.cells, 'cell')}), "
            f"mean within a pair: Pearson {within.pearson:.2f}, Spearman {within.spearman:.2f}"
        )
    return scatters.scatter(
        y[both].astype(np.float64),
        x[both].astype(np.float64),
        hover,
        inner_cells(exact)[both],
        headline=titled("Approximate against exact effects", name),
        detail=f"{detail}; all {plural(agreement.cells, 'cell')} together: Pearson "
        f"{agreement.pearson:.2f}, Spearman {agreement.spearman:.2f}, same sign "
        f"{style.percent(agreement.sign)}",
        names=(f"approximate, {approximate.method}", f"exact, {metric_words(exact.metric)}"),
        groups=("target position, last layer", "all other cells"),
    )
