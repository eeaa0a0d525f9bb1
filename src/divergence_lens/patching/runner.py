"""The run that exact and approximate patching share.

For each chunk both runs are done once, and what a method does with them is handed in as a function.
A run is shared by processes, goes on from what it has kept, and puts the states of an ablation in
the place of the other run's.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from tqdm.auto import tqdm

from divergence_lens._utils.batching import pad_right
from divergence_lens._utils.checkpoints import Checkpoints, Processes
from divergence_lens._utils.interrupts import partial_on_interrupt
from divergence_lens._utils.memory import halved, run_halved
from divergence_lens.deltas import base_fingerprint
from divergence_lens.engine import Engine, get_engine
from divergence_lens.models import Model
from divergence_lens.pairs import weights_key
from divergence_lens.patching.effects import Effects
from divergence_lens.patching.metrics import (
    MetricFunction,
    bind,
    finite,
    metric_name,
    metric_values,
)
from divergence_lens.patching.request import (
    ALL,
    Case,
    Chunk,
    Question,
    Trace,
    cut,
    groups_of_pairs,
    trace,
    weights,
)
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher

# The entry of a run's arrays that holds the metrics of both unpatched runs.
_METRICS = "metrics"

_MEANS_PAIRS = 32


@dataclass(frozen=True, kw_only=True)
class Long:
    """How a long run is cut, shared, kept and watched, as the public functions take it.

    Attributes:
        size: At most so many pairs in a chunk.
        checkpoint_dir: Where finished chunks are kept, and gone on from.
        accelerator: Shares the chunks among the processes that it knows.
        progress: Whether to show a progress bar, in the first process.
    """

    size: int
    checkpoint_dir: str | os.PathLike[str] | None = None
    accelerator: Any = None
    progress: bool = False


def answer(
    model: Model,
    question: Question,
    work: Callable[[Case], dict[str, Float[Tensor, "layer batch col ..."]]],
    *,
    long: Long,
    method: str,
    base_run: Callable[[Engine, Chunk, Tensor | None], Trace] | None = None,
    **settings: Any,
) -> dict[str, Effects]:
    """Run both sides of every pair, chunk by chunk, and let `work` find the values.

    Args:
        model: The model, already checked.
        question: What is measured.
        work: Gives the values of one chunk by site; it is called under the base run's weights.
        long: How the run is cut, shared and kept.
        method: What the effects call it.
        base_run: What runs the base side in place of `trace`, given the noise on its embeddings.
        **settings: Further entries of the header.

    Returns:
        The effects of each site.
    """
    pairs, sites, engine = question.pairs, question.sites, get_engine(model, causal=False)
    named = {
        "direction": question.direction,
        "metric": metric_name(question.metric),
        "corruption": str(question.corruption),
        "span": question.span,
        **settings,
    }
    shape = (len(pairs), engine.n_layers, max(len(row) for row in question.columns))
    found = {}
    for site in sites:
        heads = engine.site_heads(site)
        found[site] = np.zeros((*shape, heads) if heads else shape, dtype=np.float32)
    found[_METRICS] = np.zeros((len(pairs), 2), dtype=np.float32)  # base, source
    finished: list[int] = []

    def effects(rows: Sequence[int], **more: Any) -> dict[str, Effects]:
        columns, labels = (
            tuple(texts[i] for i in rows) for texts in (question.columns, question.labels)
        )
        width = max(map(len, columns))
        # All of them take no copy.
        these = slice(None) if len(rows) == len(pairs) else rows
        base, source = found[_METRICS][these].T
        noising = question.direction == "noising"
        return {
            site: Effects(
                values=found[site][these][:, :, :width],
                site=site,
                method=method,
                direction=question.direction,
                metric=metric_name(question.metric),
                clean_metric=base if noising else source,
                corrupted_metric=source if noising else base,
                segments=columns,
                labels=labels,
                metadata=run_metadata(model, site=site, **named, **more),
            )
            for site in sites
        }

    def partial() -> dict[str, Effects]:
        return effects(sorted(finished), finished_pairs=sorted(finished))

    processes = Processes(long.accelerator)
    identity = ""
    if processes.count > 1 or long.checkpoint_dir is not None:
        identity = _identity(model, question, {"method": method, "size": long.size, **named})
        processes.agree(identity)
    with processes.together():
        store = (
            None
            if long.checkpoint_dir is None
            else Checkpoints(Path(long.checkpoint_dir), "patching shard", identity)
        )
        one = _Answer(model, question, work, base_run, found)
        groups = list(enumerate(groups_of_pairs(question, engine, long.size)))
        mine = groups[processes.index :: processes.count]
        name = f"{method} {', '.join(sites)}"
        shown = long.progress and processes.index == 0
        total = sum(len(chosen) for _, chosen in mine)
        with (
            tqdm(total=total, desc=name, unit="pair", disable=not shown) as bar,
            partial_on_interrupt("patching", finished, len(pairs), "pairs", partial),
        ):
            for number, chosen in mine:
                kept = None if store is None else store.load(number)
                if kept is not None:
                    for name, array in kept[0].items():
                        found[name][chosen] = array
                    finished += chosen
                    bar.update(len(chosen))
                    continue
                for part in halved(chosen, one):
                    bar.update(part)
                finished += chosen
                if store is not None:
                    store.save(number, {name: array[chosen] for name, array in found.items()})
    processes.add_up(list(found.values()))
    return effects(range(len(pairs)))


class _Answer:
    """Finds the values of some pairs, and puts them into the arrays of the whole run."""

    def __init__(
        self,
        model: Model,
        question: Question,
        work: Callable[[Case], dict[str, Tensor]],
        base_run: Callable[[Engine, Chunk, Tensor | None], Trace] | None,
        found: dict[str, np.ndarray],
    ) -> None:
        self._model, self._question, self._work = model, question, work
        self._base_run, self._found = base_run, found
        self._engine = get_engine(model, causal=False)

    @cached_property
    def _ablation(self) -> Callable[[Chunk, Trace, Trace], tuple[Chunk, Trace]] | None:
        # Asked for before any teacher's weights are in place: the means put theirs in themselves.
        return _ablation(self._model, self._question)

    def __call__(self, chosen: list[int]) -> int:
        """Run these pairs, which share both sides' weights; how many they are."""
        question, ablation = self._question, self._ablation
        chunk, base_teacher, source_teacher = cut(question, chosen, self._engine)
        noise = (None, chunk.noise) if chunk.noising else (chunk.noise, None)
        with weights(source_teacher, self._model) as source_model:
            source = trace(
                get_engine(source_model, causal=False),
                chunk.source,
                chunk.source_target,
                question.sites,
                noise=noise[1],
            )
        with weights(base_teacher, self._model) as base_model:
            engine = get_engine(base_model, causal=False)
            if self._base_run is None:
                base = trace(
                    engine,
                    chunk.base,
                    chunk.base_target,
                    question.sites,
                    noise=noise[0],
                    keep=True,
                )
            else:
                base = self._base_run(engine, chunk, noise[0])
            clean_logits = base.logits if chunk.noising else source.logits
            measure = bind(question.metric, question.pairs, chunk.indices, clean_logits)
            of_base, of_source = _baselines(measure, chunk, base.logits, source.logits)
            seen, states = (chunk, source) if ablation is None else ablation(chunk, base, source)
            seen = _with_members(seen, question)
            values = self._work(Case(engine, seen, base, states, measure, of_base))
        for site in question.sites:
            _store(self._found[site], seen, values[site])
        self._found[_METRICS][chosen] = torch.stack([of_base, of_source], 1).cpu().numpy()
        return len(chosen)


