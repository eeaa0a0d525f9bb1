"""What exact and approximate patching share: a question, its checks, and the loop over chunks.

Pairs are cut into chunks of like length, padded on the right. For each chunk both runs are done
once, and what a method does with them is handed in as a function.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from tqdm.auto import tqdm

from divergence_lens._long_runs import Checkpoints, Processes
from divergence_lens._memory import halved, run_halved
from divergence_lens._metrics import (
    Metric,
    MetricFunction,
    bind,
    check_metric,
    finite,
    metric_name,
    metric_values,
)
from divergence_lens.corruption import Corruption, EmbeddingNoise
from divergence_lens.delta import base_fingerprint
from divergence_lens.effects import Direction, Effects
from divergence_lens.engine import Engine, KeyValues, SiteFunction
from divergence_lens.interrupts import keeping
from divergence_lens.models import Model, provenance
from divergence_lens.pairs import PAIR_SEGMENTS, Pairs, weights_key
from divergence_lens.teachers import Teacher

Span = Literal["position", "segment", "all"]
"""What one cell covers: a position, all positions of a segment, or all positions."""

ALL = "all positions"

# The entry of a run's arrays that holds the metrics of both unpatched runs.
_METRICS = "metrics"

_MEANS_PAIRS = 32

Cells: TypeAlias = Bool[np.ndarray, "pairs layers columns *heads"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is to be measured, as the two public functions take it."""

    pairs: Pairs
    sites: tuple[str, ...]
    direction: Direction
    metric: Metric
    corruption: Corruption
    span: Span

    @property
    def noise(self) -> EmbeddingNoise | None:
        """The noise that makes the corrupted run, if noise does."""
        return self.corruption if isinstance(self.corruption, EmbeddingNoise) else None

    @cached_property
    def columns(self) -> tuple[tuple[str, ...], ...]:
        """For each pair the segments that its cells stand for, one name a cell."""
        if self.span == "position":
            return self.pairs.segments
        if self.span == "all":
            return ((ALL,),) * len(self.pairs)
        order = {name: i for i, name in enumerate(PAIR_SEGMENTS)}
        return tuple(
            tuple(sorted(dict.fromkeys(row), key=lambda name: (order.get(name, len(order)), name)))
            for row in self.pairs.segments
        )

    @property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """For each pair what its cells are called, one text a cell."""
        return self.pairs.labels if self.span == "position" else self.columns

    def teachers(self, i: int) -> tuple[Teacher | None, Teacher | None]:
        """Whose weights the clean and the corrupted run of pair `i` have."""
        clean = self.pairs.clean_teacher[i]
        return clean, clean if self.noise else self.pairs.corrupted_teacher[i]

    def corrupted(self, i: int) -> tuple[Int64[Tensor, " _"], Int64[np.ndarray, " _"]]:
        """The corrupted row of pair `i`, and for each clean position the one in it."""
        if self.noise:
            return self.pairs.clean[i], np.arange(len(self.pairs.clean[i]))
        return self.pairs.corrupted[i], self.pairs.alignment[i]

    def start(self, i: int) -> int:
        """The first position at which the two runs of pair `i` can differ in a causal model."""
        if self.corruption in ("mean", "zero"):
            return 0
        if self.noise:
            return int(self.noise.where(self.pairs.segments[i]).argmax())
        return self.pairs.first_difference(i)


