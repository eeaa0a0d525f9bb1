"""Attribution patching: the first-order estimate of causal mediation, all cells at once.

The effect of putting a source activation into the base run is estimated as the gradient of the
metric with respect to the base activation, times the difference of the two activations (Nanda
2023, "Attribution Patching"; Syed et al. 2023, arXiv 2310.10348). Two forward passes and one
backward pass serve every layer and position. The estimate is wrong where the model is far from
linear between the two states; integrating the gradient along a path (Sundararajan et al. 2017;
Marks et al. 2024, arXiv 2403.19647; Hanna et al. 2024, arXiv 2403.17806) corrects much of that and
costs more passes. To measure how far to trust it, use `verify` and `Effects.agreement`.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, get_args, overload

import torch
from torch import Tensor

from divergence_lens._utils.interrupts import convert_partial, partial_on_interrupt
from divergence_lens.engine import Engine
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs, weights_key
from divergence_lens.patching.cells import Span
from divergence_lens.patching.corruption import Corruption
from divergence_lens.patching.effects import Direction, Effects
from divergence_lens.patching.gradients import (
    PATH_METHODS,
    QUERY_KEY_SITES,
    Method,
    recorded_base_run,
)
from divergence_lens.patching.metrics import Metric
from divergence_lens.patching.paths import AttributionPass
from divergence_lens.patching.request import PatchingRequest, site_names, validate
from divergence_lens.patching.runner import RunOptions, run_patching
from divergence_lens.patching.trace import Chunk, PatchingRun, Trace
from divergence_lens.patching.verification import sampled_agreement


@overload
def attribution_patch(
    model: Model,
    pairs: Pairs,
    *,
    site: str = ...,
    method: Method = ...,
    steps: int = ...,
    direction: Direction = ...,
    metric: Metric = ...,
    corruption: Corruption = ...,
    span: Span = ...,
    verify: int = ...,
    seed: int = ...,
    batch_rows: int = ...,
    checkpoint_dir: str | os.PathLike[str] | None = ...,
    accelerator: Any = ...,
    progress: bool = ...,
) -> Effects: ...


@overload
def attribution_patch(
    model: Model,
    pairs: Pairs,
    *,
    site: list[str] | tuple[str, ...],
    method: Method = ...,
    steps: int = ...,
    direction: Direction = ...,
    metric: Metric = ...,
    corruption: Corruption = ...,
    span: Span = ...,
    verify: int = ...,
    seed: int = ...,
    batch_rows: int = ...,
    checkpoint_dir: str | os.PathLike[str] | None = ...,
    accelerator: Any = ...,
    progress: bool = ...,
) -> dict[str, Effects]: ...


@torch.inference_mode(mode=False)
def attribution_patch(
    model: Model,
    pairs: Pairs,
    *,
    site: str | Sequence[str] = "resid_post",
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
) -> Effects | dict[str, Effects]:
    """Approximate the effect of patching each layer and position (and head), from gradients.

    Each value is `sum((source - base) * gradient)` over the components of one activation, in
    float32. The methods differ in the gradient:

    `gradient`: the gradient of the base run. Two forward passes and one backward pass for all
    cells.

    `integrated`: for each layer separately, the state of that layer's site at *all* positions moves
    in a straight line from the base to the source run, and the gradient is averaged over the
    midpoints of `steps` equal intervals. For `resid_pre` and `resid_post` the blocks above run
    from that state. For the other sites the residual that enters the layer stays at the base
    run's, and only the site's output moves (all heads together for `z`). This is the form of
    Schrodi et al. (arXiv 2509.23886), with midpoints instead of left endpoints. If the rows have
    equal lengths, the values of one layer of a residual site add up to the effect of patching all
    positions as `steps` grows; for answers of one token, this is the total effect.

    `integrated-left`: the same with left endpoints, as the paper's code does.

    `integrated-inputs`: the token embeddings move from the base to the source run's, and all
    layers' gradients along that one path are averaged. `steps` forward and backward passes serve
    all layers.

    `qk`: for sites `q` and `k`, the correction of AtP* (Kramar et al. 2024, arXiv 2403.00745). The
    attention is recomputed with the patched query or key, and only the computation after it is
    linearized.

    `graddrop`: GradDrop of AtP*. One backward pass for each layer, with the gradient through that
    block's contribution dropped, so that a direct and an indirect effect of opposite sign cannot
    cancel. The value is the mean magnitude over the passes that do not drop the site's own block,
    with the sign of their sum. It ranks cells; it does not estimate the effect's size.

    `atp*`: `graddrop`, with the QK correction for sites `q` and `k`.

    `relp`: the propagation rules of RelP (Jafari et al. 2025, arXiv 2508.21258) instead of the
    gradient: the scales of norms and the attention patterns are constants, activation functions
    are replaced by their secant through zero, and each factor of a gated product gets half.

    Of a differing span with different numbers of tokens, the last position of each side counts at
    every site; the other positions stay at the base run's state.

    Parameters never receive a gradient. The model's flags, hooks and gradients are restored
    afterwards, also after an error.

    Args:
        model: The model; teachers with deltas are applied to it.
        pairs: The pairs to patch.
        site: One name of `engine.SITES`, as in `causal_mediation`, or several. Several sites share
            the passes, except with `integrated`, which has a path for each site.
        method: One of the above.
        steps: Midpoints on the path; ignored by methods without a path.
        direction: `noising` or `denoising`, as in `causal_mediation`.
        metric: As in `causal_mediation`; it must be differentiable in the logits.
        corruption: As in `causal_mediation`.
        span: As in `causal_mediation`; the estimate of a span is the sum over its positions.
        verify: If positive, this many of the strongest cells and as many others, drawn at random,
            are computed exactly, and their agreement is attached as `Effects.verified`.
        seed: Seed for drawing the cells of `verify`.
        batch_rows: The maximum number of rows (pairs times steps) run at once; pairs that do not
            fit in the device's memory are run in halves.
        checkpoint_dir: As in `causal_mediation`.
        accelerator: As in `causal_mediation`.
        progress: Whether to show a progress bar.

    Returns:
        The effects of the given method; for several sites, a dict of effects by site.

    Raises:
        Interrupted: As in `causal_mediation`; if only `verify` was interrupted, `partial` holds
            all effects, unverified.
        ValueError: As in `causal_mediation`; and if the method is unknown or does not support the
            site or the model, `steps` or `verify` is out of range, the metric detaches its result
            from the logits, `kl` is combined with noising and a method without a path (its gradient
            is zero at the clean run), or `integrated-inputs` is asked for where no path over the
            embeddings leads from one run to the other (different weights, or an ablation).
    """
    sites = site_names(site)
    _check_options(sites, method, steps, verify)
    if metric == "kl" and direction == "noising" and method not in PATH_METHODS:
        raise ValueError(
            f'method={method!r} cannot be used with metric="kl" in noising: it takes the gradient '
            "at the clean run, where the divergence has its minimum and no slope; use "
            'method="integrated"'
        )
    request = PatchingRequest(
        pairs=pairs,
        sites=sites,
        direction=direction,
        metric=metric,
        corruption=corruption,
        span=span,
    )
    validate(model, request, batch_rows=batch_rows)
    if method == "integrated-inputs":
        _check_inputs(request)

    def base_run(engine: Engine, chunk: Chunk, noise: Tensor | None) -> Trace:
        return recorded_base_run(engine, chunk, noise, sites, method)

    def compute(run: PatchingRun) -> dict[str, Tensor]:
        attribution = AttributionPass(run, sites, batch_rows)
        with run.engine.frozen(), torch.enable_grad():
            values = attribution.values(method, steps)
            return {name: attribution.by_cell(part) for name, part in values.items()}

    nodes = steps if method in PATH_METHODS else 1
    with convert_partial(itemgetter(site) if isinstance(site, str) else dict):
        by_site = run_patching(
            model,
            request,
            compute,
            options=RunOptions(
                chunk_pairs=max(1, batch_rows // nodes),
                checkpoint_dir=checkpoint_dir,
                accelerator=accelerator,
                progress=progress,
            ),
            method=f"{method} ({steps} steps)" if method in PATH_METHODS else method,
            base_run=None if method in PATH_METHODS else base_run,
            steps=nodes,
        )
        if verify:
            with partial_on_interrupt(
                "the check of `verify`", by_site, len(by_site), "sites", lambda: by_site
            ):
                by_site = {
                    name: replace(
                        effects,
                        verified=sampled_agreement(
                            model,
                            request,
                            effects,
                            k=verify,
                            seed=seed,
                            batch_rows=batch_rows,
                            accelerator=accelerator,
                        ),
                    )
                    for name, effects in by_site.items()
                }
    return by_site[site] if isinstance(site, str) else by_site


def _check_options(sites: Sequence[str], method: Method, steps: int, verify: int) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; it is one of {', '.join(get_args(Method))}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is needed")
    if verify < 0:
        raise ValueError(f"verify is {verify}; give a number of cells, or 0 for none")
    for site in sites:
        if method == "qk" and site not in QUERY_KEY_SITES:
            raise ValueError(f'method="qk" corrects sites q and k; for {site!r} use "gradient"')
        if method == "relp" and site in QUERY_KEY_SITES:
            raise ValueError(
                f'method="relp" treats attention patterns as constants, so that {site!r} '
                'has no effect; use "qk"'
            )


def _check_inputs(request: PatchingRequest) -> None:
    if request.corruption in ("mean", "zero"):
        raise ValueError(
            f'corruption="{request.corruption}" has no run of its own whose embeddings could be '
            'the end of a path; use method="integrated"'
        )
    for i in range(len(request.pairs)):
        clean, corrupted = request.teachers(i)
        if weights_key(clean) != weights_key(corrupted):
            raise ValueError(
                f"the teachers of pair {i} differ in weights, so that no path over the embeddings "
                'leads from one run to the other; use method="integrated"'
            )
