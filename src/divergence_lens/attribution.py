"""Attribution patching: the first-order estimate of causal mediation, all cells at once.

The effect of putting a source activation into the base run is estimated as the gradient of the
metric with respect to the base activation, times the difference of the two activations (Nanda
2023, "Attribution Patching"; Syed et al. 2023, arXiv 2310.10348). Two forward passes and one
backward pass serve every layer and position. The estimate fails where the model is far from linear
between the two states; integrating the gradient along a path (Sundararajan et al. 2017; Marks et
al. 2024, arXiv 2403.19647; Hanna et al. 2024, arXiv 2403.17806) mends much of that at the price of
more passes. How far to trust it is a question of measurement: see `verify` and
`Effects.agreement`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from divergence_lens._patching import (
    Chunk,
    Metric,
    MetricFunction,
    Trace,
    baselines,
    bind,
    check,
    chunks,
    empty_values,
    metric_name,
    store,
    target_logits,
    trace,
    weights,
)
from divergence_lens.effects import Agreement, Direction, Effects, agreement_of_cells
from divergence_lens.engine import Engine, Pass
from divergence_lens.mediation import causal_mediation
from divergence_lens.models import Model, provenance
from divergence_lens.pairs import Pairs, weights_key

Method = Literal["gradient", "integrated", "integrated-inputs"]
_METHODS = ("gradient", "integrated", "integrated-inputs")


def attribution_patch(
    model: Model,
    pairs: Pairs,
    *,
    site: str = "resid_post",
    method: Method = "gradient",
    steps: int = 10,
    direction: Direction = "noising",
    metric: Metric = "logit_difference",
    verify: int = 0,
    seed: int = 0,
    batch_rows: int = 32,
    progress: bool = False,
) -> Effects:
    """The approximate effect of patching each layer and position (and head), from gradients.

    Each value is `sum((source - base) * gradient)` over the components of one activation, in
    float32. What the gradient is depends on the method:

    `gradient`: that of the base run. Two forward passes and one backward for all cells.

    `integrated`: for each layer by itself, the state of that layer's site at *all* positions is
    moved in a straight line from the base to the source run, and the gradient is averaged over
    the midpoints of `steps` equal intervals. For `resid_pre` and `resid_post` the blocks above run
    from that state; for the other sites the residual that enters the layer stays at the base
    run's, and only the site's output moves (all heads together for `z`). Positions without a
    counterpart stay at the base run's state. This is the form of Schrodi et al. (arXiv
    2509.23886), with midpoints for left endpoints. The values of one layer of a residual site add
    up to the total effect as `steps` grows, if every position has a counterpart.

    `integrated-inputs`: the token embeddings move from the base to the source run's, and all
    layers' gradients along that one path are averaged. `steps` forward and backward passes serve
    all layers.

    Parameters never take a gradient; the model's flags, hooks and gradients are as before
    afterwards, also if an error is raised.

    Args:
        model: The model; teachers with deltas are applied to it.
        pairs: What to patch.
        site: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, or `z` per head.
        method: `gradient`, `integrated` or `integrated-inputs`.
        steps: Midpoints on the path; the plain gradient has no path and ignores it.
        direction: `noising` or `denoising`, as in `causal_mediation`.
        metric: As in `causal_mediation`; it must be differentiable in the logits.
        verify: If positive, so many of the strongest cells and as many others, drawn at random,
            are computed exactly, and their agreement is attached as `Effects.verified`.
        seed: Of the random cells of `verify`.
        batch_rows: At most so many rows (pairs times steps) run at once.
        progress: Whether to show a progress bar.

    Returns:
        Effects of the given method.

    Raises:
        ValueError: As in `causal_mediation`; and if the method is unknown, `steps` or `verify` is
            out of range, the metric detaches its result from the logits, or the inputs are to be
            integrated where the teachers differ in weights (their embeddings do not make a path
            between the two runs).
    """
    if method not in _METHODS:
        raise ValueError(f"method is {method!r}; it is one of {', '.join(_METHODS)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    if verify < 0:
        raise ValueError(f"verify is {verify}; it is a number of cells, or 0 for none")
    engine = check(
        model, pairs, site=site, direction=direction, metric=metric, batch_rows=batch_rows
    )
    if method == "integrated-inputs":
        _same_weights(pairs)
    values = empty_values(pairs, engine, site)
    base_metric = np.zeros(len(pairs), dtype=np.float32)
    source_metric = np.zeros(len(pairs), dtype=np.float32)
    nodes = 1 if method == "gradient" else steps
    size = max(1, batch_rows // nodes)
    bar = tqdm(total=len(pairs), desc=f"{method} {site}", unit="pair", disable=not progress)
    with bar:
        for chunk, base_teacher, source_teacher in chunks(pairs, direction, size, engine.device):
            with weights(source_teacher, model) as source_model:
                source = trace(Engine.of(source_model), chunk.source, chunk.source_target, site)
            with weights(base_teacher, model) as base_model:
                base_engine = Engine.of(base_model)
                base = trace(base_engine, chunk.base, chunk.base_target, site, keep=True)
                clean_logits = base.logits if chunk.noising else source.logits
                measure = bind(metric, pairs, chunk.indices, clean_logits)
                of_base, of_source = baselines(measure, chunk, base.logits, source.logits)
                chosen = chunk.indices.cpu().numpy()
                base_metric[chosen], source_metric[chosen] = of_base.cpu(), of_source.cpu()
                path = _Path(
                    base_engine,
                    chunk,
                    base,
                    source,
                    site=site,
                    measure=measure,
                    batch_rows=batch_rows,
                )
                with base_engine.frozen(), torch.enable_grad():
                    if method == "integrated":
                        found = path.per_layer(steps)
                    else:
                        found = path.from_inputs(0 if method == "gradient" else steps)
            store(values, chunk, path.finished(found))
            bar.update(len(chosen))
    noising = direction == "noising"
    effects = Effects(
        values=values,
        site=site,
        method=method if method == "gradient" else f"{method} ({steps} steps)",
        direction=direction,
        metric=metric_name(metric),
        clean_metric=base_metric if noising else source_metric,
        corrupted_metric=source_metric if noising else base_metric,
        segments=pairs.segments,
        labels=pairs.labels,
        header=provenance(
            model, site=site, direction=direction, metric=metric_name(metric), steps=nodes
        ),
    )
    if not verify:
        return effects
    return replace(effects, verified=_verify(model, pairs, effects, metric, k=verify, seed=seed))


class _Path:
    """Gradients along the way from the base to the source state, for one chunk."""

    def __init__(
        self,
        engine: Engine,
        chunk: Chunk,
        base: Trace,
        source: Trace,
        *,
        site: str,
        measure: MetricFunction,
        batch_rows: int,
    ) -> None:
        self.engine, self.chunk, self.base, self.source = engine, chunk, base, source
        self.site, self.measure, self.batch_rows = site, measure, batch_rows
        # What stands before the first difference is the same in both runs: kept, never rerun.
        self.first = int(chunk.start.min())
        self.past = base.past.upto(self.first) if base.past is not None and self.first else None
        self.rows = torch.arange(len(chunk.indices), device=chunk.base.device)
        self.differs = chunk.differs[:, self.first :]

    def from_inputs(self, steps: int) -> Float[Tensor, "layer batch pos ..."]:
        """All layers from one path over the embeddings, or with 0 steps from the base run alone."""
        embeddings = self.base.resid[0][:, self.first :].detach()
        if not steps:
            return self._along(embeddings, self.rows)
        other = self._embeddings_of_source()
        change = self._masked(other.float() - embeddings.float())
        found: Tensor | None = None
        for alphas in _midpoints(steps, self.batch_rows // len(self.rows), embeddings.device):
            state = _between(embeddings, change, alphas)
            part = self._along(state, self.rows.repeat(len(alphas)))
            part = part.unflatten(1, (len(alphas), len(self.rows))).sum(1)
            found = part if found is None else found + part
        assert found is not None
        return found / steps

    def per_layer(self, steps: int) -> Float[Tensor, "layer batch pos ..."]:
        """Each layer from a path over its own state."""
        return torch.stack([self._of_layer(layer, steps) for layer in range(self.engine.n_layers)])

    def finished(
        self, found: Float[Tensor, "layer batch rerun_pos ..."]
    ) -> Float[Tensor, "layer batch pos ..."]:
        """Values of all positions: zero before the runs part, NaN where there is no counterpart."""
        layers, batch, _, *heads = found.shape
        result = found.new_zeros(layers, batch, self.chunk.base.shape[1], *heads)
        result[:, :, self.first :] = found
        missing = self.chunk.counterpart < 0
        return result.masked_fill(missing.view(1, *missing.shape, *[1] * len(heads)), torch.nan)

    def _along(
        self, state: Float[Tensor, "rows pos d_model"], rows: Tensor
    ) -> Float[Tensor, "layer rows pos ..."]:
        """Run all blocks from the embeddings `state`; contract each site's gradient on the spot."""
        found: list[Tensor | None] = [None] * self.engine.n_layers
        hooks = [
            (layer, self.site, self._contractor(layer, rows, found))
            for layer in range(self.engine.n_layers)
        ]
        leaf = state.requires_grad_()
        run = self._begin()
        with self.engine.hooked(hooks):
            x = leaf.clone()  # so that the first site is no leaf, and its hook is called
            for layer in range(self.engine.n_layers):
                x = self.engine.block(layer, x, run, rows=rows)
        self._gradient(x, rows, leaf)
        return torch.stack([part for part in found if part is not None])

    def _contractor(
        self, layer: int, rows: Tensor, found: list[Tensor | None]
    ) -> Callable[[Tensor], Tensor]:
        change = self._change(layer)

        def contract(gradient: Tensor) -> None:
            found[layer] = (gradient.float() * change[rows]).sum(-1)

        def watch(activation: Tensor) -> Tensor:
            # Returned, so that the gradient also passes where a hook point reshapes what it shows.
            activation = activation.view_as(activation)
            activation.register_hook(contract)
            return activation

        return watch

    def _of_layer(self, layer: int, steps: int) -> Float[Tensor, "batch pos ..."]:
        start = self.base.sites[layer][:, self.first :]
        change = self._change(layer)
        found: Tensor | None = None
        for alphas in _midpoints(steps, self.batch_rows // len(self.rows), start.device):
            rows = self.rows.repeat(len(alphas))
            state = _between(start, change, alphas).requires_grad_()
            gradient = self._gradient(self._from_state(layer, state, rows), rows, state)
            part = gradient.float().unflatten(0, (len(alphas), len(self.rows))).sum(0)
            found = part if found is None else found + part
        assert found is not None
        return (found * change).sum(-1) / steps

    def _from_state(
        self, layer: int, state: Float[Tensor, "rows pos ..."], rows: Tensor
    ) -> Float[Tensor, "rows pos d_model"]:
        """The last residual when the site of `layer` holds `state`."""
        run = self._begin()
        if self.site == "resid_pre":
            x, above = state, layer
        elif self.site == "resid_post":
            x, above = state, layer + 1
        else:
            below = self.base.resid[layer][:, self.first :][rows]
            with self.engine.hooked([(layer, self.site, lambda _: state)]):
                x, above = self.engine.block(layer, below, run, rows=rows), layer + 1
        for upper in range(above, self.engine.n_layers):
            x = self.engine.block(upper, x, run, rows=rows)
        return x

    def _begin(self) -> Pass:
        # Only the number of positions matters to a pass, so that one row of tokens will do.
        return self.engine.begin(self.chunk.base[:1, self.first :], self.past)

    def _gradient(self, resid: Tensor, rows: Tensor, leaf: Tensor) -> Tensor:
        """The gradient of the metric, which is each row's own, with respect to `leaf`."""
        logits = target_logits(self.engine, resid, self.chunk.base_target[rows] - self.first)
        metric = self.measure(logits, rows)
        if not metric.requires_grad:
            raise ValueError(
                "the metric gave a result without a gradient; compute it from the logits with "
                "torch alone, without detach, item, numpy or argmax"
            )
        return torch.autograd.grad(metric.sum(), leaf)[0]

    def _change(self, layer: int) -> Float[Tensor, "batch pos ..."]:
        """Source minus base activation in float32; zero where alike or without counterpart."""
        other = self.chunk.aligned(self.source.sites[layer])[:, self.first :]
        return self._masked(other.float() - self.base.sites[layer][:, self.first :].float())

    def _masked(self, change: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos ..."]:
        differs = self.differs.view(*self.differs.shape, *[1] * (change.ndim - 2))
        return torch.where(differs, change, 0.0)

    @torch.no_grad()
    def _embeddings_of_source(self) -> Float[Tensor, "batch pos d_model"]:
        embeddings = self.engine.begin(self.chunk.source).resid
        return self.chunk.aligned(embeddings)[:, self.first :]


def _between(
    start: Float[Tensor, "batch pos ..."],
    change: Float[Tensor, "batch pos ..."],
    alphas: Float[Tensor, " nodes"],
) -> Float[Tensor, "rows pos ..."]:
    """States on the way, the nodes stacked on the batch."""
    weight = alphas.view(-1, *[1] * start.ndim)
    return (start.float() + weight * change).flatten(0, 1).to(start.dtype).detach()


def _midpoints(steps: int, at_once: int, device: torch.device) -> tuple[Tensor, ...]:
    """The middles of `steps` equal intervals of [0, 1], in portions of `at_once`."""
    nodes = (torch.arange(steps, device=device) + 0.5) / steps
    return torch.split(nodes, max(1, at_once))


def _same_weights(pairs: Pairs) -> None:
    for i in range(len(pairs)):
        if weights_key(pairs.clean_teacher[i]) != weights_key(pairs.corrupted_teacher[i]):
            raise ValueError(
                f"the teachers of pair {i} differ in weights, so that no path over the embeddings "
                'leads from one run to the other; use method="integrated"'
            )


def _verify(
    model: Model, pairs: Pairs, effects: Effects, metric: Metric, *, k: int, seed: int
) -> Agreement:
    """Agreement with exact values of the `k` strongest cells and `k` others."""
    flat = effects.values.ravel()
    present = np.flatnonzero(np.isfinite(flat) & (flat != 0))
    order = present[np.argsort(-np.abs(flat[present]), kind="stable")]
    strongest, others = order[:k], order[k:]
    drawn = np.random.default_rng(seed).permutation(others)[:k]
    cells = np.zeros(flat.shape, dtype=bool)
    cells[strongest] = cells[drawn] = True
    exact = causal_mediation(
        model,
        pairs,
        site=effects.site,
        direction=effects.direction,
        metric=metric,
        cells=cells.reshape(effects.values.shape),
    )
    return agreement_of_cells(flat[cells], exact.values.ravel()[cells], k)