@dataclass(frozen=True)
class Chunk:
    """Some pairs, padded on the right, seen from the run that is patched (the base).

    Attributes:
        indices: `[batch]`, which pairs.
        base: Tokens of the run that is patched.
        source: Tokens of the run whose states are put in.
        base_target: Position of the target in each base row.
        source_target: Position of the target in each source row.
        counterpart: For each base position the source position, -1 for none and for padding.
        clean: For each base position the clean position, -1 for none and for padding.
        start: `[batch]`, the first base position at which the two runs can differ.
        noising: Whether the base is the clean run.
        noise: What is added to the embeddings of the corrupted run, if anything.
        members: For each cell of a row the base positions that it covers; None if each covers
            the position of its own number.
    """

    indices: Int64[Tensor, " batch"]
    base: Int64[Tensor, "batch pos"]
    source: Int64[Tensor, "batch source_pos"]
    base_target: Int64[Tensor, " batch"]
    source_target: Int64[Tensor, " batch"]
    counterpart: Int64[Tensor, "batch pos"]
    clean: Int64[Tensor, "batch pos"]
    start: Int64[Tensor, " batch"]
    noising: bool
    noise: Float[Tensor, "batch _ d_model"] | None = None
    members: Bool[Tensor, "batch column pos"] | None = None

    @cached_property
    def differs(self) -> Bool[Tensor, "batch pos"]:
        """Where a patch can matter: a counterpart, and not before the runs part."""
        positions = torch.arange(self.base.shape[1], device=self.base.device)
        return (self.counterpart >= 0) & (positions >= self.start[:, None])

    @property
    def missing(self) -> Bool[Tensor, "batch column"]:
        """Cells none of whose positions has a counterpart."""
        there = self.counterpart >= 0
        if self.members is None:
            return ~there
        return ~(self.members & there[:, None]).any(-1)

    def aligned(self, activations: Float[Tensor, "batch source_pos ..."]) -> Tensor:
        """Source activations at each base position; arbitrary where there is no counterpart."""
        rows = torch.arange(len(activations), device=activations.device)[:, None]
        return activations[rows, self.counterpart.clamp(min=0)]

    def any_of(self, positions: Bool[Tensor, "*more batch pos"]) -> Bool[Tensor, "*more batch col"]:
        """Which cells cover one of `positions`."""
        if self.members is None:
            return positions
        return (positions[..., None, :] & self.members).any(-1)

    def sum_of(
        self, values: Float[Tensor, "layer batch pos ..."]
    ) -> Float[Tensor, "layer batch col ..."]:
        """Values of positions added up by cell; NaN where nothing is there."""
        if self.members is None:
            return values
        there = (self.members & (self.counterpart >= 0)[:, None]).to(values.dtype)
        added = torch.einsum("bcp,lbp...->lbc...", there, values.nan_to_num())
        missing = self.missing.view(1, *self.missing.shape, *[1] * (values.ndim - 3))
        return added.masked_fill(missing, torch.nan)


@dataclass(frozen=True)
class Trace:
    """What one forward pass left behind.

    Attributes:
        sites: Of each chosen site its activation per layer, `[batch, pos, ...]`.
        resid: `resid_pre` of layer 0, and if kept of every layer, then the last `resid_post`.
        past: Keys and values of all positions; None unless kept.
        logits: `[batch, d_vocab]` at the targets, float32.
    """

    sites: dict[str, list[Tensor]]
    resid: list[Tensor]
    past: KeyValues | None
    logits: Float[Tensor, "batch d_vocab"]


@dataclass(frozen=True)
class Case:
    """A chunk with both of its runs done, while the base run's weights are in place.

    Attributes:
        engine: Of the model that the base run is patched in.
        base: The run that is patched.
        source: The run whose states are put in; its sites may be made up by an ablation.
        measure: The metric.
        base_metric: `[batch]`, of the unpatched base run.
    """

    engine: Engine
    chunk: Chunk
    base: Trace
    source: Trace
    measure: MetricFunction
    base_metric: Float[Tensor, " batch"]

    def new(self, site: str, layer: int) -> Tensor:
        """What replaces a site of `layer`, by base position; arbitrary without counterpart."""
        return self.chunk.aligned(self.source.sites[site][layer])


@torch.no_grad()
def trace(
    engine: Engine,
    tokens: Int64[Tensor, "batch pos"],
    target: Int64[Tensor, " batch"],
    sites: Sequence[str],
    *,
    noise: Float[Tensor, "batch pos d_model"] | None = None,
    keep: bool = False,
) -> Trace:
    """Run `tokens` and keep sites of every layer, and with `keep` residuals, keys and values."""
    kept: dict[str, list[Tensor]] = {site: [] for site in sites}
    resid: list[Tensor] = []

    def watch(site: str) -> SiteFunction:
        return lambda activation: kept[site].append(activation.detach())

    layers = range(engine.n_layers)
    with engine.hooked([(layer, site, watch(site)) for layer in layers for site in kept]):
        run = engine.begin(tokens, keep=keep)
        x = run.resid if noise is None else run.resid + noise.to(run.resid.dtype)
        for layer in range(engine.n_layers):
            if keep or not layer:
                resid.append(x)
            x = engine.block(layer, x, run)
    if keep:
        resid.append(x)
    return Trace(kept, resid, run.key_values() if keep else None, target_logits(engine, x, target))


def target_logits(
    engine: Engine,
    resid: Float[Tensor, "batch pos d_model"],
    target: Int64[Tensor, " batch"],
) -> Float[Tensor, "batch d_vocab"]:
    """Logits of each row at its own target position; nothing else is normed or unembedded."""
    return logits_at(engine, resid[torch.arange(len(resid), device=resid.device), target])


def logits_at(
    engine: Engine, resid: Float[Tensor, "rows d_model"]
) -> Float[Tensor, "rows d_vocab"]:
    """Logits of single positions of the last residual, in float32."""
    logits: Tensor = engine.unembed(engine.norm(resid[:, None])[:, 0]).float()
    return logits


