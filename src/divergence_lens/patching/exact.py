"""Exact causal mediation: put one state of one run into the other, and see what changes.

The textbook way runs the whole model once per layer and position. Most of that work is known
beforehand to change nothing: a patch of (layer l, position p) leaves the layers below l and the
positions before p as they were, and what stands after the target is never read. So the base run is
done once, with its residuals, keys and values kept, and only positions p to target are run again,
from the layer after the patch. For one p a single *staggered* pass serves all layers: the row of a
deeper layer joins when the pass reaches that layer.

Most sites come down to one mechanism. What happens in a block after its attention pattern is
settled happens at each position by itself, so a change of `resid_mid`, `attn_out`, `mlp_out`,
`block_out` or of one head's `q` or `z` at some positions changes the block's output at those
positions only. One run of the block over the whole row, with the site replaced everywhere at once,
gives the patched output of every position; these are the starting vectors of the staggered pass.
Keys and values reach later positions, so their rows enter at the block itself and are patched on
the way, and so are the further layers of a window.

Where attention goes in both directions, a patch reaches earlier positions too: then whole rows are
run, of equal length, and only the layers below the patch are saved.

The vocabulary follows Vig et al. (2020, arXiv 2004.12265); windows of layers follow Meng et al.
(2022, arXiv 2202.05262); the use for divergence tokens follows Schrodi et al. (2025, arXiv
2509.23886).
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens._utils.interrupts import convert_partial
from divergence_lens._utils.memory import halved
from divergence_lens.engine import Pass
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs
from divergence_lens.patching.corruption import Corruption
from divergence_lens.patching.effects import Direction, Effects
from divergence_lens.patching.metrics import Metric, finite
from divergence_lens.patching.request import (
    Case,
    Cells,
    Chunk,
    Question,
    Span,
    check,
    logits_at,
)
from divergence_lens.patching.runner import Long, answer

if TYPE_CHECKING:
    import pandas as pd

# Neighbouring positions share a pass while it stays this small: a call costs as much as the
# arithmetic of about so many tokens, and the positions in between are few beside it.
_SMALL_PASS = 1024

# Sites whose change at a position reaches later positions within the same block.
_REACHING = ("k", "v")


@torch.no_grad()
def causal_mediation(
    model: Model,
    pairs: Pairs,
    *,
    site: str = "resid_post",
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
) -> Effects:
    """The exact effect of patching each layer and position (and head), one at a time.

    With `direction="noising"` the corrupted run's state replaces the clean one at a single cell of
    the clean run; with `"denoising"` the other way round. Where the two teachers have other
    weights, each run is its own teacher's, and the run that is patched goes on under its own
    weights.

    Args:
        model: The model; teachers with deltas are applied to it. If it attends in both directions
            the same is computed more slowly; the target is the last token of a row there too.
        pairs: What to patch.
        site: One of `engine.SITES`: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`,
            `block_out` (all that a block adds), or per head `z`, `q`, `k`, `v`.
        direction: Which run is patched.
        metric: What is measured at the target position: `logit_difference` (answer minus foil),
            `probability_difference`, `log_probability` (of the answer), `kl` (of the clean run's
            distribution to the patched one's), or a function of `(logits [rows, d_vocab], pair
            indices [rows])` that returns `[rows]`.
        corruption: What makes the state that is put in: `counterfactual`, the pair's other run;
            `mean` of the clean runs of all pairs at the same place of the same segment; `zero`; or
            an `EmbeddingNoise`, whose noisy run then is the corrupted one (causal tracing). `mean`
            and `zero` are noising only, and the baselines stay those of the pair's two runs.
        span: What one cell covers: a `position`, all positions of a `segment` at once, or `all`
            positions at once. The last axis of the result then counts the row's segments.
        window: How many neighbouring layers are patched at once: row l covers layers l to
            l + window - 1, fewer at the top.
        cells: Only these cells: the table that `Effects.top` returns, or booleans in the shape of
            `Effects.values`. The others become NaN.
        batch_rows: At most so many patched rows run at once; also sets how many pairs are held in
            memory at a time. Rows that do not fit the device are run in halves.
        checkpoint_dir: A folder of this run's own, where the values of finished pairs are kept. The
            same call, made again after the run was stopped, goes on from there and gives the same
            bits. A metric of your own counts as the same if its name is, and what it gives for some
            logits.
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`: the processes that it
            knows share the pairs, and each returns the whole. All must make the same call.
        progress: Whether to show a progress bar.

    Returns:
        Effects with method `exact`. Cells before the two runs part are zero.

    Raises:
        Interrupted: If it was stopped; `partial` holds the effects of the pairs that were finished.
        ValueError: If the model lacks the site or is in training mode, a row does not fit the
            context or the vocabulary, an option is unknown or out of range, the metric returns
            another shape or gives NaN, or `cells` does not fit.
    """
    question = Question(
        pairs=pairs,
        sites=(site,),
        direction=direction,
        metric=metric,
        corruption=corruption,
        span=span,
    )
    engine = check(model, question, batch_rows=batch_rows)
    if not 1 <= window <= engine.n_layers:
        raise ValueError(
            f"window is {window}; it is a number of layers, 1 to {engine.n_layers} in this model"
        )
    heads = engine.site_heads(site)
    shape = (len(pairs), engine.n_layers, max(map(len, question.columns)))
    wanted = None if cells is None else _cell_mask(cells, (*shape, heads) if heads else shape, span)

    def work(case: Case) -> dict[str, Tensor]:
        patched = _Patched(case, site, window, batch_rows)
        return {site: patched.effects(_wanted(wanted, case.chunk))}

    with convert_partial(itemgetter(site)):
        return answer(
            model,
            question,
            work,
            long=Long(
                size=max(1, batch_rows // (engine.n_layers * max(heads, 1))),
                checkpoint_dir=checkpoint_dir,
                accelerator=accelerator,
                progress=progress,
            ),
            method="exact",
            window=window,
            cells="all" if wanted is None else hashlib.sha256(wanted.tobytes()).hexdigest(),
        )[site]


@dataclass(frozen=True)
class _Rows:
    """Patched rows to be run: one entry per row.

    Attributes:
        batch: Row of the chunk.
        column: Cell of that row that is patched.
        start: First position that the patch changes.
        layer: First layer that is patched.
        slot: Head, counted from the first of the group; 0 for sites without heads.
    """

    batch: Int64[Tensor, " rows"]
    column: Int64[Tensor, " rows"]
    start: Int64[Tensor, " rows"]
    layer: Int64[Tensor, " rows"]
    slot: Int64[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, index: slice | Int64[Tensor, " some"]) -> "_Rows":
        return _Rows(
            self.batch[index],
            self.column[index],
            self.start[index],
            self.layer[index],
            self.slot[index],
        )


class _Patched:
    """The staggered passes of one chunk."""

    def __init__(self, case: Case, site: str, window: int, batch_rows: int) -> None:
        self.case, self.site, self.window, self.batch_rows = case, site, window, batch_rows
        self.engine, self.chunk = case.engine, case.chunk
        self.heads = self.engine.site_heads(self.site)
        self.reaching = self.site in _REACHING
        # A row joins at the input of its layer, or of the next one if the patch is known by then.
        self.shift = 0 if self.reaching or self.site == "resid_pre" else 1

    @cached_property
    def new(self) -> list[Tensor]:
        """Per layer, what replaces the site, by base position."""
        return [self.case.new(self.site, layer) for layer in range(self.engine.n_layers)]

    def effects(
        self, wanted: Bool[Tensor, "layer batch col ..."] | None
    ) -> Float[Tensor, "layer batch col ..."]:
        """Patched minus base metric by layer, base cell (and head); NaN where missing."""
        layers, (batch, _) = self.engine.n_layers, self.chunk.base.shape
        missing = self.chunk.missing
        heads = max(self.heads, 1)
        group = max(1, min(heads, self.batch_rows // (layers * batch)))
        result = torch.zeros(heads, layers, *missing.shape, device=self.engine.device)
        if wanted is not None:
            wanted = wanted.movedim(-1, 0) if self.heads else wanted[None]
        differing = self._differing()
        for first in range(0, heads, group):
            several = list(range(first, min(first + group, heads)))
            changed = self._changed(differing[several])
            if wanted is not None:
                changed &= wanted[several]
            if not bool(changed.any()):
                continue
            starts = [] if self.reaching else self._starts(several)
            slot, layer, row, column = changed.nonzero(as_tuple=True)
            rows = _Rows(row, column, self._first(row, column), layer, slot)
            run = partial(self._metric, starts=starts, head=first)
            for part, metric in chain.from_iterable(
                halved(part, run) for part in self._passes(rows)
            ):
                effect = metric - self.case.base_metric[part.batch]
                result[part.slot + first, part.layer, part.batch, part.column] = effect
        missing = missing.expand_as(result)
        if wanted is not None:
            missing = missing | ~wanted
        result = result.masked_fill(missing, torch.nan)
        return result.movedim(0, -1) if self.heads else result[0]

    def _starts(self, heads: list[int]) -> list[Float[Tensor, "slot batch pos d_model"]]:
        """Per layer, the residual after the patch at each position (for each of the heads).

        For `resid_pre` it stands at the input of the layer, for the other sites at its output.
        """
        if self.site in ("resid_pre", "resid_post"):
            return [activation[None] for activation in self.new]
        run = self.engine.begin(self.chunk.base)
        return [
            torch.stack([self._replaced(layer, head, run) for head in heads])
            for layer in range(self.engine.n_layers)
        ]

    def _replaced(self, layer: int, head: int, run: Pass) -> Float[Tensor, "batch pos d_model"]:
        """The output of a block with the site replaced at every position that has a counterpart."""
        there = (self.chunk.counterpart >= 0)[..., None]
        new = self.new[layer]

        def replace(activation: Tensor) -> Tensor:
            if not self.heads:
                return torch.where(there, new, activation)
            changed = activation.clone()
            changed[:, :, head] = torch.where(there, new[:, :, head], activation[:, :, head])
            return changed

        with self.engine.hooked([(layer, self.site, replace)]):
            return self.engine.block(layer, self.case.base.resid[layer], run)

    def _differing(self) -> Bool[Tensor, "head layer batch pos"]:
        """Where the two runs have other states of the site, and a patch can matter."""
        old = self.case.base.sites[self.site]
        found = torch.stack([(new != own).any(-1) for new, own in zip(self.new, old, strict=True)])
        found = found.movedim(-1, 0) if self.heads else found[None]
        return found & self.chunk.differs

    def _changed(
        self, differing: Bool[Tensor, "slot layer batch pos"]
    ) -> Bool[Tensor, "slot layer batch col"]:
        """Which cells need a pass; all others have no effect, or are missing."""
        if self.shift:  # after the last block, only the target position is read
            positions = torch.arange(self.chunk.base.shape[1], device=differing.device)
            differing = differing.clone()
            differing[:, -1] &= positions == self.chunk.base_target[:, None]
        changed = self.chunk.any_of(differing).clone()
        for further in range(1, self.window):
            changed[:, :-further] |= self.chunk.any_of(differing[:, further:])
        return changed

    def _first(
        self, row: Int64[Tensor, " rows"], column: Int64[Tensor, " rows"]
    ) -> Int64[Tensor, " rows"]:
        """The first position that must be run again for each cell."""
        if not self.engine.causal:
            return torch.zeros_like(column)
        if self.chunk.members is None:
            return column
        patched = self.chunk.members & self.chunk.differs[:, None]
        return patched.int().argmax(-1)[row, column]

    def _members(self, rows: _Rows, first: int, stop: int) -> Bool[Tensor, "rows pos"]:
        """Which positions of a pass are patched in each row."""
        if self.chunk.members is None:
            positions = torch.arange(first, stop, device=rows.column.device)
            return positions == rows.column[:, None]
        patched = self.chunk.members[rows.batch, rows.column] & self.chunk.differs[rows.batch]
        return patched[:, first:stop]

    def _passes(self, rows: _Rows) -> Iterator[_Rows]:
        """Rows that run together: of like position, few enough, shallow layers first."""
        order = torch.argsort(rows.start * self.engine.n_layers + rows.layer, stable=True)
        rows = rows[order]
        positions, counts = torch.unique_consecutive(rows.start, return_counts=True)
        width = self.chunk.base.shape[1]
        first = end = 0
        start = 0
        for position, count in zip(positions.tolist(), counts.tolist(), strict=True):
            tokens = (end + count - first) * (width - start)
            if end > first and (tokens > _SMALL_PASS or end + count - first > self.batch_rows):
                yield from self._split(rows[first:end])
                first = end
            if first == end:
                start = position
            end += count
        if end > first:
            yield from self._split(rows[first:end])

    def _split(self, rows: _Rows) -> Iterator[_Rows]:
        rows = rows[torch.argsort(rows.layer, stable=True)]
        for first in range(0, len(rows), self.batch_rows):
            yield rows[first : first + self.batch_rows]

    def _metric(
        self, rows: _Rows, *, starts: list[Tensor], head: int
    ) -> tuple[_Rows, Float[Tensor, " rows"]]:
        """Rows, and the metric of each: one staggered pass. They come sorted by layer."""
        engine, chunk, base = self.engine, self.chunk, self.case.base
        assert base.past is not None
        first = int(rows.start.min())
        targets = chunk.base_target[rows.batch]
        stop = int(targets.max()) + 1
        # Only the number of positions matters to a pass, so that one row of tokens will do.
        run = engine.begin(chunk.base[:1, first:stop], base.past.upto(first) if first else None)
        patched = self._members(rows, first, stop)
        entries = (rows.layer + self.shift).tolist()
        running = 0
        done: list[Tensor] = []
        x = base.resid[0].new_empty(0, stop - first, engine.d_model)
        for layer in range(entries[0], engine.n_layers + 1):
            joined = running
            while joined < len(entries) and entries[joined] == layer:
                joined += 1
            if joined > running:
                new, where = rows[running:joined], patched[running:joined]
                fresh = base.resid[layer][new.batch, first:stop]
                if not self.reaching:
                    state = starts[layer - self.shift]
                    row, position = where.nonzero(as_tuple=True)
                    fresh[row, position] = state[new.slot[row], new.batch[row], position + first]
                x = torch.cat([x, fresh])
                running = joined
            if layer == engine.n_layers:
                break
            under_way = rows[:running]
            hooks = self._on_the_way(layer, under_way, patched, first, head)
            if layer == engine.n_layers - 1 and not hooks:
                at = (targets - first)[:running]
                done = [engine.last_block(x, run, at, rows=under_way.batch)]
                x = x[:0]
            else:
                with engine.hooked(hooks):
                    x = engine.block(layer, x, run, rows=under_way.batch)
        late = torch.arange(len(x), device=x.device)
        done.append(x[late, (targets - first)[len(rows) - len(x) :]])
        metric = self.case.measure(logits_at(engine, torch.cat(done)), rows.batch)
        return rows, finite(metric, chunk.indices[rows.batch], "a patched run")

    def _on_the_way(
        self, layer: int, rows: _Rows, patched: Bool[Tensor, "more pos"], first: int, head: int
    ) -> list[tuple[int, str, Callable[[Tensor], Tensor]]]:
        """The patch that rows under way still need in this layer, as hooks."""
        if not self.reaching and self.window == 1:
            return []
        begun = rows.layer <= layer if self.reaching else rows.layer < layer
        chosen = (begun & (rows.layer > layer - self.window)).nonzero()[:, 0]
        if not len(chosen):
            return []
        where = patched[chosen][..., None]
        new = self.new[layer][rows.batch[chosen], first : first + where.shape[1]]
        if self.heads:
            of = torch.arange(self.heads, device=where.device) == rows.slot[chosen, None] + head
            where = where[..., None] & of[:, None, :, None]

        def replace(activation: Tensor) -> Tensor:
            changed = activation.clone()
            changed[chosen] = torch.where(where, new, activation[chosen])
            return changed

        return [(layer, self.site, replace)]


def _wanted(mask: Cells | None, chunk: Chunk) -> Bool[Tensor, "layer batch col ..."] | None:
    """The mask of a chunk's pairs, moved from clean to base positions."""
    if mask is None:
        return None
    chosen = torch.from_numpy(mask[chunk.indices.cpu().numpy()]).to(chunk.base.device)
    if chunk.members is not None:
        return chosen[:, :, : chunk.members.shape[1]].movedim(0, 1)
    rows = torch.arange(len(chunk.indices), device=chosen.device)[:, None]
    by_base = chosen.movedim(1, -1)[rows, chunk.clean.clamp(min=0)].movedim(-1, 0)
    there = (chunk.clean >= 0)[None]
    return by_base & (there[..., None] if by_base.ndim == 4 else there)


def _cell_mask(cells: "pd.DataFrame | Cells", shape: tuple[int, ...], span: Span) -> Cells:
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
    if cells.attrs.get("span", span) != span:
        raise ValueError(
            f"cells is a table of effects with span={cells.attrs['span']!r}, and span is {span!r} "
            "here; the two must be the same"
        )
    index = tuple(cells[name].to_numpy(dtype=np.int64) for name in names)
    for name, column, size in zip(names, index, shape, strict=True):
        if len(column) and not 0 <= int(column.min()) <= int(column.max()) < size:
            raise ValueError(
                f"cells names {name} {int(column.max())}, but there are only 0 to {size - 1}"
            )
    mask = np.zeros(shape, dtype=bool)
    mask[index] = True
    return mask
