"""Where patches are computed exactly: the staggered passes.

Running the whole model once per layer and position repeats work: a patch of (layer l, position p)
changes nothing below layer l or before position p, and nothing after the target matters. The
algorithm for one chunk of pairs:

1. The base run is done once; its residuals, keys and values are stored (`trace.traced_pass`).
2. One run of each block over the whole row, with the site (or one head of it) replaced at every
   position at once, gives the residual after the patch at each position
   (`StaggeredPasses._block_with_site_replaced`). This works because everything in a block
   after its attention pattern happens at each position separately: a change of `resid_mid`,
   `attn_out`, `mlp_out`, `block_out` or of one head's `q`, `pattern` or `z` at some positions
   changes the block's output at those positions only.
3. For a fixed position p, one *staggered* pass over positions p to target covers all layers: it
   starts at the lowest patched layer, and the row of a deeper layer joins when the pass reaches
   that layer (`StaggeredPasses._metric`). If the answer has several tokens, they continue the
   row, and the pass extends over them (see `readings`).

Keys and values reach later positions, so their rows join at the input of the patched block and are
patched by a hook inside it (`_block_hooks`), as are the further layers of a window. If attention
goes in both directions, a patch also reaches earlier positions: whole rows of equal length are run
then, and only the layers below the patch are skipped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens._utils.memory import halved
from divergence_lens.engine import Pass
from divergence_lens.patching.metrics import finite
from divergence_lens.patching.request import Cells
from divergence_lens.patching.trace import Chunk, PatchingRun, logits_at, states_at

# Neighboring positions share a pass of up to this many tokens: the overhead of a call is about the
# arithmetic of 1024 tokens, and the positions added by sharing are few compared with that.
_SMALL_PASS = 1024

# Sites whose change at a position reaches later positions within the same block.
_REACHING = ("k", "v")


@dataclass(frozen=True)
class PatchedRows:
    """Patched rows, one entry per row.

    Attributes:
        batch: Row of the chunk.
        column: The cell that is patched.
        start: The first position that the patch changes.
        layer: The first layer that is patched.
        slot: Head, counted from the first of the group; 0 for sites without heads.
    """

    batch: Int64[Tensor, " rows"]
    column: Int64[Tensor, " rows"]
    start: Int64[Tensor, " rows"]
    layer: Int64[Tensor, " rows"]
    slot: Int64[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, index: slice | Int64[Tensor, " some"]) -> "PatchedRows":
        return PatchedRows(
            self.batch[index],
            self.column[index],
            self.start[index],
            self.layer[index],
            self.slot[index],
        )


@dataclass(frozen=True)
class OpenPass:
    """A pass over patched rows, before its first block.

    Attributes:
        rows: The rows, shallow layers first.
        run: The pass.
        first: Its first position; `patched` and `targets` count from there.
        patched: The patched positions of each row.
        targets: The target position of each row.
    """

    rows: PatchedRows
    run: Pass
    first: int
    patched: Bool[Tensor, "rows pos"]
    targets: Int64[Tensor, " rows"]


class StaggeredPasses:
    """The staggered passes of one chunk and one site."""

    def __init__(self, run: PatchingRun, site: str, window: int, batch_rows: int) -> None:
        self.run, self.site = run, site
        self.window, self.batch_rows = window, batch_rows
        self.engine, self.chunk = run.engine, run.chunk
        self.heads = self.engine.site_heads(self.site)
        self.reaching = self.site in _REACHING
        # A row joins at the input of its layer, or of the next one if its output is known.
        self.shift = 0 if self.reaching or self.site == "resid_pre" else 1

    @cached_property
    def new(self) -> list[Tensor]:
        """Per layer, the patched-in state of the site, `[batch, pos, ...]`, by base position."""
        return [self.run.new(self.site, layer) for layer in range(self.engine.n_layers)]

    def effects(
        self, requested: Bool[Tensor, "layer batch col ..."] | None
    ) -> Float[Tensor, "layer batch col ..."]:
        """Patched minus base metric by layer, base cell (and head); NaN where missing."""
        layers, (batch, _) = self.engine.n_layers, self.chunk.base.shape
        missing = self.chunk.missing
        heads = max(self.heads, 1)
        group = max(1, min(heads, self.batch_rows // (layers * batch)))
        # [head, layer, batch, col]; one head where the site has none
        result = torch.zeros(heads, layers, *missing.shape, device=self.engine.device)
        if requested is not None:
            requested = requested.movedim(-1, 0) if self.heads else requested[None]
        differing = self._differing()  # [head, layer, batch, pos]
        for first in range(0, heads, group):
            head_group = list(range(first, min(first + group, heads)))
            changed = self._changed(differing[head_group])  # [slot, layer, batch, col]
            if requested is not None:
                changed &= requested[head_group]
            if not bool(changed.any()):
                continue
            starts = [] if self.reaching else self._starts(head_group)
            slot, layer, row, column = changed.nonzero(as_tuple=True)
            rows = PatchedRows(row, column, self._first(row, column), layer, slot)
            metric_of = partial(self._metric, starts=starts, head=first)
            for part, metric in chain.from_iterable(
                halved(part, metric_of) for part in self._passes(rows)
            ):
                effect = metric - self.run.base_metric[part.batch]
                result[part.slot + first, part.layer, part.batch, part.column] = effect
        missing = missing.expand_as(result)
        if requested is not None:
            missing = missing | ~requested
        result = result.masked_fill(missing, torch.nan)
        return result.movedim(0, -1) if self.heads else result[0]  # [layer, batch, col, (head)]

    def _starts(self, heads: list[int]) -> list[Float[Tensor, "slot batch pos d_model"]]:
        """Per layer, the residual after the patch at each position (for each of the heads).

        For `resid_pre` it is the input of the layer, for the other sites its output.
        """
        if self.site in ("resid_pre", "resid_post"):
            return [activation[None] for activation in self.new]  # [1, batch, pos, d_model]
        run = self.engine.begin(self.chunk.base)
        return [
            torch.stack([self._block_with_site_replaced(layer, head, run) for head in heads])
            for layer in range(self.engine.n_layers)
        ]

    def _block_with_site_replaced(
        self, layer: int, head: int, run: Pass
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run a block with its site (of one head) replaced at every position with a counterpart."""
        present = (self.chunk.counterpart >= 0)[..., None]  # [batch, pos, 1]
        new = self.new[layer]

        def replace(activation: Tensor) -> Tensor:
            if not self.heads:
                return torch.where(present, new, activation)
            changed = activation.clone()  # [batch, pos, head, d_head]
            changed[:, :, head] = torch.where(present, new[:, :, head], activation[:, :, head])
            return changed

        with self.engine.hooked([(layer, self.site, replace)]):
            return self.engine.block(layer, self.run.base.resid[layer], run)

    def _differing(self) -> Bool[Tensor, "head layer batch pos"]:
        """Positions at which the site differs between the two runs, and a patch can matter."""
        old = self.run.base.sites[self.site]
        differs = torch.stack(
            [(new != own).any(-1) for new, own in zip(self.new, old, strict=True)]
        )  # [layer, batch, pos] or [layer, batch, pos, head]
        differs = differs.movedim(-1, 0) if self.heads else differs[None]
        return differs & self.chunk.differs

    def _changed(
        self, differing: Bool[Tensor, "slot layer batch pos"]
    ) -> Bool[Tensor, "slot layer batch col"]:
        """Cells that need a pass; all others have no effect or are missing."""
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
        """The first position that must be recomputed for each cell."""
        if not self.engine.causal:
            return torch.zeros_like(column)
        if self.chunk.members is None:
            return column
        patched = self.chunk.members & self.chunk.differs[:, None]  # [batch, col, pos]
        return patched.int().argmax(-1)[row, column]

    def _members(self, rows: PatchedRows, first: int, stop: int) -> Bool[Tensor, "rows pos"]:
        """The patched positions of each row of a pass."""
        if self.chunk.members is None:
            positions = torch.arange(first, stop, device=rows.column.device)
            return positions == rows.column[:, None]
        patched = self.chunk.members[rows.batch, rows.column] & self.chunk.differs[rows.batch]
        return patched[:, first:stop]  # [row, later_pos]

    def _passes(self, rows: PatchedRows) -> Iterator[PatchedRows]:
        """Divide rows into passes of similar positions, shallow layers first."""
        # One sort key for both: by first position, then by layer.
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

    def _split(self, rows: PatchedRows) -> Iterator[PatchedRows]:
        """Sort the rows of a pass by layer, and cut them to `batch_rows`."""
        rows = rows[torch.argsort(rows.layer, stable=True)]
        for first in range(0, len(rows), self.batch_rows):
            yield rows[first : first + self.batch_rows]

    def _metric(
        self, rows: PatchedRows, *, starts: list[Tensor], head: int
    ) -> tuple[PatchedRows, Float[Tensor, " rows"]]:
        """Run one staggered pass over rows sorted by layer; return them with their metrics."""
        engine, base, readings = self.engine, self.run.base, self.chunk.readings
        first = int(rows.start.min())
        opened = self._begin(rows, first)
        run, patched, targets = opened.run, opened.patched, opened.targets
        entries = (rows.layer + self.shift).tolist()
        running = 0
        done: list[Tensor] = []
        x = base.resid[0].new_empty(0, patched.shape[1], engine.d_model)  # [running, pos, d_model]
        for layer in range(entries[0], engine.n_layers + 1):
            joined = running
            while joined < len(entries) and entries[joined] == layer:
                joined += 1
            if joined > running:
                joining = slice(running, joined)
                state = starts[layer - self.shift] if starts else None
                x = torch.cat([x, self._joining(layer, joining, state, opened)])  # [more, pos, d]
                running = joined
            if layer == engine.n_layers:
                break
            active = rows[:running]
            hooks = self._block_hooks(layer, active, patched, first, head)
            if layer == engine.n_layers - 1 and not hooks and readings is None:
                at = targets[:running]  # only the target position is read
                done = [engine.last_block(x, run, at, rows=active.batch)]
                x = x[:0]
            else:
                with engine.hooked(hooks):
                    x = engine.block(layer, x, run, rows=active.batch)
        # Rows that joined after the last block are read here (and all rows of several positions).
        late = len(rows) - len(x)
        done.append(states_at(x, targets[late:], rows.batch[late:], readings))
        metric = self.run.measure(logits_at(engine, torch.cat(done)), rows.batch)
        return rows, finite(metric, self.chunk.indices[rows.batch], "a patched run")

    def _begin(self, rows: PatchedRows, first: int) -> OpenPass:
        """Begin the pass over some rows, from position `first` on."""
        past = self.run.base.past
        assert past is not None
        targets = self.chunk.base_target[rows.batch]
        stop = self.chunk.base.shape[1]
        if self.engine.causal:  # nothing after the last position that is read reaches it
            stop = int(self._ends(rows, targets).max()) + 1
        # A pass needs the number of positions, not the tokens, so one row is enough.
        run = self.engine.begin(
            self.chunk.base[:1, first:stop], past.upto(first) if first else None
        )
        return OpenPass(rows, run, first, self._members(rows, first, stop), targets - first)

    def _ends(self, rows: PatchedRows, targets: Int64[Tensor, " rows"]) -> Int64[Tensor, " rows"]:
        """The last position of each row that is read."""
        readings = self.chunk.readings
        # After the target, only the positions of an answer of several tokens are read.
        return targets if readings is None else targets + readings.count[rows.batch] - 1

    def _joining(
        self,
        layer: int,
        joining: slice,
        state: Float[Tensor, "slot batch pos d_model"] | None,
        opened: OpenPass,
    ) -> Float[Tensor, "some later_pos d_model"]:
        """The base residual, overwritten by the patched state at the patched positions."""
        new, where, first = opened.rows[joining], opened.patched[joining], opened.first
        fresh = self.run.base.resid[layer][new.batch, first : first + where.shape[1]]
        if state is not None:
            row, position = where.nonzero(as_tuple=True)
            # Positions of `state` count from the start of the row, those of `fresh` from `first`.
            fresh[row, position] = state[new.slot[row], new.batch[row], position + first]
        return fresh

    def _replacement(
        self, layer: int, rows: PatchedRows, first: int, width: int
    ) -> Float[Tensor, "rows pos ..."]:
        """The patched-in state of a layer's site for each row, at positions from `first` on."""
        return self.new[layer][rows.batch, first : first + width]

    def _block_hooks(
        self,
        layer: int,
        rows: PatchedRows,
        patched: Bool[Tensor, "more pos"],
        first: int,
        head: int,
    ) -> list[tuple[int, str, Callable[[Tensor], Tensor]]]:
        """Hooks that patch the rows whose site is replaced inside this block."""
        if not self.reaching and self.window == 1:
            return []
        begun = rows.layer <= layer if self.reaching else rows.layer < layer
        chosen = (begun & (rows.layer > layer - self.window)).nonzero()[:, 0]
        if not len(chosen):
            return []
        where = patched[chosen][..., None]  # [chosen, pos, 1]
        new = self._replacement(layer, rows[chosen], first, where.shape[1])
        if self.heads:
            heads = torch.arange(self.heads, device=where.device)
            is_head = heads == rows.slot[chosen, None] + head  # [chosen, head]
            where = where[..., None] & is_head[:, None, :, None]  # [chosen, pos, head, 1]

        def replace(activation: Tensor) -> Tensor:
            changed, old = activation.clone(), activation[chosen]
            # The keys of a pattern end with the pass, which may stop before the end of the rows.
            changed[chosen] = torch.where(where, new[..., : old.shape[-1]], old)
            return changed

        return [(layer, self.site, replace)]


def requested_cells(mask: Cells | None, chunk: Chunk) -> Bool[Tensor, "layer batch col ..."] | None:
    """Select the mask of a chunk's pairs."""
    if mask is None:
        return None
    chosen = torch.from_numpy(mask[chunk.indices.cpu().numpy()]).to(chunk.base.device)
    chosen = chosen[:, :, : chunk.missing.shape[1]].movedim(0, 1)  # [layer, batch, col, ...]
    # Positions after the target, which continue a row with its answer, are not cells of the mask.
    extra = chunk.missing.shape[1] - chosen.shape[2]
    if not extra:
        return chosen
    return torch.cat([chosen, chosen.new_zeros(*chosen.shape[:2], extra, *chosen.shape[3:])], 2)