def check(model: Model, question: Question, *, batch_rows: int) -> Engine:
    """Refuse what cannot be patched, and give the model's engine.

    Raises:
        ValueError: Named in the docstrings of the public functions.
    """
    if question.direction not in ("noising", "denoising"):
        raise ValueError(f'direction is {question.direction!r}; it is "noising" or "denoising"')
    if question.span not in get_args(Span):
        raise ValueError(f"span is {question.span!r}; it is one of {', '.join(get_args(Span))}")
    _check_corruption(question)
    check_metric(question.metric, question.pairs)
    if batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}; at least 1 row is needed")
    engine = Engine.of(model, causal=False)
    for site in question.sites:
        if site not in engine.sites:
            reason = (
                "its blocks are parallel: attention and MLP read the same residual"
                if site == "resid_mid" and "mlp_out" in engine.sites
                else "unknown name or not in this architecture"
            )
            raise ValueError(
                f"this model has no site {site!r} ({reason}); it has {', '.join(engine.sites)}"
            )
    _check_models(engine, question.pairs)
    for i in range(len(question.pairs)):
        _check_rows(engine, question.pairs, i)
        _check_weights(engine, question.pairs, i)
        if question.noise:
            question.noise.where(question.pairs.segments[i])
    return engine


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
    pairs, sites, engine = question.pairs, question.sites, Engine.of(model, causal=False)
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
                header=provenance(model, site=site, **named, **more),
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
            keeping("patching", finished, len(pairs), "pairs", partial),
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
        self._engine = Engine.of(model, causal=False)

    @cached_property
    def _ablation(self) -> Callable[[Chunk, Trace, Trace], tuple[Chunk, Trace]] | None:
        # Asked for before any teacher's weights are in place: the means put theirs in themselves.
        return _ablation(self._model, self._question)

    def __call__(self, chosen: list[int]) -> int:
        """Run these pairs, which share both sides' weights; how many they are."""
        question, ablation = self._question, self._ablation
        chunk, base_teacher, source_teacher = _chunk(question, chosen, self._engine)
        noise = (None, chunk.noise) if chunk.noising else (chunk.noise, None)
        with weights(source_teacher, self._model) as source_model:
            source = trace(
                Engine.of(source_model, causal=False),
                chunk.source,
                chunk.source_target,
                question.sites,
                noise=noise[1],
            )
        with weights(base_teacher, self._model) as base_model:
            engine = Engine.of(base_model, causal=False)
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
        *(provenance(model, **settings), base_fingerprint(model), question.sites, pairs.segments),
        [[side(teacher) for teacher in question.teachers(i)] for i in range(len(pairs))],
        metric_values(question.metric, len(pairs), Engine.of(model, causal=False)),
    ]
    digest.update(json.dumps(record, sort_keys=True).encode())
    for row in (*pairs.clean, *pairs.corrupted, pairs.answers, pairs.foils):
        digest.update(f"{len(row)} ".encode() + row.numpy().tobytes())
    for alignment in pairs.alignment:
        digest.update(alignment.tobytes())
    return digest.hexdigest()


def _check_corruption(question: Question) -> None:
    if question.noise is None and question.corruption not in ("counterfactual", "mean", "zero"):
        raise ValueError(
            f"corruption is {question.corruption!r}; it is counterfactual, mean, zero, or an "
            "EmbeddingNoise"
        )
    if question.corruption in ("mean", "zero") and question.direction == "denoising":
        raise ValueError(
            f'corruption="{question.corruption}" takes a state of the clean run away and has no '
            'corrupted run to put the clean state back into; use direction="noising"'
        )
    if question.corruption == "mean" and len(question.pairs) < 2:
        raise ValueError(
            'corruption="mean" needs two pairs or more: the mean of one run is the run itself, and '
            "every effect would be zero"
        )


def _check_models(engine: Engine, pairs: Pairs) -> None:
    models = [engine.model, *(t.model for t in _teachers(pairs) if t.model is not None)]
    if any(m.training for m in models):
        raise ValueError("the model is in training mode; call model.eval() first")
    for other in (Engine.of(model, causal=False) for model in models):
        mine = (engine.n_layers, engine.n_heads, engine.d_model, engine.d_vocab)
        theirs = (other.n_layers, other.n_heads, other.d_model, other.d_vocab)
        if mine != theirs:
            raise ValueError(
                "states can only be put into a model of the same shape; layers, heads, d_model and "
                f"vocabulary are {mine} and {theirs}"
            )


def _check_weights(engine: Engine, pairs: Pairs, i: int) -> None:
    """Refuse two runs on equal tokens whose weights are both the model's own."""
    models = [
        engine.model if teacher is None or teacher.model is None else teacher.model
        for teacher in (pairs.clean_teacher[i], pairs.corrupted_teacher[i])
    ]
    deltas = [
        None if teacher is None else teacher.delta
        for teacher in (pairs.clean_teacher[i], pairs.corrupted_teacher[i])
    ]
    same = models[0] is models[1] and deltas[0] is deltas[1]
    if same and torch.equal(pairs.clean[i], pairs.corrupted[i]):
        raise ValueError(
            f"the two runs of pair {i} are identical (same tokens, same weights); nothing to patch"
        )


