"""Exact causal mediation: patch one state of one run into the other and measure the change.

The vocabulary follows Vig et al. (2020, arXiv 2004.12265); windows of layers follow Meng et al.
(2022, arXiv 2202.05262); the application to divergence tokens follows Schrodi et al. (2025, arXiv
2509.23886). This module validates a call and collects its results; the patches themselves are
computed in `staggered`.
"""

import hashlib
import os
from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor

from divergence_lens._utils.interrupts import convert_partial
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs
from divergence_lens.patching.cells import Span
from divergence_lens.patching.corruption import Corruption
from divergence_lens.patching.effects import Direction, Effects
from divergence_lens.patching.metrics import Metric
from divergence_lens.patching.request import Cells, PatchingRequest, site_names, validate
from divergence_lens.patching.resized import RESIZING_SITES, check_lengths
from divergence_lens.patching.resized_passes import exact_effects
from divergence_lens.patching.runner import RunOptions, run_patching
from divergence_lens.patching.staggered import requested_cells
from divergence_lens.patching.trace import PatchingRun

if TYPE_CHECKING:
    import pandas as pd


@overload
def causal_mediation(
    model: Model,
    pairs: Pairs,
    *,
    site: str = ...,
    direction: Direction = ...,
    metric: Metric = ...,
    corruption: Corruption = ...,
    span: Span = ...,
    window: int = ...,
    cells: "pd.DataFrame | Cells | None" = ...,
    batch_rows: int = ...,
    checkpoint_dir: str | os.PathLike[str] | None = ...,
    accelerator: Any = ...,
    progress: bool = ...,
) -> Effects: ...


@overload
def causal_mediation(
    model: Model,
    pairs: Pairs,
    *,
    site: list[str] | tuple[str, ...],
    direction: Direction = ...,
    metric: Metric = ...,
    corruption: Corruption = ...,
    span: Span = ...,
    window: int = ...,
    cells: "pd.DataFrame | Cells | None" = ...,
    batch_rows: int = ...,
    checkpoint_dir: str | os.PathLike[str] | None = ...,
    accelerator: Any = ...,
    progress: bool = ...,
) -> dict[str, Effects]: ...


