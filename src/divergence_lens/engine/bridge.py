"""The engine of a `TransformerBridge`, through the Hugging Face decoder that it wraps."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from divergence_lens.engine.base import Engine
from divergence_lens.engine.passes import Pass
from divergence_lens.engine.sites import PER_HEAD, hook_point_of
from divergence_lens.models import Model

_BY_HEAD = ("alibi", "position_bias")
"""Block arguments whose first axis is heads: Bloom [row * head, 1, pos], MPT [head, 1, pos]."""

_FUSED = {".qkv.": ".q.", "._original_component.gate_up_proj.": ".gate."}
"""Fused weights that a bridge splits into copies to compute with, and the name of one copy."""


class _FirstBlockReturnedError(Exception):
    """Ends a pass after its first block; the argument says whether it returned a tuple."""


class _BridgeCache:
    """Hugging Face's key/value cache interface over a `Pass`."""

    is_compileable = False
    is_sliding: tuple[bool, ...] = ()

    def __init__(self, run: Pass) -> None:
        self._run = run

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return them after those of the past."""
        return self._run.join(layer_idx, key, value)

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        """Return the number of stored positions."""
        return self._run.offset

    def get_query_offset(self, _layer_idx: int = 0) -> int:
        """Return the absolute position of the first query."""
        return self._run.offset

    def get_mask_sizes(self, query_length: int, _layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys that the mask covers, and the first key."""
        return self._run.offset + query_length, 0


