"""The engine of a `HookedTransformer`, whose blocks are called as they stand."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from divergence_lens.engine.base import INNER, PER_HEAD, Engine, Pass
from divergence_lens.models import Model


class _Entry:
    """What a HookedTransformer's attention expects of a key/value cache of one block."""

    def __init__(self, run: Pass, layer: int) -> None:
        self._run, self._layer = run, layer

    @property
    def past_keys(self) -> Tensor:
        past = self._run.past
        return past.keys[self._layer] if past is not None else torch.empty(1, 0)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
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
            self.sites = tuple(site for site in self.sites if site not in ("mlp_out", "resid_mid"))
        self._positions = kind == "standard"

    def _begin(self, run: Pass, tokens: Tensor) -> Tensor:
        model = self._lens
        resid: Tensor = model.hook_embed(model.embed(tokens))
        if self._positions:
            resid = resid + model.hook_pos_embed(model.pos_embed(tokens, run.offset))
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
        target: Int[Tensor, "rows"],
        *,
        rows: Int[Tensor, "rows"] | None = None,
    ) -> Float[Tensor, "rows d_model"]:
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
        block = self._lens.blocks[layer]
        point: nn.Module
        if site.startswith("mlp_p"):
            point = getattr(block.mlp, f"hook_{site[4:]}")
        elif site in PER_HEAD or site in INNER:
            point = getattr(block.attn, f"hook_{site}")
        else:
            point = getattr(block, f"hook_{site}")
        return point

    def by_position(self, layer: int) -> list[nn.Module]:
        # Queries and the output of attention are computed by functions here, not by modules.
        block = self._lens.blocks[layer]
        return [block.mlp] if hasattr(block, "mlp") else []

    def norm(self, resid: Tensor) -> Tensor:
        hidden: Tensor = self._lens.ln_final(resid) if hasattr(self._lens, "ln_final") else resid
        return hidden

    def _unembed(self, hidden: Tensor) -> Tensor:
        flat: Tensor = self._lens.unembed(hidden.reshape(1, -1, hidden.shape[-1]))
        return flat.reshape(*hidden.shape[:-1], flat.shape[-1])

    def block_parameters(self, layer: int) -> dict[str, nn.Parameter]:
        prefix = f"blocks.{layer}."
        return {n: p for n, p in self.named_parameters().items() if n.startswith(prefix)}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())