def _check_rows(engine: Engine, pairs: Pairs, i: int) -> None:
    for name, row in (("clean", pairs.clean[i]), ("corrupted", pairs.corrupted[i])):
        if len(row) > engine.n_ctx:
            raise ValueError(
                f"the {name} row of pair {i} has {len(row)} tokens, "
                f"but the model's context holds {engine.n_ctx}"
            )
        if int(row.max()) >= engine.d_vocab:
            raise ValueError(
                f"the {name} row of pair {i} holds token id {int(row.max())}, "
                f"but the model's vocabulary has {engine.d_vocab}"
            )
    for name, token in (("answer", pairs.answers[i]), ("foil", pairs.foils[i])):
        if int(token) >= engine.d_vocab:
            raise ValueError(
                f"the {name} of pair {i} is token id {int(token)}, "
                f"but the model's vocabulary has {engine.d_vocab}"
            )


def weights(teacher: Teacher | None, model: Model) -> AbstractContextManager[Model]:
    """The model under the teacher's weights, if it has weights of its own."""
    if teacher is None or weights_key(teacher) is None:
        return nullcontext(model)
    return teacher.applied(model)


def groups_of_pairs(question: Question, engine: Engine, size: int) -> list[list[int]]:
    """Pairs in groups of at most `size` that share both sides' weights and are of like length.

    Where attention goes both ways, padding would be read: there the lengths are equal.
    """
    pairs = question.pairs
    groups: dict[tuple[object, ...], list[int]] = {}
    for i in range(len(pairs)):
        key: tuple[object, ...] = tuple(weights_key(t) for t in question.teachers(i))
        if not engine.causal:
            key += (len(pairs.clean[i]), len(question.corrupted(i)[0]))
        groups.setdefault(key, []).append(i)
    found = []
    for members in groups.values():
        members.sort(key=lambda i: (-len(pairs.clean[i]), i))
        found += [members[first : first + size] for first in range(0, len(members), size)]
    return found


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
        engine = Engine.of(model, causal=False)
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._counts = torch.zeros(len(places), device=engine.device)

        def add(chosen: list[int]) -> None:
            chunk, teacher, _ = _chunk(question, chosen, engine)
            with weights(teacher, model) as clean_model:
                run = trace(
                    Engine.of(clean_model, causal=False),
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
        where = _padded(chosen, chunk.base.device)
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


def _teachers(pairs: Pairs) -> list[Teacher]:
    return [t for t in (*pairs.clean_teacher, *pairs.corrupted_teacher) if t is not None]


def _chunk(
    question: Question, chosen: list[int], engine: Engine
) -> tuple[Chunk, Teacher | None, Teacher | None]:
    """Some pairs, and the teachers whose weights the base and the source run have."""
    pairs, device, noising = question.pairs, engine.device, question.direction == "noising"
    clean = [pairs.clean[i] for i in chosen]
    corrupted, alignments = zip(*(question.corrupted(i) for i in chosen), strict=True)
    base, source = (clean, corrupted) if noising else (corrupted, clean)
    width = max(len(row) for row in base)
    counterpart = np.full((len(chosen), width), -1, dtype=np.int64)
    to_clean = counterpart.copy()
    for row, alignment in enumerate(alignments):
        there = np.flatnonzero(alignment >= 0)
        other = alignment[there]
        if noising:
            counterpart[row, there], to_clean[row, there] = other, there
        else:
            counterpart[row, other] = to_clean[row, other] = there
    start = [question.start(i) if engine.causal else 0 for i in chosen]
    noise = question.noise
    chunk = Chunk(
        indices=torch.tensor(chosen, device=device),
        base=_padded(base, device),
        source=_padded(source, device),
        base_target=torch.tensor([len(row) - 1 for row in base], device=device),
        source_target=torch.tensor([len(row) - 1 for row in source], device=device),
        counterpart=torch.from_numpy(counterpart).to(device),
        clean=torch.from_numpy(to_clean).to(device),
        start=torch.tensor(start, device=device),
        noising=noising,
        noise=None
        if noise is None
        else torch.nn.utils.rnn.pad_sequence(
            [noise.draw(engine, pairs.clean[i], pairs.segments[i]) for i in chosen],
            batch_first=True,
        ),
    )
    teachers = question.teachers(chosen[0])
    base_teacher, source_teacher = teachers if noising else teachers[::-1]
    return chunk, base_teacher, source_teacher


def _padded(
    rows: Sequence[Int64[Tensor, " _"]], device: torch.device
) -> Int64[Tensor, "batch pos"]:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)
