"""Exact causal mediation: put one state of one run into the other, and see what changes.

The textbook way runs the whole model once per layer and position. Most of that work is known
beforehand to change nothing: a patch of (layer l, position p) leaves the layers below l and the
positions before p as they were, and what stands after the target is never read. So the base run is
done once, with its residuals, keys and values kept, and only positions p to target are run again,
from the layer after the patch. For one p a single *staggered* pass serves all layers: the row of a
deeper layer joins when the pass reaches that layer.

Every site comes down to one mechanism. What happens in a block after its attention pattern is
settled happens at each position by itself, so a change of `resid_mid`, `attn_out`, `mlp_out` or of
one head's `z` at one position changes the block's output at that position only. One run of the
block over the whole row, with the site replaced everywhere at once, gives the patched output of
every position; each is then one starting vector of the staggered pass.

The vocabulary follows Vig et al. (2020, arXiv 2004.12265); the use for divergence tokens follows
Schrodi et al. (2025, arXiv 2509.23886).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from tqdm.auto import tqdm

from divergence_lens._patching import (
    Cells,
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
from divergence_lens.effects import Direction, Effects
from divergence_lens.engine import Engine, Pass
from divergence_lens.models import Model, provenance
from divergence_lens.pairs import Pairs

if TYPE_CHECKING:
    import pandas as pd

# Neighbouring positions share a pass while it stays this small: a call costs as much as the
# arithmetic of about so many tokens, and the positions in between are few beside it.
_SMALL_PASS = 1024


@torch.no_grad()
def causal_mediation(
    model: Model,
    pairs: Pairs,
    *,
    site: str = "resid_post",
    direction: Direction = "noising",
    metric: Metric = "logit_difference",
    cells: "pd.DataFrame | Cells | None" = None,
    batch_rows: int = 128,
    progress: bool = False,
) -> Effects:
    """The exact effect of patching each layer and position (and head), one at a time.

    With `direction="noising"` the corrupted run's state replaces the clean one at a single cell of
    the clean run; with `"denoising"` the other way round. Where the two teachers have other
    weights, each run is its own teacher's, and the run that is patched goes on under its own
    weights.

    Args:
        model: The model; teachers with deltas are applied to it.
        pairs: What to patch.
        site: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, or `z` per head.
        direction: Which run is patched.
        metric: What is measured at the target position: `logit_difference` (answer minus foil),
            `probability_difference`, `log_probability` (of the answer), `kl` (of the clean run's
            distribution to the patched one's), or a function of `(logits [rows, d_vocab], pair
            indices [rows])` that returns `[rows]`.
        cells: Only these cells: the table that `Effects.top` returns, or booleans in the shape of
            `Effects.values`. The others become NaN.
        batch_rows: At most so many patched rows run at once; also sets how many pairs are held in
            memory at a time.
        progress: Whether to show a progress bar.

    Returns:
        Effects with method `exact`. Cells before the two runs part are zero.

    Raises:
        ValueError: If the model lacks the site or is in training mode, a row does not fit the
            context or the vocabulary, the metric is unknown, returns another shape or gives NaN,
            or `cells` does not fit.
    """
    engine = check(
        model, pairs, site=site, direction=direction, metric=metric, batch_rows=batch_rows
    )
    values = empty_values(pairs, engine, site)
    wanted = None if cells is None else _cell_mask(cells, values.shape)
    base_metric = np.zeros(len(pairs), dtype=np.float32)
    source_metric = np.zeros(len(pairs), dtype=np.float32)
    heads = engine.n_heads if site == "z" else 1
    size = max(1, batch_rows // (engine.n_layers * heads))
    bar = tqdm(total=len(pairs), desc=f"exact {site}", unit="pair", disable=not progress)
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
                patched = _Patched(base_engine, chunk, base, source, site, measure, batch_rows)
                found = patched.effects(of_base, _wanted(wanted, chunk))
            store(values, chunk, found)
            bar.update(len(chosen))
    noising = direction == "noising"
    return Effects(
        values=values,
        site=site,
        method="exact",
        direction=direction,
        metric=metric_name(metric),
        clean_metric=base_metric if noising else source_metric,
        corrupted_metric=source_metric if noising else base_metric,
        segments=pairs.segments,
        labels=pairs.labels,
        header=provenance(model, site=site, direction=direction, metric=metric_name(metric)),
    )


@dataclass(frozen=True)
class _Rows:
    """Patched rows to be run: one entry per row.

    Attributes:
        batch: Row of the chunk.
        position: Base position that is patched.
        entry: Layer at whose input the row starts; `n_layers` for the final norm.
        slot: Head, counted from the first of the group; 0 for other sites.
    """

    batch: Int64[Tensor, " rows"]
    position: Int64[Tensor, " rows"]
    entry: Int64[Tensor, " rows"]
    slot: Int64[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.batch)

    def part(self, index: slice | Int64[Tensor, " some"]) -> "_Rows":
        return _Rows(self.batch[index], self.position[index], self.entry[index], self.slot[index])


@dataclass(frozen=True)
class _Patched:
    """The staggered passes of one chunk."""

    engine: Engine
    chunk: Chunk
    base: Trace
    source: Trace
    site: str
    measure: MetricFunction
    batch_rows: int

    def effects(
        self,
        base_metric: Float[Tensor, " batch"],
        wanted: Bool[Tensor, "layer batch pos ..."] | None,
    ) -> Float[Tensor, "layer batch pos ..."]:
        """Patched minus base metric by layer, base position (and head); NaN where missing."""
        layers, (batch, width) = self.engine.n_layers, self.chunk.base.shape
        heads = self.engine.n_heads if self.site == "z" else 1
        group = max(1, min(heads, self.batch_rows // (layers * batch)))
        result = torch.zeros(heads, layers, batch, width, device=self.engine.device)
        if wanted is not None:
            wanted = wanted.movedim(-1, 0) if self.site == "z" else wanted[None]
        for first in range(0, heads, group):
            several = list(range(first, min(first + group, heads)))
            starts = self._starts(several)
            changed = self._changed(starts)
            if wanted is not None:
                changed &= wanted[several]
            shift = 0 if self.site == "resid_pre" else 1
            slot, layer, row, position = changed.nonzero(as_tuple=True)
            rows = _Rows(row, position, layer + shift, slot)
            for part in self._passes(rows):
                metric = self._run(part, starts) - base_metric[part.batch]
                result[part.slot + first, part.entry - shift, part.batch, part.position] = metric
        missing = (self.chunk.counterpart < 0).expand_as(result)
        if wanted is not None:
            missing = missing | ~wanted
        result.masked_fill_(missing, torch.nan)
        return result.movedim(0, -1) if self.site == "z" else result[0]

    def _starts(self, heads: list[int]) -> list[Float[Tensor, "slot batch pos d_model"]]:
        """Per layer, the residual after the patch at each position (for each of the heads).

        For `resid_pre` it stands at the input of the layer, for the other sites at its output.
        """
        if self.site in ("resid_pre", "resid_post"):
            return [self.chunk.aligned(activation)[None] for activation in self.source.sites]
        run = self.engine.begin(self.chunk.base)
        return [
            torch.stack([self._replaced(layer, head, run) for head in heads])
            for layer in range(self.engine.n_layers)
        ]

    def _replaced(self, layer: int, head: int, run: Pass) -> Float[Tensor, "batch pos d_model"]:
        """The output of a block with the site replaced at every position that has a counterpart."""
        there = (self.chunk.counterpart >= 0)[..., None]
        new = self.chunk.aligned(self.source.sites[layer])

        def replace(activation: Tensor) -> Tensor:
            if self.site != "z":
                return torch.where(there, new, activation)
            changed = activation.clone()
            changed[:, :, head] = torch.where(there, new[:, :, head], activation[:, :, head])
            return changed

        with self.engine.hooked([(layer, self.site, replace)]):
            return self.engine.block(layer, self.base.resid[layer], run)

    def _changed(self, starts: list[Tensor]) -> Bool[Tensor, "slot layer batch pos"]:
        """Which cells need a pass; all others have no effect, or are missing."""
        shift = 0 if self.site == "resid_pre" else 1
        before = self.base.resid[shift : shift + len(starts)]
        changed = torch.stack(
            [(after != resid).any(-1) for after, resid in zip(starts, before, strict=True)], dim=1
        )
        changed &= self.chunk.differs
        if shift:  # after the last block, only the target position is read
            positions = torch.arange(self.chunk.base.shape[1], device=changed.device)
            changed[:, -1] &= positions == self.chunk.base_target[:, None]
        return changed

    def _passes(self, rows: _Rows) -> Iterator[_Rows]:
        """Rows that run together: of like position, few enough, shallow layers first."""
        order = torch.argsort(rows.position * (self.engine.n_layers + 1) + rows.entry, stable=True)
        rows = rows.part(order)
        positions, counts = torch.unique_consecutive(rows.position, return_counts=True)
        width = self.chunk.base.shape[1]
        first = end = 0
        start = 0
        for position, count in zip(positions.tolist(), counts.tolist(), strict=True):
            tokens = (end + count - first) * (width - start)
            if end > first and (tokens > _SMALL_PASS or end + count - first > self.batch_rows):
                yield from self._split(rows.part(slice(first, end)))
                first = end
            if first == end:
                start = position
            end += count
        if end > first:
            yield from self._split(rows.part(slice(first, end)))

    def _split(self, rows: _Rows) -> Iterator[_Rows]:
        rows = rows.part(torch.argsort(rows.entry, stable=True))
        for first in range(0, len(rows), self.batch_rows):
            yield rows.part(slice(first, first + self.batch_rows))

    def _run(self, rows: _Rows, starts: list[Tensor]) -> Float[Tensor, " rows"]:
        """The metric of each row: one staggered pass. Rows come sorted by entry."""
        engine, chunk, past = self.engine, self.chunk, self.base.past
        assert past is not None
        first = int(rows.position.min())
        targets = chunk.base_target[rows.batch]
        stop = int(targets.max()) + 1
        # Only the number of positions matters to a pass, so that one row of tokens will do.
        run = engine.begin(chunk.base[:1, first:stop], past.upto(first) if first else None)
        entries = rows.entry.tolist()
        shift = 0 if self.site == "resid_pre" else 1
        running = 0
        x = self.base.resid[0].new_empty(0, stop - first, engine.d_model)
        for layer in range(entries[0], engine.n_layers + 1):
            joined = running
            while joined < len(entries) and entries[joined] == layer:
                joined += 1
            if joined > running:
                new = rows.part(slice(running, joined))
                fresh = self.base.resid[layer][new.batch, first:stop]
                index = torch.arange(len(new), device=fresh.device)
                vectors = starts[layer - shift][new.slot, new.batch, new.position]
                fresh[index, new.position - first] = vectors
                x = torch.cat([x, fresh])
                running = joined
            if layer < engine.n_layers:
                x = engine.block(layer, x, run, rows=rows.batch[:running])
        return self.measure(target_logits(engine, x, targets - first), rows.batch)


def _wanted(mask: Cells | None, chunk: Chunk) -> Bool[Tensor, "layer batch pos ..."] | None:
    """The mask of a chunk's pairs, moved from clean to base positions."""
    if mask is None:
        return None
    chosen = torch.from_numpy(mask[chunk.indices.cpu().numpy()]).to(chunk.base.device)
    rows = torch.arange(len(chunk.indices), device=chosen.device)[:, None]
    by_base = chosen.movedim(1, -1)[rows, chunk.clean.clamp(min=0)].movedim(-1, 0)
    there = (chunk.clean >= 0)[None]
    return by_base & (there[..., None] if by_base.ndim == 4 else there)


def _cell_mask(cells: "pd.DataFrame | Cells", shape: tuple[int, ...]) -> Cells:
    if isinstance(cells, np.ndarray):
        if cells.shape != shape or cells.dtype != bool:
            raise ValueError(
                f"cells is {cells.dtype} of shape {list(cells.shape)}; it must be bool of shape "
                f"{list(shape)}, or a table as Effects.top returns it"
            )
        return cells
    names = ["pair", "layer", "position", *(["head"] if len(shape) == 4 else [])]
    absent = [name for name in names if name not in cells]
    if absent:
        raise ValueError(f"cells lacks the columns {absent}; it needs {names}")
    index = tuple(cells[name].to_numpy(dtype=np.int64) for name in names)
    for name, column, size in zip(names, index, shape, strict=True):
        if len(column) and not 0 <= int(column.min()) <= int(column.max()) < size:
            raise ValueError(
                f"cells names {name} {int(column.max())}, but there are only 0 to {size - 1}"
            )
    mask = np.zeros(shape, dtype=bool)
    mask[index] = True
    return mask
