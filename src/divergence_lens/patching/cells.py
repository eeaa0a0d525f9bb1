"""The cells of a grid's last axis: positions, units, segments, or everything at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Int64

from divergence_lens.pairs import PAIR_SEGMENTS, Column, Pairs

Span: TypeAlias = Literal["position", "segment", "all"]
"""What one cell covers: a position (or a unit), all positions of a segment, or all positions."""

ALL = "all positions"


@dataclass(frozen=True)
class PairCells:
    """The cells of one pair, from left to right.

    Attributes:
        columns: The columns of the pair; a cell covers one or several.
        cell_of: For each column the number of its cell.
        labels: For each cell the text of its column, or the name of its segment.
        segments: For each cell the segment that it covers or lies in.
        differs: For each cell whether it covers a token that differs between the two rows.
        positions: For each cell its first clean position, and the length of the clean row; empty
            if cell p is position p, or if cells are not columns.
    """

    columns: tuple[Column, ...]
    cell_of: Int64[np.ndarray, " columns"]
    labels: tuple[str, ...]
    segments: tuple[str, ...]
    differs: tuple[bool, ...]
    positions: tuple[int, ...] = ()


def cells_of(pairs: Pairs, i: int, span: Span, *, units: bool) -> PairCells:
    """The cells of pair `i`.

    Args:
        pairs: The pairs.
        i: The pair.
        span: What one cell covers.
        units: Whether differing spans are units. An ablation changes clean states alone, so every
            clean position is a column.
    """
    differ = pairs.differs(i)
    positions: tuple[int, ...] = ()
    if units and pairs.units(i):
        columns = pairs.columns(i)
        labels = [column_label(pairs, i, column) for column in columns]
        # Segment and target of a unit are those of its last token.
        names = [pairs.segments[i][column.clean[-1]] for column in columns]
        differ = [any(differ[position] for position in column.clean) for column in columns]
        positions = (0, *(column.clean.stop for column in columns))
    else:
        columns = _one_to_one(len(pairs.clean[i]))
        labels, names = list(pairs.labels[i]), list(pairs.segments[i])
    if span == "position":
        cell_of = np.arange(len(columns))
        texts = (tuple(labels), tuple(names), tuple(differ))
        return PairCells(columns, cell_of, *texts, positions)
    groups = [ALL] if span == "all" else _in_order(names)
    cell_of = np.array([0 if span == "all" else groups.index(name) for name in names])
    differs = tuple(bool(np.array(differ)[cell_of == cell].any()) for cell in range(len(groups)))
    return PairCells(columns, cell_of, tuple(groups), tuple(groups), differs)


def column_label(pairs: Pairs, i: int, column: Column) -> str:
    """The text of a column: its token, or the tokens of both sides of a unit ("T|om → Lily")."""
    clean = [pairs.labels[i][position] for position in column.clean]
    if not column.is_unit:
        return clean[0]
    corrupted = [pairs.corrupted_labels[i][position] for position in column.corrupted]
    return f"{'|'.join(clean)} → {'|'.join(corrupted)}"


@lru_cache(maxsize=256)
def _one_to_one(length: int) -> tuple[Column, ...]:
    return tuple(Column(range(p, p + 1), range(p, p + 1)) for p in range(length))


def _in_order(names: Sequence[str]) -> list[str]:
    """The segments that occur, in the order of tables and figures."""
    order = {name: i for i, name in enumerate(PAIR_SEGMENTS)}
    return sorted(dict.fromkeys(names), key=lambda name: (order.get(name, len(order)), name))
