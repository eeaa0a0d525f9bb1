"""Ablations: patch the clean run with zeros, or with means over the clean runs of all pairs."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.functional import pad

from divergence_lens._utils.batching import pad_right
from divergence_lens._utils.memory import run_halved
from divergence_lens.engine import get_engine
from divergence_lens.models import Model
from divergence_lens.patching.request import PatchingRequest
from divergence_lens.patching.trace import (
    Chunk,
    Trace,
    build_chunk,
    groups_of_pairs,
    traced_pass,
    weights,
)

Ablation: TypeAlias = Callable[[Chunk, Trace, Trace], Trace]
"""From a chunk, its base and its source trace to the source trace to use."""

# A fixed group size: the sums then have the same bits however the run itself is divided.
_MEANS_PAIRS = 32


def ablation_of(model: Model, request: PatchingRequest) -> Ablation | None:
    """The function that replaces the source states by ablated ones; None without an ablation."""
    if request.corruption not in ("mean", "zero"):
        return None
    means = _SiteMeans(model, request) if request.corruption == "mean" else None

    def ablate(chunk: Chunk, base: Trace, source: Trace) -> Trace:
        if means is None:
            sites = {
                site: [torch.zeros_like(activation) for activation in activations]
                for site, activations in base.sites.items()
            }
        else:
            sites = means.states(chunk, base)
        return replace(source, sites=sites)

    return ablate


class _SiteMeans:
    """Mean activations of sites over the clean runs of all pairs, slot by slot.

    A slot is a pair of a segment and an index within it: the first `user` positions of all rows
    share one slot, the second `user` positions another.
    """

    def __init__(self, model: Model, request: PatchingRequest) -> None:
        slots: dict[tuple[str, int], int] = {}
        self._slots = []  # for each pair, the slot of each position
        for row in request.pairs.segments:
            last_index: dict[str, int] = {}
            row_slots = []
            for name in row:
                last_index[name] = last_index.get(name, -1) + 1
                row_slots.append(slots.setdefault((name, last_index[name]), len(slots)))
            self._slots.append(torch.tensor(row_slots))
        engine = get_engine(model, causal=False)
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._counts = torch.zeros(len(slots), device=engine.device)

        def add(chosen: list[int]) -> None:
            chunk, teacher, _ = build_chunk(request, chosen, engine, continued=False)
            with weights(teacher, model) as clean_model:
                run = traced_pass(
                    get_engine(clean_model, causal=False),
                    chunk.base,
                    chunk.base_target,
                    request.sites,
                )
            self._add(chunk, run)

        for group in groups_of_pairs(request, engine, _MEANS_PAIRS):
            run_halved(group, add)
        self._means = {
            key: total / self._counts.view(-1, *[1] * (total.ndim - 1))  # [slot, ...]
            for key, total in self._sums.items()
        }

    def _add(self, chunk: Chunk, run: Trace) -> None:
        present, slots = self._present_and_slots(chunk)
        flat_slots = slots[present]  # [token]
        new = {
            (site, layer): activation[present].float()  # [token, ...]
            for site, activations in run.sites.items()
            for layer, activation in enumerate(activations)
        }
        for key, states in new.items():
            if key not in self._sums:
                self._sums[key] = states.new_zeros(len(self._counts), *states.shape[1:])
        ones = torch.ones_like(flat_slots, dtype=self._counts.dtype)
        # No sum has changed so far: if memory runs out above, `run_halved` can retry the pairs.
        self._counts.index_add_(0, flat_slots, ones)
        for key, states in new.items():
            self._sums[key].index_add_(0, flat_slots, states)

    def _present_and_slots(
        self, chunk: Chunk
    ) -> tuple[Bool[Tensor, "batch pos"], Int64[Tensor, "batch pos"]]:
        """Whether each position of the chunk is a token, not padding, and its slot."""
        rows = [self._slots[i] for i in chunk.indices.tolist()]
        slots = pad_right(rows, chunk.base.device)
        lengths = torch.tensor([len(row) for row in rows], device=slots.device)
        return torch.arange(slots.shape[1], device=slots.device) < lengths[:, None], slots

    def states(self, chunk: Chunk, base: Trace) -> dict[str, list[Tensor]]:
        """The means by site and layer, `[batch, pos, ...]`, at each position of the chunk."""
        slots = self._present_and_slots(chunk)[1]  # [batch, prompt pos]
        # Answers of several tokens continue the rows; no position of theirs is patched.
        slots = pad(slots, (0, chunk.base.shape[1] - slots.shape[1]))  # [batch, pos]
        return {
            site: [
                self._means[site, layer][slots].to(activation.dtype)
                for layer, activation in enumerate(activations)
            ]
            for site, activations in base.sites.items()
        }