def _identity(model: Model, question: Question, settings: Mapping[str, Any]) -> str:
    """A hash over all that the values depend on; of a metric of one's own, what it gives."""
    pairs, digest = question.pairs, hashlib.sha256()
    known: dict[tuple[int, int] | None, str] = {None: ""}

    def side(teacher: Teacher | None) -> list[str]:
        key = weights_key(teacher)
        if key not in known:
            assert teacher is not None
            own = "" if teacher.model is None else base_fingerprint(teacher.model)
            delta = "" if teacher.delta is None else teacher.delta.digest()
            known[key] = f"{own} {delta}"
        return ["" if teacher is None else teacher.name, known[key]]

    record = [
        *(run_metadata(model, **settings), base_fingerprint(model), question.sites, pairs.segments),
        [[side(teacher) for teacher in question.teachers(i)] for i in range(len(pairs))],
        metric_values(question.metric, len(pairs), get_engine(model, causal=False)),
    ]
    digest.update(json.dumps(record, sort_keys=True).encode())
    for row in (*pairs.clean, *pairs.corrupted, pairs.answers, pairs.foils):
        digest.update(f"{len(row)} ".encode() + row.numpy().tobytes())
    for alignment in pairs.alignment:
        digest.update(alignment.tobytes())
    return digest.hexdigest()


