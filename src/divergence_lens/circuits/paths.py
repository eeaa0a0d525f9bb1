"""Path patching: the exact effect of one edge, with everything after its receiver recomputed.

Run both sides of each pair; every sender's change is its source minus its base output. The patched
run is the base run in which one receiver reads the residual plus one sender's change (Goldowsky-
Dill et al. 2023, arXiv 2304.05969). All paths from the receiver on are open.
`circuits.path_passes` runs many edges at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int64

from divergence_lens.circuits.blocks import Blocks
from divergence_lens.circuits.circuit import Circuit
from divergence_lens.circuits.graph import Graph
from divergence_lens.circuits.path_passes import PathPasses
from divergence_lens.circuits.runs import (
    circuit_request,
    each_run,
    scores_of,
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
