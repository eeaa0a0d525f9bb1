"""Titles and labels fitted to a figure's width, and figures without their title.

Plotly wraps no titles, and thins numeric ticks but not texts. `fitted` does both; pages thin the
labels in the browser, with the script in `pages.py`.
"""

import re

import plotly.graph_objects as go

from divergence_lens.plots import style

NODE_LETTER, NODE_LINE = 5.6, 11
"""Pixels per letter and line of the names of points, which have a font of 9 pixels."""


def rewrapped(figure: go.Figure, width: float) -> go.Figure:
    """Return a copy whose title has lines for a width in pixels."""
    meta = figure.layout.meta or {}
    if "headline" not in meta:
        return figure
    old = str(figure.layout.title.text or "").split("<br>")
    lines = style.title_lines(meta["headline"], meta["detail"], width) or [""]
    if lines == old:
        return figure
    copy = go.Figure(figure)
    added = style.LINE * (len(lines) - len(old))
    copy.layout.title.text = "<br>".join(lines)
    copy.layout.margin.t += added
    copy.layout.height += added
    return copy


def fitted(figure: go.Figure, width: float) -> go.Figure:
    """Return a copy with the labels that fit beside each other at a width in pixels.

    Figures without such labels are returned as they are. The labels of an axis and their order of
    importance are stored in `layout.meta`; those of points are annotations named "node", the most
    important first.
    """
    meta = figure.layout.meta or {}
    items = meta.get("items")
    nodes = any(note.name == "node" for note in figure.layout.annotations)
    if items is None and not nodes:
        return figure
    copy = go.Figure(figure)
    margin = copy.layout.margin
    if nodes:
        _name_nodes(copy, width)
    if items is None:
        return copy
    pixels = (width - margin.l - margin.r) * items["share"] / len(items["texts"])  # per item
    chosen: list[int] = []
    for i in items["order"]:
        if all(abs(i - other) * pixels >= items["letter"] for other in chosen):
            chosen.append(i)
    chosen.sort()
    for axis in items["axes"]:
        copy.layout[axis].tickvals = chosen
        copy.layout[axis].ticktext = [items["texts"][i] for i in chosen]
    for note in copy.layout.annotations:
        place = re.fullmatch(r"group (\d+) (\d+)", note.name or "")
        if place:
            note.visible = (int(place[2]) - int(place[1])) * pixels >= 6 * len(note.text)
    return copy


def _name_nodes(figure: go.Figure, width: float) -> None:
    """Show the names of points that overlap no name of a more important point."""
    layout = figure.layout
    margin = layout.margin
    room = (width - margin.l - margin.r, layout.height - margin.t - margin.b)
    ranges = (layout.xaxis.range, layout.yaxis.range)
    boxes: list[tuple[float, float, float]] = []  # center and half the width, in pixels
    for note in layout.annotations:
        if note.name != "node":
            continue
        x, y = (
            (at - start) / (end - start) * pixels
            for at, (start, end), pixels in zip((note.x, note.y), ranges, room, strict=True)
        )
        half = NODE_LETTER * len(note.text) / 2
        note.visible = all(
            abs(x - x0) >= half + half0 or abs(y - y0) >= NODE_LINE for x0, y0, half0 in boxes
        )
        if note.visible:
            boxes.append((x, y, half))


def without_title(figure: go.Figure, *, title: bool = False, caption: bool = False) -> go.Figure:
    """Return a copy without the title, without the caption below it, or without both.

    Args:
        figure: A figure of this package.
        title: Whether the bold lines stay.
        caption: Whether the lines below them stay.
    """
    lines = str(figure.layout.title.text or "").split("<br>")
    stay = [line for line in lines if line and (title if line.startswith("<b>") else caption)]
    if len(stay) == len(lines) or lines == [""]:
        return figure
    copy = go.Figure(figure)
    # Without any line, the space above the first is left out too.
    removed = style.LINE * (len(lines) - len(stay)) + (0 if stay else 12)
    copy.layout.title.text = "<br>".join(stay)
    copy.layout.margin.t -= removed
    copy.layout.height -= removed
    meta = copy.layout.meta or {}
    copy.layout.meta = meta | {
        "headline": meta.get("headline", "") if title else "",
        "detail": meta.get("detail", "") if caption else "",
    }
    return copy
