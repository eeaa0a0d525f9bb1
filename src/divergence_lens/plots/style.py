"""How every figure looks: colors, type, margins and the text on it.

A figure is laid out for a column of 80 mm (302 CSS pixels, type of 12 pixels or 9 points) and
grows from there. Backgrounds are clear and the ink is a gray that is readable on white and on
black alike, so that a figure shown in a notebook fits whatever theme the notebook has.
"""

import html
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

# Contrast 4.5 to 1 on white and 4.6 to 1 on black: the one gray that passes on both.
INK = "#767676"
FAINT = "rgba(128, 128, 128, 0.28)"
MISSING = "rgba(128, 128, 128, 0.38)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

# Okabe and Ito's palette, which people with the common color blindnesses can tell apart, without
# its yellow (lost on white) and its black (lost on black), and with a blue that stands out on both.
BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE = (
    "#1F83C4",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#56B4E9",
    "#CC79A7",
)
GREY = "#8C8C8C"
CYCLE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, GREY)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")

# Blue for less, orange for more, equally light at equal distance from zero.
DIVERGING: tuple[tuple[float, str], ...] = (
    (0.0, "#053061"),
    (0.15, "#1B62A5"),
    (0.32, "#6CA7D2"),
    (0.44, "#CFE3F0"),
    (0.5, "#F8F8F6"),
    (0.56, "#FBE0C6"),
    (0.68, "#EE9B4E"),
    (0.85, "#C05A0C"),
    (1.0, "#662C00"),
)

_MARKS = str.maketrans({" ": "·", "\n": "↵", "\r": "↵", "\t": "⇥"})


def escape(text: object) -> str:
    """`text` as plotly shows it letter by letter, without reading tags or entities in it."""
    return html.escape(str(text), quote=False)


def show_token(token: str, longest: int = 14) -> str:
    """A token as it stands on an axis: white space visible, cut to `longest` letters, escaped."""
    shown = token.translate(_MARKS) or "∅"
    if len(shown) > longest:
        shown = shown[: longest - 1] + "…"
    return escape(shown)


def plural(count: int, noun: str) -> str:
    """The count with its noun: "1 pair", "1,200 pairs"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def percent(value: float) -> str:
    """A share in words for people: "12.3 %", with two digits more below one per cent."""
    shown = 100 * value
    return f"{shown:.1f} %" if abs(shown) >= 1 or shown == 0 else f"{shown:.2g} %"


def shade(color: str, opacity: float) -> str:
    """A hex color, see-through."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def figure(
    traces: Sequence[Any],
    *,
    what: str,
    detail: str,
    plot_height: int,
    bottom: int = 48,
    left: int = 52,
    right: int = 10,
    widest: int = 720,
    legend_rows: int = 0,
    **layout: Any,
) -> go.Figure:
    """A figure in the house style, apart from plotly's global template.

    Args:
        traces: Its traces.
        what: The first, bold lines of the title: what was measured.
        detail: The lines under it: on how many, of what. Both are plain text.
        plot_height: Height of the plot itself in pixels; title and margins come on top.
        bottom: Room under the plot for ticks and axis title, in pixels.
        left: Room left of the plot.
        right: Room right of the plot.
        widest: Pixels beyond which a page should not stretch it (kept in `layout.meta`).
        legend_rows: Entries of the legend, which stands under the plot, one below the other so that
            the figure's height does not depend on its width.
        **layout: Anything else of plotly's layout.
    """
    for trace in traces:
        if trace.text is not None:
            trace.text = _wrapped(trace.text)
    headline = _balanced(what, 36)
    notes = _balanced(detail, 42)
    lines = [f"<b>{escape(line)}</b>" for line in headline]
    lines += [f'<span style="font-size:12px">{escape(line)}</span>' for line in notes]
    top = 24 + 17 * len(headline) + 17 * len(notes)
    legend_top = bottom
    bottom += 20 * legend_rows + (8 if legend_rows else 0)
    base: dict[str, Any] = {
        "template": go.layout.Template(),
        "title": {
            "text": "<br>".join(lines),
            "font": {"size": 13},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 20, "l": 8},
        },
        "font": {"family": FONT, "size": 12, "color": INK},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": list(CYCLE),
        "hoverlabel": {
            "bgcolor": "#222222",
            "bordercolor": "#222222",
            "font": {"color": "#FFFFFF", "size": 12, "family": FONT},
            "align": "left",
        },
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": INK, "activecolor": BLUE},
        "height": top + plot_height + bottom,
        "margin": {"t": top, "b": bottom, "l": left, "r": right, "autoexpand": False},
        "showlegend": legend_rows > 0,
        "legend": {
            "x": 0,
            "xanchor": "left",
            "y": -legend_top / plot_height,
            "yanchor": "top",
            "font": {"size": 12},
            "bgcolor": "rgba(0,0,0,0)",
            "itemsizing": "constant",
            "traceorder": "normal",
            "tracegroupgap": 0,
        },
        "meta": {"widest": widest},
    }
    return go.Figure(data=list(traces), layout={**base, **layout})


def _wrapped(text: Any) -> Any:
    """Hover texts, in lists of lists for heatmaps, in lines that fit beside a point at 80 mm."""
    if isinstance(text, str):
        lines = [
            "<br>".join(
                textwrap.wrap(_glued(line), 26, break_long_words=False, break_on_hyphens=False)
            )
            for line in text.split("<br>")
        ]
        return "<br>".join(lines)
    return text if text is None else [_wrapped(part) for part in text]


def _glued(text: str) -> str:
    """`text` in which a number and what it counts stay on one line."""
    return re.sub(r"(?<=\d) (?=[a-z%])", "\u00a0", text)


def _balanced(text: str, widest: int) -> list[str]:
    """`text` in as few lines as fit, of about equal length."""
    text = _glued(text)
    lines = textwrap.wrap(text, widest)
    for width in range(widest - 1, 0, -1):
        narrower = textwrap.wrap(text, width, break_long_words=False)
        if len(narrower) > len(lines) or max(map(len, narrower)) > width:
            break
        lines = narrower
    return lines


def axis(title: str, *, grid: bool = True, **more: Any) -> dict[str, Any]:
    """One axis: thin lines, a title in words, no zoom surprises."""
    return {
        "title": {"text": title, "font": {"size": 12}, "standoff": 4},
        "showgrid": grid,
        "gridcolor": FAINT,
        "zeroline": False,
        "showline": True,
        "linecolor": FAINT,
        "ticks": "",
        "automargin": False,
        **more,
    }


def thinned(numbers: Sequence[int], most: int) -> list[int]:
    """At most `most` of the numbers, evenly spaced, for the ticks of an axis."""
    step = max(1, -(-len(numbers) // most))
    return [int(number) for number in numbers[::step]]


def diverging(limit: float, title: str, plot_height: int) -> dict[str, Any]:
    """Zero-centered colors of a heatmap from -limit to limit, with their bar under the plot."""
    return {
        "colorscale": [list(stop) for stop in DIVERGING],
        "zmin": -limit,
        "zmid": 0,
        "zmax": limit,
        "hoverongaps": True,
        "colorbar": {
            "orientation": "h",
            "x": 0.5,
            "xanchor": "center",
            "y": -44 / plot_height,
            "yref": "paper",
            "yanchor": "top",
            "len": 1,
            "thickness": 10,
            "outlinewidth": 0,
            "nticks": 5,
            "title": {"text": title, "side": "top", "font": {"size": 11}},
            "tickfont": {"size": 10},
            "ypad": 0,
            "xpad": 0,
        },
    }
