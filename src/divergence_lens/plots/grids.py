"""Heatmaps of effects: layers across, tokens or segments down; means of aligned rows."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from divergence_lens.pairs import BIAS, target_column
from divergence_lens.patching import Effects
from divergence_lens.plots import style

_ROW = 15  # pixels per token on an axis: the smallest row that keeps 10-pixel letters apart
_MOST_TOKENS = 90
_LETTER = 11  # pixels that a line of those letters needs
_TOKEN, _UNIT = 12, 18  # most letters of a token on an axis, and of a unit, which has two sides
_SIDES = " → "


def token_heatmap(
    values: Float[np.ndarray, "layers positions"],
    tokens: Sequence[str],
    segments: Sequence[str],
    *,
    differs: Sequence[bool],
    positions: Sequence[int] = (),
    headline: str,
    detail: str,
    unit: str,
) -> go.Figure:
    """Draw layers across and tokens down, with a mark at the token whose logits are measured.

    Args:
        values: One number per cell, NaN where a cell is missing.
        tokens: The token at each position, or the tokens of both sides of a unit.
        segments: The segment of each position.
        differs: Whether each position differs between the two rows.
        positions: The first clean position of each row of the figure, if that is not its number.
        headline: Title.
        detail: Text below the title.
        unit: Title of the color bar, and name of the value in hover texts.
    """
    layers, count = values.shape
    limit = _limit(values)
    row = _ROW if count <= _MOST_TOKENS else max(3, _ROW * _MOST_TOKENS // count)
    height = max(row * count, 90)
    shown = [_shown(token) for token in tokens]
    places = positions or range(len(tokens))
    hover = [
        [
            f"layer {layer}, position {places[p]}, token “{style.show_token(token, 40)}” "
            f"({segment}{', differs' if differs[p] else ''})<br>"
            + (
                f"{unit}: {values[layer, p]:+.3f}"
                if np.isfinite(values[layer, p])
                else "not measured"
            )
            for layer in range(layers)
        ]
        for p, (token, segment) in enumerate(zip(tokens, segments, strict=True))
    ]
    heatmap = go.Heatmap(
        x=list(range(layers)),
        y=list(range(count)),
        z=values.T,
        text=hover,
        hoverinfo="text",
        xgap=0.6,
        ygap=0.6,
        **style.diverging(limit, unit, height),
    )
    target = target_column(segments)
    every = -(-_LETTER // row)
    ticks = [p for p in range(count) if (target - p) % every == 0 or differs[p]]
    # Bold means that a token differs, which the framed one need not.
    marks = [f"{shown[p]} ◂" if p == target else shown[p] for p in ticks]
    marks = [_bold(mark) if differs[p] else mark for p, mark in zip(ticks, marks, strict=True)]
    letters = max((min(len(t), _UNIT if _SIDES in t else _TOKEN) for t in tokens), default=1)
    left = 34 + round(letters * 6.4) + 16
    runs = spans(segments)
    return style.figure(
        [heatmap],
        headline=headline,
        detail=detail
        + ("; bold: tokens that differ" if any(differs) else "")
        + "; ◂: the position whose prediction is measured",
        plot_height=height,
        bottom=98,
        left=left,
        right=12,
        widest=max(520, 190 + 34 * layers),
        plot_bgcolor=style.MISSING,
        shapes=[
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": start - 0.5,
                "y1": start - 0.5,
                "line": {"color": style.INK, "width": 1},
            }
            for _, start, _ in runs[1:]
        ]
        + [
            {
                "type": "rect",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": target - 0.5,
                "y1": target + 0.5,
                "line": {"color": style.INK, "width": 1.5},
            }
        ],
        annotations=[
            {
                "text": name,
                "xref": "paper",
                "x": 0,
                "xanchor": "center",
                "xshift": 10 - left,
                "yref": "y",
                "y": (start + stop - 1) / 2,
                "yanchor": "middle",
                "textangle": -90,
                "showarrow": False,
                "font": {"size": 10},
            }
            for name, start, stop in runs
            if (stop - start) * row >= 6 * len(name)
        ],
        xaxis=style.layer_axis(range(layers)),
        yaxis=style.axis(
            "",
            grid=False,
            tickvals=ticks,
            ticktext=marks,
            tickfont={"size": 10, "family": style.MONO},
            range=[count - 0.5, -0.5],
        ),
    )


def _shown(token: str) -> str:
    """A token on an axis, or both sides of a unit, of which the longer is cut first."""
    clean, both, corrupted = token.partition(_SIDES)
    if not both:
        return style.show_token(token, _TOKEN)
    room = _UNIT - len(_SIDES)
    first = style.show_token(clean, max(room // 2, room - len(corrupted)))
    return first + _SIDES + style.show_token(corrupted, max(room - room // 2, room - len(clean)))


def _bold(text: str) -> str:
    return f"<b>{text}</b>"


def spans(segments: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return runs of equal names as (name, start, stop)."""
    runs: list[tuple[str, int, int]] = []
    for i, name in enumerate(segments):
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1], i + 1)
        else:
            runs.append((name, i, i + 1))
    return runs


