"""Heatmaps of layers by positions, segments or heads: one panel, or several that share colors.

Layers run down and items across, as in TransformerLens's figures, or the other way round. Labels
that do not fit beside each other are thinned to the width at which the figure is written or shown:
first the position that is measured, then positions that differ, then evenly spaced ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from divergence_lens.plots import style
from divergence_lens.plots.color_limits import color_bar
from divergence_lens.plots.fitting import fitted

Orientation = Literal["layers_down", "layers_across"]

_LABEL = 10  # font size of tokens
_MOST_ROWS = 90  # tokens down the figure at full height
_WRITTEN = (6, 8)  # most layers and items of a panel whose values are written into its cells
_GAP = 0.035  # between panels beside each other, as a share of the plot
_MOST_APART = 80  # most items beside each other whose cells have gaps
_NAME = 26  # pixels between panels below each other, for the name of the lower one


@dataclass(frozen=True)
class Rows:
    """Names for the axis of layers, if it shows something else.

    Attributes:
        labels: Text of each row, already escaped.
        letters: Most letters of a label.
        noun: Title of the axis.
        hover: Text of each row for hover texts.
    """

    labels: Sequence[str]
    letters: int
    noun: str
    hover: Sequence[str]


@dataclass(frozen=True)
class Items:
    """The items on the axis that is not layers.

    Attributes:
        labels: Plain text for the axis, already escaped.
        letters: Most letters of a label.
        hover: Text of each item for hover texts, already escaped.
        noun: Title of the axis; empty for none.
        missing: Text for a cell without a value.
        bold: Whether the label of each item is bold.
        groups: Name, start and stop of each group of neighbors, or none.
        framed: The item with a frame.
    """

    labels: Sequence[str]
    letters: int
    hover: Sequence[str]
    noun: str = ""
    missing: str = "not measured"
    bold: Sequence[bool] = ()
    groups: Sequence[tuple[str, int, int]] = ()
    framed: int | None = None

    def shown(self, i: int) -> str:
        """The label of an item, in bold tags if it is bold."""
        return f"<b>{self.labels[i]}</b>" if self.bold and self.bold[i] else self.labels[i]

    def priority(self) -> list[int]:
        """All items, the most important labels first."""
        last = len(self.labels) - 1 if self.framed is None else self.framed
        bold = [i for i, is_bold in enumerate(self.bold) if is_bold]
        first = [] if self.framed is None else [self.framed]
        count = len(self.labels)
        # Halving steps from the framed item: each round is evenly spaced.
        step = 1 << max(count - 1, 1).bit_length()
        rest: list[int] = []
        while step:
            rest += [i for i in range(count) if (last - i) % step == 0]
            step //= 2
        return list(dict.fromkeys([*first, *bold, *rest]))


def heatmap(
    panels: Mapping[str, Float[np.ndarray, "layers items"]],
    items: Items,
    *,
    headline: str,
    detail: str,
    unit: str,
    orientation: Orientation,
    stacked: bool = False,
    limit: float | None = None,
    floor: float = 0.0,
    rows: Rows | None = None,
) -> go.Figure:
    """Draw panels of layers by items with one color scale.

    Args:
        panels: Values by the name of a panel, NaN where a cell is missing; all of one shape. The
            name of a single panel is not shown.
        items: The other axis.
        headline: Title.
        detail: Text below the title.
        unit: Title of the color bar, and name of the value in hover texts.
        orientation: Whether layers run down or across.
        stacked: Whether panels are below each other instead of beside each other.
        limit: End of the color scale; chosen from the values if None.
        floor: See `color_limits.color_limit`.
        rows: Shown instead of layers, which then run down.
    """
    if orientation not in ("layers_down", "layers_across"):
        raise ValueError(f"orientation is {orientation!r}; it is 'layers_down' or 'layers_across'")
    if limit is not None and not limit > 0:
        raise ValueError(f"limit is {limit!r}; the end of the color scale is a number above 0")
    down = orientation == "layers_down"
    layers, count = next(iter(panels.values())).shape
    end, bar_title = color_bar(list(panels.values()), unit, limit, floor)
    written = layers <= _WRITTEN[0] and count <= _WRITTEN[1] and len(panels) == 1
    size = (
        _layer_row(layers, written=written) * layers
        if down
        else _item_row(count, written=written) * count
    )
    height = max(90, size)
    if stacked:  # the panels share the height, with room for their names between them
        height = height * len(panels) + _NAME * (len(panels) - 1)
    domains = _domains(len(panels), _NAME / height if stacked else _GAP, stacked=stacked)
    named = len(panels) > 1
    label_pixels = round(6.2 * items.letters) + 8
    # Below the plot: labels of the items, or ticks and title of the layers; then the color bar.
    labels_below = label_pixels + (16 if items.noun else 0) if down else 44
    short = down and items.letters <= 2  # labels that need no rotation
    if short:
        labels_below = 20 + (18 if items.noun else 0)
    # Gaps and lines would hide cells that are a few pixels wide.
    crowded = count * (1 if stacked else len(panels)) > _MOST_APART
    numbers = range(layers)
    rows = rows or Rows(list(map(str, numbers)), 3, "layer", [f"layer {i}" for i in numbers])
    left = 18 + label_pixels + (16 if items.groups or items.noun else 0)
    if down:
        left = 24 + round(6.4 * rows.letters)
    above = (18 if named else 0) + (16 if down and items.groups else 0)
    traces: list[go.Heatmap] = []
    axes: dict[str, Any] = {}
    shapes: list[dict[str, Any]] = []
    notes: list[dict[str, Any]] = []
    for i, (name, values) in enumerate(panels.items()):
        suffix = str(i + 1) if i else ""
        own = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        traces.append(
            _trace(
                values,
                rows,
                items,
                name if named else "",
                unit,
                down=down,
                written=written,
                crowded=crowded,
            )
        )
        traces[-1].update(coloraxis="coloraxis", **own)
        (x0, x1), (y0, y1) = domains[i]
        layer_axis, item_axis = ("yaxis", "xaxis") if down else ("xaxis", "yaxis")
        outer = {"xaxis": not stacked or i == len(panels) - 1, "yaxis": stacked or i == 0}
        axes[layer_axis + suffix] = _layer_axis(rows, down=down, outer=outer[layer_axis], size=size)
        axes[item_axis + suffix] = _item_axis(items, down=down, outer=outer[item_axis], short=short)
        axes["xaxis" + suffix] |= {"domain": [x0, x1], "anchor": f"y{suffix}"}
        axes["yaxis" + suffix] |= {"domain": [y0, y1], "anchor": f"x{suffix}"}
        shapes += _marks(items, suffix, down=down, thin=0.5 if crowded else 1)
        if named:
            grouped = down and bool(items.groups) and not (stacked and i)
            notes.append(_panel_name(name, (x0 + x1) / 2, y1, 16 if grouped else 0))
    notes += _group_names(items, len(panels), down=down, left=left, size=size, stacked=stacked)
    figure = style.figure(
        traces,
        headline=headline,
        detail=detail,
        plot_height=height,
        above=above,
        bottom=labels_below + 54 + 14 * bar_title.count("<br>"),
        left=left,
        right=12,
        widest=_widest(layers, count, down=down, across=1 if stacked else len(panels), left=left),
        plot_bgcolor=style.MISSING,
        shapes=shapes,
        annotations=notes,
        coloraxis=style.diverging(end, bar_title, below=labels_below, plot_height=height),
        **axes,
    )
    if down and not short:
        figure.layout.meta["items"] = {
            "axes": [f"xaxis{i + 1 if i else ''}" for i in range(len(panels))],
            "texts": [items.shown(i) for i in range(count)],
            "order": items.priority(),
            "share": domains[0][0][1] - domains[0][0][0],
            "letter": _LABEL + 1,
        }
    return fitted(figure, min(figure.layout.meta["widest"], 720))


def _layer_row(layers: int, *, written: bool) -> int:
    """Pixels per layer down the figure: 8 layers or more take about 256 pixels."""
    return 30 if written else min(32, max(6, 260 // layers))


def _item_row(count: int, *, written: bool = False) -> int:
    """Pixels per item down the figure."""
    if written:
        return 30
    return 15 if count <= _MOST_ROWS else max(3, 15 * _MOST_ROWS // count)


def _widest(layers: int, count: int, *, down: bool, across: int, left: int) -> int:
    """Pixels to which a page may stretch the figure."""
    cells = 24 * count if down else 34 * layers
    return min(1200, max(420 if across == 1 else 680, left + 24 + min(cells, 640) * across))


def _domains(
    panels: int, gap: float, *, stacked: bool
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """The horizontal and vertical share of the plot that each panel takes."""
    size = (1 - gap * (panels - 1)) / panels
    starts = [i * (size + gap) for i in range(panels)]
    if stacked:
        return [((0.0, 1.0), (max(0.0, 1 - start - size), 1 - start)) for start in starts]
    return [((start, min(1.0, start + size)), (0.0, 1.0)) for start in starts]


def _trace(
    values: Float[np.ndarray, "layers items"],
    rows: Rows,
    items: Items,
    panel: str,
    unit: str,
    *,
    down: bool,
    written: bool,
    crowded: bool,
) -> go.Heatmap:
    layers, count = values.shape
    gap = 0.0 if crowded else 0.6
    lead = f"{style.escape(panel)}, " if panel else ""
    hover = np.array(
        [
            [
                f"{lead}{rows.hover[layer]}, {items.hover[i]}<br>"
                + (
                    f"{unit}: {values[layer, i]:+.3f}"
                    if np.isfinite(values[layer, i])
                    else items.missing
                )
                for i in range(count)
            ]
            for layer in range(layers)
        ]
    )
    return go.Heatmap(
        x=list(range(count if down else layers)),
        y=list(range(layers if down else count)),
        z=values if down else values.T,
        text=(hover if down else hover.T).tolist(),
        name=panel or None,
        hoverinfo="text",
        hoverongaps=True,
        xgap=gap if down else 0.6,
        ygap=0.6 if down else gap,
        texttemplate="%{z:.2f}" if written else None,
        textfont={"size": 11} if written else None,
    )


def _layer_axis(rows: Rows, *, down: bool, outer: bool, size: int) -> dict[str, Any]:
    layers = len(rows.labels)
    most = max(2, size // 13) if down else 10
    ends = {"range": [layers - 0.5, -0.5] if down else [-0.5, layers - 0.5]}
    shown = style.layer_axis(range(layers), most=most, title=rows.noun if outer else "", **ends)
    shown["ticktext"] = [rows.labels[layer] for layer in shown["tickvals"]]
    if rows.letters > 4:  # tokens
        shown["tickfont"] = {"size": _LABEL, "family": style.MONO}
    return shown if outer else {**shown, "showticklabels": False}


def _item_axis(items: Items, *, down: bool, outer: bool, short: bool) -> dict[str, Any]:
    count = len(items.labels)
    step = -(-(_LABEL + 1) // _item_row(count))
    ticks = list(range(count))
    if not down and step > 1:
        ticks = [i for i in ticks if i % step == (items.framed or 0) % step or i == items.framed]
        ticks = sorted({*ticks, *(i for i, bold in enumerate(items.bold) if bold)})
    return style.axis(
        items.noun if outer else "",
        grid=False,
        tickvals=ticks,
        ticktext=[items.shown(i) for i in ticks],
        tickangle=-90 if down and not short else 0,
        tickfont={"size": _LABEL, "family": style.MONO},
        showticklabels=outer,
        range=[-0.5, count - 0.5] if down else [count - 0.5, -0.5],
    )


def _marks(items: Items, suffix: str, *, down: bool, thin: float) -> list[dict[str, Any]]:
    """Lines between groups, and the frame."""
    along, across = ("x", "y") if down else ("y", "x")

    def shape(kind: str, start: float, stop: float, width: float) -> dict[str, Any]:
        return {
            "type": kind,
            f"{along}ref": along + suffix,
            f"{across}ref": f"{across}{suffix} domain",
            f"{along}0": start,
            f"{along}1": stop,
            f"{across}0": 0,
            f"{across}1": 1,
            "line": {"color": style.INK, "width": width},
        }

    lines = [shape("line", start - 0.5, start - 0.5, thin) for _, start, _ in items.groups[1:]]
    at = items.framed
    return lines if at is None else [*lines, shape("rect", at - 0.5, at + 0.5, 1.5)]


def _panel_name(name: str, x: float, y: float, shift: int) -> dict[str, Any]:
    return {
        "text": style.escape(name),
        "xref": "paper",
        "x": x,
        "xanchor": "center",
        "yref": "paper",
        "y": y,
        "yanchor": "bottom",
        "yshift": 2 + shift,
        "showarrow": False,
        "font": {"size": 12},
    }


def _group_names(
    items: Items,
    panels: int,
    *,
    down: bool,
    left: int,
    size: int,
    stacked: bool,
) -> list[dict[str, Any]]:
    """Names of the groups: above the panels, or rotated at the left of the first."""
    notes = []
    for i in range(panels):
        if i and (stacked if down else not stacked):
            continue  # the names of the neighbor hold for this panel as well
        suffix = str(i + 1) if i else ""
        for name, start, stop in items.groups:
            middle = (start + stop - 1) / 2
            note = {"text": name, "showarrow": False, "font": {"size": 10}}
            if down:
                # `fitted` leaves out names that are wider than their group.
                note |= {"name": f"group {start} {stop}", "xref": f"x{suffix}", "x": middle}
                note |= {"xanchor": "center", "yref": f"y{suffix} domain", "y": 1}
                notes.append(note | {"yanchor": "bottom", "yshift": 1})
            elif (stop - start) * size >= 6 * len(name) * len(items.labels):
                note |= {"xref": "paper", "x": 0, "xanchor": "center", "xshift": 10 - left}
                note |= {"yref": f"y{suffix}", "y": middle, "yanchor": "middle"}
                notes.append(note | {"textangle": -90})
    return notes
