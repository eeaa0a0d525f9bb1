"""The tokens of one completion as a figure, colored by divergence."""

import textwrap
from typing import Any

import plotly.graph_objects as go

from divergence_lens._utils.wording import plural
from divergence_lens.divergence import ExampleDivergence
from divergence_lens.plots import style

_COLUMNS = 36  # letters of 12 pixels that fit across 80 mm
_LINE = 30  # pixels from one line of tokens to the next
_ORANGE, _BLUE = style.ORANGE, style.SKY


def divergence_tokens(example: ExampleDivergence) -> go.Figure:
    """Draw the tokens of one completion, colored and underlined by divergence.

    Divergence tokens are orange with a solid line, stronger where more counterfactual teachers
    differ. Tokens that are not the teacher's own argmax are blue with a dotted line. Hover texts
    show the argmax of each teacher.

    Args:
        example: One example of a `Divergence`, such as `divergence[0]`.

    Raises:
        ValueError: The completion holds no tokens.
    """
    if not len(example):
        raise ValueError(f"example {example.index} has an empty completion; it has no tokens")
    shown = [style.show_token(token.strip(" ") or token, 16) for token in example.tokens]
    widths = [max(len(token.strip(" ") or token), 1) for token in example.tokens]
    places = _placed([min(width, 16) for width in widths])
    rows = 1 + max(row for _, _, row in places)
    shapes: list[dict[str, Any]] = []
    for i, place in enumerate(places):
        shapes += _mark(example, i, place)
    hover = go.Scatter(
        x=[(start + stop) / 2 for start, stop, _ in places],
        y=[row for _, _, row in places],
        mode="markers",
        marker={"size": 22, "color": style.GREY, "opacity": 0},
        text=[style.escape(example.describe(i)).replace("\n", "<br>") for i in range(len(example))],
        hoverinfo="text",
        showlegend=False,
    )
    count = int(example.divergence.sum())
    others = int((~example.agrees & ~example.divergence).sum())
    detail = (
        f"{count} of {plural(len(example), 'token')} diverge (orange, solid line; stronger "
        f"where more of {len(example.names) - 1} counterfactuals differ)"
    )
    if others:
        detail += f"; {others} not the argmax of {example.names[0]} (blue, dotted line)"
    prompt = textwrap.shorten(str(example.prompt), 80, placeholder=" …")
    return style.figure(
        [hover],
        headline=f"Divergence tokens of example {example.index}, {example.names[0]}",
        detail=f"{detail}; prompt: {prompt}",
        plot_height=max(_LINE * rows, 90),
        bottom=12,
        left=8,
        right=8,
        widest=460,
        shapes=shapes,
        annotations=[
            {
                "text": token,
                "x": (start + stop) / 2,
                "y": row,
                "showarrow": False,
                "font": {"family": style.MONO, "size": 12},
                "borderpad": 0,
            }
            for token, (start, stop, row) in zip(shown, places, strict=True)
        ],
        xaxis={"visible": False, "range": [0, _COLUMNS], "fixedrange": True},
        yaxis={
            "visible": False,
            "range": [max(rows, 90 / _LINE) - 0.5, -0.5],
            "fixedrange": True,
        },
    )


def _placed(widths: list[int]) -> list[tuple[float, float, int]]:
    """Lay out tokens in reading order: start and stop in letters, and line, of each."""
    places = []
    at, row = 0.5, 0
    for width in widths:
        if at + width + 0.6 > _COLUMNS:
            at, row = 0.5, row + 1
        places.append((at, at + width + 0.6, row))
        at += width + 1.1
    return places


def _mark(example: ExampleDivergence, i: int, place: tuple[float, float, int]) -> list[Any]:
    """Return the colored box and the line of a token; nothing for a plain token."""
    start, stop, row = place
    if example.divergence[i]:
        share = float(example.differs[:, i].mean())
        color, opacity, dash = _ORANGE, 0.2 + 0.5 * share, "solid"
    elif not example.agrees[i]:
        color, opacity, dash = _BLUE, 0.3, "dot"
    else:
        return []
    box = {
        "type": "rect",
        "x0": start,
        "x1": stop,
        "y0": row - 0.36,
        "y1": row + 0.36,
        "fillcolor": style.shade(color, round(opacity, 2)),
        "line": {"width": 0},
        "layer": "below",
    }
    line = {
        "type": "line",
        "x0": start,
        "x1": stop,
        "y0": row + 0.36,
        "y1": row + 0.36,
        "line": {"color": style.INK, "width": 2, "dash": dash},
    }
    return [box, line]
