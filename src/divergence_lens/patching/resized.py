"""Patched rows of a new length: the rows of cells that cover a unit.

Patching a unit replaces its span of the base run by the source run's span, which has another number
of tokens. The patched row is assembled from both runs: each of its positions holds the state of
one base or one source position, in the order of the text. From the patched layer up it is
recomputed at its new length:

- The positions that blocks see (rotary angles, ALiBi distances, masks) are those in the new row.
- States that follow the unit are the base run's, also where learned position embeddings went into
  them at their old positions. Only at the input of block 0 (`resid_pre` of layer 0) are they
  embedded anew, at their new positions: there the patched row is the row of the patched tokens.

If every column is patched, the row is the source run's, at every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from divergence_lens.patching.cells import PairCells
from divergence_lens.patching.readings import Readings

RESIZING_SITES = ("resid_pre", "resid_mid", "resid_post")
"""Sites whose units are patched as whole spans: the residual stream, a position's entire state."""


@dataclass(frozen=True)
class ResizedRows:
    """The patched rows of the cells of a chunk that cover a unit, one entry per cell.

    Attributes:
        batch: Row of the chunk.
        cell: The cell.
        origin: For each position of the patched row, the base position p whose state it holds as p,
            or the source position q as -1 - q. Padded with 0.
        target: Target position of the patched row.
        length: Length of the patched row, with the answer that continues it after its target.
        first: The first position at which the patched row can differ from the base row; its length
            if there is none.
    """

    batch: Int64[Tensor, " cells"]
    cell: Int64[Tensor, " cells"]
    origin: Int64[Tensor, "cells pos"]
    target: Int64[Tensor, " cells"]
    length: Int64[Tensor, " cells"]
    first: Int64[Tensor, " cells"]

    @property
    def from_source(self) -> Bool[Tensor, "cells pos"]:
        """Positions that hold a state of the source run."""
        return self.origin < 0


def resized_rows(
    cells: Sequence[PairCells],
    start: Sequence[int],
    *,
    readings: Readings | None,
    noising: bool,
    device: torch.device,
) -> ResizedRows | None:
    """The resized rows of a chunk, or None if no cell covers a unit.

    Args:
        cells: The cells of each pair of the chunk.
        start: For each pair, the first position at which its two runs can differ.
        readings: The tokens that continue the rows, if answers or foils have several.
        noising: Whether the base is the clean run.
        device: Where the result is stored.
    """
    batch, cell, origins, targets, firsts = [], [], [], [], []
    for row, (own, begin) in enumerate(zip(cells, start, strict=True)):
        for number in _cells_with_units(own):
            origin = patched_origin(own, number, noising=noising)
            targets.append(len(origin) - 1)
            if readings is not None:  # the base run's answer follows
                base_end = (own.columns[-1].clean if noising else own.columns[-1].corrupted).stop
                more = np.arange(len(readings.continuations[row]))
                origin = np.concatenate([origin, base_end + more])
            positions = np.arange(len(origin))
            # Before `start` the two runs agree, so a source state at its own position is no change.
            agrees = (origin == positions) | ((origin == -1 - positions) & (positions < begin))
            batch.append(row)
            cell.append(number)
            origins.append(torch.from_numpy(origin))
            firsts.append(len(origin) if agrees.all() else int(np.argmin(agrees)))
    if not origins:
        return None
    return ResizedRows(
        batch=torch.tensor(batch, device=device),
        cell=torch.tensor(cell, device=device),
        origin=torch.nn.utils.rnn.pad_sequence(origins, batch_first=True).to(device),
        target=torch.tensor(targets, device=device),
        length=torch.tensor([len(origin) for origin in origins], device=device),
        first=torch.tensor(firsts, device=device),
    )


def check_lengths(i: int, cells: PairCells, n_ctx: int, *, noising: bool, answer: int) -> None:
    """Refuse a pair with a patched row that the model's context does not hold.

    `answer` is the number of tokens that continue the row after its target position.

    Raises:
        ValueError: Names the cell and the length of its row.
    """
    for cell in _cells_with_units(cells):
        length = len(patched_origin(cells, cell, noising=noising)) + answer
        if length > n_ctx:
            raise ValueError(
                f"patching {cells.labels[cell]!r} alone gives a row of {length} tokens from pair "
                f"{i}, but the model's context holds {n_ctx}; shorten its prompts"
            )


def _cells_with_units(cells: PairCells) -> list[int]:
    units = [column.is_unit for column in cells.columns]
    numbers: list[int] = np.unique(cells.cell_of[units]).tolist()
    return numbers


def patched_origin(cells: PairCells, cell: int, *, noising: bool) -> Int64[np.ndarray, " pos"]:
    """List the origin of each state of the row with one patched cell, see `ResizedRows.origin`."""
    parts = []
    for number, column in zip(cells.cell_of, cells.columns, strict=True):
        base, source = column.clean, column.corrupted
        if not noising:
            base, source = source, base
        parts.append(-1 - np.array(source) if number == cell else np.array(base))
    return np.concatenate(parts)
