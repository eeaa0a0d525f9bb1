"""Edge attribution: the first-order effect of every edge, from two forward passes and a backward.

1. Run both sides of each pair. Every sender's change is its source minus its base output (EAP, Syed
   et al. 2023, arXiv 2310.10348).
2. Run the base side again with a graph, and back from the metric. The gradient at a receiver's
   input follows from the gradient at its queries, keys, values or MLP input, through the receiver's
   own weights and the norm it reads through: g = J_norm^T W g_q.
3. Contract: the score of the edge from s to r is the sum over positions of (change of s) . g_r. The
   contraction of one layer's receivers is one matrix product with the changes of all senders
   below, so nothing has an axis of edges and one of d_model.

`integrated-inputs` averages the gradients along a straight path of the embeddings (EAP-IG, Hanna et
al. 2024, arXiv 2403.17806), at midpoints instead of left endpoints.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from divergence_lens.circuits.blocks import Blocks, Change
from divergence_lens.circuits.graph import READS
from divergence_lens.circuits.paths import sampled_agreement
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
    Corruption,
    Direction,
    Metric,
    PatchingRun,
    Span,
    logits_at,
    states_at,
)

EdgeMethod = Literal["gradient", "integrated-inputs"]


@torch.inference_mode(mode=False)
def edge_scores(
    model: Model,
    pairs: Pairs,
    *,
    method: EdgeMethod = "integrated-inputs",
    steps: int = 5,
    span: Span = "all",
    direction: Direction = "noising",
    metric: Metric = "logit_difference",
    corruption: Corruption = "counterfactual",
    verify: int = 0,
    seed: int = 0,
    batch_rows: int = 32,
    progress: bool = False,
) -> EdgeScores:
    """Approximate the effect of every edge: what a sender changes through one receiver's input.

    Senders are the embeddings, each head's output and each MLP; receivers are each head's queries,
    keys and values, each MLP's input, and the logits. The keys and values of grouped queries have
    one receiver per group.

    Args:
        model: The model; teachers with deltas are applied to it. Pre-norm blocks, sequential or
            parallel.
        pairs: The pairs to patch. Of a differing span with different numbers of tokens, the last
            position of each side counts.
        method: `gradient`, at the base run: two forward passes and one backward pass.
            `integrated-inputs`: the mean gradient over `steps` midpoints of a straight path from
            the base run's embeddings to the source run's.
        steps: Midpoints on the path.
        span: What one column of the result covers: `all` positions together, each `segment` of a
            row, or each `position`.
        direction: Which run is patched: `noising` (the clean run) or `denoising`.
        metric: As in `causal_mediation`; it must be differentiable in the logits.
        corruption: Where the patched-in states come from, as in `causal_mediation`.
        verify: If positive, this many of the strongest cells and as many others, drawn at random,
            are computed by `path_patch`, and their agreement is attached as `EdgeScores.verified`.
        seed: Seed for drawing the cells of `verify`.
        batch_rows: The maximum number of rows (pairs times steps) run at once.
        progress: Whether to show a progress bar.

    Returns:
        The scores of all edges. Summed over the edges of a sender, they are the sender's
        `attribution_patch` value.

    Raises:
        ValueError: As in `attribution_patch`; and if a block's output is not the sum of its heads
            and its MLP (post-norm blocks), or the two runs of a pair have different weights.
    """
    _check_options(method, steps, verify, metric=metric, direction=direction, corruption=corruption)
    request, blocks = circuit_request(
        model,
        pairs,
        direction=direction,
        metric=metric,
        corruption=corruption,
        span=span,
        batch_rows=batch_rows,
    )
    graph, n = blocks.graph, len(pairs)
    values = empty_values(n, [len(cells.labels) for cells in request.cells], graph)
    metrics = np.zeros((n, 2), dtype=np.float32)

    def compute(run: PatchingRun, blocks: Blocks) -> None:
        edge_pass = EdgePass(run, blocks, span, batch_rows)
        with run.engine.frozen(), torch.enable_grad():
            result = edge_pass.values(steps if method == "integrated-inputs" else 0)
        write_cells(values, run.chunk, result)
        write_metrics(metrics, run)

    nodes = steps if method == "integrated-inputs" else 1
    each_run(
        model,
        request,
        compute,
        chunk_pairs=max(1, batch_rows // nodes),
        progress=progress,
        title=f"{method} edges",
    )
    scores = scores_of(
        model,
        request,
        blocks,
        values,
        metrics,
        method=method if nodes == 1 else f"{method} ({steps} steps)",
        steps=nodes,
    )
    if not verify:
        return scores
    agreement = sampled_agreement(
        model, request, blocks, scores, k=verify, seed=seed, batch_rows=batch_rows
    )
    return replace(scores, verified=agreement)


class EdgePass:
    """Gradients of one chunk at all receivers, contracted with the changes of all senders."""

    def __init__(self, run: PatchingRun, blocks: Blocks, span: Span, batch_rows: int) -> None:
        self.run, self.engine, self.chunk = run, run.engine, run.chunk
        self.blocks, self.graph, self.batch_rows = blocks, blocks.graph, batch_rows
        # Before the first difference no sender changes: those positions are only read, as a past.
        self.first = first_position(run)
        past = run.base.past
        self.past = past.upto(self.first) if past is not None and self.first else None
        self.summed = span == "all"
        self.rows = torch.arange(len(run.chunk.indices), device=run.chunk.base.device)
        with torch.no_grad():
            self.changes = sender_changes(run, blocks, by_position=not self.summed)

    def values(self, steps: int) -> Float[Tensor, "batch cell edge"]:
        """Scores at the base state, or along the path of the embeddings if `steps` is positive."""
        start = self.run.base.resid[0][:, self.first :].detach()  # [batch, pos, d_model]
        if not steps:
            return self._scores(start, 1)
        result: Tensor | None = None
        for weights in path_weights(steps, self.batch_rows // len(self.rows)):
            weight = torch.tensor(weights, device=start.device).view(-1, 1, 1, 1)
            change = self.changes[:, 0]  # of `embed`
            state = (start.float() + weight * change).flatten(0, 1)  # [nodes * batch, pos, d_model]
            part = self._scores(state.to(start.dtype), len(weights))
            result = part if result is None else result + part
        assert result is not None
        return result / steps

    def _scores(
        self, state: Float[Tensor, "rows pos d_model"], nodes: int
    ) -> Float[Tensor, "batch cell edge"]:
        """Scores from one recorded pass, summed over the nodes stacked on its rows."""
        record = _Recorded(self.blocks)
        rows = self.rows.repeat(nodes)
        # A pass needs the number of positions, not the tokens, so one row is enough.
        run = self.engine.begin(self.chunk.base[:1, self.first :], self.past)
        last = record.forward(state, run, rows)
        read = states_at(last, self.chunk.base_target[rows] - self.first, rows, self.chunk.readings)
        metric = self.run.measure(logits_at(self.engine, read), rows)
        if not metric.requires_grad:
            raise ValueError(
                "the metric returned a result without a gradient; compute it from the logits with "
                "torch functions only, without detach, item, numpy or argmax"
            )
        record.backward(metric.sum(), last)
        graph, parts = self.graph, []

        def add(receivers: int, gradient: Float[Tensor, "rows head pos d_model"]) -> None:
            gradient = gradient.unflatten(0, (nodes, -1)).sum(0)  # [batch, head, pos, d_model]
            parts.append(self._contract(int(graph.reach[receivers]), gradient))

        with torch.no_grad():
            for layer in range(graph.n_layers):
                for read_kind in READS:
                    add(graph.reading(layer, read_kind).start, record.at_reads(layer, read_kind))
                if graph.mlps:
                    add(graph.mlp_receiver(layer), record.at_mlp(layer))
            add(len(graph.receivers) - 1, record.gradients["logits", 0][:, None].float())
            return torch.cat(parts, -1)  # edges are sorted by receiver: [batch, cell, edge]

    def _contract(
        self, senders: int, gradient: Float[Tensor, "batch head pos d_model"]
    ) -> Float[Tensor, "batch cell edge"]:
        """Edges from the first `senders` to each of some receivers, receiver by receiver."""
        changes = self.changes[:, :senders]
        if self.summed:
            # [batch, head, pos * d_model] x [batch, pos * d_model, sender]
            scores = gradient.flatten(2) @ changes.flatten(2).mT  # [batch, head, sender]
            return scores.flatten(1)[:, None]  # [batch, 1, edge]
        # A small product for each position: [head, d_model] x [d_model, sender].
        scores = torch.einsum("bhpd,bspd->bphs", gradient, changes).flatten(2)  # [batch, pos, edge]
        if self.chunk.members is None:
            return nn.functional.pad(scores, (0, 0, self.first, 0))  # [batch, all pos, edge]
        members = self.chunk.members[:, :, self.first :].to(scores.dtype)  # [batch, cell, pos]
        return members @ scores


class _Recorded:
    """A forward pass that records each part's input and, on the way back, its gradient."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks, self.graph = blocks, blocks.graph
        self.inputs: dict[tuple[str, int], Tensor] = {}
        self.gradients: dict[tuple[str, int], Tensor] = {}

    def forward(self, state: Tensor, run: object, rows: Tensor) -> Float[Tensor, "rows pos d"]:
        """Run all blocks from the embeddings; return the last residual."""
        self._leaf = state.detach().requires_grad_()
        x: Tensor = self._leaf.clone()
        engine = self.blocks.engine
        for layer in range(self.graph.n_layers):
            self.inputs["attention", layer] = x.detach()
            with ExitStack() as stack:
                changes: dict[str, Change] = {read: self._watch(read, layer) for read in READS}
                mlp = self.blocks.parts(layer).mlp
                if mlp is not None:
                    # Before the hook that `reading` adds, which would replace this one's result.
                    changes["mlp"] = self._store_mlp_input(layer)
                    watch = self._watch("mlp", layer)

                    def hook(
                        _module: nn.Module,
                        args: tuple[Tensor, ...],
                        watch: Callable[[Tensor], Tensor] = watch,
                    ) -> tuple[Tensor, ...]:
                        return (watch(args[0]), *args[1:])

                    stack.callback(mlp.register_forward_pre_hook(hook).remove)
                stack.enter_context(self.blocks.reading(layer, changes))
                x = engine.block(layer, x, run, rows=rows)  # type: ignore[arg-type]
        x = x.view_as(x)
        x.register_hook(lambda gradient: self._keep("logits", 0, gradient))
        return x

    def backward(self, metric: Float[Tensor, ""], last: Tensor) -> None:
        """Run one backward pass, which fills `gradients`."""
        del last
        torch.autograd.grad(metric, self._leaf)

    def _keep(self, kind: str, layer: int, gradient: Tensor) -> None:
        self.gradients[kind, layer] = gradient.detach()

    def _watch(self, kind: str, layer: int) -> Callable[[Tensor], Tensor]:
        def change(activation: Tensor) -> Tensor:
            # A view, because tensor hooks are inert on an activation that the hook point reshapes.
            activation = activation.view_as(activation)
            activation.register_hook(lambda gradient: self._keep(kind, layer, gradient))
            return activation

        return change

    def _store_mlp_input(self, layer: int) -> Change:
        def store(resid: Tensor) -> None:
            self.inputs["mlp", layer] = resid.detach()

        return store

    def at_reads(self, layer: int, read: str) -> Float[Tensor, "rows head pos d_model"]:
        """Gradients at the inputs of a layer's queries, keys or values, head by head."""
        weight = self.blocks.parts(layer).maps[read].weight
        gradient = self.gradients[read, layer].to(weight.dtype)  # [rows, pos, head, d_head]
        back = torch.einsum("bphe,hde->hbpd", gradient, weight)
        return self._through_norm(layer, read, self.inputs["attention", layer], back)

    def at_mlp(self, layer: int) -> Float[Tensor, "rows 1 pos d_model"]:
        """The gradient at the input of a layer's MLP."""
        gradient = self.gradients["mlp", layer][None]  # [1, rows, pos, d_model]
        return self._through_norm(layer, "mlp", self.inputs["mlp", layer], gradient)

    def _through_norm(
        self,
        layer: int,
        read: str,
        resid: Float[Tensor, "rows pos d_model"],
        back: Float[Tensor, "head rows pos d_model"],
    ) -> Float[Tensor, "rows head pos d_model"]:
        """Gradients before the norm from those after it: J^T g, with one J for all heads."""
        with torch.enable_grad():
            resid = resid.detach().requires_grad_()
            normed = self.blocks.normed(layer, read, resid)
            parts = [
                torch.autograd.grad(normed, resid, g.to(normed.dtype), retain_graph=True)[0]
                for g in back
            ]
        return torch.stack(parts, 1).float()


def path_weights(steps: int, at_once: int) -> list[list[float]]:
    """The midpoints of `steps` equal intervals of [0, 1], in groups of `at_once`."""
    nodes = [(i + 0.5) / steps for i in range(steps)]
    size = max(1, at_once)
    return [nodes[i : i + size] for i in range(0, steps, size)]


def _check_options(
    method: EdgeMethod,
    steps: int,
    verify: int,
    *,
    metric: Metric,
    direction: Direction,
    corruption: Corruption,
) -> None:
    if method not in get_args(EdgeMethod):
        raise ValueError(f"method is {method!r}; it is one of {', '.join(get_args(EdgeMethod))}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    if verify < 0:
        raise ValueError(f"verify is {verify}; give a number of cells, or 0 for none")
    if method == "gradient" and metric == "kl" and direction == "noising":
        raise ValueError(
            'method="gradient" cannot be used with metric="kl" in noising, where the divergence '
            'has its minimum and no slope; use method="integrated-inputs"'
        )
    if method == "integrated-inputs" and corruption in ("mean", "zero"):
        raise ValueError(
            f'corruption="{corruption}" has no run of its own whose embeddings could be the end of '
            'a path; use method="gradient"'
        )
