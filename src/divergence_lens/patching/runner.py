"""The loop over chunks of pairs that exact and approximate patching share.

For each chunk, both runs are traced once; a function passed in by the method computes the values
from the two traces. The loop divides the chunks among processes, stores finished chunks in a
checkpoint directory and resumes from it, and replaces the source states for an ablation.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from divergence_lens._utils.checkpoints import Checkpoints, Processes
from divergence_lens._utils.interrupts import partial_on_interrupt
from divergence_lens._utils.memory import halved
from divergence_lens.deltas import base_fingerprint
from divergence_lens.engine import Engine, get_engine
from divergence_lens.models import Model
from divergence_lens.pairs import answers_naming_bias, weights_key
from divergence_lens.patching.ablations import Ablation, ablation_of
from divergence_lens.patching.effects import Effects
from divergence_lens.patching.metrics import (
    MetricFunction,
    bind,
    check_resumable,
    finite,
    metric_values,
)
from divergence_lens.patching.request import PatchingRequest
from divergence_lens.patching.trace import (
    Chunk,
    PatchingRun,
    Trace,
    build_chunk,
    groups_of_pairs,
    traced_pass,
    weights,
)
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher

Compute = Callable[[PatchingRun], dict[str, Float[Tensor, "layer batch col ..."]]]
"""Computes the values of one chunk by site, under the base run's weights."""

BaseRun = Callable[[Engine, Chunk, Tensor | None], Trace]
"""Runs the base side of a chunk, given the noise on its embeddings."""

