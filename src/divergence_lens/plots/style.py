"""The style of every figure: colors, type, margins and axes.

A figure is laid out for a column of 80 mm (302 CSS pixels, type of 12 pixels or 9 points) and grows
from there. Backgrounds are transparent, and the text is a gray that is readable on white and on
black, so that a figure fits the light and the dark theme of a notebook.
"""

import html
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

# Contrast 4.5 to 1 on white and 4.6 to 1 on black: the one gray that passes on both.
INK = "#767676"
FAINT = "rgba(128, 128, 128, 0.28)"
MISSING = "rgba(128, 128, 128, 0.38)"
LINE = 17  # pixels per line of a title
BAR_LENGTH = 220  # pixels of a color bar
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

# Okabe and Ito's palette, which people with the common color blindnesses can distinguish, without
# yellow (invisible on white) and black (invisible on black), and with a blue that shows on both.
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


def model_label(metadata: Mapping[str, Any]) -> str:
    """The model of a result for a caption, or an empty text. A folder goes by its last part."""
    name = str(metadata.get("model", {}).get("name") or "").rstrip("/")
    return f"model {name.rsplit('/', 1)[-1]}" if name else ""


def escape(text: object) -> str:
    """Escape text, so that plotly shows tags and entities in it as they are."""
    return html.escape(str(text), quote=False)


def show_token(token: str, longest: int = 14) -> str:
    """Format a token for an axis: visible white space, at most `longest` letters, escaped."""
    return escape(clipped(token, longest))


def clipped(token: str, longest: int) -> str:
    """Cut a token to at most `longest` letters, with visible white space; it is not escaped."""
    shown = token.translate(_MARKS) or "∅"
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def percent(value: float) -> str:
    """Format a share: "12.3 %", with two significant digits below one percent."""
    shown = 100 * value
    return f"{shown:.1f} %" if abs(shown) >= 1 or shown == 0 else f"{shown:.2g} %"


