"""Redraw plotly figures with matplotlib, where plotly has no browser to draw images with.

Supports the elements of this package's figures: panels of heatmaps with one color bar; lines,
markers, filled bands and bars; boxes, lines and texts. Hover texts are left out.
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layout = figure.layout
    canvas = Figure(figsize=(width / 96, height / 96), dpi=dpi, facecolor=layout.paper_bgcolor)
    FigureCanvasAgg(canvas)
    ink = layout.font.color
    panels = _panels(canvas, figure, width, height)
    stacked: dict[float, float] = {}  # top of the bars so far, by position
    mesh = None
    for trace in figure.data:
        axes = panels[trace.xaxis or "x"]
        if trace.type == "heatmap":
            mesh = _heatmap(axes, trace, layout.coloraxis)
        elif trace.type == "bar":
            _bars(axes, trace, stacked if layout.barmode == "stack" else {})
        else:
            _scatter(axes, trace)
    for name, axes in panels.items():
        for letter in "xy":
            _axis(axes, letter, layout[f"{letter}axis{name[1:]}"], ink)
    _shapes(panels, layout)
    _notes(canvas, panels, layout)
    if mesh is not None:
        _color_bar(canvas, mesh, layout, width, height)
    _title(canvas, layout, height)
    if layout.showlegend:
        panels["x"].legend(
            **_legend_entries(panels["x"], figure.data),
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

    # A hatch (the pattern of a bar) has the line width of the context.
    with mpl.rc_context(
        {"svg.hashsalt": "divergence-lens", "svg.fonttype": "none", "hatch.linewidth": 1.2}
    ):
        canvas.savefig(stream, format=kind, facecolor=layout.paper_bgcolor, metadata=date)
    return stream.getvalue()


def _plain(text: Any) -> str:
    """Remove the tags and entities of plotly's text."""
    return unescape(re.sub(r"<[^<>]*>", "", str(text or "").replace("<br>", "\n")))


def _color(color: str | None) -> Any:
    """Convert a CSS color for matplotlib."""
    parts = re.fullmatch(r"rgba\((.*)\)", color or "")
    if parts is None:
        return color
    red, green, blue, opacity = (float(part) for part in parts[1].split(","))
    return (red / 255, green / 255, blue / 255, opacity)


def _values(values: Any) -> Any:
    """Convert a trace's values to floats; gaps become NaN."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _panels(canvas: Any, figure: go.Figure, width: int, height: int) -> dict[str, Any]:
    """Create the axes of each panel, by the name of its horizontal axis."""
    margin = figure.layout.margin
    plot_width, plot_height = width - margin.l - margin.r, height - margin.t - margin.b
    panels = {}
    for name in dict.fromkeys(trace.xaxis or "x" for trace in figure.data):
        left, right = figure.layout[f"xaxis{name[1:]}"].domain or (0, 1)
        low, high = figure.layout[f"yaxis{name[1:]}"].domain or (0, 1)
        axes = canvas.add_axes(
            (
                (margin.l + left * plot_width) / width,
                (margin.b + low * plot_height) / height,
                (right - left) * plot_width / width,
                (high - low) * plot_height / height,
            )
        )
        heat = any(trace.type == "heatmap" for trace in figure.data)
        axes.set_facecolor("#C8C8C8" if heat else figure.layout.paper_bgcolor)
        panels[name] = axes
    return panels


def _heatmap(axes: Any, trace: Any, colors: Any) -> Any:
    """Draw the cells of a heatmap; return them for the color bar."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("figure", [tuple(s) for s in colors.colorscale])
    z = np.array(trace.z, dtype=float)  # [rows, columns]
    edges = [np.arange(size + 1) - 0.5 for size in (z.shape[1], z.shape[0])]
    mesh = axes.pcolormesh(
        *edges,
        np.ma.masked_invalid(z),
        cmap=scale,
        vmin=colors.cmin,
        vmax=colors.cmax,
        edgecolors="#E2E2E2",
        linewidth=(trace.xgap or 0) * _POINTS * 0.6,
    )
    if trace.texttemplate:
        for (row, column), value in np.ndenumerate(z):
            if np.isfinite(value):
                share = (value - colors.cmin) / (colors.cmax - colors.cmin)
                dark = sum(scale(share)[:3]) < 1.5
                axes.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=11 * _POINTS,
                    color="#FFFFFF" if dark else "#444444",
                )
    return mesh