# The key of the array that holds the metrics of both unpatched runs.
_METRICS = "metrics"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options for dividing, storing and reporting a long run.

    Attributes:
        chunk_pairs: The maximum number of pairs in a chunk.
        checkpoint_dir: Where finished chunks are stored; an interrupted run resumes from there.
        accelerator: Divides the chunks among its processes.
        progress: Whether the first process shows a progress bar.
    """

    chunk_pairs: int
    checkpoint_dir: str | os.PathLike[str] | None = None
    accelerator: Any = None
    progress: bool = False


def run_patching(
    model: Model,
    request: PatchingRequest,
    compute: Compute,
    *,
    options: RunOptions,
    method: str,
    base_run: BaseRun | None = None,
    **settings: Any,
) -> dict[str, Effects]:
    """Run both sides of every pair, chunk by chunk, and compute the values from them.

    Args:
        model: The model, already validated.
        request: The patching request.
        compute: Computes the values of one chunk.
        options: Options for dividing, storing and reporting the run.
        method: Name of the method in the effects.
        base_run: Runs the base side instead of `traced_pass`.
        **settings: Further settings for the metadata.

    Returns:
        The effects of each site.

    Raises:
        ValueError: The metric is a lambda or a closure, and there is a checkpoint directory.
    """
    pairs, sites, engine = request.pairs, request.sites, get_engine(model, causal=False)
    settings = {
        "direction": request.direction,
        "metric": request.metric_name,
        "corruption": str(request.corruption),
        "span": request.span,
        **settings,
    }
    shape = (len(pairs), engine.n_layers, request.width)
    arrays = {}
    for site in sites:
        heads = engine.site_heads(site)
        arrays[site] = np.zeros((*shape, heads) if heads else shape, dtype=np.float32)
    arrays[_METRICS] = np.zeros((len(pairs), 2), dtype=np.float32)  # base, source
    finished: list[int] = []
    naming = answers_naming_bias(pairs)

    def effects(rows: Sequence[int], **more: Any) -> dict[str, Effects]:
        cells = [request.cells[i] for i in rows]
        answers, foils = (
            tuple(texts[i] for i in rows) for texts in (pairs.answer_labels, pairs.foil_labels)
        )
        width = max(len(own.labels) for own in cells)
        # A slice is a view; a list of all rows would copy the arrays.
        index = slice(None) if len(rows) == len(pairs) else rows
        base, source = arrays[_METRICS][index].T
        noising = request.direction == "noising"
        noted = {"answers_naming_bias": [naming.get(row) for row in rows]} if naming else {}
        return {
            site: Effects(
                values=arrays[site][index][:, :, :width],
                site=site,
                method=method,
                direction=request.direction,
                metric=request.metric_name,
                clean_metric=base if noising else source,
                corrupted_metric=source if noising else base,
                segments=tuple(own.segments for own in cells),
                labels=tuple(own.labels for own in cells),
                differs=tuple(own.differs for own in cells),
                positions=tuple(own.positions for own in cells),
                answer_labels=answers,
                foil_labels=foils,
                metadata=run_metadata(model, site=site, **settings, **more, **noted),
            )
            for site in sites
        }

    def partial() -> dict[str, Effects]:
        return effects(sorted(finished), finished_pairs=sorted(finished))

    processes = Processes(options.accelerator)
    identity = ""
    if processes.count > 1 or options.checkpoint_dir is not None:
        identity = _identity(
            model, request, {"method": method, "size": options.chunk_pairs, **settings}
        )
        processes.agree(identity)
    with processes.together(), engine.packed():
        store = _store(request, options, identity)
        run_chunk = _ChunkRunner(model, request, compute, base_run, arrays)
        chunks = list(enumerate(groups_of_pairs(request, engine, options.chunk_pairs)))
        own_chunks = chunks[processes.index :: processes.count]
        with (
            tqdm(
                total=sum(len(chosen) for _, chosen in own_chunks),
                desc=f"{method} {', '.join(sites)}",
                unit="pair",
                disable=not (options.progress and processes.index == 0),
            ) as bar,
            partial_on_interrupt("patching", finished, len(pairs), "pairs", partial),
        ):
            for number, chosen in own_chunks:
                stored = None if store is None else store.load(number)
                if stored is not None:
                    for name, array in stored[0].items():
                        arrays[name][chosen] = array
                    finished += chosen
                    bar.update(len(chosen))
                    continue
                for part in halved(chosen, run_chunk):
                    bar.update(part)
                finished += chosen
                if store is not None:
                    store.save(number, {name: array[chosen] for name, array in arrays.items()})
    processes.add_up(list(arrays.values()))
    return effects(range(len(pairs)))


def _store(request: PatchingRequest, options: RunOptions, identity: str) -> Checkpoints | None:
    if options.checkpoint_dir is None:
        return None
    check_resumable(request.metric)
    return Checkpoints(Path(options.checkpoint_dir), "patching shard", identity)


@contextmanager
def patching_run(
    model: Model,
    request: PatchingRequest,
    chosen: list[int],
    *,
    ablation: Ablation | None = None,
    base_run: BaseRun | None = None,
) -> Iterator[PatchingRun]:
    """Run both sides of pairs that share their weights; the base run's apply within the context.

    Args:
        model: The model.
        request: The patching request.
        chosen: The pairs.
        ablation: Replaces the source states; made before any weights are applied.
        base_run: Runs the base side instead of `traced_pass`.
    """
    chunk, base_teacher, source_teacher = build_chunk(
        request, chosen, get_engine(model, causal=False)
    )
    # Noise corrupts, so it is added to the corrupted side, whichever that is.
    base_noise, source_noise = (None, chunk.noise) if chunk.noising else (chunk.noise, None)
    with weights(source_teacher, model) as source_model:
        source = traced_pass(
            get_engine(source_model, causal=False),
            chunk.source,
            chunk.source_target,
            request.sites,
            readings=chunk.readings,
            noise=source_noise,
        )
    # From here on under the base run's weights, with which the patched runs continue.
    with weights(base_teacher, model) as base_model:
        engine = get_engine(base_model, causal=False)
        if base_run is None:
            base = traced_pass(
                engine,
                chunk.base,
                chunk.base_target,
                request.sites,
                readings=chunk.readings,
                noise=base_noise,
                store=True,
            )
        else:
            base = base_run(engine, chunk, base_noise)
        clean_logits = base.logits if chunk.noising else source.logits
        measure = bind(request.metric, request.pairs, chunk.indices, clean_logits, chunk.readings)
        of_base, of_source = _baselines(measure, chunk, base.logits, source.logits)
        # After the baselines: an ablation replaces the source's states, not its metric.
        if ablation is not None:
            source = ablation(chunk, base, source)
        yield PatchingRun(engine, chunk, base, source, measure, of_base, of_source)


class _ChunkRunner:
    """Computes the values of some pairs and writes them into the arrays of the whole run."""

    def __init__(
        self,
        model: Model,
        request: PatchingRequest,
        compute: Compute,
        base_run: BaseRun | None,
        arrays: dict[str, np.ndarray],
    ) -> None:
        self._model, self._request, self._compute = model, request, compute
        self._base_run, self._arrays = base_run, arrays

    @cached_property
    def _ablation(self) -> Ablation | None:
        # Must be read before a teacher's weights are applied: the means apply them themselves.
        return ablation_of(self._model, self._request)

    def __call__(self, chosen: list[int]) -> int:
        """Run these pairs, which share both sides' weights, and return their number."""
        request = self._request
        with patching_run(
            self._model, request, chosen, ablation=self._ablation, base_run=self._base_run
        ) as run:
            chunk, of_base, of_source = run.chunk, run.base_metric, run.source_metric
            values = self._compute(run)
        # A metric is a sum over the rows of a pair, and an effect is a difference of two metrics.
        for site in request.sites:
            _write(self._arrays[site], chunk, chunk.merged(values[site], 1))
        metrics = chunk.merged(torch.stack([of_base, of_source], 1))  # [batch, 2]
        self._arrays[_METRICS][chosen] = metrics[: chunk.pairs].cpu().numpy()
        return len(chosen)


