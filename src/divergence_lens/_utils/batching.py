"""Batches of rows of unequal length, right padding, and shared prefixes.

Right padding needs no attention mask: under causal attention no position reads the padding after
it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor


def length_batches(lengths: Int64[np.ndarray, " rows"], budget: int) -> list[np.ndarray]:
    """Divide row numbers into batches, longest rows first.

    The first batch needs the most memory, so a budget that is too large fails at once.

    Args:
        lengths: Tokens of each row.
        budget: Most padded tokens of a batch. A longer row is a batch by itself.
    """
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def ascending_batches(
    lengths: Int64[np.ndarray, " rows"], budget: int, *, spread: int | None = None
) -> Iterator[np.ndarray]:
    """Divide row numbers into batches, shortest rows first.

    Args:
        lengths: Tokens of each row.
        budget: Most padded tokens of a batch. A longer row is a batch by itself.
        spread: Largest difference between the lengths of one batch; None for any.
    """
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        if end < len(order):
            longest = int(lengths[order[end]])
            fits = (end + 1 - start) * longest <= budget
            alike = spread is None or longest - int(lengths[order[start]]) <= spread
            if fits and alike:
                continue
        yield order[start:end]
        start = end


def balanced_batches(
    lengths: Int64[np.ndarray, " rows"], budget: int, *, spread: int | None = None
) -> list[np.ndarray]:
    """Divide row numbers into batches of about equal padded tokens.

    There are as few batches as with `ascending_batches`, but no small last batch, which would take
    almost as long as a full one.
    """
    batches = list(ascending_batches(lengths, budget, spread=spread))
    low, high = 1, budget  # the smallest budget that needs no more batches lies in (low, high]
    while high - low > max(1, budget // 100):
        middle = (low + high) // 2
        smaller = list(ascending_batches(lengths, middle, spread=spread))
        if len(smaller) > len(batches):
            low = middle
        else:
            high, batches = middle, smaller
    return batches


def shared_prefix(rows: Sequence[Any]) -> int:
    """Count the ids that all rows begin with."""
    first = np.asarray(rows[0])
    shared = len(first)
    for row in rows[1:]:
        other = np.asarray(row)
        shared = min(shared, len(other))
        differ = np.flatnonzero(other[:shared] != first[:shared])
        shared = int(differ[0]) if len(differ) else shared
    return shared


def pad_right(rows: Sequence[Tensor | Sequence[int]], device: torch.device | None = None) -> Tensor:
    """Stack rows of token ids, or tensors whose first axis is the position, padded with 0.

    Returns:
        A tensor [rows, pos, ...] on `device`.
    """
    tensors = [
        row if isinstance(row, Tensor) else torch.tensor(row, dtype=torch.int64) for row in rows
    ]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)
