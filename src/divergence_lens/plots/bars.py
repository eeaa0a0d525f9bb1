"""Bar charts and dot plots of arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int

from divergence_lens._utils.wording import plural
from divergence_lens.plots import style

_PATTERNS = ("", "/", ".", "x", "-", "+", "|")
_FEWEST_TOKENS = 20  # bars of fewer tokens are pale, because their shares are noisy
_ROW = 17  # pixels
_LONGEST = 26  # letters of a name, to leave room for the plot in a column of 80 mm


@dataclass(frozen=True)
class Bars:
    """A series of bars in one color: one value per group.

    Attributes:
        label: Name in the legend.
        groups: The group of each bar.
        values: The heights.
        hover: Hover text of each bar.
        low: Lower ends of intervals, if known.
        high: Upper ends of intervals.
        points: Single values, drawn as dots on the bars: (group, value, hover text).
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
    """A line across the bars of each group: (label, group -> value, plotly's dash)."""

    label: str
    values: Mapping[str, float]
    dash: str


def bars(
    series: Sequence[Bars],
    *,
    headline: str,
    detail: str,
    value_title: str,
    lines: Sequence[Line] = (),
    top: float | None = None,
    value_format: str = ".0%",
    group_title: str = "",
) -> go.Figure:
    """Draw bars side by side in groups, with lines across each group."""
    groups = list(dict.fromkeys(name for bar in series for name in bar.groups))
    place = {name: i for i, name in enumerate(groups)}
    width = 0.84 / len(series)
    traces: list[Any] = []
    for i, bar in enumerate(series):
        shift = (i - (len(series) - 1) / 2) * width
        color = style.CYCLE[i % len(style.CYCLE)]
        traces.append(
            go.Bar(
                x=[place[name] + shift for name in bar.groups],
                y=bar.values,
                width=width * 0.94,
                name=style.escape(bar.label),
                marker={
                    "color": color,
                    "pattern": _pattern(_PATTERNS[i % len(_PATTERNS)]),
                    "line": {"width": 0},
                },
                error_y=style.error_bars(
                    bar.values, bar.low, bar.high, thickness=1.2, color=style.INK
                ),
                text=[style.escape(words) for words in bar.hover],
                textposition="none",
                hoverinfo="text",
                legendgroup=bar.label,
            )
        )
        if bar.points:
            traces.append(
                go.Scatter(
                    x=[place[name] + shift for name, _, _ in bar.points],
                    y=[value for _, value, _ in bar.points],
                    mode="markers",
                    marker={
                        "size": 4.5,
                        "color": "#FFFFFF",
                        "line": {"color": "#333333", "width": 1},
                    },
                    text=[style.escape(words) for _, _, words in bar.points],
                    hoverinfo="text",
                    legendgroup=bar.label,
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
    # A letter of 12-pixel type is about 7 pixels wide. Names that would touch are rotated.
    turned = longest * 7 > 240 / max(len(groups), 1)
    entries = len(series) + len(lines)
    return style.figure(
        traces,
        headline=headline,
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
    """White strokes on the bar's color, which distinguish bars in print without color."""
    return {
        "shape": shape,
        "size": 6,
        "solidity": 0.25,
        "fillmode": "overlay",
        "fgcolor": "#FFFFFF",
        "fgopacity": 0.6,
    }


def dot_plot(series: Bars, *, headline: str, detail: str, value_title: str) -> go.Figure:
    """Draw one row per group on an axis of ratios, for groups that do not fit side by side."""
    place = {name: i for i, name in enumerate(series.groups)}
    rows = list(place.values())
    names = [n if len(n) <= _LONGEST else n[: _LONGEST - 1] + "…" for n in series.groups]
    values = np.asarray(series.values, dtype=float)
    low = values if series.low is None else np.asarray(series.low, dtype=float)
    high = values if series.high is None else np.asarray(series.high, dtype=float)
    traces: list[Any] = [
        go.Scatter(
            x=[1, 1],
            y=[-0.6, len(rows) - 0.4],
            mode="lines",
            line={"color": style.INK, "width": 1.2, "dash": "dash"},
            hoverinfo="skip",
        ),
        go.Scatter(
            x=[value for _, value, _ in series.points],
            y=[place[name] for name, _, _ in series.points],
            mode="markers",
            marker={"size": 4.5, "color": style.GREY, "opacity": 0.6},
            text=[style.escape(words) for _, _, words in series.points],
            hoverinfo="text",
        ),
        go.Scatter(
            x=values,
            y=rows,
            mode="markers",
            marker={"size": 8, "color": style.BLUE, "symbol": "diamond"},
            error_x=style.error_bars(values, low, high, thickness=1.5, color=style.BLUE),
            text=[style.escape(words) for words in series.hover],
            hoverinfo="text",
        ),
    ]
    # Intervals over two targets can be arbitrarily wide: the values alone determine the axis.
    measured = np.log10([*values, *(value for _, value, _ in series.points), 1.0])
    return style.figure(
        traces,
        headline=headline,
        detail=detail,
        plot_height=_ROW * len(rows),
        bottom=44,
        left=14 + 6 * max(map(len, names)),
        xaxis=style.axis(
            value_title,
            type="log",
            range=[float(measured.min()) - 0.12, float(measured.max()) + 0.12],
            tickvals=[0.25, 0.5, 1, 2, 3, 4, 6, 8, 16],
            tickformat="~g",
        ),
        yaxis=style.axis(
            "",
            grid=False,
            tickvals=rows,
            ticktext=[style.escape(name) for name in names],
            range=[len(rows) - 0.4, -0.6],
        ),
    )


def positions(
    results: Sequence[tuple[Int[np.ndarray, " _"], Bool[np.ndarray, " _"]]],
    *,
    headline: str,
) -> go.Figure:
    """Draw the share of divergence tokens at each position, from (offsets, mask)."""
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
        raise ValueError("the completions hold no tokens; give a Divergence with completions")
    width = -(-(int(place.max()) + 1) // 40)
    bins = place // width
    count = np.bincount(bins)
    total = int(sum(mask.sum() for _, mask in results))
    few = count < _FEWEST_TOKENS
    traces = []
    for label, masks, color, pattern, words in (
        ("first of its example", first, style.BLUE, "", "the first divergence of their example"),
        ("later ones", later, style.SKY, "/", "later divergence tokens"),
    ):
        share = np.bincount(bins, np.concatenate(masks), len(count)) / np.maximum(count, 1)
        traces.append(
            go.Bar(
                x=np.arange(len(count)) * width + (width + 1) / 2,
                y=share,
                width=width * 0.86,
                name=label,
                marker={
                    # One color: with several, plotly draws black strokes and warns.
                    "color": color,
                    "opacity": [0.3 if rare else 1.0 for rare in few],
                    "pattern": _pattern(pattern),
                    "line": {"width": 0},
                },
                text=[
                    (
                        f"position {i + 1}"
                        if width == 1
                        else f"positions {i * width + 1} to {(i + 1) * width}"
                    )
                    + f": {style.percent(value)} of {plural(int(n), 'token')} are {words}"
                    for i, (value, n) in enumerate(zip(share, count, strict=True))
                ],
                textposition="none",
                hoverinfo="text",
            )
        )
    return style.figure(
        traces,
        headline=headline,
        detail=f"{plural(total, 'divergence token')} among "
        f"{plural(len(place), 'token')} of {plural(examples, 'completion')}"
        + (f"; pale: fewer than {_FEWEST_TOKENS} tokens" if few.any() else ""),
        plot_height=190,
        legend_rows=2,
        left=60,
        barmode="stack",
        xaxis=style.axis("position in the completion (from 1)", grid=False),
        yaxis=style.percent_axis("share of the tokens at the position"),
    )