def _color_bar(canvas: Any, mesh: Any, layout: Any, width: int, height: int) -> None:
    """Draw the color bar below the plot, where plotly has it."""
    margin, bar = layout.margin, layout.coloraxis.colorbar
    plot_height = height - margin.t - margin.b
    title = _plain(bar.title.text)
    lines = title.count("\n") + 1
    # From the bottom of the plot down: ticks and axis title, the title of the bar, the bar.
    bottom = margin.b + bar.y * plot_height - 15 * lines - 14
    middle = margin.l + (width - margin.l - margin.r) / 2
    axes = canvas.add_axes(
        ((middle - bar.len / 2) / width, bottom / height, bar.len / width, bar.thickness / height)
    )
    drawn = canvas.colorbar(mesh, cax=axes, orientation="horizontal")
    drawn.set_ticks(list(bar.tickvals), labels=list(bar.ticktext))
    drawn.outline.set_visible(False)
    axes.set_title(title, fontsize=11 * _POINTS, color=layout.font.color, loc="center", pad=3)
    axes.tick_params(labelsize=10 * _POINTS, colors=layout.font.color, length=0)


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
    if trace.marker.pattern.shape:
        for patch in containers:
            # The hatch has the color of the edge, which itself has no width.
            patch.set(hatch=3 * trace.marker.pattern.shape, edgecolor="#FFFFFF99", linewidth=0)
    stacked.update(zip(x.tolist(), (bottom + y).tolist(), strict=True))
    _error_bars(axes, x, y, trace.error_y, name="yerr", color=trace.marker.color)


def _scatter(axes: Any, trace: Any) -> None:
    """Draw a line, markers, or a filled band."""
    x, y = _values(trace.x), _values(trace.y)
    if trace.fill == "toself":
        axes.fill(x, y, color=_color(trace.fillcolor), linewidth=0)
        return
    mode = trace.mode or "lines"
    color = _color(trace.line.color if "lines" in mode else trace.marker.color)
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
        markerfacecolor="none" if hollow else _color(trace.marker.color) or color,
        markeredgecolor=_color(outline.color) or color,
        markeredgewidth=(outline.width or 1) * _POINTS,
    )
    _error_bars(axes, x, y, trace.error_y, name="yerr", color=color)
    _error_bars(axes, x, y, trace.error_x, name="xerr", color=color)


def _error_bars(axes: Any, x: Any, y: Any, error: Any, *, name: str, color: Any) -> None:
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


