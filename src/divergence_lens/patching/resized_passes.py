"""The staggered passes of cells that cover a unit, whose patched rows have a new length."""

from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens.patching.resized import RESIZING_SITES, ResizedRows
from divergence_lens.patching.staggered import OpenPass, PatchedRows, StaggeredPasses
from divergence_lens.patching.trace import PatchingRun


def exact_effects(
    run: PatchingRun,
    site: str,
    window: int,
    batch_rows: int,
    requested: Bool[Tensor, "layer batch col ..."] | None,
) -> Float[Tensor, "layer batch col ..."]:
    """Effects of one site by layer and cell (and head), see `StaggeredPasses.effects`."""
    staggered = StaggeredPasses(run, site, window, batch_rows)
    resized = run.chunk.resized
    if resized is None or site not in RESIZING_SITES:
        return staggered.effects(requested)
    unit = torch.zeros_like(run.chunk.missing)  # [batch, col]
    unit[resized.batch, resized.cell] = True
    if requested is None:
        requested = unit.new_ones(run.engine.n_layers, *unit.shape)
    whole = ResizedPasses(run, resized, site, window, batch_rows).effects(requested & unit)
    return torch.where(unit, whole, staggered.effects(requested & ~unit))


class ResizedPasses(StaggeredPasses):
    """The staggered passes of one chunk and one residual site, for cells that cover a unit."""

    def __init__(
        self, run: PatchingRun, resized: ResizedRows, site: str, window: int, batch_rows: int
    ) -> None:
        super().__init__(run, site, window, batch_rows)
        self.resized = resized

    @cached_property
    def new(self) -> list[Tensor]:
        """Per layer, the source run's state of the site, `[batch, source_pos, d_model]`."""
        return self.run.source.sites[self.site]

    @cached_property
    def _entry(self) -> Int64[Tensor, "batch col"]:
        """The entry of `resized` that holds each cell's row; 0 for cells without a unit."""
        entries = torch.zeros_like(self.chunk.missing, dtype=torch.int64)
        order = torch.arange(len(self.resized.batch), device=entries.device)
        entries[self.resized.batch, self.resized.cell] = order
        return entries

    def _starts(self, heads: list[int]) -> list[Float[Tensor, "slot batch source_pos d_model"]]:
        """Per layer, the source states from which the patched span continues."""
        if self.site != "resid_mid":
            return super()._starts(heads)
        run = self.engine.begin(self.chunk.source)
        starts = []
        for layer, mid in enumerate(self.new):

            def replace(_: Tensor, mid: Tensor = mid) -> Tensor:
                return mid

            # Only the MLP of the block matters: whatever attention adds is overwritten by `mid`.
            with self.engine.hooked([(layer, "resid_mid", replace)]):
                starts.append(self.engine.block(layer, mid, run)[None])
        return starts

    def _differing(self) -> Bool[Tensor, "slot layer batch col"]:
        """Cells whose patched row can differ from the base row, by layer."""
        resized = self.resized
        result = torch.zeros_like(self.chunk.missing).repeat(1, self.engine.n_layers, 1, 1)
        changed = resized.first < resized.length if self.engine.causal else True
        result[:, :, resized.batch, resized.cell] = changed
        if self.shift:  # after the last block, only the target position is read
            at_target = resized.origin.gather(1, resized.target[:, None])[:, 0] < 0  # [cells]
            result[:, -1, resized.batch, resized.cell] &= at_target
        return result

    def _changed(
        self, differing: Bool[Tensor, "slot layer batch col"]
    ) -> Bool[Tensor, "slot layer batch col"]:
        return differing.clone()

    def _first(
        self, row: Int64[Tensor, " rows"], column: Int64[Tensor, " rows"]
    ) -> Int64[Tensor, " rows"]:
        if not self.engine.causal:
            return torch.zeros_like(column)
        return self.resized.first[self._entry[row, column]]

    def _split(self, rows: PatchedRows) -> Iterator[PatchedRows]:
        if self.engine.causal:
            yield from super()._split(rows)
            return
        # Attention in both directions would read padding, so a pass has rows of one length.
        lengths = self.resized.length[self._entry[rows.batch, rows.column]]
        for length in lengths.unique():
            yield from super()._split(rows[(lengths == length).nonzero()[:, 0]])

    def _begin(self, rows: PatchedRows, first: int) -> OpenPass:
        chunk, past = self.chunk, self.run.base.past
        assert past is not None
        entry = self._entry[rows.batch, rows.column]
        stop = int(self.resized.length[entry].max())
        origin = self._origin(rows, first, stop - first)
        batch, patched = rows.batch[:, None], origin < 0
        tokens = torch.where(
            patched,
            chunk.source[batch, (-1 - origin).clamp(min=0)],
            chunk.base[batch, origin.clamp(min=0)],
        )  # [rows, pos]
        run = self.engine.begin(tokens, past.upto(first) if first else None)
        return OpenPass(rows, run, first, patched, self.resized.target[entry] - first)

    def _joining(
        self,
        layer: int,
        joining: slice,
        state: Float[Tensor, "slot batch source_pos d_model"] | None,
        opened: OpenPass,
    ) -> Float[Tensor, "some later_pos d_model"]:
        """States of both runs, in the order of the patched row."""
        assert state is not None
        rows, patched = opened.rows[joining], opened.patched[joining]
        origin, batch = self._origin(rows, opened.first, patched.shape[1]), rows.batch[:, None]
        if layer == 0 and self.site == "resid_pre":
            fresh = opened.run.resid[joining]  # what follows is embedded at its new position
        else:
            fresh = self.run.base.resid[layer][
                batch, origin.clamp(min=0)
            ]  # [joining, pos, d_model]
        return torch.where(patched[..., None], state[0][batch, (-1 - origin).clamp(min=0)], fresh)

    def _replacement(
        self, layer: int, rows: PatchedRows, first: int, width: int
    ) -> Float[Tensor, "rows pos d_model"]:
        origin = self._origin(rows, first, width)
        return self.new[layer][rows.batch[:, None], (-1 - origin).clamp(min=0)]

    def _origin(self, rows: PatchedRows, first: int, width: int) -> Int64[Tensor, "rows pos"]:
        entry = self._entry[rows.batch, rows.column]
        return self.resized.origin[entry, first : first + width]