class BridgeEngine(Engine):
    """Passes over a bridge, through the decoder that it wraps.

    Hugging Face's decoder passes masks, rotary angles and positions to each block, and families
    differ in which. So `_begin` runs the decoder with every block replaced by a recorder that
    returns its input. That costs an embedding and a norm, and yields the embeddings and the
    arguments of each block.
    """

    position_axis = 2

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self._decoder: nn.Module = self._lens.original_model.base_model
        if any(type(block).__name__ == "ParallelBlockBridge" for block in self._lens.blocks):
            self._absent.add("resid_mid")
        self._points: dict[str, nn.Module] = dict(self._lens.hook_dict)
        absent = {s for s in PER_HEAD if f"blocks.0.{hook_point_of(s)}" not in self._points}
        self._absent |= absent
        config = self._lens.original_model.config
        # Granite scales what attention and MLP add: resid_mid is not resid_pre + attn_out.
        if getattr(config, "residual_multiplier", 1.0) != 1.0:
            self._absent.add("resid_mid")
        # Granite divides the logits by this number after the unembedding.
        self._logits_divisor = float(getattr(config, "logits_scaling", None) or 1.0)
        self._in_tuple = self._blocks_return_tuples()

    @torch.no_grad()
    def _blocks_return_tuples(self) -> bool:
        def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
            raise _FirstBlockReturnedError(isinstance(output, tuple))

        watch = self._lens.blocks[0].register_forward_hook(stop)
        try:
            self._decoder(torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        except _FirstBlockReturnedError as returned:
            return bool(returned.args[0])
        finally:
            watch.remove()
        raise AttributeError("the decoder does not call its first block")

    @cached_property
    def _reads_patterns(self) -> bool:
        # In some families the hook point shows a pattern that was already used: replacing it has
        # no effect. So replace it once, in the first block, on two tokens.
        if "pattern" in self._absent:
            return False
        changed: list[Tensor] = []
        point = self._site_module(0, "pattern")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TransformerLens 4 warns where the edit has no effect
            for zero in (False, True):
                handle = point.register_forward_hook(
                    lambda _module, _inputs, pattern, zero=zero: pattern * (0.0 if zero else 1.0)
                )
                try:
                    run = self.begin(torch.zeros(1, 2, dtype=torch.long))
                    changed.append(self._block(0, run.resid, run))
                finally:
                    handle.remove()
        return not torch.equal(*changed)

    def _begin(self, run: Pass, tokens: Tensor) -> Tensor:
        cached = {"past_key_values": _BridgeCache(run)} if run.keep or run.offset else {}
        placed = {} if run.positions is None else {"position_ids": run.positions[None]}
        with self._recorders(run):
            self._decoder(tokens, use_cache=bool(cached), **cached, **placed)
        first, _ = run.calls[0]
        embeddings: Tensor = first[0]
        batch = tokens.shape[0]
        # The blocks' arguments do not depend on the row: one row broadcasts to any number of rows.
        run.calls = [
            (
                tuple(_one_row(a, batch) for a in args[1:]),
                {k: v if k in _BY_HEAD else _one_row(v, batch) for k, v in kw.items()},
            )
            for args, kw in run.calls
        ]
        return embeddings

    @contextmanager
    def _recorders(self, run: Pass) -> Iterator[None]:
        def recorder(resid: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
            run.calls.append(((resid, *args), kwargs))
            return (resid,) if self._in_tuple else resid

        blocks = list(self._lens.blocks)
        try:
            for block in blocks:
                block.__dict__["forward"] = recorder
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def _block(self, layer: int, resid: Tensor, run: Pass) -> Tensor:
        fused = self._fused(layer)
        if fused is not None:
            return fused.block(layer, resid, run)
        args, kwargs = run.calls[layer]
        alibi = kwargs.get("alibi")
        if alibi is not None and alibi.ndim == 3:
            kwargs = kwargs | {"alibi": alibi[: self.n_heads].repeat(len(resid), 1, 1)}
        block = self._lens.blocks[layer]
        attention: Any = getattr(block, "attn", None)
        pattern = getattr(attention, "_pattern", None)
        out = block(resid, *args, **kwargs)
        if getattr(attention, "_pattern", None) is not pattern:
            attention._pattern = pattern  # noqa: SLF001 - it would hold the pass's graph in memory
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def _site_module(self, layer: int, site: str) -> nn.Module:
        name = f"blocks.{layer}.{hook_point_of(site)}"
        if name not in self._points:  # collecting all hook points and aliases takes milliseconds
            self._points = dict(self._lens.hook_dict)
        return self._points[name]

    def by_position(self, layer: int) -> list[nn.Module]:
        """Return the query and output maps and the MLP."""
        block = self._lens.blocks[layer]
        attention = getattr(block, "attn", None)
        maps = [getattr(attention, "q", None), getattr(attention, "o", None)]
        return [m for m in (*maps, getattr(block, "mlp", None)) if isinstance(m, nn.Module)]

    def norm(self, resid: Tensor) -> Tensor:
        """Apply the final norm."""
        hidden: Tensor = self._lens.ln_final(resid)
        return hidden

    def _unembed(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._lens.unembed(hidden)
        return logits if self._logits_divisor == 1.0 else logits / self._logits_divisor

    def block_parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """Return the parameters that a block computes with, by their Hugging Face names."""
        own = {id(parameter) for parameter in self._lens.blocks[layer].parameters()}
        return {n: p for n, p in self.named_parameters().items() if id(p) in own}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the bridge computes with, by their Hugging Face names."""
        every = dict(self._lens.original_model.named_parameters())
        return {name: p for name, p in every.items() if not _split_elsewhere(name, every)}


def _split_elsewhere(name: str, names: Iterable[str]) -> bool:
    """Return whether a parameter is a fused one, which the bridge stores but no longer reads."""
    for fused, part in _FUSED.items():
        before, separator, _ = name.partition(fused)
        if separator and any(other.startswith(before + part) for other in names):
            return True
    return False


def _one_row(value: Any, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value[:1] if batch > 1 and value.ndim and value.shape[0] == batch else value
    if isinstance(value, tuple):
        return tuple(_one_row(item, batch) for item in value)
    if isinstance(value, Mapping):
        return {key: _one_row(item, batch) for key, item in value.items()}
    return value
