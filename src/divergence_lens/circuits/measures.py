"""Faithfulness: how much of the model's behavior a circuit keeps when all other edges are ablated.

1. Run both sides of each pair, and take every sender's ablated output: that of the counterfactual
   run, a mean over pairs, or zero.
2. Run the model with each receiver reading its own residual: the live output of senders whose edge
   to it is in the circuit, the ablated output of all others (`circuits.ablated`).
3. Faithfulness is (m(circuit) - m(empty)) / (m(model) - m(empty)), with m the mean metric over
   pairs, and "empty" the run with all edges ablated.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float

from divergence_lens.circuits.ablated import CircuitPass
from divergence_lens.circuits.blocks import Blocks
from divergence_lens.circuits.circuit import Circuit
from divergence_lens.circuits.graph import Graph
from divergence_lens.circuits.result import Faithfulness
from divergence_lens.circuits.runs import (
    circuit_request,
    each_run,
)
from divergence_lens.circuits.scores import EdgeScores
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs
from divergence_lens.patching import Metric, PatchingRun
from divergence_lens.provenance import run_metadata

if TYPE_CHECKING:
    import pandas as pd

Ablated = Literal["counterfactual", "mean", "zero"]
Level = Literal["edges", "nodes"]

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of edges at which MIB measures circuits."""


@torch.no_grad()
def faithfulness(
    model: Model,
    pairs: Pairs,
    circuit: Circuit | Sequence[Circuit],
    *,
    ablation: Ablated = "counterfactual",
    metric: Metric = "logit_difference",
    completeness: bool = False,
    minimality: bool = False,
    batch_rows: int = 16,
    progress: bool = False,
) -> Faithfulness:
    """Measure circuits exactly: run the model with everything outside of them ablated.

    Args:
        model: As in `edge_scores`.
        pairs: The pairs; use others than those that the circuit was chosen on.
        circuit: One circuit, or several that share the unpatched runs.
        ablation: What replaces the output of senders outside the circuit: that of the
            `counterfactual` run, the `mean` over the clean runs of all pairs at the same index of
            the same segment, or `zero`. At a position without a counterpart (in a differing span
            of unequal length) the clean run's output remains.
        metric: As in `causal_mediation`.
        completeness: Whether to measure the complement of each circuit as well.
        minimality: Whether to measure each circuit without each of its edges: one run per edge.
        batch_rows: The number of pairs run at once.
        progress: Whether to show a progress bar.

    Returns:
        The metrics, and the faithfulness that follows from them.

    Raises:
        ValueError: As in `edge_scores`; and if a circuit is of another model, there is none, or an
            ablation is unknown.
        TypeError: `circuit` is no circuit and no sequence of circuits.
    """
    if not isinstance(circuit, Circuit | Sequence):
        raise TypeError(
            f"circuit is {type(circuit).__name__}; choose edges with scores.circuit(top=...), or "
            "measure scores with faithfulness_curve"
        )
    circuits = [circuit] if isinstance(circuit, Circuit) else list(circuit)
    if not circuits:
        raise ValueError("circuit is empty; give at least one circuit")
    if ablation not in ("counterfactual", "mean", "zero"):
        raise ValueError(f"ablation is {ablation!r}; it is counterfactual, mean or zero")
    request, blocks = circuit_request(
        model,
        pairs,
        direction="noising",
        metric=metric,
        corruption=ablation,
        span="position",
        batch_rows=batch_rows,
    )
    graph = blocks.graph
    for one in circuits:
        if not isinstance(one, Circuit):
            raise TypeError(
                f"circuit contains {type(one).__name__}; give circuits, such as "
                "scores.circuit(top=20)"
            )
        one.check_graph(graph)
    masks = [np.zeros(len(graph), dtype=bool), *(one.chosen for one in circuits)]
    if completeness:
        masks += [~one.chosen for one in circuits]
    single = [
        (number, int(edge))
        for number, one in enumerate(circuits if minimality else [])
        for edge in np.flatnonzero(one.chosen)
    ]
    masks += [circuits[number].without(edge).chosen for number, edge in single]
    metrics = np.zeros((len(masks), len(pairs)))
    full = np.zeros(len(pairs))

    def compute(run: PatchingRun, blocks: Blocks) -> None:
        circuit_pass = CircuitPass(run, blocks)
        indices = run.chunk.indices[: run.chunk.pairs].tolist()
        full[indices] = run.chunk.merged(run.base_metric)[: run.chunk.pairs].cpu().numpy()
        for number, mask in enumerate(masks):
            values = run.chunk.merged(circuit_pass.metric(mask))[: run.chunk.pairs]
            metrics[number, indices] = values.cpu().numpy()

    each_run(
        model, request, compute, chunk_pairs=batch_rows, progress=progress, title="faithfulness"
    )
    n = len(circuits)
    result = Faithfulness(
        metric=metrics[1 : n + 1],
        full=full,
        empty=metrics[0],
        edges=tuple(map(len, circuits)),
        shares=tuple(len(one) / len(graph) for one in circuits),
        complement=metrics[n + 1 : 2 * n + 1] if completeness else None,
        metadata=run_metadata(
            model, ablation=ablation, metric=request.metric_name, level="edges", pairs=len(pairs)
        ),
    )
    if not minimality:
        return result
    removed = metrics[len(masks) - len(single) :]
    return replace(result, dropped=_dropped(result, circuits, single, removed))


