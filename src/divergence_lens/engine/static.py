"""Decode rows of unequal length with fused blocks and a preallocated key/value cache.

1. Read the ids that all prompts begin with once, and copy their keys and values to every row.
2. Read the rest of all prompts *packed*: one axis of tokens without padding, except in attention.
   The last block computes only the last position of each row.
3. Decode one token per row and step. A row is aligned to the right: its prompt ends at the slot at
   which all prompts end, so one slice of the cache takes all new keys and values. Rotary
   angles depend on a token's position, not on its slot.
4. Move the last row into the place of a row that has ended. This copies one row, and the rows
   still being written stay adjacent, so no work is done for the others.

A decoder reads the parameters when it starts a batch. Within `engine.packed()`, it computes with
packed copies of them if the batch is large enough.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from divergence_lens._utils.batching import shared_prefix
from divergence_lens.engine.decoding import Decoder, Reading
from divergence_lens.engine.fused import FusedBlocks, rotated
from divergence_lens.engine.packing import packing_gain

if TYPE_CHECKING:
    from divergence_lens.engine.base import Engine

# Entries of an attention mask that are held at a time while prompts are read.
_MASK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class _Group:
    """Consecutive rows whose attention is computed together, padded on the left.

    Attributes:
        rows: The rows.
        first: The first slot that any of them uses.
        tokens: For each query, its place among the packed tokens; padding repeats another token.
        packed: For each packed token of the group, its place among the flattened queries.
        mask: The slots that each query attends to, from `first` on.
    """

    rows: slice
    first: int
    tokens: Int[Tensor, "rows query"]
    packed: Int[Tensor, " tokens"]
    mask: Bool[Tensor, "rows 1 query slot"]


class StaticDecoder(Decoder):
    """Decoding with fused blocks, each row at its own position.

    Keys and values are stored as [layer, 2, row, kv_head, slot, d_head], keys after rotation.
    """

    ragged = True

    def __init__(self, engine: "Engine", fused: FusedBlocks) -> None:
        self._engine, self._fused = engine, fused
        self._group_size = engine.n_heads // engine.n_kv_heads

    # -- reading the prompts ----------------------------------------------------------------

    def start(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Reading:
        """Read the prompts, and allocate slots for the new tokens."""
        device, longest = self._engine.device, len(prompts[-1])
        # The shortest row reaches the end of the context last.
        n_ctx = self._engine.n_ctx
        slots = longest + min(new_tokens, n_ctx - len(prompts[0]))
        self._tables = self._fused.rotary_tables(min(slots, n_ctx))  # 2 x [pos, rotary]
        # Each step is a product of as many rows as are still being written.
        gain = packing_gain(sum(map(len, prompts))) + new_tokens * packing_gain(len(prompts))
        self._weights = [self._fused.weights(k, gain) for k in range(self._engine.n_layers)]
        # The last position of a row is never shared: its hidden state is needed for every row.
        shared = min(shared_prefix(prompts), len(prompts[0]) - 1) if len(prompts) > 1 else 0
        self._rows = list(range(len(prompts)))
        self._lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        self._pads = [longest - len(ids) for ids in prompts]
        # Zeros, because the weight of a masked slot is 0, and 0 * NaN is NaN.
        self._cache = self._empty(len(prompts), slots)
        if shared:
            prefix = self._empty(1, shared)
            self._read([prompts[0][:shared]], 0, [0], prefix)
            for row, pad in enumerate(self._pads):
                self._cache[:, :, row, :, pad : pad + shared] = prefix[:, :, 0]
        resid = self._read([ids[shared:] for ids in prompts], shared, self._pads, self._cache)
        self._slot = longest
        hidden_slots = torch.arange(slots, device=device) < (longest - self._lengths)[:, None]
        self._mask = torch.zeros(len(prompts), 1, 1, slots, dtype=resid.dtype, device=device)
        self._mask.masked_fill_(hidden_slots[:, None, None], -torch.inf)  # [row, 1, 1, slot]
        return self._rows, self._engine.norm(resid[:, None])[:, 0]  # [row, d_model]

    def _empty(self, rows: int, slots: int) -> Tensor:
        engine = self._engine
        shape = (engine.n_layers, 2, rows, engine.n_kv_heads, slots, engine.d_head)
        return torch.zeros(shape, dtype=engine.dtype, device=engine.device)

    def _read(
        self, parts: Sequence[Sequence[int]], offset: int, pads: Sequence[int], cache: Tensor
    ) -> Float[Tensor, "rows d_model"]:
        """Read each row's ids, which follow `offset` positions already in the cache.

        Returns:
            `resid_post` of the last block, at each row's last position.
        """
        device = self._engine.device
        tokens = torch.tensor([i for ids in parts for i in ids], device=device)  # [token]
        rows = torch.tensor([r for r, ids in enumerate(parts) for _ in ids], device=device)
        positions = torch.cat([torch.arange(len(ids), device=device) for ids in parts]) + offset
        slots = positions + torch.tensor(pads, device=device)[rows]
        sizes = torch.tensor([len(ids) for ids in parts], device=device)
        angles = self._angles(positions)
        resid = self._fused.embed(tokens, positions)  # [token, d_model]
        groups = _groups([len(ids) for ids in parts], offset, pads, device)
        last = self._engine.n_layers - 1
        ends = sizes.cumsum(0) - 1  # each row's last token
        for layer, weights in enumerate(self._weights):
            query, key, value = self._fused.project(
                resid, weights, ends if layer == last else None
            )  # [token, head, d_head]
            if angles is not None:
                cos, sin = angles
                key = rotated(key, cos, sin)
                query = rotated(query, *((cos, sin) if layer < last else (cos[ends], sin[ends])))
            keys, values = cache[layer]  # [row, kv_head, slot, d_head]
            keys[rows, :, slots], values[rows, :, slots] = key, value
            if layer == last:
                resid = resid[ends]  # [row, d_model]
                mixed = torch.cat([_attend_ends(query, group, keys, values) for group in groups])
            else:
                mixed = torch.cat([_attend(query, group, keys, values) for group in groups])
            resid = self._fused.update(resid, mixed, weights)
        return resid

    def _angles(self, positions: Int[Tensor, " tokens"]) -> tuple[Tensor, Tensor] | None:
        if self._tables is None:
            return None
        cos, sin = self._tables
        return cos[positions], sin[positions]  # [token, rotary]

    # -- extending the rows -----------------------------------------------------------------

    def step(self, tokens: Int[Tensor, " rows"], ended: Collection[int]) -> Reading:
        """Extend all rows that have not ended by one token."""
        tokens = self._drop(tokens, ended)
        size = len(self._rows)
        if not size:
            return [], torch.empty(0, self._engine.d_model, device=tokens.device)
        positions = self._lengths[:size]
        angles = self._angles(positions)
        resid = self._fused.embed(tokens, positions)  # [row, d_model]
        first, slot = min(self._pads[:size]), self._slot
        seen = slice(first, slot + 1)
        mask = self._mask[:size, ..., seen] if max(self._pads[:size]) > first else None
        for layer, weights in enumerate(self._weights):
            query, key, value = self._fused.project(resid, weights)  # [row, head, d_head]
            if angles is not None:
                query, key = rotated(query, *angles), rotated(key, *angles)
            keys, values = self._cache[layer, :, :size]  # [row, kv_head, slot, d_head]
            keys[:, :, slot], values[:, :, slot] = key, value
            # All query heads of a key head attend to the same slots, so they take the place of
            # query positions: no key is repeated.
            mixed = F.scaled_dot_product_attention(
                query.unflatten(1, (-1, self._group_size)),
                keys[:, :, seen],
                values[:, :, seen],
                attn_mask=mask,
            )  # [row, kv_head, query head of the group, d_head]
            resid = self._fused.update(resid, mixed.flatten(1, 2), weights)
        self._lengths[:size] += 1
        self._slot += 1
        return self._rows, self._engine.norm(resid[:, None])[:, 0]

    def _drop(self, tokens: Int[Tensor, " rows"], ended: Collection[int]) -> Tensor:
        """Remove ended rows; return the tokens of the others in their new order."""
        self._rows, tokens = list(self._rows), tokens.clone()
        for place in reversed(range(len(self._rows))):
            if self._rows[place] not in ended:
                continue
            last = len(self._rows) - 1
            if place < last:
                used = slice(self._pads[last], self._slot)
                # A longer prompt's slots before the moved row's first are masked by its mask.
                self._cache[:, :, place, :, used] = self._cache[:, :, last, :, used]
                for per_row in (self._lengths, self._mask, tokens):
                    per_row[place] = per_row[last]
                self._rows[place], self._pads[place] = self._rows[last], self._pads[last]
            self._rows.pop()
        return tokens[: len(self._rows)]


def _groups(
    sizes: Sequence[int], offset: int, pads: Sequence[int], device: torch.device
) -> list[_Group]:
    """Group rows, ascending by size, so that no mask has more than `_MASK_ELEMENTS` entries."""
    groups, start, before = [], 0, 0
    end_slot = offset + max(size + pad for size, pad in zip(sizes, pads, strict=True))
    while start < len(sizes):
        stop = start + 1
        while stop < len(sizes):
            widest = sizes[stop]
            if (stop + 1 - start) * widest * (widest + offset) > _MASK_ELEMENTS:
                break
            stop += 1
        queries, first = sizes[stop - 1], pads[stop - 1]
        size = torch.tensor(sizes[start:stop], device=device)
        row_start = before + size.cumsum(0) - size  # each row's first packed token
        step = torch.arange(queries, device=device)
        own = step >= (queries - size)[:, None]  # [row, query]: not padding
        tokens = row_start[:, None] + (step - (queries - size)[:, None]).clamp(min=0)
        query_slot = end_slot - queries + step
        slot = torch.arange(first, end_slot, device=device)
        pad = torch.tensor(pads[start:stop], device=device)
        # A padding query attends to its own slot, because an empty softmax is NaN.
        seen_from = torch.minimum(pad[:, None], query_slot)  # [row, query]
        mask = (slot <= query_slot[:, None]) & (slot >= seen_from[..., None])
        packed = own.flatten().nonzero()[:, 0]
        groups.append(_Group(slice(start, stop), first, tokens, packed, mask[:, None]))
        start, before = stop, before + int(size.sum())
    return groups


def _attend(
    query: Float[Tensor, "tokens head d_head"], group: _Group, keys: Tensor, values: Tensor
) -> Float[Tensor, "grouped head d_head"]:
    """Attention of a group's packed tokens."""
    slots = slice(group.first, group.first + group.mask.shape[-1])
    mixed = F.scaled_dot_product_attention(
        query[group.tokens].transpose(1, 2),  # [row, head, query, d_head]
        keys[group.rows, :, slots],
        values[group.rows, :, slots],
        attn_mask=group.mask,
        enable_gqa=keys.shape[1] != query.shape[1],
    )
    return mixed.transpose(1, 2).flatten(0, 1)[group.packed]


def _attend_ends(
    query: Float[Tensor, "rows head d_head"], group: _Group, keys: Tensor, values: Tensor
) -> Float[Tensor, "grouped head d_head"]:
    """Attention of the last position of each row of a group."""
    slots = slice(group.first, group.first + group.mask.shape[-1])
    mixed = F.scaled_dot_product_attention(
        query[group.rows, :, None],  # [row, head, 1, d_head]
        keys[group.rows, :, slots],
        values[group.rows, :, slots],
        attn_mask=group.mask[:, :, -1:],
        enable_gqa=keys.shape[1] != query.shape[1],
    )
    return mixed[:, :, 0]
