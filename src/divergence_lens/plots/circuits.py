"""Figures of circuits: edges between layers, over tokens or heads, and curves of faithfulness."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from divergence_lens._utils.wording import plural
from divergence_lens.circuits import Circuit, EdgeScores, Faithfulness
from divergence_lens.plots import style
from divergence_lens.plots.fitting import fitted

# Heads of one layer and token lie side by side within this width of one token's column.
_SPREAD = 0.62
_POINTS = 13  # of each arc
_WIDTHS = (0.7, 1.3, 2.2, 3.4)


@dataclass(frozen=True)
class _Arc:
    """One edge: its ends with their names, its strength (1 for the strongest), its hover text."""

    start: tuple[float, float]
    end: tuple[float, float]
    names: tuple[str, str]
    score: float
    text: str
    attention: bool = False


def edge_graph(scores: EdgeScores, *, pair: int = 0, k: int = 200) -> go.Figure:
    """Draw the strongest edges of one pair: layers down, tokens (or segments) across.

    A solid arc is an edge at one position, from a sender to a receiver below it in the figure. A
    dotted arc is attention: it leads from the position of a head's keys or values to the positions
    at which the head writes. Only columns with an edge are drawn, and the strongest nodes are
    named, as many as have room.

    Args:
        scores: Edge scores with `span="position"` or `"segment"`.
        pair: The pair.
        k: The number of edges.

    Raises:
        ValueError: The scores are summed over positions, or `k` or `pair` is out of range.
    """
    if scores.setting("span") == "all":
        raise ValueError(
            'these scores are summed over positions; compute them with span="position"'
        )
    if not 0 <= pair < len(scores) or k < 1:
        raise ValueError(f"pair is {pair} and k is {k}; there are {len(scores)} pairs, and k >= 1")
    table = scores.top(k, "cells", pair=pair)
    table = table[table["score"] != 0]
    columns = sorted(set(table["column"]))
    place = {column: i for i, column in enumerate(columns)}
    graph, arcs = scores.graph, []
    writes: dict[str, set[int]] = {}
    for row in table.itertuples():
        writes.setdefault(str(row.sender), set()).add(int(row.column))
    limit = float(table["score"].abs().max()) if len(table) else 1.0
    for row in table.itertuples():
        sender, receiver, column = str(row.sender), str(row.receiver), int(row.column)
        shift = float(place[column])
        start, end = _spot(graph, sender, shift), _spot(graph, receiver, shift)
        text = f"{sender} to {receiver} at {row.label!r}: {row.score:+.3f}"
        names = (sender, _node_of(receiver))
        arcs.append(_Arc(start, end, names, float(row.score) / limit, style.escape(text)))
        if receiver.endswith((".k", ".v")):
            for head in _heads_of(graph, receiver):
                arcs += [
                    _Arc(
                        end,
                        _spot(graph, head, float(place[to])),
                        (names[1], head),
                        float(row.score) / limit,
                        style.escape(f"{head} attends to {row.label!r}"),
                        attention=True,
                    )
                    for to in sorted(writes.get(head, ()))
                    if to > column
                ]
    ticks = [style.show_token(scores.labels[pair][column], 10) for column in columns]
    return _figure(
        arcs,
        graph.n_layers,
        headline=f"The strongest {plural(len(table), 'edge')} of pair {pair}",
        detail=f"{scores.method} {scores.direction}, {scores.metric}; orange raises it, "
        "blue lowers it; dotted: attention",
        ticks=ticks,
        x_title="token" if scores.setting("span") == "position" else "segment",
    )


def circuit_graph(circuit: Circuit, *, k: int = 400) -> go.Figure:
    """Draw a circuit: layers down, heads across, the MLP right of them, its edges as arcs.

    The nodes with the strongest edges are named, as many as have room.

    Args:
        circuit: The circuit.
        k: The number of edges drawn, strongest first.
    """
    graph = circuit.graph
    table = circuit.table().head(k)
    limit = float(np.nanmax(np.abs(np.nan_to_num(table["score"], nan=1.0)), initial=0.0)) or 1.0

    def spot(name: str) -> tuple[float, float]:
        layer, kind, head = _parts(name, graph.n_layers)
        if kind in ("embed", "logits"):
            return (graph.n_heads / 2, layer)
        if ".g" in name:  # in the middle of its heads
            size = graph.n_heads // graph.n_kv_heads
            return (head * size + (size - 1) / 2, layer)
        return (float(graph.n_heads), layer + 0.5) if kind == "m" else (head, layer)

    nodes, arcs = circuit.nodes, []
    for row in table.itertuples():
        sender, receiver = str(row.sender), str(row.receiver)
        known = np.isfinite(row.score)
        score = f": {row.score:+.3f}" if known else ""
        arcs += [
            _Arc(
                spot(sender),
                spot(target),
                (sender, target),
                float(row.score) / limit if known else 0.3,
                style.escape(f"{sender} to {receiver}{score}"),
            )
            for target in circuit.targets(receiver, nodes)
        ]
    left_out = len(circuit) - len(table)
    return _figure(
        arcs,
        graph.n_layers,
        headline=f"Circuit of {plural(len(circuit), 'edge')}",
        detail=f"{plural(len(nodes), 'node')} of {len(graph.senders) + 1:,}"
        + ("; orange raises the metric, blue lowers it" if table["score"].notna().any() else "")
        + (f"; {plural(left_out, 'weaker edge')} not drawn" if left_out else ""),
        ticks=[*(str(head) for head in range(graph.n_heads)), "MLP"],
        x_title="head",
    )


def faithfulness_curves(curves: Mapping[str, Faithfulness]) -> go.Figure:
    """Draw faithfulness over the share of edges or nodes kept, one line per method.

    Args:
        curves: From names to results of `faithfulness_curve`.

    Raises:
        ValueError: There is no curve.
    """
    if not curves:
        raise ValueError("there is no curve; give at least one to faithfulness_curves")
    traces: list[Any] = []
    for number, (name, curve) in enumerate(curves.items()):
        color = style.CYCLE[number % len(style.CYCLE)]
        traces.append(
            go.Scatter(
                x=list(curve.shares),
                y=curve.values.tolist(),
                mode="lines+markers",
                name=style.escape(name)
                + (
                    " (undefined: no effect)"
                    if curve.undefined
                    else f" (CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f})"
                ),
                line={"color": color, "width": 1.8},
                marker={"symbol": style.SYMBOLS[number % len(style.SYMBOLS)], "size": 6},
                text=[
                    f"{style.escape(name)}, {style.percent(share)} kept: {value:.2f}"
                    for share, value in zip(curve.shares, curve.values, strict=True)
                ],
                hoverinfo="text",
            )
        )
    ends = [min(min(c.shares) for c in curves.values()), 1.0]
    traces.append(style.level("the whole model", ends, 1.0, "the whole model: 1"))
    first = next(iter(curves.values()))
    return style.figure(
        traces,
        headline="Faithfulness over circuit size",
        detail=f"{plural(len(first.full), 'pair')}, "
        f"{first.metadata.get('settings', {}).get('ablation', '')} ablation",
        plot_height=240,
        legend_rows=len(traces),
        xaxis=style.axis(
            "share kept",
            type="log",
            tickvals=[0.001, 0.01, 0.1, 1.0],
            ticktext=["0.1 %", "1 %", "10 %", "100 %"],
        ),
        yaxis=style.axis("faithfulness"),
    )


def _parts(name: str, n_layers: int) -> tuple[float, str, int]:
    """The layer, kind (`embed`, `a`, `m` or `logits`) and head of a sender or receiver."""
    if name in ("embed", "logits"):
        return (-1.0 if name == "embed" else float(n_layers), name, 0)
    layer, _, rest = name[1:].partition(".")
    return float(layer), name[0], int(rest.split(".")[0][1:]) if rest else 0


def _node_of(receiver: str) -> str:
    """The node of a receiver: `a0.h1` of `a0.h1.q`."""
    return ".".join(receiver.split(".")[:2])


def _heads_of(graph: Any, receiver: str) -> list[str]:
    """The heads that use the keys or values of a receiver."""
    layer, _, rest = receiver.partition(".")
    number, size = int(rest.split(".")[0][1:]), graph.n_heads // graph.n_kv_heads
    return [f"{layer}.h{number * size + i}" for i in range(size)]


def _spot(graph: Any, name: str, column: float) -> tuple[float, float]:
    """Where a node is drawn within the column of a token."""
    layer, kind, head = _parts(name, graph.n_layers)
    if kind in ("embed", "logits"):
        return column, layer
    if kind == "m":
        return column + _SPREAD / 2, layer + 0.5
    heads = graph.n_kv_heads if ".g" in name else graph.n_heads
    return column + _SPREAD * ((head + 0.5) / heads - 0.5), layer


def _curve(arc: _Arc) -> tuple[list[float], list[float]]:
    """A quadratic arc between two points, and a gap after it."""
    (x0, y0), (x1, y1) = arc.start, arc.end
    t = np.linspace(0, 1, _POINTS)
    # Arcs between neighbors bulge to the side, and attention over many tokens hangs lower.
    aside = 0.18 if abs(x1 - x0) < 0.5 else 0.0
    below = min(0.3 + 0.08 * abs(x1 - x0), 1.1) if arc.attention else 0.0
    middle = ((x0 + x1) / 2 + aside, (y0 + y1) / 2 + below)
    x = (1 - t) ** 2 * x0 + 2 * t * (1 - t) * middle[0] + t**2 * x1
    y = (1 - t) ** 2 * y0 + 2 * t * (1 - t) * middle[1] + t**2 * y1
    return [*x.tolist(), float("nan")], [*y.tolist(), float("nan")]


def _bundles(arcs: Sequence[_Arc]) -> Iterable[tuple[str, float, bool, list[_Arc]]]:
    """Arcs by color, width and kind: one trace each, so that 200 edges need few traces."""
    groups: dict[tuple[str, float, bool], list[_Arc]] = {}
    for arc in arcs:
        width = _WIDTHS[min(int(abs(arc.score) * len(_WIDTHS)), len(_WIDTHS) - 1)]
        color = style.ORANGE if arc.score > 0 else style.BLUE
        groups.setdefault((color, 1.0 if arc.attention else width, arc.attention), []).append(arc)
    for (color, width, attention), members in sorted(groups.items(), key=lambda item: item[0][1]):
        yield color, width, attention, members


def _figure(
    arcs: Sequence[_Arc],
    n_layers: int,
    *,
    headline: str,
    detail: str,
    ticks: Sequence[str],
    x_title: str,
) -> go.Figure:
    traces: list[Any] = []
    for color, width, attention, members in _bundles(arcs):
        xs, ys, middles = [], [], []
        for arc in members:
            x, y = _curve(arc)
            xs += x
            ys += y
            middles.append((x[_POINTS // 2], y[_POINTS // 2]))
        traces.append(
            go.Scatter(
                x=xs,
                y=ys,
                mode="lines",
                line={
                    "color": style.shade(color, 0.45 if width < 1 else 0.75),
                    "width": width,
                    "dash": "dot" if attention else "solid",
                },
                hoverinfo="skip",
            )
        )
        # Lines have no hover text of their own between their points.
        traces.append(
            go.Scatter(
                x=[x for x, _ in middles],
                y=[y for _, y in middles],
                mode="markers",
                marker={"size": 7, "color": "rgba(0, 0, 0, 0)"},
                text=[arc.text for arc in members],
                hoverinfo="text",
            )
        )
    nodes = _nodes(arcs)
    traces.append(
        go.Scatter(
            x=[x for (x, _), _ in nodes],
            y=[y for (_, y), _ in nodes],
            mode="markers",
            marker={"size": 4, "color": style.INK},
            text=[name for _, name in nodes],
            hoverinfo="text",
        )
    )
    layers = style.thinned(range(n_layers), 10)
    drawn = style.figure(
        traces,
        headline=headline,
        detail=detail,
        plot_height=max(260, min(50 * (n_layers + 2), 620)),
        bottom=76,
        widest=max(720, 34 * len(ticks)),
        xaxis=style.axis(
            x_title,
            grid=False,
            tickvals=list(range(len(ticks))),
            ticktext=list(ticks),
            tickangle=-60 if x_title == "token" else 0,
            range=[-0.6, len(ticks) - 0.4],
        ),
        yaxis=style.axis(
            "layer",
            range=[n_layers + 0.6, -1.6],
            tickvals=[-1, *layers, n_layers],
            ticktext=["embed", *map(str, layers), "logits"],
        ),
        annotations=[_name(*node) for node in nodes if node[1] not in ("embed", "logits")],
    )
    return fitted(drawn, min(drawn.layout.meta["widest"], 720))


def _nodes(arcs: Sequence[_Arc]) -> list[tuple[tuple[float, float], str]]:
    """The places and names of the arcs' ends, those with the strongest arcs first."""
    strength: dict[tuple[tuple[float, float], str], float] = {}
    for arc in arcs:
        for end in zip((arc.start, arc.end), arc.names, strict=True):
            strength[end] = max(strength.get(end, 0.0), abs(arc.score))
    return sorted(strength, key=lambda end: (-strength[end], end))


def _name(place: tuple[float, float], name: str) -> dict[str, Any]:
    """The name of a node, above it; `fitted` leaves out names that overlap."""
    return {
        "name": "node",
        "text": name,
        "x": place[0],
        "y": place[1],
        "xanchor": "center",
        "yanchor": "middle",
        "yshift": 8,
        "showarrow": False,
        "font": {"size": 9},
    }