def _baselines(
    measure: MetricFunction,
    chunk: Chunk,
    base: Float[Tensor, "batch d_vocab"],
    source: Float[Tensor, "batch d_vocab"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The metric of the unpatched base and source runs, neither NaN nor infinite."""
    rows = torch.arange(len(chunk.indices), device=base.device)
    names = ("clean", "corrupted") if chunk.noising else ("corrupted", "clean")
    of_base, of_source = (
        finite(measure(logits, rows).detach(), chunk.indices, f"the {name} run")
        for logits, name in zip((base, source), names, strict=True)
    )
    return of_base, of_source


def _ablation(
    model: Model, question: Question
) -> Callable[[Chunk, Trace, Trace], tuple[Chunk, Trace]] | None:
    """What puts the states of an ablation in the place of the source run's, if it is one."""
    if question.corruption not in ("mean", "zero"):
        return None
    means = _Means(model, question) if question.corruption == "mean" else None

    def ablate(chunk: Chunk, base: Trace, source: Trace) -> tuple[Chunk, Trace]:
        positions = torch.arange(chunk.base.shape[1], device=chunk.base.device)
        here = torch.where(positions <= chunk.base_target[:, None], positions, -1)
        chunk = replace(chunk, counterpart=here, clean=here)
        if means is None:
            sites = {
                site: [torch.zeros_like(activation) for activation in kept]
                for site, kept in base.sites.items()
            }
        else:
            sites = means.states(chunk, base)
        return chunk, replace(source, sites=sites)

    return ablate


class _Means:
    """The means of sites over the clean runs of all pairs, place by place.

    Two positions are in the same place if they have the same number within the same segment.
    """

    def __init__(self, model: Model, question: Question) -> None:
        places: dict[tuple[str, int], int] = {}
        self._places = []
        for row in question.pairs.segments:
            seen: dict[str, int] = {}
            mine = []
            for name in row:
                seen[name] = seen.get(name, -1) + 1
                mine.append(places.setdefault((name, seen[name]), len(places)))
            self._places.append(torch.tensor(mine))
        engine = get_engine(model, causal=False)
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._counts = torch.zeros(len(places), device=engine.device)

        def add(chosen: list[int]) -> None:
            chunk, teacher, _ = cut(question, chosen, engine)
            with weights(teacher, model) as clean_model:
                run = trace(
                    get_engine(clean_model, causal=False),
                    chunk.base,
                    chunk.base_target,
                    question.sites,
                )
            self._add(chunk, run)

        # The same groups whatever else a run is cut into, so that its sums have the same bits.
        for group in groups_of_pairs(question, engine, _MEANS_PAIRS):
            run_halved(group, add)
        self._means = {
            where: total / self._counts.view(-1, *[1] * (total.ndim - 1))
            for where, total in self._sums.items()
        }

    def _add(self, chunk: Chunk, run: Trace) -> None:
        rows, where = self._of(chunk)
        there = where[rows]
        new = {
            (site, layer): activation[rows].float()
            for site, kept in run.sites.items()
            for layer, activation in enumerate(kept)
        }
        for key, states in new.items():
            if key not in self._sums:
                self._sums[key] = states.new_zeros(len(self._counts), *states.shape[1:])
        ones = torch.ones_like(there, dtype=self._counts.dtype)
        # Nothing above has added anything: if memory runs out there, the pairs can come again.
        self._counts.index_add_(0, there, ones)
        for key, states in new.items():
            self._sums[key].index_add_(0, there, states)

    def _of(self, chunk: Chunk) -> tuple[Bool[Tensor, "batch pos"], Int64[Tensor, "batch pos"]]:
        """Which positions of the chunk are no padding, and the place of each."""
        chosen = [self._places[i] for i in chunk.indices.tolist()]
        where = pad_right(chosen, chunk.base.device)
        positions = torch.arange(where.shape[1], device=where.device)
        return positions <= chunk.base_target[:, None], where

    def states(self, chunk: Chunk, base: Trace) -> dict[str, list[Tensor]]:
        """The means by site and layer, at each position of the chunk."""
        where = self._of(chunk)[1]
        return {
            site: [
                self._means[site, layer][where].to(activation.dtype)
                for layer, activation in enumerate(kept)
            ]
            for site, kept in base.sites.items()
        }


def _with_members(chunk: Chunk, question: Question) -> Chunk:
    if question.span == "position":
        return chunk
    columns = [question.columns[i] for i in chunk.indices.tolist()]
    members = np.zeros((len(columns), max(map(len, columns)), chunk.base.shape[1]), dtype=bool)
    clean = chunk.clean.cpu().numpy()
    for row, (pair, names) in enumerate(zip(chunk.indices.tolist(), columns, strict=True)):
        here = np.flatnonzero(clean[row] >= 0)
        of = np.array(question.pairs.segments[pair])[clean[row, here]]
        for column, name in enumerate(names):
            members[row, column, here] = (of == name) | (name == ALL)
    return replace(chunk, members=torch.from_numpy(members).to(chunk.base.device))


def _store(values: np.ndarray, chunk: Chunk, found: Float[Tensor, "layer batch col ..."]) -> None:
    """Put a chunk's values into the result, which counts positions in the clean row."""
    result = found.float().cpu().numpy()
    values[chunk.indices.cpu().numpy()] = np.nan
    clean = chunk.clean.cpu().numpy()
    for row, pair in enumerate(chunk.indices.tolist()):
        if chunk.members is None:
            here = np.flatnonzero(clean[row] >= 0)
            values[pair][:, clean[row][here]] = result[:, row, here]
        else:
            values[pair][:, : result.shape[2]] = result[:, row]