@torch.no_grad()
def causal_mediation(
    model: Model,
    pairs: Pairs,
    *,
    site: str | Sequence[str] = "resid_post",
    direction: Direction = "noising",
    metric: Metric = "logit_difference",
    corruption: Corruption = "counterfactual",
    span: Span = "position",
    window: int = 1,
    cells: "pd.DataFrame | Cells | None" = None,
    batch_rows: int = 128,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> Effects | dict[str, Effects]:
    """Compute the exact effect of patching each layer and position (and head), one at a time.

    With `direction="noising"` the corrupted run's state replaces the clean one at a single cell of
    the clean run; with `"denoising"` the clean state replaces the corrupted one. Where the two
    teachers have different weights, each run uses its own teacher's, and the patched run continues
    under its own weights.

    A differing span with different numbers of tokens is one cell. At residual sites its states are
    replaced by the source run's span and the row is recomputed at its new length; at other sites
    only the state of the last position of each side is exchanged. See `patching.resized` for the
    states after a span.

    Args:
        model: The model; teachers with deltas are applied to it. A model that attends in both
            directions takes longer; where its target is not the last token of a row, the pairs
            need `whole_rows=True`.
        pairs: The pairs to patch.
        site: One name of `engine.SITES`, or several, each patched by itself: `resid_pre`,
            `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, `block_out` (everything that a block
            adds), or per head `z`, `q`, `k`, `v` and `pattern` (the weights with which a position
            attends; the two rows of a pair must correspond position by position). Several sites
            share the unpatched runs.
        direction: Which run is patched.
        metric: What is measured at the target position: `logit_difference` (answer minus foil; for
            several tokens the difference of summed log-probabilities, each token predicted after
            those before it), `probability_difference`, `log_probability` (of the answer), `kl`
            (from the clean run's distribution to the patched run's), or a function of `(logits
            [rows, d_vocab], pair indices [rows])` that returns `[rows]`. The last two read the
            target position alone.
        corruption: Where the patched-in state comes from: `counterfactual`, the pair's other run;
            `mean` of the clean runs of all pairs at the same index of the same segment; `zero`; or
            an `EmbeddingNoise`, whose noisy run is then the corrupted one (causal tracing). `mean`
            and `zero` are noising only, and the baselines are still the pair's two runs.
        span: What one cell covers: a `position`, all positions of a `segment` at once, or `all`
            positions at once. The last axis of the result then counts the row's segments.
        window: The number of adjacent layers patched at once: row l covers layers l to
            l + window - 1, fewer at the top.
        cells: Compute only these cells: a table as returned by `Effects.top`, or booleans in the
            shape of `Effects.values`. The other cells become NaN.
        batch_rows: The maximum number of patched rows run at once; also determines how many pairs
            are in memory at a time. Rows that do not fit in the device's memory are run in halves.
        checkpoint_dir: A folder for this run, where the values of finished pairs are stored.
            The same call, repeated after an interruption, resumes from there and returns the same
            bits. A custom metric counts as the same if its name and its values on a probe are; a
            lambda or a closure is refused.
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`: its processes divide
            the pairs, and each returns the whole result. All must make the same call.
        progress: Whether to show a progress bar.

    Returns:
        Effects with method `exact`; for several sites, a dict of effects by site. Cells before the
        first difference of the two runs are zero.

    Raises:
        Interrupted: If it was interrupted; `partial` holds the effects of the finished pairs.
        ValueError: If the model lacks the site or is in training mode, a row does not fit the
            context or the vocabulary, an option is unknown or out of range, the metric returns
            another shape or NaN, or `cells` does not fit.
    """
    request = PatchingRequest(
        pairs=pairs,
        sites=site_names(site),
        direction=direction,
        metric=metric,
        corruption=corruption,
        span=span,
    )
    engine = validate(model, request, batch_rows=batch_rows)
    if not 1 <= window <= engine.n_layers:
        raise ValueError(
            f"window is {window}; it is a number of layers, 1 to {engine.n_layers} in this model"
        )
    if not set(RESIZING_SITES).isdisjoint(request.sites):
        for i, own in enumerate(request.cells):
            check_lengths(
                i,
                own,
                engine.n_ctx,
                noising=direction == "noising",
                answer=request.continuation_length(i),
            )
    heads = {name: engine.site_heads(name) for name in request.sites}
    shape = (len(pairs), engine.n_layers, request.width)
    masks = {
        name: None if cells is None else _cell_mask(cells, (*shape, n) if n else shape, span)
        for name, n in heads.items()
    }
    digest = hashlib.sha256(b"".join(m.tobytes() for m in masks.values() if m is not None))

    def compute(run: PatchingRun) -> dict[str, Tensor]:
        return {
            name: exact_effects(run, name, window, batch_rows, requested_cells(mask, run.chunk))
            for name, mask in masks.items()
        }

    with convert_partial(itemgetter(site) if isinstance(site, str) else dict):
        by_site = run_patching(
            model,
            request,
            compute,
            options=RunOptions(
                chunk_pairs=max(1, batch_rows // (engine.n_layers * max(1, *heads.values()))),
                checkpoint_dir=checkpoint_dir,
                accelerator=accelerator,
                progress=progress,
            ),
            method="exact",
            window=window,
            cells="all" if cells is None else digest.hexdigest(),
        )
    return by_site[site] if isinstance(site, str) else by_site


def _cell_mask(cells: "pd.DataFrame | Cells", shape: tuple[int, ...], span: Span) -> Cells:
    if isinstance(cells, np.ndarray):
        if cells.shape != shape or cells.dtype != bool:
            raise ValueError(
                f"cells is {cells.dtype} of shape {list(cells.shape)}; it must be bool of shape "
                f"{list(shape)}, or a table from Effects.top"
            )
        return cells
    names = ["pair", "layer", "position", *(["head"] if len(shape) == 4 else [])]
    absent = [name for name in names if name not in cells]
    if absent:
        raise ValueError(f"cells lacks the columns {absent}; it needs {names}")
    if cells.attrs.get("span", span) != span:
        raise ValueError(
            f"cells is a table of effects with span={cells.attrs['span']!r}, and span is {span!r} "
            "here; the two must be the same"
        )
    index = tuple(cells[name].to_numpy(dtype=np.int64) for name in names)
    for name, column, size in zip(names, index, shape, strict=True):
        if len(column) and not 0 <= int(column.min()) <= int(column.max()) < size:
            raise ValueError(
                f"cells contains {name} {int(column.max())}, but there are only 0 to {size - 1}"
            )
    mask = np.zeros(shape, dtype=bool)
    mask[index] = True
    return mask
