"""What is asked of patching, what it may not ask, and one pass over a chunk of pairs.

Pairs are cut into chunks of like length, padded on the right. `_patching_run` goes through them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens._utils.batching import pad_right
from divergence_lens.engine import Engine, KeyValues, SiteFunction, get_engine
from divergence_lens.models import Model
from divergence_lens.pairs import PAIR_SEGMENTS, Pairs, weights_key
from divergence_lens.patching.corruption import Corruption, EmbeddingNoise
from divergence_lens.patching.effects import Direction
from divergence_lens.patching.metrics import (
    Metric,
    MetricFunction,
    check_metric,
)
from divergence_lens.teachers import Teacher

Span = Literal["position", "segment", "all"]
"""What one cell covers: a position, all positions of a segment, or all positions."""

ALL = "all positions"

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
    engine = get_engine(model, causal=False)
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
    for other in (get_engine(model, causal=False) for model in models):
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


def _teachers(pairs: Pairs) -> list[Teacher]:
    return [t for t in (*pairs.clean_teacher, *pairs.corrupted_teacher) if t is not None]


def cut(
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
        base=pad_right(base, device),
        source=pad_right(source, device),
        base_target=torch.tensor([len(row) - 1 for row in base], device=device),
        source_target=torch.tensor([len(row) - 1 for row in source], device=device),
        counterpart=torch.from_numpy(counterpart).to(device),
        clean=torch.from_numpy(to_clean).to(device),
        start=torch.tensor(start, device=device),
        noising=noising,
        noise=None
        if noise is None
        else pad_right([noise.draw(engine, pairs.clean[i], pairs.segments[i]) for i in chosen]),
    )
    teachers = question.teachers(chosen[0])
    base_teacher, source_teacher = teachers if noising else teachers[::-1]
    return chunk, base_teacher, source_teacher
