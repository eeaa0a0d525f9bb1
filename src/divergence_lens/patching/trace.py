"""Traced forward passes over chunks of pairs.

Pairs are cut into chunks of similar length, padded on the right. A `Chunk` holds the tokens and the
alignment of some pairs, a `Trace` the activations of one forward pass over them, and a
`PatchingRun` a chunk with both of its traces, from which a patching method computes its values.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens._utils.batching import pad_right
from divergence_lens.engine import Engine, KeyValues, SiteFunction
from divergence_lens.models import Model
from divergence_lens.pairs import weights_key
from divergence_lens.patching.metrics import MetricFunction
from divergence_lens.patching.readings import Readings
from divergence_lens.patching.request import PatchingRequest
from divergence_lens.patching.resized import ResizedRows, resized_rows
from divergence_lens.teachers import Teacher


@dataclass(frozen=True)
class Chunk:
    """Some pairs, padded on the right. The base run is patched with states of the source run.

    Attributes:
        indices: `[batch]`, the numbers of the pairs. With `readings`, a pair may have two rows.
        base: Tokens of the base run.
        source: Tokens of the source run.
        base_target: Target position of each base row.
        source_target: Target position of each source row.
        counterpart: For each base position the source position, -1 for none and for padding. In a
            unit, the last base position corresponds to the last source position, and the others
            have no counterpart.
        start: `[batch]`, the first base position at which the two runs can differ.
        noising: Whether the base is the clean run.
        noise: Added to the embeddings of the corrupted run, if given.
        members: For each cell of a row the base positions with a counterpart that it covers; None
            if each cell covers one position.
        resized: The patched rows of cells that cover a unit; None if there is no such cell.
        readings: The tokens that are read, if answers or foils have several; rows are then
            continued with them after the target position.
    """

    indices: Int64[Tensor, " batch"]
    base: Int64[Tensor, "batch pos"]
    source: Int64[Tensor, "batch source_pos"]
    base_target: Int64[Tensor, " batch"]
    source_target: Int64[Tensor, " batch"]
    counterpart: Int64[Tensor, "batch pos"]
    start: Int64[Tensor, " batch"]
    noising: bool
    noise: Float[Tensor, "batch _ d_model"] | None = None
    members: Bool[Tensor, "batch column pos"] | None = None
    resized: ResizedRows | None = None
    readings: Readings | None = None

    @property
    def pairs(self) -> int:
        """The number of pairs. Their first rows come first."""
        return len(self.indices) if self.readings is None else self.readings.pairs

    @cached_property
    def differs(self) -> Bool[Tensor, "batch pos"]:
        """Positions at which a patch matters: with a counterpart, from the first difference on."""
        positions = torch.arange(self.base.shape[1], device=self.base.device)  # [pos]
        return (self.counterpart >= 0) & (positions >= self.start[:, None])

    @property
    def missing(self) -> Bool[Tensor, "batch column"]:
        """Cells none of whose positions has a counterpart."""
        present = self.counterpart >= 0
        if self.members is None:
            return ~present
        return ~(self.members & present[:, None]).any(-1)

    def aligned(self, activations: Float[Tensor, "batch source_pos ..."]) -> Tensor:
        """Source activations at each base position; arbitrary where there is no counterpart."""
        rows = torch.arange(len(activations), device=activations.device)[:, None]  # [batch, 1]
        return activations[rows, self.counterpart.clamp(min=0)]  # [batch, pos, ...]

    def merged(self, values: Float[Tensor, "..."], axis: int = 0) -> Float[Tensor, "..."]:
        """Add the values of each pair's second row to those of its first; see `Readings`."""
        return values if self.readings is None else self.readings.merged(values, axis)

    def any_of(self, positions: Bool[Tensor, "*more batch pos"]) -> Bool[Tensor, "*more batch col"]:
        """Cells that cover at least one of `positions`."""
        if self.members is None:
            return positions
        return (positions[..., None, :] & self.members).any(-1)

    def sum_of(
        self, values: Float[Tensor, "layer batch pos ..."]
    ) -> Float[Tensor, "layer batch col ..."]:
        """Sum values of positions within each cell; NaN in cells without a counterpart."""
        if self.members is None:
            return values
        present = (self.members & (self.counterpart >= 0)[:, None]).to(
            values.dtype
        )  # [batch, col, pos]
        # A position without a counterpart is NaN, and 0 * NaN is NaN: zero it before the sum.
        added = torch.einsum("bcp,lbp...->lbc...", present, values.nan_to_num())
        missing = self.missing.view(1, *self.missing.shape, *[1] * (values.ndim - 3))
        return added.masked_fill(missing, torch.nan)


