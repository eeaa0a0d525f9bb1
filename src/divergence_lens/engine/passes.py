"""The state of a forward pass: its embeddings, and the keys and values before and after it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class KeyValues:
    """Keys and values of every block for the first `length` positions of a batch.

    Each model class has its own layout. Code outside the engine only slices rows and positions.

    Attributes:
        keys: One tensor per block.
        values: One tensor per block.
        position_axis: The axis of positions: 1 in [batch, pos, head, d_head] (HookedTransformer),
            2 in [batch, head, pos, d_head] (Hugging Face).
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    position_axis: int

    @property
    def length(self) -> int:
        """Number of stored positions."""
        return self.keys[0].shape[self.position_axis]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.keys[0].shape[0]

    def _map(self, change: Callable[[Tensor], Tensor]) -> "KeyValues":
        return KeyValues(
            tuple(change(key) for key in self.keys),
            tuple(change(value) for value in self.values),
            self.position_axis,
        )

    def upto(self, length: int) -> "KeyValues":
        """Return the first `length` positions, as a view."""
        return self._map(lambda stored: stored.narrow(self.position_axis, 0, length))

    def select(self, rows: Int[Tensor, " rows"]) -> "KeyValues":
        """Return the given rows in the given order, as a copy."""
        return self._map(lambda stored: stored.index_select(0, rows))

    def expand(self, batch: int) -> "KeyValues":
        """Repeat a single row `batch` times, as a view."""
        if self.batch != 1:
            raise ValueError(f"only a single row can be repeated; this holds {self.batch} rows")
        return self._map(lambda stored: stored.expand(batch, *stored.shape[1:]))


@dataclass
class Work:
    """Counts of the positions that an engine has computed, which benchmarks compare with a minimum.

    Attributes:
        positions: Positions that went through a block, summed over blocks and rows.
        fused: Those of them that went through a fused block.
        unembedded: Positions whose logits were computed.
    """

    positions: int = 0
    fused: int = 0
    unembedded: int = 0


class Pass:
    """A forward pass in progress.

    Attributes:
        resid: The embeddings, `resid_pre` of block 0, [batch, pos, d_model].
        past: Keys and values of the positions before this pass.
        keep: Whether to store this pass's keys and values.
        offset: Absolute position of the first token of `resid`.
        rows: For each row of the residual, its row in the past; None if they are the same.
        calls: The arguments that Hugging Face's decoder passes to each block (bridges only).
        positions: Absolute positions of the tokens where they do not follow one another.
        masks: Attention masks by shape, shared by the fused blocks of this pass.
        stored: The keys and values stored so far, by layer.
    """

    def __init__(self, past: KeyValues | None, *, keep: bool, position_axis: int) -> None:
        self.resid: Tensor
        self.past = past
        self.keep = keep
        self.rows: Tensor | None = None
        self.positions: Tensor | None = None
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.masks: dict[tuple[int, int], Tensor] = {}
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        self._axis = position_axis

    @property
    def offset(self) -> int:
        """Absolute position of the pass's first token."""
        return self.past.length if self.past is not None else 0

    def allow_ancestors(self, parents: Sequence[int], dtype: torch.dtype) -> None:
        """Let each position attend to the past, its ancestors and itself, in the fused blocks."""
        device, n_nodes = self.resid.device, len(parents)
        allowed = torch.zeros(n_nodes, n_nodes, dtype=torch.bool)  # [query node, key node]
        for node, parent in enumerate(parents):
            if parent >= 0:
                allowed[node] = allowed[parent]
            allowed[node, node] = True
        mask = torch.zeros(n_nodes, self.offset + n_nodes, dtype=dtype)
        mask[:, self.offset :].masked_fill_(~allowed, -torch.inf)
        self.masks[mask.shape[0], mask.shape[1]] = mask.to(device)

    def key_values(self) -> KeyValues:
        """Return the keys and values of the past and of this pass, after all blocks have run.

        Raises:
            RuntimeError: The attention did not pass any to the cache.
        """
        if not self.stored:
            raise RuntimeError("the model's attention does not pass its keys and values to a cache")
        layers = [self.stored[layer] for layer in sorted(self.stored)]
        return KeyValues(
            tuple(key for key, _ in layers), tuple(value for _, value in layers), self._axis
        )

    def join(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Prepend the past to a block's new keys and values, and store the result if `keep`."""
        if self.past is not None and self.past.length:
            # [rows, past, head, d_head] + [rows, pos, head, d_head], or with pos and head swapped
            key = torch.cat([self.rows_of(self.past.keys[layer], len(key)), key], self._axis)
            value = torch.cat(
                [self.rows_of(self.past.values[layer], len(value)), value], self._axis
            )
        if self.keep:
            self.stored[layer] = (key, value)
        return key, value

    def rows_of(self, stored: Tensor, batch: int) -> Tensor:
        """Return the past's keys or values for each of `batch` rows."""
        if len(stored) == 1:
            return stored.expand(batch, *stored.shape[1:])  # one prefix shared by all rows; a view
        return stored if self.rows is None else stored.index_select(0, self.rows)