def segment_heatmap(
    values: Float[np.ndarray, "segments layers"],
    segments: Sequence[str],
    *,
    headline: str,
    detail: str,
    unit: str,
    row: str = "segment",
    differs: Sequence[str] = (),
) -> go.Figure:
    """Draw layers across and segments (or heads) down, with the values written if there is room.

    Segments in `differs`, which hold tokens that differ between the two rows, are bold.
    """
    count, layers = values.shape
    limit = _limit(values)
    height = max(30 * count, 90)
    hover = [
        [
            f"layer {layer}, {row} {style.escape(name)}<br>"
            + (
                f"{unit}: {values[i, layer]:+.3f}"
                if np.isfinite(values[i, layer])
                else f"not measured, or no position in this {row}"
            )
            for layer in range(layers)
        ]
        for i, name in enumerate(segments)
    ]
    written = layers <= 6
    heatmap = go.Heatmap(
        x=list(range(layers)),
        y=list(range(count)),
        z=values,
        text=hover,
        hoverinfo="text",
        xgap=1,
        ygap=1,
        texttemplate="%{z:.2f}" if written else None,
        textfont={"size": 11} if written else None,
        **style.diverging(limit, unit, height),
    )
    letters = max(len(name) for name in segments)
    return style.figure(
        [heatmap],
        headline=headline,
        detail=detail + ("; bold: segments with tokens that differ" if differs else ""),
        plot_height=height,
        bottom=98,
        left=(34 if row != "segment" else 16) + 7 * min(letters, 16),
        right=12,
        widest=max(560, 190 + 40 * layers),
        plot_bgcolor=style.MISSING,
        xaxis=style.layer_axis(range(layers)),
        yaxis=style.axis(
            "" if row == "segment" else row,
            grid=False,
            tickvals=list(range(count)),
            ticktext=[
                _bold(style.escape(name)) if name in differs else style.escape(name)
                for name in segments
            ],
            range=[count - 0.5, -0.5],
        ),
    )


def _limit(values: Float[np.ndarray, "..."]) -> float:
    finite = np.abs(values[np.isfinite(values)])
    largest = float(finite.max()) if finite.size else 0.0
    return largest if largest > 0 else 1.0


def cells(effects: Effects) -> Float[np.ndarray, "pairs layers pos"]:
    """Return the values summed over heads; NaN where no head has a value."""
    values = effects.values
    if values.ndim == 3:
        return values
    there = np.isfinite(values)
    return np.where(there.any(3), np.where(there, values, 0).sum(3), np.nan)


def aligned_mean(
    effects: Effects,
) -> tuple[Float[np.ndarray, "layers pos"], list[str], list[str], list[bool], int]:
    """Average the largest set of pairs that share one order of segments, aligned by segment.

    Returns:
        Values `[layers, positions]`; the token and segment of each position, and whether it differs
        between the rows of some pair; and the number of pairs.
    """
    values = cells(effects.normalized())
    usable = np.flatnonzero(~effects.near_zero())
    runs = {int(i): spans(effects.segments[i]) for i in usable}
    if not runs:
        raise ValueError(
            "the total effect of every pair is near zero, so shares of it are undefined; draw "
            "single pairs with pair=0, 1, ..."
        )
    names = {i: tuple(name for name, _, _ in own) for i, own in runs.items()}
    fits = {
        shape: {i: order for i, own in names.items() if (order := _within(own, shape)) is not None}
        for shape in dict.fromkeys(names.values())
    }
    shape, chosen = max(fits.items(), key=lambda entry: len(entry[1]))
    widths = [0] * len(shape)
    for i, order in chosen.items():
        for j, (_, start, stop) in zip(order, runs[i], strict=True):
            widths[j] = max(widths[j], stop - start)
    starts = np.concatenate([[0], np.cumsum(widths)])
    stacked = np.full(
        (len(chosen), effects.n_layers, int(starts[-1])), np.nan
    )  # [pair, layer, pos]
    words: list[Counter[str]] = [Counter() for _ in range(int(starts[-1]))]
    differs = [False] * int(starts[-1])
    for row, (i, order) in enumerate(chosen.items()):
        for j, (_, start, stop) in zip(order, runs[i], strict=True):
            at = int(starts[j])
            stacked[row, :, at : at + stop - start] = values[i, :, start:stop]
            for k in range(stop - start):
                words[at + k][effects.labels[i][start + k]] += 1
                differs[at + k] |= differing(effects, i)[start + k]
    there = np.isfinite(stacked)
    count = there.sum(0)
    mean = np.where(count > 0, np.where(there, stacked, 0).sum(0) / np.maximum(count, 1), np.nan)
    tokens = []
    for counter in words:
        token, times = counter.most_common(1)[0]
        tokens.append(token if 2 * times > counter.total() else "*")
    segments = [name for name, width in zip(shape, widths, strict=True) for _ in range(width)]
    return mean, tokens, segments, differs, len(chosen)


def differing(effects: Effects, pair: int) -> tuple[bool, ...]:
    """Whether the tokens of each column of a pair differ between its two rows."""
    if effects.differs:
        return effects.differs[pair]
    return tuple(name == BIAS for name in effects.segments[pair])


def differing_segments(effects: Effects) -> tuple[str, ...]:
    """The segments in which tokens differ, in some pair."""
    return tuple(
        dict.fromkeys(
            name
            for i, row in enumerate(effects.segments)
            for name, differs in zip(row, differing(effects, i), strict=True)
            if differs
        )
    )


def _within(names: Sequence[str], shape: Sequence[str]) -> list[int] | None:
    """Return the index of each name in `shape`; None if `names` is no subsequence of it."""
    places: list[int] = []
    for name in names:
        start = places[-1] + 1 if places else 0
        if name not in shape[start:]:
            return None
        places.append(shape.index(name, start))
    return places