@dataclass(frozen=True)
class Trace:
    """The activations of one forward pass.

    Attributes:
        sites: For each traced site the activation per layer, `[batch, pos, ...]`.
        resid: `resid_pre` of layer 0; with `store=True`, `resid_pre` of every layer and then the
            last `resid_post`.
        past: Keys and values of all positions; None unless stored.
        logits: At the states that are read, one per row unless the chunk has `readings`, float32.
    """

    sites: dict[str, list[Tensor]]
    resid: list[Tensor]
    past: KeyValues | None
    logits: Float[Tensor, "states d_vocab"]


@dataclass(frozen=True)
class PatchingRun:
    """A chunk with both of its traces, while the base run's weights are applied.

    Attributes:
        engine: Engine of the base run.
        chunk: The pairs.
        base: Trace of the run that is patched.
        source: Trace of the run whose states are patched in; an ablation replaces its sites.
        measure: The metric.
        base_metric: `[batch]`, each row's share in the metric of the unpatched base run.
        source_metric: `[batch]`, the same of the unpatched source run.
    """

    engine: Engine
    chunk: Chunk
    base: Trace
    source: Trace
    measure: MetricFunction
    base_metric: Float[Tensor, " batch"]
    source_metric: Float[Tensor, " batch"]

    def new(self, site: str, layer: int) -> Tensor:
        """The patched-in state of a site, by base position; arbitrary without a counterpart."""
        return self.chunk.aligned(self.source.sites[site][layer])


@torch.no_grad()
def traced_pass(
    engine: Engine,
    tokens: Int64[Tensor, "batch pos"],
    target: Int64[Tensor, " batch"],
    sites: Sequence[str],
    *,
    readings: Readings | None = None,
    noise: Float[Tensor, "batch pos d_model"] | None = None,
    store: bool = False,
) -> Trace:
    """Run `tokens` and record `sites`; with `store`, also residuals, keys and values."""
    activations: dict[str, list[Tensor]] = {site: [] for site in sites}
    resid: list[Tensor] = []

    def recorder(site: str) -> SiteFunction:
        return lambda activation: activations[site].append(activation.detach())

    layers = range(engine.n_layers)
    with engine.hooked([(layer, site, recorder(site)) for layer in layers for site in activations]):
        run = engine.begin(tokens, keep=store)
        x = run.resid if noise is None else run.resid + noise.to(run.resid.dtype)
        for layer in layers:
            if store or not layer:
                resid.append(x)
            x = engine.block(layer, x, run)  # [batch, pos, d_model]
    if store:
        resid.append(x)
    past = run.key_values() if store else None
    return Trace(activations, resid, past, target_logits(engine, x, target, readings))


def target_logits(
    engine: Engine,
    resid: Float[Tensor, "batch pos d_model"],
    target: Int64[Tensor, " batch"],
    readings: Readings | None = None,
) -> Float[Tensor, "states d_vocab"]:
    """Logits of a chunk's rows at the positions read; no other is normalized or unembedded."""
    rows = torch.arange(len(resid), device=resid.device)
    return logits_at(engine, states_at(resid, target, rows, readings))


def states_at(
    resid: Float[Tensor, "rows pos d_model"],
    target: Int64[Tensor, " rows"],
    rows: Int64[Tensor, " rows"],
    readings: Readings | None,
) -> Float[Tensor, "states d_model"]:
    """States at the target position of each row, or at all positions read.

    Args:
        resid: A residual.
        target: The target position of each row.
        rows: The row of the chunk that each is a run of.
        readings: The chunk's readings.
    """
    if readings is not None:
        return readings.states(resid, target, rows)
    return resid[torch.arange(len(resid), device=resid.device), target]  # [rows, d_model]


def logits_at(
    engine: Engine, resid: Float[Tensor, "rows d_model"]
) -> Float[Tensor, "rows d_vocab"]:
    """Logits of single positions of the last residual, in float32."""
    logits: Tensor = engine.unembed(engine.norm(resid[:, None])[:, 0]).float()
    return logits


def weights(teacher: Teacher | None, model: Model) -> AbstractContextManager[Model]:
    """The model under the teacher's weights, or unchanged if the teacher has none."""
    if teacher is None or weights_key(teacher) is None:
        return nullcontext(model)
    return teacher.applied(model)