def shade(color: str, opacity: float) -> str:
    """Return a hex color with an opacity."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def figure(
    traces: Sequence[Any],
    *,
    headline: str,
    detail: str,
    plot_height: int,
    above: int = 0,
    bottom: int = 48,
    left: int = 52,
    right: int = 10,
    widest: int = 720,
    legend_rows: int = 0,
    **layout: Any,
) -> go.Figure:
    """Build a figure in this style, independent of plotly's global template.

    Args:
        traces: Plotly traces.
        headline: Bold lines of the title: the measured quantity, as plain text.
        detail: Lines below them: sample size and method, as plain text.
        plot_height: Height of the plot in pixels, without title and margins.
        above: Pixels between the title and the plot, for names of panels and groups.
        bottom: Pixels below the plot for ticks and axis title.
        left: Pixels left of the plot.
        right: Pixels right of the plot.
        widest: Width in pixels to which a page may stretch the figure (stored in `layout.meta`).
        legend_rows: Entries of the legend, one per line below the plot, so that the figure's height
            does not depend on its width.
        **layout: Further entries of plotly's layout.
    """
    for trace in traces:
        if trace.text is not None:
            trace.text = _wrapped(trace.text)
    lines = title_lines(headline, detail)
    top = 24 + LINE * len(lines) + above
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
        "meta": {"widest": widest, "headline": headline, "detail": detail},
    }
    return go.Figure(data=list(traces), layout={**base, **layout})


def title_lines(headline: str, detail: str, width: float = 302) -> list[str]:
    """Wrap a title to a width in pixels: bold lines, and smaller ones below them."""
    lines = [f"<b>{escape(line)}</b>" for line in _balanced(headline, int(width / 8.4))]
    notes = _balanced(detail, int(width / 7.15))
    return lines + [f'<span style="font-size:12px">{escape(line)}</span>' for line in notes]


def _wrapped(text: Any) -> Any:
    """Wrap hover texts (in nested lists for heatmaps) to fit beside a point at 80 mm."""
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
    """Join each number and the word after it by a no-break space."""
    return re.sub(r"(?<=\d) (?=[a-z%])", "\u00a0", text)


def _balanced(text: str, widest: int) -> list[str]:
    """Wrap text into as few lines as possible, of about equal length."""
    text = _glued(text)
    lines = textwrap.wrap(text, widest)
    for width in range(widest - 1, 0, -1) if lines else ():
        narrower = textwrap.wrap(text, width, break_long_words=False)
        if len(narrower) > len(lines) or max(map(len, narrower)) > width:
            break
        lines = narrower
    return lines


def axis(title: str, *, grid: bool = True, **more: Any) -> dict[str, Any]:
    """Build an axis with thin lines and a title."""
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


def layer_axis(
    layers: Sequence[int], *, title: str = "layer", most: int = 10, **more: Any
) -> dict[str, Any]:
    """The axis of layers, with at most `most` ticks."""
    return axis(title, grid=False, tickangle=0, tickvals=thinned(layers, most), **more)


def percent_axis(title: str, **more: Any) -> dict[str, Any]:
    """A vertical axis of shares that starts at 0."""
    return axis(title, tickformat=".0%", rangemode="tozero", **more)


def error_bars(
    values: Any, low: Any, high: Any, *, thickness: float, width: int = 3, **more: Any
) -> dict[str, Any] | None:
    """Intervals around values; None where there are none."""
    if low is None or high is None:
        return None
    values = np.asarray(values, dtype=float)
    above, below = np.asarray(high) - values, values - np.asarray(low)
    return {
        "type": "data",
        "symmetric": False,
        "array": above,
        "arrayminus": below,
        "thickness": thickness,
        "width": width,
        **more,
    }


_DASHES = {"control": "dot", "before": "dashdot"}


def level(label: str, ends: Sequence[float], value: float, words: str) -> go.Scatter:
    """Draw a dashed line across the plot at one value; the kinds of dashes differ by label."""
    return go.Scatter(
        x=[ends[0], (ends[0] + ends[1]) / 2, ends[1]],
        y=[value] * 3,
        mode="lines",
        name=escape(label),
        line={"color": INK, "width": 1.6, "dash": _DASHES.get(label, "dash")},
        text=[words] * 3,
        hoverinfo="text",
    )


def thinned(numbers: Sequence[int], most: int) -> list[int]:
    """Select at most `most` of the numbers, evenly spaced, for the ticks of an axis."""
    step = max(1, -(-len(numbers) // most))
    return [int(number) for number in numbers[::step]]


def round_ticks(limit: float) -> list[float]:
    """Return round numbers from -limit to limit: zero, and two to four on each side."""
    power = 10.0 ** math.floor(math.log10(limit / 2))
    step = power * max(factor for factor in (1, 2, 2.5, 5) if factor * power * 2 <= limit)
    count = math.floor(limit / step + 1e-9)
    return [i * step for i in range(-count, count + 1)]


def diverging(limit: float, title: str, *, below: int, plot_height: int) -> dict[str, Any]:
    """Return a zero-centered color axis from -limit to limit, with a bar below the plot.

    Args:
        limit: End of the scale.
        title: Title of the bar.
        below: Pixels between the plot and the bar, for ticks and axis title.
        plot_height: Height of the plot in pixels.
    """
    ticks = round_ticks(limit)
    return {
        "colorscale": [list(stop) for stop in DIVERGING],
        "cmin": -limit,
        "cmid": 0,
        "cmax": limit,
        "colorbar": {
            "orientation": "h",
            "x": 0.5,
            "xanchor": "center",
            "y": -below / plot_height,
            "yref": "paper",
            "yanchor": "top",
            "lenmode": "pixels",
            "len": BAR_LENGTH,
            "thickness": 10,
            "outlinewidth": 0,
            "tickvals": ticks,
            "ticktext": [f"{tick:.3g}" for tick in ticks],
            "title": {"text": title, "side": "top", "font": {"size": 11}},
            "tickfont": {"size": 10},
            "ypad": 0,
            "xpad": 0,
        },
    }
