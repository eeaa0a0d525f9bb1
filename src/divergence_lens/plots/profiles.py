"""Line charts over layers."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, Int

from divergence_lens.plots import style

Line: TypeAlias = Float[np.ndarray, " layers"]


def values_by_layer(
    numbers: Sequence[int],
    mean: Line,
    spread: tuple[Line, Line] | None,
    singles: Mapping[str, Mapping[int, float]],
    references: Mapping[str, float],
    *,
    headline: str,
    detail: str,
    unit: str = " times as before",
    value_title: str = "times the preference before",
) -> go.Figure:
    """Draw values by layer: a thick mean, thin lines of single targets, dashed references.

    Args:
        numbers: The layers.
        mean: One value per layer.
        spread: Lower and upper ends of the mean's interval, if known.
        singles: Thin lines: name -> layer -> value.
        references: Levels across the plot.
        headline: Title.
        detail: Text below the title.
        unit: Follows each value in hover texts.
        value_title: Title of the vertical axis.
    """
    traces: list[Any] = [
        go.Scatter(
            x=list(series),
            y=list(series.values()),
            mode="lines+markers",
            name="each target",
            line={"color": style.SKY, "width": 1.2},
            marker={"size": 5},
            opacity=0.8,
            text=[
                f"{style.escape(name)}, layer {layer} alone: {value:.2f}{unit}"
                for layer, value in series.items()
            ],
            hoverinfo="text",
            legendgroup="each target",
            showlegend=i == 0,
        )
        for i, (name, series) in enumerate(singles.items())
    ]
    whose = ", mean over targets" if singles else ""
    bounds = [""] * len(numbers)
    if spread is not None:
        bounds = [f" (95 % interval {a:.2f} to {b:.2f})" for a, b in zip(*spread, strict=True)]
    traces.append(
        go.Scatter(
            x=list(numbers),
            y=mean,
            mode="lines+markers",
            name="mean of targets" if singles else "one layer",
            line={"color": style.BLUE, "width": 3.5},
            marker={"size": 8},
            error_y=style.error_bars(mean, *(spread or (None, None)), thickness=1.5, width=4),
            text=[
                f"layer {layer} alone{whose}: {value:.2f}{unit}{bound}"
                for layer, value, bound in zip(numbers, mean, bounds, strict=True)
            ],
            hoverinfo="text",
        )
    )
    edges = [numbers[0] - 0.35, numbers[-1] + 0.35]
    traces += [
        style.level(label, edges, value, f"{style.escape(label)}: {value:.2f}{unit}")
        for label, value in references.items()
    ]
    return style.figure(
        traces,
        headline=headline,
        detail=detail,
        plot_height=210,
        legend_rows=sum(trace.showlegend is not False for trace in traces),
        widest=680,
        xaxis=style.layer_axis(numbers, title="trained layer", range=edges),
        yaxis=style.axis(value_title, rangemode="tozero"),
    )


def profile(
    layers: Int[np.ndarray, " layers"],
    series: Mapping[str, tuple[Line, Line | None, Line | None]],
    *,
    headline: str,
    detail: str,
    value_title: str,
    across: str = "layer",
) -> go.Figure:
    """Draw lines over layers with a band where there is an interval: name -> (mean, low, high)."""
    traces: list[Any] = []
    for i, (name, (mean, low, high)) in enumerate(series.items()):
        color = style.CYCLE[i % len(style.CYCLE)]
        bounds = [""] * len(mean)
        if low is not None and high is not None:
            bounds = [
                f" (95 % interval {a:.3f} to {b:.3f})" for a, b in zip(low, high, strict=True)
            ]
            traces.append(
                go.Scatter(
                    x=np.concatenate([layers, layers[::-1]]),
                    y=np.concatenate([high, low[::-1]]),
                    fill="toself",
                    fillcolor=style.shade(color, 0.22),
                    mode="lines",
                    line={"width": 0},
                    hoverinfo="skip",
                    showlegend=False,
                    legendgroup=name,
                )
            )
        traces.append(
            go.Scatter(
                x=layers,
                y=mean,
                mode="lines+markers",
                name=style.escape(name),
                legendgroup=name,
                line={"color": color, "width": 2.2},
                marker={"size": 7, "symbol": style.SYMBOLS[i % len(style.SYMBOLS)]},
                text=[
                    f"{across} {layer}, {style.escape(name)}: {m:.3f}{bound}"
                    for layer, m, bound in zip(layers, mean, bounds, strict=True)
                ],
                hoverinfo="text",
            )
        )
    numbers = [int(layer) for layer in layers]
    return style.figure(
        traces,
        headline=headline,
        detail=detail,
        plot_height=200,
        left=60,
        legend_rows=0 if len(series) == 1 else len(series),
        widest=680,
        xaxis=style.layer_axis(numbers, title=across, range=[numbers[0] - 0.3, numbers[-1] + 0.3]),
        yaxis=style.axis(
            value_title,
            rangemode="tozero",
            zeroline=True,
            zerolinecolor=style.INK,
            zerolinewidth=1,
        ),
    )
