"""A validated patching request: the pairs, sites, direction, metric, corruption and span."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from divergence_lens.engine import Engine, get_engine
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs, check_pairs
from divergence_lens.patching.cells import PairCells, Span, cells_of
from divergence_lens.patching.corruption import Corruption, EmbeddingNoise
from divergence_lens.patching.effects import Direction
from divergence_lens.patching.metrics import Metric, check_metric, name_on, row_readings
from divergence_lens.patching.readings import Reading
from divergence_lens.provenance import warn_if_other_model
from divergence_lens.teachers import Teacher

Cells: TypeAlias = Bool[np.ndarray, "pairs layers columns *heads"]


@dataclass(frozen=True, kw_only=True)
class PatchingRequest:
    """The options that `causal_mediation` and `attribution_patch` share.

    Attributes:
        pairs: The pairs to patch.
        sites: The sites to patch, one at a time.
        direction: `noising` or `denoising`.
        metric: What is measured at the target position.
        corruption: Where the patched-in states come from.
        span: What one cell covers.
    """

    pairs: Pairs
    sites: tuple[str, ...]
    direction: Direction
    metric: Metric
    corruption: Corruption
    span: Span

    @property
    def noise(self) -> EmbeddingNoise | None:
        """The embedding noise, if the corruption is one."""
        return self.corruption if isinstance(self.corruption, EmbeddingNoise) else None

    @property
    def two_rows(self) -> bool:
        """Whether states of the corrupted row are patched; an ablation only changes the clean."""
        return self.corruption == "counterfactual"

    @cached_property
    def cells(self) -> tuple[PairCells, ...]:
        """For each pair, its cells: one per entry of the last axis of the result."""
        return tuple(
            cells_of(self.pairs, i, self.span, units=self.two_rows) for i in range(len(self.pairs))
        )

    @property
    def width(self) -> int:
        """The largest number of cells of a pair."""
        return max(len(cells.labels) for cells in self.cells)

    def has_units(self, i: int) -> bool:
        """Whether a column of pair `i` is more than one position on one side."""
        return self.two_rows and bool(self.pairs.units(i))

    @cached_property
    def metric_name(self) -> str:
        """The name of the metric in results."""
        return name_on(self.metric, self.pairs)

    def readings(self, i: int) -> tuple[Reading, ...]:
        """The rows that continue pair `i`, one or two; none if one position is read."""
        return row_readings(self.metric, self.pairs, i)

    def continuation_length(self, i: int) -> int:
        """The largest number of tokens that continue a row of pair `i`."""
        return max([0, *(len(reading.continuation) for reading in self.readings(i))])

    def teachers(self, i: int) -> tuple[Teacher | None, Teacher | None]:
        """The teachers whose weights the clean and the corrupted run of pair `i` use."""
        clean = self.pairs.clean_teacher[i]
        return clean, clean if self.noise else self.pairs.corrupted_teacher[i]

    def corrupted(self, i: int) -> Int64[Tensor, " _"]:
        """The tokens of the corrupted run of pair `i`."""
        return self.pairs.clean[i] if self.noise else self.pairs.corrupted[i]

    def start(self, i: int) -> int:
        """The first position at which the two runs of pair `i` can differ in a causal model."""
        if self.corruption in ("mean", "zero"):
            return 0
        if self.noise:
            return int(self.noise.where(self.pairs.segments[i]).argmax())
        return self.pairs.first_difference(i)


def site_names(site: str | Sequence[str]) -> tuple[str, ...]:
    """Convert the `site` option, one name or several, to a tuple of names.

    Raises:
        ValueError: There is no name, or one occurs twice.
    """
    names = (site,) if isinstance(site, str) else tuple(site)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"site is {list(names)}; name at least one site, and each once")
    return names


def validate(model: Model, request: PatchingRequest, *, batch_rows: int) -> Engine:
    """Refuse a request that the model or the pairs cannot serve, and return the model's engine.

    Raises:
        ValueError: As listed in the docstrings of the public functions.
    """
    check_pairs(request.pairs)
    if request.direction not in ("noising", "denoising"):
        raise ValueError(f'direction is {request.direction!r}; it is "noising" or "denoising"')
    if request.span not in get_args(Span):
        raise ValueError(f"span is {request.span!r}; it is one of {', '.join(get_args(Span))}")
    _check_corruption(request)
    check_metric(request.metric, request.pairs)
    if batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}; at least 1 row is needed")
    engine = get_engine(model, causal=False)
    for site in request.sites:
        if site not in engine.sites:
            reason = (
                "its blocks are parallel: attention and MLP read the same residual"
                if site == "resid_mid" and "mlp_out" in engine.sites
                else "its attention does not read the pattern back from the hook point"
                if site == "pattern"
                else "unknown name or not in this architecture"
            )
            raise ValueError(
                f"this model has no site {site!r} ({reason}); it has {', '.join(engine.sites)}"
            )
    if "pattern" in request.sites:
        _check_patterns(request)
    request.pairs.check_direction(causal=engine.causal)
    _check_models(engine, request.pairs)
    warn_if_other_model(request.pairs.metadata, model, "the divergence behind these pairs")
    for i in range(len(request.pairs)):
        _check_rows(engine, request, i)
        _check_weights(engine, request.pairs, i)
        if request.noise:
            request.noise.where(request.pairs.segments[i])
    return engine


def _check_corruption(request: PatchingRequest) -> None:
    if request.noise is None and request.corruption not in ("counterfactual", "mean", "zero"):
        raise ValueError(
            f"corruption is {request.corruption!r}; it is counterfactual, mean, zero, or an "
            "EmbeddingNoise"
        )
    if request.corruption in ("mean", "zero") and request.direction == "denoising":
        raise ValueError(
            f'corruption="{request.corruption}" ablates states of the clean run and has no '
            'corrupted run in which the clean state could be restored; use direction="noising"'
        )
    if request.corruption == "mean" and len(request.pairs) < 2:
        raise ValueError(
            'corruption="mean" needs two pairs or more: the mean of one run is the run itself, and '
            "every effect would be zero"
        )


def _check_patterns(request: PatchingRequest) -> None:
    """Refuse pairs whose patterns have other keys in the two runs."""
    if request.corruption == "mean":
        raise ValueError(
            'corruption="mean" does not apply to site "pattern": the patterns of rows of different '
            'lengths have no mean; use "counterfactual" or "zero"'
        )
    for i, pair in enumerate(request.cells):
        lengths = len(request.pairs.clean[i]), len(request.corrupted(i))
        if lengths[0] != lengths[1] or any(c.clean != c.corrupted for c in pair.columns):
            raise ValueError(
                f"the rows of pair {i} have {lengths[0]} and {lengths[1]} tokens or are aligned "
                'with a shift; site "pattern" needs rows whose positions correspond one to one'
            )


def _check_models(engine: Engine, pairs: Pairs) -> None:
    teachers = [t for t in (*pairs.clean_teacher, *pairs.corrupted_teacher) if t is not None]
    models = [engine.model, *(t.model for t in teachers if t.model is not None)]
    if any(m.training for m in models):
        raise ValueError("the model is in training mode; call model.eval() first")
    for other in (get_engine(model, causal=False) for model in models):
        shape, other_shape = (
            (one.n_layers, one.n_heads, one.d_model, one.d_vocab_out) for one in (engine, other)
        )
        if shape != other_shape:
            raise ValueError(
                "states can only be patched into a model of the same shape; layers, heads, d_model "
                f"and vocabulary are {shape} and {other_shape}"
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
            f"the two runs of pair {i} are identical (same tokens, same weights); give it another "
            "corrupted row or a teacher with other weights"
        )


def _check_rows(engine: Engine, request: PatchingRequest, i: int) -> None:
    pairs = request.pairs
    if request.readings(i) and not engine.causal:
        raise ValueError(
            f"the answer or foil of pair {i} has several tokens, but this model attends in both "
            "directions and would read them at the target position; give one token each"
        )
    added = request.continuation_length(i)
    for name, row in (("clean", pairs.clean[i]), ("corrupted", pairs.corrupted[i])):
        if len(row) + added > engine.n_ctx:
            answer = f" and its answer {added} more" if added else ""
            raise ValueError(
                f"the {name} row of pair {i} has {len(row)} tokens{answer}, "
                f"but the model's context holds {engine.n_ctx}"
            )
        if int(row.max()) >= engine.d_vocab:
            raise ValueError(
                f"the {name} row of pair {i} holds token id {int(row.max())}, "
                f"but the model's vocabulary has {engine.d_vocab}"
            )
    for name, tokens in (("answer", pairs.answers[i]), ("foil", pairs.foils[i])):
        if int(tokens.max()) >= engine.d_vocab_out:
            raise ValueError(
                f"the {name} of pair {i} is token id {int(tokens.max())}, "
                f"but the model predicts ids below {engine.d_vocab_out}"
            )
