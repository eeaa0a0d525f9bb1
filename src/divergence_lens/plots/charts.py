"""The shapes of figure that `plots` fills with results: bars, profiles, scatters.

They take arrays and plain words and know nothing of teachers or students.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int

from divergence_lens.plots import style

_PATTERNS = ("", "/", ".", "x", "-", "+", "|")
_MOST_POINTS = 4000
_FEWEST_TOKENS = 20  # at a place, below which a share says next to nothing


@dataclass(frozen=True)
class Bars:
    """One colour of bars: a value for each of some groups.

    Attributes:
        label: Its name in the legend.
        groups: The groups that it has a bar in.
        values: The heights.
        hover: What each bar says, in words.
        low: Lower ends of intervals, if known.
        high: Upper ends.
        points: Single values drawn as dots on the bars: (group, value, hover).
    """

    label: str
    groups: Sequence[str]
    values: Float[np.ndarray, " groups"]
    hover: Sequence[str]
    low: Float[np.ndarray, " groups"] | None = None
    high: Float[np.ndarray, " groups"] | None = None
    points: Sequence[tuple[str, float, str]] = ()


@dataclass(frozen=True)
class Line:
    """A level for each group, drawn across its bars: (label, group -> value, plotly's dash)."""

    label: str
    values: Mapping[str, float]
    dash: str


def bars(
    series: Sequence[Bars],
    *,
    what: str,
    detail: str,
    value_title: str,
    lines: Sequence[Line] = (),
    top: float | None = None,
    value_format: str = ".0%",
    group_title: str = "",
) -> go.Figure:
    """Bars side by side in groups, with lines across each group."""
    groups = list(dict.fromkeys(name for one in series for name in one.groups))
    place = {name: i for i, name in enumerate(groups)}
    width = 0.84 / len(series)
    traces: list[Any] = []
    for i, one in enumerate(series):
        shift = (i - (len(series) - 1) / 2) * width
        colour = style.CYCLE[i % len(style.CYCLE)]
        error = None
        if one.low is not None and one.high is not None:
            error = {
                "type": "data",
                "symmetric": False,
                "array": one.high - one.values,
                "arrayminus": one.values - one.low,
                "color": style.INK,
                "thickness": 1.2,
                "width": 3,
            }
        traces.append(
            go.Bar(
                x=[place[name] + shift for name in one.groups],
                y=one.values,
                width=width * 0.94,
                name=style.escape(one.label),
                marker={
                    "color": colour,
                    "pattern": _pattern(_PATTERNS[i % len(_PATTERNS)]),
                    "line": {"width": 0},
                },
                error_y=error,
                text=[style.escape(words) for words in one.hover],
                textposition="none",
                hoverinfo="text",
                legendgroup=one.label,
            )
        )
        if one.points:
            traces.append(
                go.Scatter(
                    x=[place[name] + shift for name, _, _ in one.points],
                    y=[value for _, value, _ in one.points],
                    mode="markers",
                    marker={
                        "size": 4.5,
                        "color": "#FFFFFF",
                        "line": {"color": "#333333", "width": 1},
                    },
                    text=[style.escape(words) for _, _, words in one.points],
                    hoverinfo="text",
                    legendgroup=one.label,
                    showlegend=False,
                )
            )
    for line in lines:
        xs: list[float | None] = []
        ys: list[float | None] = []
        texts: list[str | None] = []
        for name, value in line.values.items():
            if name in place:
                xs += [place[name] - 0.46, place[name], place[name] + 0.46, None]
                ys += [value, value, value, None]
                words = style.escape(f"{name}, {line.label}: {style.percent(value)}")
                texts += [words, words, words, None]
        traces.append(
            go.Scatter(
                x=xs,
                y=ys,
                mode="lines",
                name=style.escape(line.label),
                line={"color": style.INK, "width": 2, "dash": line.dash},
                text=texts,
                hoverinfo="text",
            )
        )
    names = [style.show_token(name, 16).replace("·", " ") for name in groups]
    longest = max((len(name) for name in groups), default=0)
    # Twelve pixels of type need about seven per letter: names that would touch are turned.
    turned = longest * 7 > 240 / max(len(groups), 1)
    entries = len(series) + len(lines)
    return style.figure(
        traces,
        what=what,
        detail=detail,
        plot_height=200,
        bottom=24 + (min(longest, 16) * 6 if turned else 6) + (18 if group_title else 0),
        left=60,
        legend_rows=0 if entries == 1 else entries,
        barmode="overlay",
        xaxis=style.axis(
            group_title,
            grid=False,
            tickvals=list(range(len(groups))),
            ticktext=names,
            tickangle=-55 if turned else 0,
            range=[-0.55, len(groups) - 0.45],
        ),
        yaxis=style.axis(
            value_title,
            tickformat=value_format,
            rangemode="tozero",
            range=None if top is None else [0, top * 1.02],
        ),
    )


def _pattern(shape: str) -> dict[str, Any]:
    """White strokes on the bar's colour, so that bars differ in print without colour too."""
    return {
        "shape": shape,
        "size": 6,
        "solidity": 0.25,
        "fillmode": "overlay",
        "fgcolor": "#FFFFFF",
        "fgopacity": 0.6,
    }


def blocks(
    numbers: Sequence[int],
    mean: Float[np.ndarray, " blocks"],
    spread: tuple[Float[np.ndarray, " blocks"], Float[np.ndarray, " blocks"]] | None,
    singles: Mapping[str, Mapping[int, float]],
    references: Mapping[str, float],
    *,
    what: str,
    detail: str,
    unit: str = " times as before",
    value_title: str = "times the preference before",
) -> go.Figure:
    """Values by layer: a thick mean, thin single lines, dashed references.

    Args:
        numbers: The layers.
        mean: One value for each.
        spread: Lower and upper ends of the mean's interval, if known.
        singles: Thin lines: name -> layer -> value.
        references: Levels across the plot.
        what: Title.
        detail: Under the title.
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
            error_y=None
            if spread is None
            else {
                "type": "data",
                "symmetric": False,
                "array": spread[1] - mean,
                "arrayminus": mean - spread[0],
                "thickness": 1.5,
                "width": 4,
            },
            text=[
                f"layer {layer} alone{whose}: {value:.2f}{unit}{bound}"
                for layer, value, bound in zip(numbers, mean, bounds, strict=True)
            ],
            hoverinfo="text",
        )
    )
    edges = [numbers[0] - 0.35, numbers[-1] + 0.35]
    for label, value in references.items():
        words = f"{style.escape(label)}: {value:.2f}{unit}"
        traces.append(
            go.Scatter(
                x=[edges[0], (edges[0] + edges[1]) / 2, edges[1]],
                y=[value] * 3,
                mode="lines",
                name=style.escape(label),
                line={
                    "color": style.INK,
                    "width": 1.6,
                    "dash": "dot" if label == "control" else "dash",
                },
                text=[words] * 3,
                hoverinfo="text",
            )
        )
    return style.figure(
        traces,
        what=what,
        detail=detail,
        plot_height=210,
        legend_rows=sum(trace.showlegend is not False for trace in traces),
        widest=680,
        xaxis=style.axis(
            "trained layer",
            grid=False,
            tickangle=0,
            tickvals=style.thinned(numbers, 10),
            range=edges,
        ),
        yaxis=style.axis(value_title, rangemode="tozero"),
    )


def profile(
    layers: Int[np.ndarray, " layers"],
    series: Mapping[
        str,
        tuple[
            Float[np.ndarray, " layers"],
            Float[np.ndarray, " layers"],
            Float[np.ndarray, " layers"],
        ],
    ],
    *,
    what: str,
    detail: str,
    value_title: str,
    across: str = "layer",
) -> go.Figure:
    """A line over layers with a band for its interval: name -> (mean, low, high)."""
    traces: list[Any] = []
    for i, (name, (mean, low, high)) in enumerate(series.items()):
        colour = style.CYCLE[i % len(style.CYCLE)]
        traces.append(
            go.Scatter(
                x=np.concatenate([layers, layers[::-1]]),
                y=np.concatenate([high, low[::-1]]),
                fill="toself",
                fillcolor=style.shade(colour, 0.22),
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
                line={"color": colour, "width": 2.2},
                marker={"size": 7, "symbol": style.SYMBOLS[i % len(style.SYMBOLS)]},
                text=[
                    f"{across} {layer}, {style.escape(name)}: {m:.3f} (95 % interval {a:.3f} to "
                    f"{b:.3f})"
                    for layer, m, a, b in zip(layers, mean, low, high, strict=True)
                ],
                hoverinfo="text",
            )
        )
    numbers = [int(layer) for layer in layers]
    return style.figure(
        traces,
        what=what,
        detail=detail,
        plot_height=200,
        left=60,
        legend_rows=0 if len(series) == 1 else len(series),
        widest=680,
        xaxis=style.axis(
            across,
            grid=False,
            tickangle=0,
            tickvals=style.thinned(numbers, 10),
            range=[numbers[0] - 0.3, numbers[-1] + 0.3],
        ),
        yaxis=style.axis(
            value_title,
            rangemode="tozero",
            zeroline=True,
            zerolinecolor=style.INK,
            zerolinewidth=1,
        ),
    )


def scatter(
    approximate: Float[np.ndarray, " cells"],
    exact: Float[np.ndarray, " cells"],
    hover: Sequence[str],
    second: Bool[np.ndarray, " cells"],
    *,
    what: str,
    detail: str,
    names: tuple[str, str],
    groups: tuple[str, str],
) -> go.Figure:
    """One value against another, in two groups, with the line on which they are equal.

    `second` says which cells belong to the second of the two groups, which is drawn on top.
    """
    chosen = _spread(approximate, exact)
    if len(chosen) < len(exact):
        detail += f"; {len(chosen):,} cells drawn, every large one among them"
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
    for label, (colour, symbol, size), own in zip(
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
                marker={"size": size, "color": colour, "symbol": symbol, "opacity": 0.6},
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
        what=what,
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
    """The cells to draw: all, or the larger half of the budget by size and the rest evenly."""
    if len(exact) <= _MOST_POINTS:
        return np.arange(len(exact))
    size = np.maximum(np.abs(approximate), np.abs(exact))
    order = np.argsort(-size, kind="stable")
    half = _MOST_POINTS // 2
    rest = order[half:]
    even = rest[np.linspace(0, len(rest) - 1, _MOST_POINTS - half).astype(int)]
    return np.sort(np.concatenate([order[:half], even]))


def falls(
    results: Sequence[tuple[Int[np.ndarray, " _"], Bool[np.ndarray, " _"]]],
    *,
    what: str,
) -> go.Figure:
    """The share of divergence tokens at each place of a completion, from (offsets, mask)."""
    places, first, later = [], [], []
    examples = 0
    for offsets, mask in results:
        lengths = np.diff(offsets)
        starts = np.repeat(offsets[:-1], lengths)
        before = np.concatenate([[0], np.cumsum(mask)])
        # Divergence tokens of the same example before this one: none for the first.
        earlier = before[:-1] - before[starts]
        places.append(np.arange(len(mask)) - starts)
        first.append(mask & (earlier == 0))
        later.append(mask & (earlier > 0))
        examples += len(lengths)
    place = np.concatenate(places)
    if len(place) == 0:
        raise ValueError("The completions hold no tokens, so divergence tokens fall nowhere.")
    width = -(-(int(place.max()) + 1) // 40)
    bins = place // width
    count = np.bincount(bins)
    total = int(sum(mask.sum() for _, mask in results))
    few = count < _FEWEST_TOKENS
    traces = []
    for label, found, colour, pattern, words in (
        ("first of its example", first, style.BLUE, "", "the first divergence of their example"),
        ("later ones", later, style.SKY, "/", "later divergence tokens"),
    ):
        share = np.bincount(bins, np.concatenate(found), len(count)) / np.maximum(count, 1)
        traces.append(
            go.Bar(
                x=np.arange(len(count)) * width + (width + 1) / 2,
                y=share,
                width=width * 0.86,
                name=label,
                marker={
                    # One colour: with several, plotly draws black strokes and warns.
                    "color": colour,
                    "opacity": [0.3 if rare else 1.0 for rare in few],
                    "pattern": _pattern(pattern),
                    "line": {"width": 0},
                },
                text=[
                    (
                        f"place {i + 1}"
                        if width == 1
                        else f"places {i * width + 1} to {(i + 1) * width}"
                    )
                    + f": {style.percent(value)} of {style.plural(int(n), 'token')} are {words}"
                    for i, (value, n) in enumerate(zip(share, count, strict=True))
                ],
                textposition="none",
                hoverinfo="text",
            )
        )
    return style.figure(
        traces,
        what=what,
        detail=f"{style.plural(total, 'divergence token')} among "
        f"{style.plural(len(place), 'token')} of {style.plural(examples, 'completion')}"
        + (f"; pale: fewer than {_FEWEST_TOKENS} tokens there" if few.any() else ""),
        plot_height=190,
        legend_rows=2,
        left=60,
        barmode="stack",
        xaxis=style.axis("place in the completion (from 1)", grid=False),
        yaxis=style.axis("share of the tokens there", tickformat=".0%", rangemode="tozero"),
    )