def _identity(model: Model, request: PatchingRequest, settings: Mapping[str, Any]) -> str:
    """Hash everything that the values depend on; for a custom metric, its values on a probe."""
    pairs, digest = request.pairs, hashlib.sha256()
    fingerprints: dict[tuple[int, int] | None, str] = {None: ""}

    def side(teacher: Teacher | None) -> list[str]:
        key = weights_key(teacher)
        if key not in fingerprints:
            assert teacher is not None
            own = "" if teacher.model is None else base_fingerprint(teacher.model)
            delta = "" if teacher.delta is None else teacher.delta.digest()
            fingerprints[key] = f"{own} {delta}"
        return ["" if teacher is None else teacher.name, fingerprints[key]]

    record = [
        *(run_metadata(model, **settings), base_fingerprint(model), request.sites, pairs.segments),
        [[side(teacher) for teacher in request.teachers(i)] for i in range(len(pairs))],
        metric_values(request.metric, len(pairs), get_engine(model, causal=False)),
    ]
    digest.update(json.dumps(record, sort_keys=True).encode())
    targets = pairs.target_position
    for row in (*pairs.clean, *pairs.corrupted, pairs.answers, pairs.foils, targets):
        digest.update(f"{list(row.shape)} ".encode() + row.numpy().tobytes())
    for alignment in pairs.alignment:
        digest.update(alignment.tobytes())
    return digest.hexdigest()


def _baselines(
    measure: MetricFunction,
    chunk: Chunk,
    base: Float[Tensor, "states d_vocab"],
    source: Float[Tensor, "states d_vocab"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The metric of the unpatched base and source runs; refuses NaN and infinity."""
    rows = torch.arange(len(chunk.indices), device=base.device)
    names = ("clean", "corrupted") if chunk.noising else ("corrupted", "clean")
    of_base, of_source = (
        finite(measure(logits, rows).detach(), chunk.indices, f"the {name} run")
        for logits, name in zip((base, source), names, strict=True)
    )
    return of_base, of_source


def _write(values: np.ndarray, chunk: Chunk, result: Float[Tensor, "layer batch col ..."]) -> None:
    """Write a chunk's values into the whole run's array."""
    array = result.float().cpu().numpy()  # [layer, batch, col, ...]
    indices = chunk.indices[: chunk.pairs].tolist()
    values[indices] = np.nan
    for row, pair in enumerate(indices):
        # Cells right of the row's own are missing, and NaN already.
        width = min(array.shape[2], values.shape[2])
        values[pair][:, :width] = array[:, row, :width]