def groups_of_pairs(request: PatchingRequest, engine: Engine, size: int) -> list[list[int]]:
    """Group at most `size` pairs that share both sides' weights and have similar lengths.

    A model that attends in both directions would read padding, so its groups have equal lengths.
    Pairs with units have groups of their own, because their cells are not the base positions.
    """
    pairs = request.pairs
    by_weights: dict[tuple[object, ...], list[int]] = {}
    for i in range(len(pairs)):
        key: tuple[object, ...] = tuple(weights_key(t) for t in request.teachers(i))
        # Pairs of one token each are measured from the logits at the target position alone.
        key += (bool(request.readings(i)), request.has_units(i))
        if not engine.causal:
            key += (len(pairs.clean[i]), len(request.corrupted(i)))
        by_weights.setdefault(key, []).append(i)
    groups = []
    for members in by_weights.values():
        members.sort(key=lambda i: (-len(pairs.clean[i]), i))
        groups += [members[first : first + size] for first in range(0, len(members), size)]
    return groups


def build_chunk(
    request: PatchingRequest, chosen: list[int], engine: Engine, *, continued: bool = True
) -> tuple[Chunk, Teacher | None, Teacher | None]:
    """Build the chunk of some pairs; also return the teachers of its base and its source run.

    With `continued=False`, the rows end at their target position, and nothing can be read after it.
    """
    pairs, device, noising = request.pairs, engine.device, request.direction == "noising"
    by_pair = [request.readings(i) if continued else () for i in chosen]
    readings = Readings.of_pairs(by_pair, device)
    if readings is not None:
        chosen = [chosen[i] for i in readings.owner.tolist()]
    clean = [pairs.clean[i] for i in chosen]
    corrupted = [request.corrupted(i) for i in chosen]
    cells = [request.cells[i] for i in chosen]
    base, source = (clean, corrupted) if noising else (corrupted, clean)
    base_target, source_target = ([len(row) - 1 for row in side] for side in (base, source))
    if pairs.targets is not None:  # both rows of a pair have one target, with tokens after it
        base_target = source_target = pairs.targets[torch.tensor(chosen)].tolist()
    if readings is not None:
        base, source = readings.continued(base), readings.continued(source)
    width = max(len(row) for row in base)
    counterpart = np.full((len(chosen), width), -1, dtype=np.int64)  # [batch, pos]
    start = [request.start(i) if engine.causal else 0 for i in chosen]
    last: list[Int64[np.ndarray, " columns"]] = []  # for each row, the last base position by column
    for row, own in enumerate(cells):
        here = np.array([column.clean[-1] for column in own.columns])
        other = np.array([column.corrupted[-1] for column in own.columns])
        if not noising:
            here, other = other, here
        counterpart[row, here] = other
        # A state from another position can differ, also where the tokens up to it are the same.
        start[row] = min([start[row], *here[here != other][:1].tolist()])
        last.append(here)
    units = any(request.has_units(i) for i in chosen)
    members = None
    if units or request.span != "position":
        most = max(len(own.labels) for own in cells)
        members = torch.zeros(len(chosen), most, width, dtype=torch.bool)  # [batch, col, pos]
        for row, (own, here) in enumerate(zip(cells, last, strict=True)):
            members[row, own.cell_of, here] = True
        members = members.to(device)
    chunk = Chunk(
        indices=torch.tensor(chosen, device=device),
        base=pad_right(base, device),
        source=pad_right(source, device),
        base_target=torch.tensor(base_target, device=device),
        source_target=torch.tensor(source_target, device=device),
        counterpart=torch.from_numpy(counterpart).to(device),
        start=torch.tensor(start, device=device),
        noising=noising,
        noise=_noise(request, chosen, engine, width),
        members=members,
        resized=resized_rows(cells, start, readings=readings, noising=noising, device=device),
        readings=readings,
    )
    teachers = request.teachers(chosen[0])
    base_teacher, source_teacher = teachers if noising else teachers[::-1]
    return chunk, base_teacher, source_teacher


def _noise(
    request: PatchingRequest, chosen: list[int], engine: Engine, width: int
) -> Float[Tensor, "batch pos d_model"] | None:
    """The noise on the embeddings of each row, which is zero after the target position."""
    if request.noise is None:
        return None
    pairs = request.pairs
    drawn = [request.noise.draw(engine, pairs.clean[i], pairs.segments[i]) for i in chosen]
    noise = pad_right(drawn)  # [batch, longest, d_model]
    return torch.nn.functional.pad(
        noise, (0, 0, 0, width - noise.shape[1])
    )  # [batch, pos, d_model]
