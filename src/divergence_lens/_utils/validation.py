"""Checks of arguments that several packages share."""

from collections.abc import Iterable, Mapping
from numbers import Number
from typing import Any

import numpy as np
from jaxtyping import Int64

# Predictions are stored as 32-bit integers; no vocabulary is as large.
_LAST_ID = 2**31 - 1


def refuse_one_string(value: object, name: str) -> None:
    """Refuse a string where a list of strings is expected; Python would iterate its letters.

    Raises:
        TypeError: `value` is a string.
    """
    if isinstance(value, str):
        raise TypeError(f"{name} is one string; pass a list: [{value!r}]")


def refuse_one_number(value: object, name: str) -> None:
    """Refuse a number where a list of numbers is expected.

    Raises:
        TypeError: `value` is a number.
    """
    if isinstance(value, Number):
        raise TypeError(f"{name} is one number; pass a list: [{value}]")


def token_ids(
    values: Any, name: str, *, first: int = 0, d_vocab: int | None = None
) -> Int64[np.ndarray, " ids"]:
    """Convert a flat sequence, array or tensor of token ids to an array.

    Args:
        values: The ids.
        name: Names the argument in messages, such as "the clean row of pair 3".
        first: The smallest allowed id; -1 where it means "none".
        d_vocab: Size of the vocabulary, if it is known.

    Raises:
        TypeError: The values are not a flat sequence, or one of them is not a whole number.
        ValueError: An id lies outside the allowed range.
    """
    if hasattr(values, "tolist"):
        values = values.tolist()  # also of a tensor on a GPU, or of a type that NumPy lacks
    if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping):
        raise TypeError(f"{name} is {values!r:.60}, not a flat list of token ids")
    values = list(values)
    last = _LAST_ID if d_vocab is None else d_vocab - 1
    allowed = f"token ids are whole numbers from {first} to {last}"
    try:
        array = np.asarray(values or np.zeros(0, np.int64))
    except ValueError:  # rows of unequal length
        array = np.asarray(None)
    # One vectorized test for nearly all input; otherwise look for the first invalid value.
    if (
        array.ndim == 1
        and array.dtype.kind in "iu"
        and not ((array < first) | (array > last)).any()
    ):
        return array.astype(np.int64)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} holds {value!r:.60}; {allowed}, in one flat list")
        if not first <= int(value) <= last:
            raise ValueError(f"{name} holds {int(value)}; {allowed}")
    return np.array([int(value) for value in values], dtype=np.int64)
