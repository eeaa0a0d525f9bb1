"""Indexing of results and inputs that hold rows: `rows[3]`, `rows[:4]`, `rows[mask]`."""

from collections.abc import Sequence
from typing import SupportsIndex, TypeAlias

import numpy as np
from torch import Tensor

Index: TypeAlias = SupportsIndex | slice | Sequence[int] | np.ndarray | Tensor


def row_numbers(index: Index, count: int, noun: str) -> list[int]:
    """Resolve an index into row numbers.

    Args:
        index: An integer, a slice, a boolean mask of length `count`, or a sequence of integers
            (list, array or tensor). Negative integers count from the end.
        count: The number of rows.
        noun: What a row is, in the singular, for error messages.

    Returns:
        The chosen row numbers, in the order of the index.

    Raises:
        IndexError: A row number is out of range, or a mask has another length.
        TypeError: The index is none of these.
    """
    if isinstance(index, slice):
        return list(range(count)[index])
    array = np.asarray(index)
    if array.dtype == bool and array.ndim == 1:
        if len(array) != count:
            raise IndexError(f"the mask has {len(array)} entries for {count} {noun}s")
        return [int(i) for i in np.flatnonzero(array)]
    if array.ndim == 0 and np.issubdtype(array.dtype, np.integer):
        numbers = [int(array)]
    elif array.ndim == 1 and (array.size == 0 or np.issubdtype(array.dtype, np.integer)):
        numbers = [int(i) for i in array]
    else:
        raise TypeError(
            f"cannot index {noun}s with {index!r}; use an integer, a slice, a boolean mask or a "
            "list of integers"
        )
    for number in numbers:
        if not -count <= number < count:
            raise IndexError(f"there is no {noun} {number}; they are numbered 0 to {count - 1}")
    return [number % count for number in numbers]