def faithfulness_curve(
    model: Model,
    pairs: Pairs,
    scores: "EdgeScores | np.ndarray",
    *,
    level: Level = "edges",
    shares: Sequence[float] = SHARES,
    select: Literal["top", "greedy"] = "top",
    absolute: bool = True,
    ablation: Ablated = "counterfactual",
    metric: Metric = "logit_difference",
    batch_rows: int = 16,
    progress: bool = False,
) -> Faithfulness:
    """Measure circuits of growing size: MIB's curve, with the areas `cpr` and `cmd`.

    Args:
        model: As in `edge_scores`.
        pairs: The pairs to measure on.
        scores: Edge scores, or one number per edge (per sender with `level="nodes"`).
        level: Whether the strongest `edges` are chosen, or the strongest `nodes` (a head or an MLP
            with all edges between those kept; its score is the sum over its outgoing edges).
        shares: Shares of the edges or nodes, increasing.
        select: `top` scores, or `greedy` from the logits backward (edges only).
        absolute: Whether scores are ranked by magnitude. Otherwise edges that support the answer
            come first (`EdgeScores.support`; of an array, the largest), which suits `cpr`.
        ablation: As in `faithfulness`.
        metric: As in `causal_mediation`.
        batch_rows: As in `faithfulness`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: As in `faithfulness`; if shares are not increasing numbers up to 1; if more
            edges or nodes are asked for than have a score; and if `absolute` is false and the mean
            total effect is zero.
    """
    if not all(a < b for a, b in zip((0, *shares), (*shares, 1.001), strict=False)):
        raise ValueError(f"shares is {list(shares)}; give increasing shares, above 0 and up to 1")
    if level not in ("edges", "nodes") or select not in ("top", "greedy"):
        raise ValueError(
            f"level is {level!r} and select is {select!r}; level is edges or nodes, and select is "
            "top or greedy"
        )
    if isinstance(scores, EdgeScores):
        graph = scores.graph
        values = scores.ranked(absolute=absolute)
        if level == "nodes":
            values = np.bincount(graph.edge_sender, values, len(graph.senders))
    else:
        graph, values = _graph_of(model, pairs, metric), np.asarray(scores)
    expected = len(graph) if level == "edges" else len(graph.senders)
    if values.shape != (expected,):
        raise ValueError(
            f"scores has the shape {list(values.shape)}; level={level!r} needs one number for each "
            f"of the {expected} {level} (senders)"
        )
    counts = [int(share * expected) for share in shares]
    if level == "edges":
        circuits = [
            Circuit.from_scores(
                graph,
                values,
                top=count if select == "top" else None,
                greedy=count if select == "greedy" else None,
                absolute=absolute,
            )
            for count in counts
        ]
    else:
        known = np.isfinite(values)
        if counts and counts[-1] > known.sum():
            raise ValueError(
                f"{counts[-1]} nodes are asked for, but only {known.sum()} have a score for each "
                "of their edges; score all edges, or give smaller shares"
            )
        strength = np.where(known, np.abs(values) if absolute else values, -np.inf)
        order = np.argsort(-strength, kind="stable")
        circuits = []
        for count in counts:
            kept = np.zeros(expected, dtype=bool)
            kept[order[:count]] = True
            circuits.append(Circuit.from_kept_senders(graph, kept))
    result = faithfulness(
        model,
        pairs,
        circuits,
        ablation=ablation,
        metric=metric,
        batch_rows=batch_rows,
        progress=progress,
    )
    settings = {**result.metadata["settings"], "level": level, "select": select}
    return replace(result, shares=tuple(shares), metadata={**result.metadata, "settings": settings})


def _graph_of(model: Model, pairs: Pairs, metric: Metric) -> Graph:
    return circuit_request(
        model,
        pairs,
        direction="noising",
        metric=metric,
        corruption="counterfactual",
        span="all",
        batch_rows=1,
    )[1].graph


def _dropped(
    result: Faithfulness,
    circuits: Sequence[Circuit],
    single: Sequence[tuple[int, int]],
    removed: Float[np.ndarray, "single pairs"],
) -> "tuple[pd.DataFrame, ...]":
    """The change of faithfulness by removed edge, for each circuit."""
    import pandas as pd

    without = result.normalized(removed) if len(removed) else np.zeros(0)
    tables = []
    for number, one in enumerate(circuits):
        rows = [i for i, (owner, _) in enumerate(single) if owner == number]
        names = [one.graph.names(single[i][1]) for i in rows]
        table = pd.DataFrame(names, columns=["sender", "receiver"])
        table["change"] = without[rows] - result.values[number]
        tables.append(table.sort_values("change", ignore_index=True))
    return tuple(tables)
