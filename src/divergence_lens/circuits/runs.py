"""What all circuit methods share: the request, the loop over pairs, and what senders change."""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from divergence_lens._utils.memory import halved
from divergence_lens.circuits.blocks import Blocks
from divergence_lens.circuits.scores import EdgeScores
from divergence_lens.engine import Engine, get_engine
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs, weights_key
from divergence_lens.patching import (
    Chunk,
    Corruption,
    Direction,
    Metric,
    PatchingRequest,
    PatchingRun,
    Span,
    ablation_of,
    groups_of_pairs,
    patching_run,
    validate,
)
from divergence_lens.provenance import run_metadata

Changes: TypeAlias = Float[Tensor, "batch sender pos d_model"]

CHANGES_BYTES = 2**30
"""Pairs are run in groups whose `sender_changes` take at most this many bytes."""


def circuit_request(
    model: Model,
    pairs: Pairs,
    *,
    direction: Direction,
    metric: Metric,
    corruption: Corruption,
    span: Span,
    batch_rows: int,
) -> tuple[PatchingRequest, Blocks]:
    """Validate a call; also return the model's blocks.

    Raises:
        ValueError: As listed in the docstrings of the public functions.
    """
    engine = get_engine(model, causal=False)
    # `resid_pre` of layer 0 is what the embeddings write; an ablation replaces it like the others.
    sites = ("resid_pre", "z", *(["mlp_out"] if "mlp_out" in engine.sites else []))
    request = PatchingRequest(
        pairs=pairs,
        sites=sites,
        direction=direction,
        metric=metric,
        corruption=corruption,
        span=span,
    )
    validate(model, request, batch_rows=batch_rows)
    for i in range(len(pairs)):
        clean, corrupted = request.teachers(i)
        if weights_key(clean) != weights_key(corrupted):
            raise ValueError(
                f"the teachers of pair {i} differ in weights, so that one sender would write with "
                "two sets of weights; edges need two runs of one model (use causal_mediation)"
            )
    return request, Blocks(engine)


def each_run(
    model: Model,
    request: PatchingRequest,
    compute: Callable[[PatchingRun, Blocks], None],
    *,
    chunk_pairs: int,
    progress: bool,
    title: str,
) -> None:
    """Call `compute` for groups of pairs, under the weights of their teacher."""
    engine = get_engine(model, causal=False)
    ablation = ablation_of(model, request)

    def run(chosen: list[int]) -> int:
        with patching_run(model, request, chosen, ablation=ablation) as traced:
            compute(traced, Blocks(traced.engine, check=False))
        return len(chosen)

    with (
        engine.packed(),
        tqdm(total=len(request.pairs), desc=title, unit="pair", disable=not progress) as bar,
    ):
        for group in groups_of_pairs(request, engine, _fitting(request, engine, chunk_pairs)):
            for done in halved(group, run):
                bar.update(done)


def _fitting(request: PatchingRequest, engine: Engine, most: int) -> int:
    """At most as many pairs as have changes of all senders that fit into `CHANGES_BYTES`."""
    pairs = range(len(request.pairs))
    longest = max(max(len(request.pairs.clean[i]), len(request.corrupted(i))) for i in pairs)
    positions = longest - (min(request.start(i) for i in pairs) if engine.causal else 0)
    senders = len(Blocks(engine, check=False).graph.senders)
    each = 4 * senders * positions * engine.d_model  # float32
    return max(1, min(most, CHANGES_BYTES // each))


def first_position(run: PatchingRun) -> int:
    """The first position at which the two runs of a chunk can differ."""
    return int(run.chunk.start.min())


def sender_changes(run: PatchingRun, blocks: Blocks, *, by_position: bool = False) -> Changes:
    """The source minus the base output of every sender, from the first difference on.

    Zero at positions without a counterpart. The largest tensor of all methods, and none has an axis
    of edges and one of d_model: an edge's score is a product of its sender's change, which all of
    the sender's edges share, and its receiver's gradient.

    Args:
        run: Both runs of a chunk.
        blocks: The blocks of the model.
        by_position: Whether the axis of positions comes before that of senders in memory.
    """
    graph, first = blocks.graph, first_position(run)
    differs = run.chunk.differs[:, first:]
    batch, length = differs.shape
    sizes = (batch, len(graph.senders), length, blocks.engine.d_model)
    if by_position:
        result = torch.empty(
            sizes[0], sizes[2], sizes[1], sizes[3], device=blocks.engine.device
        ).transpose(1, 2)  # [batch, sender, pos, d_model]
    else:
        result = torch.empty(sizes, device=blocks.engine.device)

    def change(site: str, layer: int) -> Tensor:
        new = run.new(site, layer)[:, first:].float()
        difference = new - run.base.sites[site][layer][:, first:].float()
        return difference.masked_fill(
            ~differs.view(batch, length, *[1] * (difference.ndim - 2)), 0.0
        )

    result[:, 0] = change("resid_pre", 0)
    for layer in range(graph.n_layers):
        heads = slice(graph.heads_from(layer), graph.heads_from(layer) + graph.n_heads)
        result[:, heads] = blocks.written(layer, change("z", layer))  # W (z' - z) = W z' - W z
        if graph.mlps:
            result[:, graph.mlp_sender(layer)] = change("mlp_out", layer)
    return result


def write_cells(
    values: Float[np.ndarray, "pairs cells more"],
    chunk: Chunk,
    result: Float[Tensor, "batch cell more"],
) -> None:
    """Write a chunk's values into the whole run's array, NaN where a cell has no counterpart."""
    result = result.masked_fill(chunk.missing[:, : result.shape[1], None], torch.nan)
    array = chunk.merged(result).cpu().numpy()  # [batch, cell, more]
    width = min(array.shape[1], values.shape[1])
    for row, pair in enumerate(chunk.indices[: chunk.pairs].tolist()):
        values[pair] = np.nan
        values[pair, :width] = array[row, :width]


def write_metrics(metrics: Float[np.ndarray, "pairs 2"], run: PatchingRun) -> None:
    """Write the metrics of a chunk's unpatched base and source runs."""
    both = run.chunk.merged(torch.stack([run.base_metric, run.source_metric], 1))  # [batch, 2]
    indices = run.chunk.indices[: run.chunk.pairs].tolist()
    metrics[indices] = both[: run.chunk.pairs].cpu().numpy()


def scores_of(
    model: Model,
    request: PatchingRequest,
    blocks: Blocks,
    values: Float[np.ndarray, "pairs cells edges"],
    metrics: Float[np.ndarray, "pairs 2"],
    *,
    method: str,
    **settings: object,
) -> EdgeScores:
    """Scores with the labels and settings of a request."""
    base, source = metrics.T
    noising = request.direction == "noising"
    return EdgeScores(
        values=values,
        graph=blocks.graph,
        method=method,
        direction=request.direction,
        metric=request.metric_name,
        clean_metric=base if noising else source,
        corrupted_metric=source if noising else base,
        segments=tuple(cells.segments for cells in request.cells),
        labels=tuple(cells.labels for cells in request.cells),
        metadata=run_metadata(
            model,
            direction=request.direction,
            metric=request.metric_name,
            corruption=str(request.corruption),
            span=request.span,
            **settings,
        ),
    )
