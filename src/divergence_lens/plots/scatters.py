"""Scatter plots of one value against another."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int

from divergence_lens.plots import style

_MOST_POINTS = 4000


def scatter(
    approximate: Float[np.ndarray, " cells"],
    exact: Float[np.ndarray, " cells"],
    hover: Sequence[str],
    second: Bool[np.ndarray, " cells"],
    *,
    headline: str,
    detail: str,
    names: tuple[str, str],
    groups: tuple[str, str],
) -> go.Figure:
    """Draw one value against another, with the line on which they are equal.

    `second` marks the cells of the second group, which is drawn on top of the first.
    """
    chosen = _spread(approximate, exact)
    if len(chosen) < len(exact):
        detail += f"; {len(chosen):,} cells drawn, including every large one"
    both = np.concatenate([approximate, exact])
    low, high = (float(both.min()), float(both.max())) if len(both) else (-1.0, 1.0)
    pad = 0.06 * (high - low or 1.0)
    ends = [low - pad, high + pad]
    equal = go.Scatter(
        x=ends,
        y=ends,
        mode="lines",
        name="equal",
        line={"color": style.INK, "width": 1.2, "dash": "dash"},
        hoverinfo="skip",
        showlegend=False,
    )
    traces: list[Any] = [equal]
    looks = ((style.ORANGE, "diamond-open", 6), (style.BLUE, "circle", 5))
    for label, (color, symbol, size), own in zip(
        groups, looks, (chosen[~second[chosen]], chosen[second[chosen]]), strict=True
    ):
        if not len(own):
            continue
        traces.append(
            go.Scatter(
                x=exact[own],
                y=approximate[own],
                mode="markers",
                name=label,
                marker={"size": size, "color": color, "symbol": symbol, "opacity": 0.6},
                text=[
                    f"{style.escape(hover[i])}<br>{names[1]} {exact[i]:+.3f}, "
                    f"{names[0]} {approximate[i]:+.3f}"
                    for i in own
                ],
                hoverinfo="text",
            )
        )
    return style.figure(
        traces,
        headline=headline,
        detail=detail,
        plot_height=250,
        left=60,
        widest=520,
        legend_rows=len(traces) - 1,
        xaxis=style.axis(names[1], range=ends),
        yaxis=style.axis(names[0], range=ends),
    )


def _spread(
    approximate: Float[np.ndarray, " cells"], exact: Float[np.ndarray, " cells"]
) -> Int[np.ndarray, " chosen"]:
    """Choose the cells to draw: all, or half of the budget by size and the rest evenly."""
    if len(exact) <= _MOST_POINTS:
        return np.arange(len(exact))
    size = np.maximum(np.abs(approximate), np.abs(exact))
    order = np.argsort(-size, kind="stable")
    half = _MOST_POINTS // 2
    rest = order[half:]
    even = rest[np.linspace(0, len(rest) - 1, _MOST_POINTS - half).astype(int)]
    return np.sort(np.concatenate([order[:half], even]))
