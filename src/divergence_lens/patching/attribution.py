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

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from divergence_lens._utils.interrupts import convert_partial, partial_on_interrupt
from divergence_lens.engine import Engine, Pass, SiteFunction
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs, weights_key
from divergence_lens.patching.corruption import Corruption
from divergence_lens.patching.effects import Agreement, Direction, Effects, agreement_of_cells
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.patching.metrics import Metric
from divergence_lens.patching.relp import QueryKey, relevance_rules
from divergence_lens.patching.request import (
    Case,
    Chunk,
    Question,
    Span,
    Trace,
    check,
    logits_at,
    trace,
)
from divergence_lens.patching.runner import Long, answer

Method = Literal["gradient", "integrated", "integrated-inputs", "qk", "graddrop", "atp*", "relp"]

_QUERY_KEY = ("q", "k")
_ON_A_PATH = ("integrated", "integrated-inputs")


def attribution_patch(
    model: Model,
    pairs: Pairs,
    *,
    site: str = "resid_post",
    method: Method = "gradient",
    steps: int = 10,
    direction: Direction = "noising",
    metric: Metric = "logit_difference",
    corruption: Corruption = "counterfactual",
    span: Span = "position",
    verify: int = 0,
    seed: int = 0,
    batch_rows: int = 32,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
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

    `qk`: for sites `q` and `k`, the correction of AtP* (Kramar et al. 2024, arXiv 2403.00745). The
    attention is computed anew with the query or key in place, and only what follows is linear.

    `graddrop`: GradDrop of AtP*. One backward pass for each layer, with the gradient through that
    block's contribution dropped, so that a direct and an indirect effect of opposite sign cannot
    hide each other. The value is the mean magnitude over the passes that leave the site in place,
    with the sign of their sum. It ranks cells; it is no estimate of the effect's size.

    `atp*`: `graddrop` with the QK correction where the site is `q` or `k`.

    `relp`: the gradient is replaced by the propagation rules of RelP (Jafari et al. 2025, arXiv
    2508.21258): norms keep their scale, attention keeps its pattern, activation functions are
    replaced by their secant through zero, and of a gated product each branch gets half.

    Parameters never take a gradient; the model's flags, hooks and gradients are as before
    afterwards, also if an error is raised.

    Args:
        model: The model; teachers with deltas are applied to it.
        pairs: What to patch.
        site: One of `engine.SITES`, as in `causal_mediation`.
        method: One of the above.
        steps: Midpoints on the path; methods without a path ignore it.
        direction: `noising` or `denoising`, as in `causal_mediation`.
        metric: As in `causal_mediation`; it must be differentiable in the logits.
        corruption: As in `causal_mediation`.
        span: As in `causal_mediation`; the estimate of a span is the sum of its positions'.
        verify: If positive, so many of the strongest cells and as many others, drawn at random,
            are computed exactly, and their agreement is attached as `Effects.verified`.
        seed: Of the random cells of `verify`.
        batch_rows: At most so many rows (pairs times steps) run at once; pairs that do not fit the
            device are run in halves.
        checkpoint_dir: As in `causal_mediation`.
        accelerator: As in `causal_mediation`.
        progress: Whether to show a progress bar.

    Returns:
        Effects of the given method.

    Raises:
        Interrupted: As in `causal_mediation`; where only `verify` was stopped, `partial` holds
            all effects, unverified.
        ValueError: As in `causal_mediation`; and if the method is unknown or does not serve the
            site or the model, `steps` or `verify` is out of range, the metric detaches its result
            from the logits, `kl` is asked of a method without a path in noising (its gradient is
            zero at the clean run), or the inputs are to be integrated where no path over the
            embeddings leads from one run to the other (other weights, or an ablation).
    """
    with convert_partial(itemgetter(site)):
        return attribution_patch_sites(
            model,
            pairs,
            sites=(site,),
            method=method,
            steps=steps,
            direction=direction,
            metric=metric,
            corruption=corruption,
            span=span,
            verify=verify,
            seed=seed,
            batch_rows=batch_rows,
            checkpoint_dir=checkpoint_dir,
            accelerator=accelerator,
            progress=progress,
        )[site]


@torch.inference_mode(mode=False)
def attribution_patch_sites(
    model: Model,
    pairs: Pairs,
    *,
    sites: Sequence[str],
    method: Method = "gradient",
    steps: int = 10,
    direction: Direction = "noising",
    metric: Metric = "logit_difference",
    corruption: Corruption = "counterfactual",
    span: Span = "position",
    verify: int = 0,
    seed: int = 0,
    batch_rows: int = 32,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> dict[str, Effects]:
    """`attribution_patch` of several sites from the same passes.

    All layers, positions and sites come from two forward passes and one backward (times the number
    of steps or layers where the method says so). `integrated` alone has a path for each site.

    Args:
        model: As in `attribution_patch`, like all that follow.
        pairs: What to patch.
        sites: Which sites.
        method: How.
        steps: Midpoints on the path.
        direction: Which run is patched.
        metric: What is measured.
        corruption: What makes the state that is put in.
        span: What one cell covers.
        verify: How many cells to check, for each site.
        seed: Of the cells to check.
        batch_rows: At most so many rows at once.
        checkpoint_dir: Where finished pairs are kept.
        accelerator: Whose processes share the pairs.
        progress: Whether to show a progress bar.

    Returns:
        Effects by site.

    Raises:
        ValueError: As in `attribution_patch`; and if there are no sites, or one is named twice.
    """
    _check_options(sites, method, steps, verify)
    if metric == "kl" and direction == "noising" and method not in _ON_A_PATH:
        raise ValueError(
            f'method={method!r} says nothing of metric="kl" in noising: it starts from the clean '
            'run, where that divergence is lowest and has no slope; use method="integrated"'
        )
    question = Question(
        pairs=pairs,
        sites=tuple(sites),
        direction=direction,
        metric=metric,
        corruption=corruption,
        span=span,
    )
    check(model, question, batch_rows=batch_rows)
    if method == "integrated-inputs":
        _check_inputs(question)

    def base_run(engine: Engine, chunk: Chunk, noise: Tensor | None) -> Trace:
        return _recorded(engine, chunk, noise, sites, method)

    def work(case: Case) -> dict[str, Tensor]:
        path = _Path(case, sites, batch_rows)
        with case.engine.frozen(), torch.enable_grad():
            return {site: path.finished(part) for site, part in path.values(method, steps).items()}

    nodes = steps if method in _ON_A_PATH else 1
    found = answer(
        model,
        question,
        work,
        long=Long(
            size=max(1, batch_rows // nodes),
            checkpoint_dir=checkpoint_dir,
            accelerator=accelerator,
            progress=progress,
        ),
        method=f"{method} ({steps} steps)" if method in _ON_A_PATH else method,
        base_run=None if method in _ON_A_PATH else base_run,
        steps=nodes,
    )
    if not verify:
        return found
    with partial_on_interrupt("the check of `verify`", found, len(found), "sites", lambda: found):
        return {
            site: replace(
                effects,
                verified=_verify(
                    model,
                    question,
                    effects,
                    k=verify,
                    seed=seed,
                    batch_rows=batch_rows,
                    accelerator=accelerator,
                ),
            )
            for site, effects in found.items()
        }


_Found = dict[str, Float[Tensor, "layer rows pos ..."]]


class _Record:
    """A forward pass whose sites hand their gradients over, to be contracted on the spot.

    Args:
        engine: Of the model.
        sites: The sites that are asked for.
        through: For each of them the site whose gradient it takes.
        drops: Whether a block's contribution can be dropped from the backward pass.
    """

    def __init__(
        self, engine: Engine, sites: Sequence[str], through: dict[str, str], *, drops: bool = False
    ) -> None:
        self.engine, self.sites, self.through, self.drops = engine, sites, through, drops
        self.contract: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {}
        self._found: dict[tuple[str, int], Tensor] = {}
        self._dropped = -1
        self._leaf: Tensor

    def forward(
        self, state: Float[Tensor, "rows pos d_model"], run: Pass, rows: Tensor | None = None
    ) -> list[Float[Tensor, "rows pos d_model"]]:
        """All blocks from the embeddings `state`; the residual before each, and after the last."""
        layers = range(self.engine.n_layers)
        hooks: list[tuple[int, str, SiteFunction]] = [
            (layer, self.through[site], self._watcher(site, layer))
            for site in self.sites
            for layer in layers
        ]
        if self.drops:
            hooks += [(layer, "block_out", self._dropper(layer)) for layer in layers]
        self._leaf = state.detach().requires_grad_()
        with self.engine.hooked(hooks):
            resid = [self._leaf.clone()]  # so that the first site is no leaf, and its hook called
            for layer in layers:
                resid.append(self.engine.block(layer, resid[-1], run, rows=rows))
        return resid

    def backward(self, metric: Float[Tensor, ""], *, drop: int = -1, last: bool = True) -> _Found:
        """What the sites make of their gradients; with `drop`, one block's contribution has none.

        Args:
            metric: The sum of the metrics.
            drop: The layer, or -1 for none.
            last: Whether the graph can go.
        """
        self._dropped = drop
        torch.autograd.grad(metric, self._leaf, retain_graph=not last)
        layers = range(self.engine.n_layers)
        return {
            site: torch.stack([self._found[site, layer] for layer in layers]) for site in self.sites
        }

    def _watcher(self, site: str, layer: int) -> SiteFunction:
        def keep(gradient: Tensor) -> None:
            self._found[site, layer] = self.contract[site, layer](gradient)

        def watch(activation: Tensor) -> Tensor:
            # Returned, so that the gradient also passes where a hook point reshapes what it shows.
            activation = activation.view_as(activation)
            activation.register_hook(keep)
            return activation

        return watch

    def _dropper(self, layer: int) -> SiteFunction:
        def drop(gradient: Tensor) -> Tensor:
            return torch.zeros_like(gradient) if layer == self._dropped else gradient

        def watch(contribution: Tensor) -> None:
            contribution.register_hook(drop)

        return watch


@dataclass(frozen=True)
class _Recorded(Trace):
    """A base run that was recorded for the backward pass, so that it need not be run again.

    Attributes:
        record: Of the positions from the first difference on.
        live: The last residual at the targets, with its graph.
    """

    record: _Record
    live: Float[Tensor, "batch d_model"]


def _recorded(
    engine: Engine, chunk: Chunk, noise: Tensor | None, sites: Sequence[str], method: Method
) -> _Recorded:
    """The base run of a chunk, recorded from the first difference on."""
    first = int(chunk.start.min())
    tokens = chunk.base
    before: Trace | None = None
    if first:  # the same in both runs: no change, so no gradient is asked for
        end = torch.full_like(chunk.base_target, first - 1)
        before = trace(engine, tokens[:, :first], end, sites, keep=True)
    corrected = method in ("qk", "atp*")
    through = {site: "z" if corrected and site in _QUERY_KEY else site for site in sites}
    record = _Record(engine, sites, through, drops=method in ("graddrop", "atp*"))
    kept: dict[str, list[Tensor]] = {site: [] for site in sites}

    def keeper(site: str) -> SiteFunction:
        return lambda activation: kept[site].append(activation.detach())

    layers = range(engine.n_layers)
    watch = [(layer, site, keeper(site)) for layer in layers for site in sites]
    with ExitStack() as stack:
        stack.enter_context(engine.frozen())
        stack.enter_context(torch.enable_grad())
        if method == "relp":
            stack.enter_context(relevance_rules(engine))
        stack.enter_context(engine.hooked(watch))
        run = engine.begin(tokens[:, first:], before.past if before else None)
        state = run.resid if noise is None else run.resid + noise[:, first:].to(run.resid.dtype)
        resid = record.forward(state, run)
        each = torch.arange(len(tokens), device=tokens.device)
        live = resid[-1][each, chunk.base_target - first]
        with torch.no_grad():
            logits = logits_at(engine, live)
    resid = [one.detach() for one in resid]
    if before is not None:
        resid = [torch.cat(both, 1) for both in zip(before.resid, resid, strict=True)]
        kept = {
            site: [torch.cat(both, 1) for both in zip(before.sites[site], found, strict=True)]
            for site, found in kept.items()
        }
    past = before.past if before else None
    return _Recorded(kept, resid, past, logits, record=record, live=live)


class _Path:
    """Gradients along the way from the base to the source state, for one chunk."""

    def __init__(self, case: Case, sites: Sequence[str], batch_rows: int) -> None:
        self.case, self.engine, self.chunk, self.base = case, case.engine, case.chunk, case.base
        self.sites, self.batch_rows = sites, batch_rows
        # What stands before the first difference is the same in both runs: kept, never rerun.
        self.first = int(case.chunk.start.min())
        past = case.base.past
        self.past = past.upto(self.first) if past is not None and self.first else None
        self.rows = torch.arange(len(case.chunk.indices), device=case.chunk.base.device)
        self.differs = case.chunk.differs[:, self.first :]

    def values(self, method: Method, steps: int) -> _Found:
        """The values of the positions that are run again, by one of the methods."""
        if method == "integrated":
            layers = range(self.engine.n_layers)
            return {
                site: torch.stack([self._of_layer(site, layer, steps) for layer in layers])
                for site in self.sites
            }
        if method == "integrated-inputs":
            return self.from_inputs(steps)
        assert isinstance(self.base, _Recorded)
        record = self.base.record
        self._prepare(record, self.rows, corrected=method in ("qk", "atp*"))
        # The final norm is run here, so that its rule is needed here too.
        with relevance_rules(self.engine) if method == "relp" else nullcontext():
            metric = self._metric(self.base.live, self.rows)
        if method in ("graddrop", "atp*"):
            return self.with_drops(record, metric)
        return record.backward(metric)

    def with_drops(self, record: "_Record", metric: Float[Tensor, ""]) -> _Found:
        """GradDrop: one backward pass for each layer whose contribution is dropped."""
        layers = self.engine.n_layers
        found = [record.backward(metric, drop=layer, last=False) for layer in range(layers)]
        result = {}
        for site in self.sites:
            # A site inside the dropped block is cut off with it, and says nothing in that pass.
            inside = site not in ("resid_pre", "resid_post")
            passes = max(1, layers - 1) if inside else layers
            every = torch.stack([one[site] for one in found])
            result[site] = torch.sign(every.sum(0)) * every.abs().sum(0) / passes
        return result

    def from_inputs(self, steps: int) -> _Found:
        """All layers from one path over the embeddings."""
        embeddings = self.base.resid[0][:, self.first :].detach()
        other = self.chunk.aligned(self.case.source.resid[0])[:, self.first :]
        change = self._masked(other.float() - embeddings.float())
        result: _Found = {}
        for alphas in _midpoints(steps, self.batch_rows // len(self.rows), embeddings.device):
            state = _between(embeddings, change, alphas)
            rows = self.rows.repeat(len(alphas))
            record = _Record(self.engine, self.sites, {site: site for site in self.sites})
            resid = record.forward(state, self._begin(), rows)[-1]
            self._prepare(record, rows, corrected=False)
            at = self.chunk.base_target[rows] - self.first
            at_target = resid[torch.arange(len(resid), device=resid.device), at]
            found = record.backward(self._metric(at_target, rows))
            for site, part in found.items():
                mean = part.unflatten(1, (len(alphas), len(self.rows))).sum(1) / steps
                result[site] = result[site] + mean if site in result else mean
        return result

    def finished(
        self, found: Float[Tensor, "layer batch rerun_pos ..."]
    ) -> Float[Tensor, "layer batch col ..."]:
        """Values of all cells: zero before the runs part, NaN where there is no counterpart."""
        if not bool(torch.isfinite(found).all()):
            pair = int(self.chunk.indices[(~torch.isfinite(found)).nonzero()[0, 1]])
            raise ValueError(
                f"the gradient of the metric of pair {pair} holds NaN or infinity; the model or "
                "the metric is not differentiable there"
            )
        layers, batch, _, *heads = found.shape
        result = found.new_zeros(layers, batch, self.chunk.base.shape[1], *heads)
        result[:, :, self.first :] = found
        missing = self.chunk.counterpart < 0
        result = result.masked_fill(missing.view(1, *missing.shape, *[1] * len(heads)), torch.nan)
        return self.chunk.sum_of(result)

    def _prepare(self, record: "_Record", rows: Tensor, *, corrected: bool) -> None:
        """Say what becomes of each site's gradient."""
        for site in self.sites:
            for layer in range(self.engine.n_layers):
                record.contract[site, layer] = self._contraction(
                    site, layer, rows, corrected=corrected and site in _QUERY_KEY
                )

    def _contraction(
        self, site: str, layer: int, rows: Tensor, *, corrected: bool
    ) -> Callable[[Tensor], Tensor]:
        if corrected:
            return QueryKey(self.case, site, self._begin, self.first).contraction(layer)
        change = self._change(site, layer)
        return lambda gradient: (gradient.float() * change[rows]).sum(-1)

    def _of_layer(self, site: str, layer: int, steps: int) -> Float[Tensor, "batch pos ..."]:
        """One layer from a path over its own state."""
        start = self.base.sites[site][layer][:, self.first :]
        change = self._change(site, layer)
        found: Tensor | None = None
        for alphas in _midpoints(steps, self.batch_rows // len(self.rows), start.device):
            rows = self.rows.repeat(len(alphas))
            state = _between(start, change, alphas).requires_grad_()
            metric = self._metric(self._from_state(site, layer, state, rows), rows)
            (gradient,) = torch.autograd.grad(metric, state)
            part = gradient.float().unflatten(0, (len(alphas), len(self.rows))).sum(0)
            found = part if found is None else found + part
        assert found is not None
        return (found * change).sum(-1) / steps

    def _from_state(
        self, site: str, layer: int, state: Float[Tensor, "rows pos ..."], rows: Tensor
    ) -> Float[Tensor, "rows d_model"]:
        """The last residual at the targets when the site of `layer` holds `state`."""
        run = self._begin()
        if site == "resid_pre":
            x, above = state, layer
        elif site == "resid_post":
            x, above = state, layer + 1
        else:
            below = self.base.resid[layer][:, self.first :][rows]
            with self.engine.hooked([(layer, site, lambda _: state)]):
                x, above = self.engine.block(layer, below, run, rows=rows), layer + 1
        at = self.chunk.base_target[rows] - self.first
        if above == self.engine.n_layers:
            return x[torch.arange(len(x), device=x.device), at]
        for upper in range(above, self.engine.n_layers - 1):
            x = self.engine.block(upper, x, run, rows=rows)
        return self.engine.last_block(x, run, at, rows=rows)

    def _begin(self) -> Pass:
        # Only the number of positions matters to a pass, so that one row of tokens will do.
        return self.engine.begin(self.chunk.base[:1, self.first :], self.past)

    def _metric(self, resid: Float[Tensor, "rows d_model"], rows: Tensor) -> Float[Tensor, ""]:
        """The sum of the metrics, each of which depends on its own row alone."""
        metric = self.case.measure(logits_at(self.engine, resid), rows)
        if not metric.requires_grad:
            raise ValueError(
                "the metric gave a result without a gradient; compute it from the logits with "
                "torch alone, without detach, item, numpy or argmax"
            )
        return metric.sum()

    def _change(self, site: str, layer: int) -> Float[Tensor, "batch pos ..."]:
        """Source minus base activation in float32; zero where alike or without counterpart."""
        other = self.case.new(site, layer)[:, self.first :]
        return self._masked(other.float() - self.base.sites[site][layer][:, self.first :].float())

    def _masked(self, change: Float[Tensor, "batch pos ..."]) -> Float[Tensor, "batch pos ..."]:
        differs = self.differs.view(*self.differs.shape, *[1] * (change.ndim - 2))
        return torch.where(differs, change, 0.0)


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


def _check_options(sites: Sequence[str], method: Method, steps: int, verify: int) -> None:
    if not sites or len(set(sites)) < len(sites):
        raise ValueError(f"sites is {list(sites)}; name at least one, and each once")
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; it is one of {', '.join(get_args(Method))}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    if verify < 0:
        raise ValueError(f"verify is {verify}; it is a number of cells, or 0 for none")
    for site in sites:
        if method == "qk" and site not in _QUERY_KEY:
            raise ValueError(f'method="qk" corrects sites q and k; for {site!r} use "gradient"')
        if method == "relp" and site in _QUERY_KEY:
            raise ValueError(
                f'method="relp" takes attention patterns as constants, so that {site!r} has no '
                'part in the result; use "qk"'
            )


def _check_inputs(question: Question) -> None:
    if question.corruption in ("mean", "zero"):
        raise ValueError(
            f'corruption="{question.corruption}" has no run of its own whose embeddings could be '
            'the end of a path; use method="integrated"'
        )
    for i in range(len(question.pairs)):
        clean, corrupted = question.teachers(i)
        if weights_key(clean) != weights_key(corrupted):
            raise ValueError(
                f"the teachers of pair {i} differ in weights, so that no path over the embeddings "
                'leads from one run to the other; use method="integrated"'
            )


def _verify(
    model: Model,
    question: Question,
    effects: Effects,
    *,
    k: int,
    seed: int,
    batch_rows: int,
    accelerator: Any,
) -> Agreement | None:
    """Agreement with exact values of the `k` strongest cells and `k` others.

    The others are drawn among all cells from the first position on that has an effect, those too
    that the approximation gives as zero; what is zero on both sides is not counted. None if there
    are not two cells to compare, as when the runs do not differ.
    """
    values = effects.values
    flat = values.ravel()
    if np.count_nonzero(np.nan_to_num(flat)) < 2:
        return None
    # Before the two runs differ every cell is zero on both sides, which says nothing.
    beyond = np.maximum.accumulate(np.nan_to_num(values) != 0, axis=2).any(1, keepdims=True)
    present = np.flatnonzero((np.isfinite(values) & beyond).ravel())
    order = present[np.argsort(-np.abs(flat[present]), kind="stable")]
    strongest, others = order[:k], order[k:]
    drawn = np.random.default_rng(seed).permutation(others)[:k]
    cells = np.zeros(flat.shape, dtype=bool)
    cells[strongest] = cells[drawn] = True
    exact = causal_mediation(
        model,
        question.pairs,
        site=effects.site,
        direction=question.direction,
        metric=question.metric,
        corruption=question.corruption,
        span=question.span,
        cells=cells.reshape(effects.values.shape),
        batch_rows=batch_rows,
        accelerator=accelerator,
    )
    return agreement_of_cells(flat[cells], exact.values.ravel()[cells], k)