def _legend_entries(axes: Any, traces: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """Return the entries of the legend in the order of the traces; matplotlib has lines first."""
    place = {_label(trace): number for number, trace in reversed(list(enumerate(traces)))}
    drawn = sorted(
        zip(*axes.get_legend_handles_labels(), strict=True), key=lambda d: place.get(d[1], 0)
    )
    return {"handles": [handle for handle, _ in drawn], "labels": [label for _, label in drawn]}


def _place(axes: Any, reference: str) -> Any:
    """The transform of a coordinate: data, or shares of the panel (or the plot)."""
    if reference.endswith("domain") or reference == "paper":
        return axes.transAxes
    return axes.transData


def _shapes(panels: dict[str, Any], layout: Any) -> None:
    """Draw lines and boxes between data coordinates, or across a panel."""
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import blended_transform_factory as blended

    for shape in layout.shapes:
        along = (shape.xref or "x").split()[0]
        axes = panels["x" + ("" if along == "paper" else along[1:])]
        place = blended(_place(axes, shape.xref or "x"), _place(axes, shape.yref or "y"))
        style: dict[str, Any] = {"transform": place, "linewidth": (shape.line.width or 0) * _POINTS}
        style["linestyle"] = _DASHES.get(shape.line.dash or "solid", "--")
        if shape.line.width:
            style["color" if shape.type == "line" else "edgecolor"] = _color(shape.line.color)
        if shape.type == "line":
            axes.plot([shape.x0, shape.x1], [shape.y0, shape.y1], clip_on=False, **style)
            continue
        fill = _color(shape.fillcolor) if shape.fillcolor else "none"
        corner, size = (shape.x0, shape.y0), (shape.x1 - shape.x0, shape.y1 - shape.y0)
        axes.add_patch(Rectangle(corner, *size, facecolor=fill, clip_on=False, zorder=3, **style))


def _notes(canvas: Any, panels: dict[str, Any], layout: Any) -> None:
    """Write the annotations."""
    from matplotlib.transforms import blended_transform_factory as blended

    vertical = {"bottom": "bottom", "top": "top"}
    for note in layout.annotations:
        if note.visible is False:
            continue
        along = (note.xref or "x").split()[0]
        paper = note.xref == note.yref == "paper"
        number = (note.yref or "y").split()[0][1:] if along == "paper" else along[1:]
        axes = panels["x"] if paper else panels[f"x{number}"]
        place = blended(_place(axes, note.xref or "x"), _place(axes, note.yref or "y"))
        x, y = note.x, note.y
        if paper:  # shares of the plot, which all panels form together
            place, (x, y) = canvas.transFigure, _of_plot(canvas, layout, x, y)
        font = note.font.family or ""
        axes.annotate(
            _plain(note.text),
            (x, y),
            xycoords=place,
            xytext=((note.xshift or 0) * _POINTS, (note.yshift or 0) * _POINTS),
            textcoords="offset points",
            rotation=-(note.textangle or 0),
            ha="center",
            va=vertical.get(note.yanchor, "center"),
            fontsize=(note.font.size or 12) * _POINTS,
            fontfamily="monospace" if "mono" in font else "sans-serif",
            color=layout.font.color,
        )


def _of_plot(canvas: Any, layout: Any, x: float, y: float) -> tuple[float, float]:
    """Convert a share of the plot to a share of the image."""
    width, height = canvas.get_figwidth() * 96, canvas.get_figheight() * 96
    margin = layout.margin
    return (
        (margin.l + x * (width - margin.l - margin.r)) / width,
        (margin.b + y * (height - margin.t - margin.b)) / height,
    )


def _axis(axes: Any, name: str, axis: Any, ink: str) -> None:
    """Set the title, scale, range and ticks of one axis."""
    from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

    own = getattr(axes, f"{name}axis")
    log = axis.type == "log"
    if log:
        getattr(axes, f"set_{name}scale")("log")
        own.set_minor_formatter(NullFormatter())
    own.set_label_text(_plain(axis.title.text), color=ink, fontsize=12 * _POINTS)
    own.labelpad = 2
    if axis.range is not None:
        low, high = axis.range
        # Plotly gives the range of a logarithmic axis as exponents.
        getattr(axes, f"set_{name}lim")(*((10**low, 10**high) if log else (low, high)))
    elif axis.rangemode == "tozero":
        limits = getattr(axes, f"get_{name}lim")()
        getattr(axes, f"set_{name}lim")(min(limits[0], 0), max(limits[1], 0))
    if str(axis.tickformat or "").endswith("%"):
        small = max(map(abs, getattr(axes, f"get_{name}lim")())) < 0.05
        own.set_major_formatter(PercentFormatter(1.0, decimals=int(small)))
        # Steps of 2.5 % would be labeled with rounded numbers.
        own.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
    if axis.tickvals is not None:
        _ticks(own, axis, sorted(getattr(axes, f"get_{name}lim")()))
    if axis.tickangle:
        axes.tick_params(axis=name, rotation=-axis.tickangle)
    if axis.visible is False:
        axes.set_axis_off()
        return
    _tick_labels(axes, name, axis, ink)
    if axis.showgrid:
        axes.grid(axis=name, color=_color(axis.gridcolor), linewidth=0.8)
        axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_color(_color(axis.linecolor))


def _tick_labels(axes: Any, name: str, axis: Any, ink: str) -> None:
    size = axis.tickfont.size or 12
    axes.tick_params(axis=name, colors=ink, labelsize=size * _POINTS, length=0)
    if "mono" in (axis.tickfont.family or ""):
        axes.tick_params(axis=name, labelfontfamily="monospace")
    if axis.showticklabels is False:
        axes.tick_params(axis=name, labelbottom=False, labelleft=False)


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
            1 - (16 + 17 * number) / height,
            _plain(line),
            fontsize=(13 if line.startswith("<b>") else 12) * _POINTS,
            fontweight="bold" if line.startswith("<b>") else "normal",
            color=layout.font.color,
            va="center",
        )
