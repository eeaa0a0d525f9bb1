"""Circuits: the edges of a model that are kept when everything else is ablated.

`greedy` selection follows Hanna et al. 2024 (arXiv 2403.17806): start at the logits, and repeatedly
add the strongest edge into a node that the circuit already holds.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float32

from divergence_lens._utils.hub import OnHub
from divergence_lens._utils.plotting import draw
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens.circuits.graph import Graph

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd
    import plotly.graph_objects as go

_KIND = "circuit"


@dataclass(frozen=True, eq=False, repr=False)
class Circuit(OnHub):
    """A set of edges of a model.

    Attributes:
        graph: The senders, receivers and edges of the model.
        chosen: `[edges]`, whether each edge belongs to the circuit.
        scores: `[edges]`, the score of each edge; NaN where none is known.
        metadata: Settings and versions; JSON-able.
    """

    graph: Graph
    chosen: Bool[np.ndarray, " edges"]
    scores: Float32[np.ndarray, " edges"]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("chosen", "scores"):
            if len(getattr(self, name)) != len(self.graph):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, but the graph has "
                    f"{len(self.graph)} edges"
                )

    def __len__(self) -> int:
        """The number of edges."""
        return int(self.chosen.sum())

    def __repr__(self) -> str:
        return f"Circuit({len(self):,} of {len(self.graph):,} edges, {len(self.nodes)} nodes)"

    @classmethod
    def from_edges(cls, graph: Graph, edges: Sequence[tuple[str, str]]) -> "Circuit":
        """The circuit of some edges, given as (sender, receiver).

        Raises:
            ValueError: There is no such node, or an edge runs backward.
        """
        chosen = np.zeros(len(graph), dtype=bool)
        chosen[graph.edges(edges)] = True
        return cls(graph, chosen, np.full(len(graph), np.nan, dtype=np.float32))

    @classmethod
    def from_nodes(cls, graph: Graph, nodes: Sequence[str]) -> "Circuit":
        """The circuit of all edges between the given senders (and `embed` and `logits`).

        Raises:
            ValueError: There is no such sender.
        """
        unknown = set(nodes) - set(graph.senders)
        if unknown:
            raise ValueError(
                f"the model has no node {min(unknown)!r}; its nodes are embed, heads such as a0.h0 "
                f"and MLPs such as m0, with {graph.n_layers} layers of {graph.n_heads} heads"
            )
        kept = np.array([name == "embed" or name in nodes for name in graph.senders])
        return cls.from_kept_senders(graph, kept)

    @classmethod
    def from_kept_senders(cls, graph: Graph, kept: Bool[np.ndarray, " senders"]) -> "Circuit":
        """The circuit of all edges between kept senders; see `from_nodes`."""
        receiving = np.zeros(len(graph.receivers), dtype=bool)
        receiving[-1] = True
        for sender in np.flatnonzero(kept):
            receiving[list(graph.readers[sender])] = True
        chosen = kept[graph.edge_sender] & receiving[graph.edge_receiver]
        return cls(graph, chosen, np.full(len(graph), np.nan, dtype=np.float32))

    @classmethod
    def from_scores(
        cls,
        graph: Graph,
        scores: "np.ndarray",
        *,
        top: int | None = None,
        threshold: float | None = None,
        greedy: int | None = None,
        absolute: bool = True,
        metadata: Mapping[str, Any] | None = None,
    ) -> "Circuit":
        """Choose edges from one score per edge; see `EdgeScores.circuit`.

        Edges without a score (NaN) are never chosen. `absolute=False` ranks by signed scores, so
        that edges against the effect come last.
        """
        given = {"top": top, "threshold": threshold, "greedy": greedy}
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) != 1:
            got = " and ".join(named) or "none"
            raise ValueError(f"give one of top, threshold and greedy, got {got}")
        ((name, value),) = named.items()
        values = np.asarray(scores, dtype=np.float64)
        known = np.isfinite(values)
        if name != "threshold" and not (
            isinstance(value, int | np.integer) and 0 <= value <= known.sum()
        ):
            raise ValueError(
                f"{name} is {value!r}; it is a number of edges, 0 to {known.sum()} (those that "
                "have a score)"
            )
        strength = np.where(known, np.abs(values) if absolute else values, -np.inf)
        if threshold is not None:
            chosen = known & (strength >= threshold)
        elif top is not None:
            chosen = np.zeros(len(graph), dtype=bool)
            chosen[np.argsort(-strength, kind="stable")[:top]] = True
        else:
            assert greedy is not None
            chosen = _greedy(graph, strength, greedy)
        return cls(graph, chosen, np.asarray(scores, dtype=np.float32), dict(metadata or {}))

    @property
    def nodes(self) -> tuple[str, ...]:
        """The senders and receivers of the circuit's edges, as nodes (`a0.h1`, not `a0.h1.q`)."""
        graph, edges = self.graph, np.flatnonzero(self.chosen)
        names = {graph.senders[i] for i in set(graph.edge_sender[edges].tolist())}
        received = {graph.receivers[i] for i in set(graph.edge_receiver[edges].tolist())}
        # Keys and values of a group belong to the heads of the group that are in the circuit.
        names |= {_node(name) for name in received if ".g" not in name}
        for name in received:
            names.update(self.targets(name, names))
        return tuple(sorted(names, key=_depth))

    def targets(self, receiver: str, names: Collection[str]) -> tuple[str, ...]:
        """The nodes among `names` that an edge into a receiver leads to.

        Keys and values of a group lead to those of its heads, or to the group if there is none.
        """
        node = _node(receiver)
        if ".g" not in node:
            return (node,)
        layer, _, group = node.partition(".g")
        size = self.graph.n_heads // self.graph.n_kv_heads
        heads = [f"{layer}.h{int(group) * size + i}" for i in range(size)]
        return tuple(name for name in heads if name in names) or (node,)

    def table(self) -> "pd.DataFrame":
        """One row per edge with columns `sender`, `receiver` and `score`, strongest first."""
        import pandas as pd

        edges = np.flatnonzero(self.chosen)
        order = np.argsort(-np.abs(np.nan_to_num(self.scores[edges])), kind="stable")
        edges = edges[order]
        named = [self.graph.names(int(edge)) for edge in edges]
        return pd.DataFrame(named, columns=["sender", "receiver"]).assign(score=self.scores[edges])

    def to_networkx(self) -> "nx.MultiDiGraph":
        """A directed graph of nodes, with one edge per circuit edge and its `receiver` and `score`.

        Keys and values of a group of queries lead to each of its heads in the circuit.

        Raises:
            ImportError: networkx is not installed.
        """
        try:
            import networkx as nx
        except ImportError as error:
            raise ImportError(
                "a networkx graph needs networkx: pip install 'divergence-lens[circuits]'"
            ) from error
        result = nx.MultiDiGraph()
        for name in self.nodes:
            result.add_node(name, layer=_depth(name)[0])
        for row in self.table().itertuples():
            for node in self.targets(row.receiver, result):
                result.add_edge(row.sender, node, receiver=row.receiver, score=float(row.score))
        return result

    def complement(self) -> "Circuit":
        """The edges that are not in the circuit."""
        return replace(self, chosen=~self.chosen)

    def without(self, edge: int) -> "Circuit":
        """The circuit without one of its edges, by number."""
        chosen = self.chosen.copy()
        chosen[edge] = False
        return replace(self, chosen=chosen)

    def connected(self) -> "Circuit":
        """The circuit without edges that lie on no path from the embeddings to the logits."""
        graph = self.graph
        matrix = graph.matrix(self.chosen)  # [sender, receiver]
        above = np.zeros(len(graph.senders), dtype=bool)  # reached from the embeddings
        above[0] = True
        for sender in range(1, len(above)):  # senders are sorted by depth
            own = list(graph.readers[sender])
            above[sender] = bool((matrix[:, own] & above[:, None]).any())
        below = graph.leading(self.chosen)
        leads = np.zeros(len(graph.receivers), dtype=bool)
        leads[-1] = True
        for sender in np.flatnonzero(below).tolist():
            leads[list(graph.readers[sender])] = True
        kept = above[graph.edge_sender] & leads[graph.edge_receiver]
        return replace(self, chosen=self.chosen & kept)

    def check_graph(self, graph: Graph) -> None:
        """Refuse a model of another shape.

        Raises:
            ValueError: Names both shapes.
        """
        if self.graph != graph:
            raise ValueError(f"the circuit is of another model: {self.graph}, not {graph}")

    def plot(self) -> "go.Figure":
        """The circuit's nodes by layer, its edges as arcs."""
        return draw("circuit_graph", self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write to one safetensors file with a JSON header."""
        header = {"graph": self.graph.to_json(), "metadata": self.metadata}
        save_tensors(path, {"chosen": self.chosen, "scores": self.scores}, header, kind=_KIND)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Circuit":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a file of a circuit, or is damaged.
        """
        tensors, header = load_tensors(path, kind=_KIND)
        return cls(
            Graph(**header["graph"]),
            np.asarray(tensors["chosen"]),
            np.asarray(tensors["scores"].to(torch.float32)),
            header["metadata"],
        )

    def _repr_html_(self) -> str:
        table = self.table().head(10).to_html(index=False, float_format=lambda x: f"{x:.4f}")
        return f"<p><b>{self!r}</b></p>{table}"


def _greedy(graph: Graph, strength: "np.ndarray", count: int) -> Bool[np.ndarray, " edges"]:
    """Add the strongest edge into a node of the circuit, from the logits backward.

    Edges of strength -inf, which have no score, are left out.
    """
    chosen = np.zeros(len(graph), dtype=bool)
    waiting: list[tuple[float, int]] = []
    entered = np.zeros(len(graph.receivers), dtype=bool)

    def enter(receiver: int) -> None:
        if not entered[receiver]:
            entered[receiver] = True
            first = int(graph.offsets[receiver])
            edges = np.arange(first, first + int(graph.reach[receiver]))
            for edge in edges[strength[edges] > -np.inf].tolist():
                heapq.heappush(waiting, (-float(strength[edge]), edge))

    enter(len(graph.receivers) - 1)
    for _ in range(count):
        if not waiting:
            break
        edge = heapq.heappop(waiting)[1]
        chosen[edge] = True
        for receiver in graph.readers[int(graph.edge_sender[edge])]:
            enter(receiver)
    return chosen


def _node(receiver: str) -> str:
    """The node of a receiver: `a0.h1` of `a0.h1.q`."""
    return ".".join(receiver.split(".")[:2])


def _depth(node: str) -> tuple[float, str, int]:
    """Sort key of a node: layer, then heads before the MLP."""
    if node in ("embed", "logits"):
        return (-1.0 if node == "embed" else float("inf"), "", 0)
    layer, _, head = node[1:].partition(".")
    return float(layer), node[0], int(head[1:] or 0)
