"""Redraw plotly figures with matplotlib, where plotly has no browser to draw images with.

Supports the elements of this package's figures: one heatmap, or lines, markers, filled bands
and bars on one pair of axes. Patterns of bars and hover texts are left out.
"""

import io
import re
from collections.abc import Sequence
from html import unescape
from typing import Any

import numpy as np
import plotly.graph_objects as go

_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (8, 3))}
_SYMBOLS = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X"}
_SYMBOLS |= {"cross": "P", "star": "*", "diamond-open": "D"}
_POINTS = 72 / 96  # points per CSS pixel


class UnsupportedFigureError(ValueError):
    """The figure has parts that matplotlib cannot redraw."""


def draw_image(figure: go.Figure, kind: str, *, width: int, height: int, dpi: float) -> bytes:
    """Draw a figure as an image.

    Args:
        figure: A plotly figure with solid colors for paper and font.
        kind: "png", "svg" or "pdf".
        width: Width in CSS pixels.
        height: Height in CSS pixels.
        dpi: Dots per inch of a PNG.

    Raises:
        UnsupportedFigureError: If the figure has traces or text that cannot be redrawn.
    """
    unsupported = {trace.type for trace in figure.data} - {"heatmap", "scatter", "bar"}
    if unsupported:
        raise UnsupportedFigureError(f"matplotlib cannot redraw {', '.join(sorted(unsupported))}")
    if figure.layout.xaxis.visible is False:
        raise UnsupportedFigureError("matplotlib cannot redraw a figure that consists of text")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout = figure.layout
    canvas = Figure(figsize=(width / 96, height / 96), dpi=dpi, facecolor=layout.paper_bgcolor)
    FigureCanvasAgg(canvas)
    margin = layout.margin
    axes = canvas.add_axes(
        (
            margin.l / width,
            margin.b / height,
            (width - margin.l - margin.r) / width,
            (height - margin.t - margin.b) / height,
        )
    )
    axes.set_facecolor("#C8C8C8" if figure.data[0].type == "heatmap" else layout.paper_bgcolor)
    ink = layout.font.color
    stacked: dict[float, float] = {}  # top of the bars so far, by position
    for trace in figure.data:
        if trace.type == "heatmap":
            _heatmap(canvas, axes, trace, ink)
        elif trace.type == "bar":
            _bars(axes, trace, stacked if layout.barmode == "stack" else {})
        else:
            _scatter(axes, trace)
    _shapes(axes, layout)
    _axis(axes, "x", layout.xaxis, ink)
    _axis(axes, "y", layout.yaxis, ink)
    _title(canvas, layout, height)
    if layout.showlegend:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0, layout.legend.y),
            frameon=False,
            fontsize=12 * _POINTS,
            labelcolor=ink,
            borderpad=0,
            borderaxespad=0,
        )
    stream = io.BytesIO()
    # Without dates and with a fixed salt, the same figure gives the same file.
    date = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "divergence-lens", "svg.fonttype": "none"}):
        canvas.savefig(stream, format=kind, facecolor=layout.paper_bgcolor, metadata=date)
    return stream.getvalue()


def _plain(text: Any) -> str:
    """Remove the tags and entities of plotly's text."""
    return unescape(re.sub(r"<[^<>]*>", "", str(text or "")))


def _color(color: str) -> Any:
    """Convert a CSS color for matplotlib."""
    parts = re.fullmatch(r"rgba\((.*)\)", color)
    if parts is None:
        return color
    red, green, blue, opacity = (float(part) for part in parts[1].split(","))
    return (red / 255, green / 255, blue / 255, opacity)


def _values(values: Any) -> Any:
    """Convert a trace's values to floats; gaps become NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _heatmap(canvas: Any, axes: Any, trace: Any, ink: str) -> None:
    """Draw a heatmap with its color bar under the plot."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("diverging", [tuple(s) for s in trace.colorscale])
    z = np.array(trace.z, dtype=float)  # [rows, columns]
    edges = [np.arange(size + 1) - 0.5 for size in (z.shape[1], z.shape[0])]
    mesh = axes.pcolormesh(
        *edges, np.ma.masked_invalid(z), cmap=colors, vmin=trace.zmin, vmax=trace.zmax
    )
    if trace.texttemplate:
        for (row, column), value in np.ndenumerate(z):
            if np.isfinite(value):
                light = abs(value) < 0.6 * trace.zmax
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=11 * _POINTS,
                    color="#222222" if light else "#FFFFFF",
                )
    box = axes.get_position()
    height = canvas.get_figheight() * 96
    bar_axes = canvas.add_axes((box.x0, box.y0 - 74 / height, box.width, 10 / height))
    bar = canvas.colorbar(mesh, cax=bar_axes, orientation="horizontal")
    bar.outline.set_visible(False)
    bar_axes.set_title(
        _plain(trace.colorbar.title.text), fontsize=11 * _POINTS, color=ink, loc="left", pad=3
    )
    bar_axes.tick_params(labelsize=10 * _POINTS, colors=ink, length=0)


def _bars(axes: Any, trace: Any, stacked: dict[float, float]) -> None:
    """Draw bars, on top of those already in `stacked`, with intervals and labels."""
    x, y = _values(trace.x), _values(trace.y)
    bottom = np.array([stacked.get(place, 0.0) for place in x.tolist()])
    opacity = trace.marker.opacity
    containers = axes.bar(
        x, y, width=trace.width, bottom=bottom, color=trace.marker.color, label=_label(trace)
    )
    if opacity is not None:
        for patch, alpha in zip(containers, np.broadcast_to(opacity, len(x)), strict=True):
            patch.set_alpha(float(alpha))
    stacked.update(zip(x.tolist(), (bottom + y).tolist(), strict=True))
    _error_bars(axes, x, y, trace.error_y, name="yerr", color=trace.marker.color)


