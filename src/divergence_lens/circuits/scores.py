"""Scores of edges: one number per pair, column and edge.

A column is one position of a pair, one of its segments, or all positions together, as the `span` of
the call says. A sum over columns, over the edges of a sender or over those into a receiver is
meaningful for attributions, which are linear in the sender's change; path patching gives one exact
value per edge, and its values do not add up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float, Float32

from divergence_lens._utils.hub import OnHub
from divergence_lens._utils.indexing import Index, row_numbers
from divergence_lens._utils.plotting import draw
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens._utils.wording import plural
from divergence_lens.circuits.circuit import Circuit
from divergence_lens.circuits.graph import Graph
from divergence_lens.circuits.result import NO_EFFECT
from divergence_lens.pairs import PAIR_SEGMENTS
from divergence_lens.patching import (
    Agreement,
    Direction,
    agreement_from_json,
    agreement_of_cells,
    agreement_to_json,
)

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_KIND = "edge scores"


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores(OnHub):
    """Scores of all edges of a model, for every pair and column.

    `scores[3]`, `scores[:4]` and `scores[mask]` select pairs, and always return `EdgeScores`.

    Attributes:
        values: `[pairs, columns, edges]`, in units of the metric: the change of the metric when the
            source run's state is sent along the edge. NaN where a column has no counterpart, and
            for edges that path patching was not asked for.
        graph: The senders, receivers and edges.
        method: `exact` for path patching, or the name of the attribution.
        direction: `noising` or `denoising`.
        metric: Name of the metric.
        clean_metric: `[pairs]`, the metric of the unpatched clean run.
        corrupted_metric: `[pairs]`, the metric of the unpatched corrupted run.
        segments: One name per column of each pair.
        labels: One string per column of each pair: its token, or the name of its segment.
        verified: Agreement with exactly computed edges, if requested.
        metadata: Settings and versions; JSON-able.
    """

    values: Float32[np.ndarray, "pairs columns edges"]
    graph: Graph
    method: str
    direction: Direction
    metric: str
    clean_metric: Float32[np.ndarray, " pairs"]
    corrupted_metric: Float32[np.ndarray, " pairs"]
    segments: tuple[tuple[str, ...], ...]
    labels: tuple[tuple[str, ...], ...]
    verified: Agreement | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, columns, edges = self.values.shape
        if edges != len(self.graph):
            raise ValueError(f"values has {edges} edges, but the graph has {len(self.graph)}")
        for name in ("clean_metric", "corrupted_metric", "segments", "labels"):
            if len(getattr(self, name)) != n:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, not {n} (pairs)")
        if max(map(len, self.labels)) != columns:
            raise ValueError(
                f"values has {columns} columns, but the longest row of labels has "
                f"{max(map(len, self.labels))}"
            )

    def __repr__(self) -> str:
        """One line: method, direction, metric, shape, mean total effect."""
        n, columns, edges = self.values.shape
        sizes = ", ".join(map(plural, (n, columns, edges), ("pair", "column", "edge")))
        return (
            f"EdgeScores({self.method} {self.direction} on {self.metric}: {sizes}; mean total "
            f"effect {self.total.mean():.4g})"
        )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Index) -> "EdgeScores":
        """Select pairs by number, slice, boolean mask or list of numbers, in that order.

        `verified` is dropped, because it was measured over all pairs.
        """
        chosen = row_numbers(index, len(self), "pair")
        if not chosen:
            raise ValueError(f"the index selects none of the {len(self)} pairs")
        labels = tuple(self.labels[i] for i in chosen)
        return replace(
            self,
            values=self.values[chosen][:, : max(map(len, labels))],
            clean_metric=self.clean_metric[chosen],
            corrupted_metric=self.corrupted_metric[chosen],
            segments=tuple(self.segments[i] for i in chosen),
            labels=labels,
            verified=None,
        )

    @property
    def total(self) -> Float32[np.ndarray, " pairs"]:
        """`[pairs]`: the effect of patching everything, with the sign of the direction."""
        difference = self.corrupted_metric - self.clean_metric
        return np.asarray(difference if self.direction == "noising" else -difference)

    def mean(self) -> Float[np.ndarray, " edges"]:
        """The mean over pairs of each edge, summed over columns; NaN without a value."""
        present = np.isfinite(self.values).any(1)  # [pairs, edges]
        summed = np.nansum(self.values, axis=1, dtype=np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.where(present, summed, 0).sum(0) / present.sum(0)
        return np.asarray(mean)

    def by_sender(self) -> "pd.Series[float]":
        """The mean score of each sender: the sum over its edges.

        For an attribution this is the attribution of the sender's output, its node score.
        """
        import pandas as pd

        sums = np.bincount(self.graph.edge_sender, self.mean(), len(self.graph.senders))
        return pd.Series(sums, index=pd.Index(self.graph.senders, name="sender"), name="score")

    def by_receiver(self) -> "pd.Series[float]":
        """The mean score of each receiver: the sum over the edges into it."""
        import pandas as pd

        sums = np.bincount(self.graph.edge_receiver, self.mean(), len(self.graph.receivers))
        return pd.Series(sums, index=pd.Index(self.graph.receivers, name="receiver"), name="score")

    def by_segment(self, ends: Literal["sender", "receiver"] = "receiver") -> "pd.DataFrame":
        """A table of receivers (or senders) by segments: what from a segment reaches which head.

        Each entry is the sum over the edges into the receiver at the positions of the segment,
        averaged over the pairs with a value there, and NaN without one, as for edges that path
        patching was not asked for. Needs `span="position"` or `"segment"`.

        Raises:
            ValueError: The scores are summed over all positions, or `ends` is unknown.
        """
        import pandas as pd

        if ends not in ("sender", "receiver"):
            raise ValueError(f"ends is {ends!r}; it is sender or receiver")
        if self.setting("span") == "all":
            raise ValueError(
                'these scores are summed over positions; compute them with span="segment"'
            )
        names = self.graph.receivers if ends == "receiver" else self.graph.senders
        index = self.graph.edge_receiver if ends == "receiver" else self.graph.edge_sender
        present = {name for row in self.segments for name in row}
        order = {name: i for i, name in enumerate(PAIR_SEGMENTS)}
        columns, edges = {}, np.bincount(index, minlength=len(names))
        for segment in sorted(present, key=lambda name: (order.get(name, len(order)), name)):
            sums, counts = np.zeros(len(names)), np.zeros(len(names))
            for i, row in enumerate(self.segments):
                own = self.values[i, [c for c, name in enumerate(row) if name == segment]]
                summed = np.nansum(own, axis=0, dtype=np.float64)  # [edges]
                measured = np.bincount(index, np.isfinite(own).any(0), len(names)) == edges
                sums[measured] += np.bincount(index, summed, len(names))[measured]
                counts += measured
            with np.errstate(invalid="ignore"):
                columns[segment] = sums / counts  # 0 / 0, NaN, without a value
        return pd.DataFrame(columns, index=pd.Index(names, name=ends))

    def top(
        self, k: int = 20, of: Literal["edges", "cells"] = "edges", *, pair: int | None = None
    ) -> "pd.DataFrame":
        """The `k` strongest edges, by magnitude.

        Args:
            k: How many.
            of: `edges` for means over pairs of sums over columns; `cells` for single values of
                one pair and column, which `path_patch` accepts as `edges`.
            pair: Only this pair; all if not given.

        Returns:
            One row per edge (or cell) with columns `sender`, `receiver` and `score`; for cells
            also `pair`, `column`, `label` and `segment`.

        Raises:
            ValueError: `k` is below 1, or `of` is unknown.
            IndexError: There is no such pair.
        """
        import pandas as pd

        if k < 1 or of not in ("edges", "cells"):
            raise ValueError(f"k is {k} and of is {of!r}; k is at least 1, and of edges or cells")
        number = None if pair is None else row_numbers(pair, len(self), "pair")[0]
        one = self if number is None else self[number]
        flat = one.mean() if of == "edges" else one.values.ravel()
        order = np.argsort(-np.abs(np.nan_to_num(flat)), kind="stable")
        order = order[np.isfinite(flat[order])][:k]
        cell = np.unravel_index(order, one.values.shape)
        edges = order if of == "edges" else cell[2]
        named = [self.graph.names(int(edge)) for edge in edges]
        table = pd.DataFrame(named, columns=["sender", "receiver"]).assign(score=flat[order])
        if of == "cells":
            rows, columns = cell[0].tolist(), cell[1].tolist()
            both = list(zip(rows, columns, strict=True))
            table.insert(0, "pair", rows if number is None else number)
            table.insert(1, "column", columns)
            table.insert(2, "label", [one.labels[i][c] for i, c in both])
            table.insert(3, "segment", [one.segments[i][c] for i, c in both])
        return table

    def support(self) -> Float[np.ndarray, " edges"]:
        """The mean scores with the sign of the mean total effect.

        Positive for edges that support the clean answer against the corrupted run, in both
        directions; negative for edges that work against it. All NaN if the mean total effect is
        zero: there is no answer to support then.
        """
        total = float(self.total.mean())
        sign = np.sign(total) if abs(total) >= NO_EFFECT else np.nan
        return np.asarray(sign * self.mean())

    def ranked(self, *, absolute: bool = True) -> Float[np.ndarray, " edges"]:
        """The scores by which circuits are chosen: the means, or `support()` with a sign.

        Raises:
            ValueError: `absolute` is false, and the mean total effect is zero.
        """
        if absolute:
            return self.mean()
        if abs(float(self.total.mean())) < NO_EFFECT:
            raise ValueError(
                f"the mean total effect is {self.total.mean():.2g}, so that no edge supports the "
                "answer; rank by magnitude with absolute=True, or choose pairs of one sign"
            )
        return self.support()

    def circuit(
        self,
        *,
        top: int | None = None,
        threshold: float | None = None,
        greedy: int | None = None,
        absolute: bool = True,
    ) -> Circuit:
        """Choose a circuit from the mean scores; give one of `top`, `threshold` and `greedy`.

        Args:
            top: This many of the strongest edges.
            threshold: All edges at least as strong as this, in units of the metric.
            greedy: This many edges, added from the logits backward: each time the strongest edge
                into a node that the circuit already holds (Hanna et al. 2024).
            absolute: Whether strength is the magnitude. Otherwise it is `support()`, so that edges
                that work against the answer come last.

        Raises:
            ValueError: None or several of the three are given, or one is out of range; or
                `absolute` is false, and the mean total effect is zero.
        """
        chosen = Circuit.from_scores(
            self.graph,
            self.ranked(absolute=absolute),
            top=top,
            threshold=threshold,
            greedy=greedy,
            absolute=absolute,
            metadata=self.metadata,
        )
        return replace(chosen, scores=self.mean().astype(np.float32))

    def agreement(self, other: "EdgeScores", k: int = 20) -> Agreement:
        """Compare these scores (the approximation) with `other` (the exact ones), cell by cell.

        Raises:
            ValueError: They are of other models, pairs, directions or metrics.
        """
        for name in ("graph", "direction", "metric", "labels"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"the scores differ in {name}, so that their edges cannot be compared"
                )
        return agreement_of_cells(self.values.ravel(), other.values.ravel(), k)

    def setting(self, name: str, default: Any = None) -> Any:
        """An option that these scores were computed with, from the metadata; else `default`."""
        return self.metadata.get("settings", {}).get(name, default)

    def plot(self, pair: int = 0, k: int = 200) -> "go.Figure":
        """The `k` strongest edges of one pair: layers down, tokens across."""
        return draw("edge_graph", self, pair=pair, k=k)

    def save(self, path: str | PathLike[str]) -> None:
        """Write to one safetensors file with a JSON header."""
        tensors = {
            name: getattr(self, name) for name in ("values", "clean_metric", "corrupted_metric")
        }
        header: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("method", "direction", "metric", "segments", "labels", "metadata")
        }
        header["graph"] = self.graph.to_json()
        header["verified"] = None if self.verified is None else agreement_to_json(self.verified)
        save_tensors(path, tensors, header, kind=_KIND)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "EdgeScores":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a file of edge scores, or is damaged.
        """
        tensors, header = load_tensors(path, kind=_KIND)
        verified = header["verified"]
        return cls(
            values=np.asarray(tensors["values"]),
            graph=Graph(**header["graph"]),
            method=header["method"],
            direction=header["direction"],
            metric=header["metric"],
            clean_metric=np.asarray(tensors["clean_metric"]),
            corrupted_metric=np.asarray(tensors["corrupted_metric"]),
            segments=tuple(tuple(row) for row in header["segments"]),
            labels=tuple(tuple(row) for row in header["labels"]),
            verified=None if verified is None else agreement_from_json(verified),
            metadata=header["metadata"],
        )

    def _repr_html_(self) -> str:
        strongest = self.top(10).to_html(index=False, float_format=lambda x: f"{x:.4f}", border=0)
        checked = "" if self.verified is None else self.verified._repr_html_()
        return f"<p><b>edges</b>: {self!r}</p>{checked}<p>strongest, mean over pairs</p>{strongest}"


def empty_values(pairs: int, cells: Sequence[int], graph: Graph) -> Float32[np.ndarray, "p c e"]:
    """An array for the values of all edges, all NaN."""
    return np.full((pairs, max(cells), len(graph)), np.nan, dtype=np.float32)
