"""The engine of a `HookedTransformer`, whose blocks are called unchanged."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from divergence_lens.engine.base import Engine
from divergence_lens.engine.passes import Pass
from divergence_lens.engine.sites import hook_point_of
from divergence_lens.models import Model


class _Entry:
    """The key/value cache entry of one block, with the methods that its attention calls."""

    def __init__(self, run: Pass, layer: int) -> None:
        self._run, self._layer = run, layer

    @property
    def past_keys(self) -> Tensor:
        """The keys of the past; their length tells the attention its offset."""
        past = self._run.past
        return past.keys[self._layer] if past is not None else torch.empty(1, 0)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return them after those of the past."""
        return self._run.join(self._layer, key, value)


class HookedEngine(Engine):
    """Passes over a `HookedTransformer`; keys and values are [batch, pos, head, d_head]."""

    position_axis = 1

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        kind = self._lens.cfg.positional_embedding_type
        if kind == "shortformer":
            raise ValueError("shortformer position embeddings are not supported")
        if self._lens.cfg.attn_only:
            self._absent |= {"mlp_out", "resid_mid"}
        self._learned_positions = kind == "standard"

    @property
    def n_kv_heads(self) -> int:
        """The number of key and value heads; `n_heads` while the model ungroups them."""
        if getattr(self._lens.cfg, "ungroup_grouped_query_attention", False):
            return self.n_heads
        return super().n_kv_heads

    def _begin(self, run: Pass, tokens: Tensor) -> Tensor:
        model = self._lens
        resid: Tensor = model.hook_embed(model.embed(tokens))
        if self._learned_positions:
            added = (
                model.pos_embed(tokens, run.offset)
                if run.positions is None
                else model.pos_embed.W_pos[run.positions].expand_as(resid)  # [batch, pos, d_model]
            )
            resid = resid + model.hook_pos_embed(added)
        return resid

    def _block(self, layer: int, resid: Tensor, run: Pass) -> Tensor:
        fused = self._fused(layer)
        if fused is not None:
            return fused.block(layer, resid, run)
        entry = _Entry(run, layer) if run.keep or run.offset else None
        out: Tensor = self._lens.blocks[layer](resid, past_kv_cache_entry=entry)
        return out

    def last_block(
        self,
        resid: Float[Tensor, "rows pos d_model"],
        run: Pass,
        target: Int[Tensor, " rows"],
        *,
        rows: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows d_model"]:
        """Run the last block; after its attention, compute the target position alone."""
        if "resid_mid" not in self.sites:  # parallel, or without an MLP
            return super().last_block(resid, run, target, rows=rows)

        def at_target(_module: nn.Module, _inputs: Any, resid_mid: Tensor) -> Tensor:
            each = torch.arange(len(resid_mid), device=resid_mid.device)
            return resid_mid[each, target][:, None]

        point = self._lens.blocks[self.n_layers - 1].hook_resid_mid
        handle = point.register_forward_hook(at_target)
        try:
            run.rows = rows
            return self._with_sites(self.n_layers - 1, resid, run)[:, 0]
        finally:
            handle.remove()

    def _site_module(self, layer: int, site: str) -> nn.Module:
        module: nn.Module = self._lens.blocks[layer]
        for name in hook_point_of(site).split("."):
            module = getattr(module, name)
        return module

    def by_position(self, layer: int) -> list[nn.Module]:
        """Return the MLP, if there is one."""
        # Queries and the output of attention are computed by functions here, not by modules.
        block = self._lens.blocks[layer]
        return [block.mlp] if hasattr(block, "mlp") else []

    def norm(self, resid: Tensor) -> Tensor:
        """Apply the final norm, if there is one."""
        hidden: Tensor = self._lens.ln_final(resid) if hasattr(self._lens, "ln_final") else resid
        return hidden

    def _unembed(self, hidden: Tensor) -> Tensor:
        flat: Tensor = self._lens.unembed(hidden.reshape(1, -1, hidden.shape[-1]))
        return flat.reshape(*hidden.shape[:-1], flat.shape[-1])

    def block_parameters(self, layer: int) -> dict[str, nn.Parameter]:
        """Return the parameters of one block."""
        prefix = f"blocks.{layer}."
        return {n: p for n, p in self.named_parameters().items() if n.startswith(prefix)}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters."""
        return dict(self.model.named_parameters())
