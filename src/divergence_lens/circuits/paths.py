"""Path patching: the exact effect of one edge, with everything after its receiver recomputed.

1. Run both sides of each pair; every sender's change is its source minus its base output.
2. The patched run is the base run in which one receiver reads the residual plus one sender's
   change: new queries, keys or values of one head, another MLP input, or other logits (Goldowsky-
   Dill et al. 2023, arXiv 2304.05969). All paths from the receiver on are open.
3. Nothing changes below the receiver's layer, so one *staggered* pass runs many edges of all
   layers: a row joins at the block of its receiver, from the stored base residual, and edges into
   the logits need no block at all. Nothing changes before the first changed position, whose keys
   and values are stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens._utils.memory import halved
from divergence_lens.circuits.blocks import Blocks, Change
from divergence_lens.circuits.circuit import Circuit
from divergence_lens.circuits.graph import READS, Graph
from divergence_lens.circuits.runs import (
    circuit_request,
    each_run,
    first_position,
    scores_of,
    sender_changes,
    write_cells,
    write_metrics,
)
from divergence_lens.circuits.scores import EdgeScores, empty_values
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs
from divergence_lens.patching import (
    Agreement,
    Corruption,
    Direction,
    Metric,
    PatchingRequest,
    PatchingRun,
    Span,
    agreement_of_cells,
    finite,
    logits_at,
    states_at,
)

if TYPE_CHECKING:
    import pandas as pd

Edges = Sequence[tuple[str, str]]
"""Edges as (sender, receiver)."""


@torch.no_grad()
def path_patch(
    model: Model,
    pairs: Pairs,
    *,
    edges: "Edges | pd.DataFrame | Circuit | None" = None,
    span: Span = "all",
    direction: Direction = "noising",
    metric: Metric = "logit_difference",
    corruption: Corruption = "counterfactual",
    batch_rows: int = 128,
    progress: bool = False,
) -> EdgeScores:
    """Compute the exact effect of edges, one at a time.

    Args:
        model: As in `edge_scores`.
        pairs: The pairs to patch.
        edges: The edges: a list of (sender, receiver), a table from `EdgeScores.top` (of cells, to
            compute only these cells), a circuit, or None for all edges of the model. Edges into
            `logits` are direct effects.
        span: What is patched at once: `all` positions, each `segment` of a row, or each `position`.
        direction: Which run is patched.
        metric: As in `causal_mediation`.
        corruption: As in `causal_mediation`.
        batch_rows: The maximum number of patched rows run at once.
        progress: Whether to show a progress bar.

    Returns:
        Scores with the method `exact`: the metric of the patched run minus that of the base run,
        NaN for edges that were not requested.

    Raises:
        ValueError: As in `edge_scores`; and if there is no such node, an edge runs backward, or a
            table or circuit is of another model.
    """
    request, blocks = circuit_request(
        model,
        pairs,
        direction=direction,
        metric=metric,
        corruption=corruption,
        span=span,
        batch_rows=batch_rows,
    )
    requested = _requested(edges, blocks.graph, len(pairs), request.width)
    return _exact(model, request, blocks, requested, batch_rows=batch_rows, progress=progress)


@dataclass(frozen=True)
class _Requested:
    """Cells to compute: every column of every pair for some edges, or single cells."""

    edges: Int64[np.ndarray, " edges"]
    cells: Int64[np.ndarray, "cells 3"] | None = None  # pair, column, edge

    def of(self, run: PatchingRun) -> Int64[np.ndarray, "rows 3"]:
        """The cells of a chunk: row, column, edge."""
        indices = run.chunk.indices.tolist()
        if self.cells is None:
            present = np.argwhere((~run.chunk.missing).cpu().numpy())  # [cells, 2]
            each = np.repeat(present, len(self.edges), axis=0)
            return np.concatenate([each, np.tile(self.edges, len(present))[:, None]], 1)
        rows = []
        for row, pair in enumerate(indices):  # a pair with a second row is computed in both
            own = self.cells[self.cells[:, 0] == pair].copy()
            own[:, 0] = row
            rows.append(own)
        return np.concatenate(rows)


def _requested(
    edges: "Edges | pd.DataFrame | Circuit | None", graph: Graph, pairs: int, width: int
) -> _Requested:
    if edges is None:
        return _Requested(np.arange(len(graph)))
    if isinstance(edges, Circuit):
        edges.check_graph(graph)
        return _Requested(np.flatnonzero(edges.chosen))
    if isinstance(edges, Sequence):
        numbers = graph.edges(edges)
        if not len(numbers):
            raise ValueError("edges is empty; name at least one edge as (sender, receiver)")
        return _Requested(np.unique(numbers))
    absent = {"sender", "receiver"} - set(edges.columns)
    if absent:
        raise ValueError(f"the table of edges lacks the columns {sorted(absent)}")
    numbers = graph.edges(list(zip(edges["sender"], edges["receiver"], strict=True)))
    if "pair" not in edges.columns:
        return _Requested(np.unique(numbers))
    cells = np.stack([edges["pair"], edges["column"], numbers], 1).astype(np.int64)
    for name, values, size in (("pair", cells[:, 0], pairs), ("column", cells[:, 1], width)):
        if len(values) and not 0 <= values.min() <= values.max() < size:
            raise ValueError(
                f"the table of edges contains {name} {values.max()}, but there are only 0 to "
                f"{size - 1}; use the span that its scores were computed with"
            )
    return _Requested(np.unique(numbers), cells)


def _exact(
    model: Model,
    request: PatchingRequest,
    blocks: Blocks,
    requested: _Requested,
    *,
    batch_rows: int,
    progress: bool,
) -> EdgeScores:
    n = len(request.pairs)
    values = empty_values(n, [len(cells.labels) for cells in request.cells], blocks.graph)
    metrics = np.zeros((n, 2), dtype=np.float32)

    def compute(run: PatchingRun, blocks: Blocks) -> None:
        cells = torch.from_numpy(requested.of(run)).to(blocks.engine.device)
        effects = PathPasses(run, blocks, batch_rows).effects(cells)
        batch, columns = run.chunk.missing.shape
        result = torch.full((batch, columns, len(blocks.graph)), torch.nan, device=effects.device)
        result[cells[:, 0], cells[:, 1], cells[:, 2]] = effects
        write_cells(values, run.chunk, result)
        write_metrics(metrics, run)

    each_run(
        model,
        request,
        compute,
        chunk_pairs=max(1, min(8, batch_rows)),
        progress=progress,
        title="exact edges",
    )
    return scores_of(model, request, blocks, values, metrics, method="exact")


@dataclass(frozen=True)
class _Rows:
    """Patched rows, in the order in which they join a pass.

    Attributes:
        cell: Where the effect belongs: row of the chunk, column, edge.
        layer, head, sender: The receiver's layer and head, and the sender.
        kind: The number of the receiver's kind in `_KINDS`.
        start: The first changed position.
    """

    cell: Int64[Tensor, "rows 3"]
    layer: Int64[Tensor, " rows"]
    kind: Int64[Tensor, " rows"]
    head: Int64[Tensor, " rows"]
    sender: Int64[Tensor, " rows"]
    start: Int64[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, index: slice | Tensor) -> "_Rows":
        return _Rows(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def batch(self) -> Int64[Tensor, " rows"]:
        return self.cell[:, 0]


_KINDS = (*READS, "mlp", "logits")


class PathPasses:
    """The staggered passes of one chunk."""

    def __init__(self, run: PatchingRun, blocks: Blocks, batch_rows: int) -> None:
        self.run, self.engine, self.chunk = run, run.engine, run.chunk
        self.blocks, self.graph, self.batch_rows = blocks, blocks.graph, batch_rows
        self.first = first_position(run)
        self.changes = sender_changes(run, blocks)  # [batch, sender, pos, d_model]
        self.patched = self._patched()  # [batch, column, pos]

    def _patched(self) -> Bool[Tensor, "batch column pos"]:
        """The positions of each column, from the first difference on."""
        chunk = self.chunk
        if chunk.members is not None:
            return chunk.members[:, :, self.first :]
        width = chunk.base.shape[1]
        own = torch.eye(width, dtype=torch.bool, device=chunk.base.device)
        return own[:, self.first :].expand(len(chunk.base), -1, -1)

    def effects(self, cells: Int64[Tensor, "rows 3"]) -> Float[Tensor, " rows"]:
        """The effect of each cell (row of the chunk, column, edge)."""
        result = torch.zeros(len(cells), device=cells.device)
        # Without a change at the patched positions, the patched run is the base run.
        changed = (self.changes != 0).any(-1)  # [batch, sender, pos]
        sender = torch.from_numpy(self.graph.edge_sender).to(cells.device)[cells[:, 2]]
        moved = changed[cells[:, 0], sender] & self.patched[cells[:, 0], cells[:, 1]]  # [rows, pos]
        active = moved.any(-1).nonzero()[:, 0]
        if not len(active):
            return result
        places = torch.tensor(
            [self._place(int(edge)) for edge in cells[active, 2].tolist()], device=cells.device
        )
        start = moved[active].int().argmax(-1) + self.first
        layer, kind, head = places.unbind(1)
        rows = _Rows(cells[active], layer, kind, head, sender[active], start)
        order = torch.argsort(rows.start * (self.graph.n_layers + 1) + rows.layer, stable=True)
        for first in range(0, len(order), self.batch_rows):
            chosen = order[first : first + self.batch_rows]
            chosen = chosen[torch.argsort(rows.layer[chosen], stable=True)]
            for part, metric in halved(chosen, lambda part: (part, self._metric(rows[part]))):
                effect = metric - self.run.base_metric[rows.batch[part]]
                result[active[part]] = effect
        return result

    def _place(self, edge: int) -> tuple[int, int, int]:
        layer, kind, head = self.graph.place(int(self.graph.edge_receiver[edge]))
        return layer, _KINDS.index(kind), head

    def _metric(self, rows: _Rows) -> Float[Tensor, " rows"]:
        """Run one staggered pass over rows sorted by layer."""
        engine, base, layers = self.engine, self.run.base, self.graph.n_layers
        first = int(rows.start.min())
        past = base.past
        assert past is not None
        # A pass needs the number of positions, not the tokens, so one row is enough.
        run = engine.begin(self.chunk.base[:1, first:], past.upto(first) if first else None)
        entries = rows.layer.tolist()
        x = base.resid[0].new_empty(0, self.chunk.base.shape[1] - first, engine.d_model)
        for layer in range(entries[0], layers):
            if len(x):
                x = engine.block(layer, x, run, rows=rows.batch[: len(x)])
            joining = [i for i in range(len(x), len(entries)) if entries[i] == layer]
            if joining:
                new = rows[joining[0] : joining[-1] + 1]
                fresh = base.resid[layer][new.batch, first:]  # [joining, pos, d_model]
                with self.blocks.reading(layer, self._changes_at(layer, new, first)):
                    x = torch.cat([x, engine.block(layer, fresh, run, rows=new.batch)])
        direct = rows[len(x) :]  # edges into the logits change the last residual only
        if len(direct):
            x = torch.cat([x, base.resid[layers][direct.batch, first:] + self._sent(direct, first)])
        target = self.chunk.base_target[rows.batch] - first
        read = states_at(x, target, rows.batch, self.chunk.readings)
        metric = self.run.measure(logits_at(engine, read), rows.batch)
        return finite(metric, self.chunk.indices[rows.batch], "a patched run")

    def _sent(self, rows: _Rows, first: int) -> Float[Tensor, "rows pos d_model"]:
        """The change that each row sends to its receiver: zero outside its column."""
        since = first - self.first
        change = self.changes[rows.batch, rows.sender][:, since:]  # [rows, pos, d_model]
        patched = self.patched[rows.batch, rows.cell[:, 1]][:, since:, None]  # [rows, pos, 1]
        return (change * patched).to(self.run.base.resid[0].dtype)

    def _changes_at(self, layer: int, rows: _Rows, first: int) -> dict[str, Change]:
        """What the parts of a block read instead, for the rows that join at it."""
        sent = self._sent(rows, first)
        changes: dict[str, Change] = {}
        for number, kind in enumerate(_KINDS[:-1]):
            own = (rows.kind == number).nonzero()[:, 0]
            if len(own):
                sent_own = sent[own]
                if kind == "mlp":
                    changes[kind] = _added(own, sent_own)
                    continue
                base = self.run.base.resid[layer][rows.batch[own], first:]
                head = rows.head[own]
                new = self.blocks.read_by(layer, kind, head, base + sent_own)
                # Elsewhere, keep the very bits of the base run.
                where = (sent_own != 0).any(-1)[..., None]  # [own, pos, 1]
                changes[kind] = _replaced(own, head, new, where)
        return changes


def _added(own: Int64[Tensor, " own"], sent: Float[Tensor, "own pos d_model"]) -> Change:
    """Add a change to the residual of some rows."""
    return lambda resid: resid.index_add(0, own, sent)


def _replaced(
    own: Int64[Tensor, " own"],
    head: Int64[Tensor, " own"],
    new: Float[Tensor, "own pos d_head"],
    where: Bool[Tensor, "own pos 1"],
) -> Change:
    """Replace the queries, keys or values of one head in each of some rows."""

    def replace(activation: Float[Tensor, "rows pos head d_head"]) -> Tensor:
        changed = activation.clone()
        changed[own, :, head] = torch.where(where, new, activation[own, :, head])
        return changed

    return replace


def sampled_agreement(
    model: Model,
    request: PatchingRequest,
    blocks: Blocks,
    scores: EdgeScores,
    *,
    k: int,
    seed: int,
    batch_rows: int,
) -> Agreement | None:
    """Agreement with exact values of the `k` strongest cells and of `k` others.

    The others are drawn from the cells that are not zero: a sender that does not change is zero on
    both sides. None if fewer than two cells can be compared.
    """
    flat = scores.values.ravel()
    present = np.flatnonzero(np.nan_to_num(flat))
    if len(present) < 2:
        return None
    order = present[np.argsort(-np.abs(flat[present]), kind="stable")]
    drawn = np.random.default_rng(seed).permutation(order[k:])[:k]
    cells = np.concatenate([order[:k], drawn])
    index = np.stack(np.unravel_index(cells, scores.values.shape), 1)  # [cells, 3]
    with torch.no_grad():
        exact = _exact(
            model,
            request,
            blocks,
            _Requested(np.unique(index[:, 2]), index),
            batch_rows=batch_rows,
            progress=False,
        )
    return agreement_of_cells(flat[cells], exact.values.ravel()[cells], k)