def _scatter(axes: Any, trace: Any) -> None:
    """Draw a line, markers, or a filled band."""
    x, y = _values(trace.x), _values(trace.y)
    if trace.fill == "toself":
        axes.fill(x, y, color=_color(trace.fillcolor), linewidth=0)
        return
    mode = trace.mode or "lines"
    color = trace.line.color if "lines" in mode else trace.marker.color
    hollow = str(trace.marker.symbol or "").endswith("-open")
    outline = trace.marker.line
    axes.plot(
        x,
        y,
        color=color,
        alpha=trace.opacity or trace.marker.opacity,
        label=_label(trace),
        linestyle=_DASHES.get(trace.line.dash or "solid", "--") if "lines" in mode else "none",
        linewidth=(trace.line.width or 2) * _POINTS,
        marker=_SYMBOLS.get(trace.marker.symbol or "circle", "o") if "markers" in mode else "none",
        markersize=(trace.marker.size or 6) * _POINTS,
        markerfacecolor="none" if hollow else trace.marker.color or color,
        markeredgecolor=outline.color or color,
        markeredgewidth=(outline.width or 1) * _POINTS,
    )
    _error_bars(axes, x, y, trace.error_y, name="yerr", color=color)
    _error_bars(axes, x, y, trace.error_x, name="xerr", color=color)


def _error_bars(axes: Any, x: Any, y: Any, error: Any, *, name: str, color: str) -> None:
    if error.array is None:
        return
    ends = np.abs(np.stack([_values(error.arrayminus), _values(error.array)]))  # [2, points]
    axes.errorbar(
        x,
        y,
        **{name: ends},
        fmt="none",
        ecolor=error.color or color,
        elinewidth=(error.thickness or 1.2) * _POINTS,
        capsize=(error.width or 3) * _POINTS,
    )


def _label(trace: Any) -> str:
    """Return a trace's label in the legend; matplotlib leaves out those with an underscore."""
    shown = trace.showlegend is not False and trace.name
    return _plain(trace.name) if shown else "_"


def _shapes(axes: Any, layout: Any) -> None:
    """Draw the separators and the frame of heatmaps, which span the width of the plot."""
    for shape in layout.shapes:
        for edge in {shape.y0, shape.y1}:
            axes.axhline(edge, color=_color(shape.line.color), linewidth=shape.line.width * _POINTS)
    for note in layout.annotations:
        axes.annotate(
            _plain(note.text),
            (0, note.y),
            xycoords=("axes fraction", "data"),
            xytext=((note.xshift or 0) * _POINTS, 0),
            textcoords="offset points",
            rotation=-(note.textangle or 0),
            ha="center",
            va="center",
            fontsize=(note.font.size or 12) * _POINTS,
            color=layout.font.color,
        )


def _axis(axes: Any, name: str, axis: Any, ink: str) -> None:
    """Set the title, scale, range and ticks of one axis."""
    from matplotlib.ticker import NullFormatter, PercentFormatter

    own = getattr(axes, f"{name}axis")
    log = axis.type == "log"
    if log:
        getattr(axes, f"set_{name}scale")("log")
        own.set_minor_formatter(NullFormatter())
    own.set_label_text(_plain(axis.title.text), color=ink, fontsize=12 * _POINTS)
    if axis.range is not None:
        low, high = axis.range
        # Plotly gives the range of a logarithmic axis as exponents.
        getattr(axes, f"set_{name}lim")(*((10**low, 10**high) if log else (low, high)))
    elif axis.rangemode == "tozero":
        limits = getattr(axes, f"get_{name}lim")()
        getattr(axes, f"set_{name}lim")(min(limits[0], 0), max(limits[1], 0))
    if str(axis.tickformat or "").endswith("%"):
        own.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if axis.tickvals is not None:
        _ticks(own, axis, sorted(getattr(axes, f"get_{name}lim")()))
    if axis.tickangle:
        axes.tick_params(axis=name, rotation=-axis.tickangle)
    size = axis.tickfont.size or 12
    axes.tick_params(axis=name, colors=ink, labelsize=size * _POINTS, length=0)
    if axis.showgrid:
        axes.grid(axis=name, color=_color(axis.gridcolor), linewidth=0.8)
        axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_color(_color(axis.linecolor))


def _ticks(own: Any, axis: Any, limits: Sequence[float]) -> None:
    """Set the ticks of one axis within its limits; texts in bold tags are bold."""
    texts = axis.ticktext or [f"{value:g}" for value in axis.tickvals]
    shown = [
        (value, str(text))
        for value, text in zip(axis.tickvals, texts, strict=True)
        if limits[0] <= value <= limits[1]
    ]
    own.set_ticks([value for value, _ in shown], [_plain(text) for _, text in shown])
    for label, (_, text) in zip(own.get_ticklabels(), shown, strict=True):
        if text.startswith("<b>"):
            label.set_fontweight("bold")


def _title(canvas: Any, layout: Any, height: int) -> None:
    """Write the lines of the title at the top left, the bold ones first."""
    for number, line in enumerate(str(layout.title.text or "").split("<br>")):
        canvas.text(
            8 / (canvas.get_figwidth() * 96),
            1 - (20 + 17 * number) / height,
            _plain(line),
            fontsize=(13 if line.startswith("<b>") else 12) * _POINTS,
            fontweight="bold" if line.startswith("<b>") else "normal",
            color=layout.font.color,
            va="center",
        )
