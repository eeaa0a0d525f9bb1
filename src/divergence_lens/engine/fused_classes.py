"""Fused blocks of the two model classes: where each has its parameters, rotations and keys."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from divergence_lens.engine.fused import Affine, FusedBlocks, Scaling, Weights, rotated

if TYPE_CHECKING:
    from divergence_lens.engine.base import Engine
    from divergence_lens.engine.passes import Pass

_ARCHITECTURES = ("GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


def fused_blocks(engine: "Engine", lens: Any, *, hooked: bool) -> "FusedBlocks | None":
    """Return the fused blocks of a model, or None if its architecture has none.

    Args:
        engine: Engine of the model.
        lens: The model.
        hooked: Whether it is a HookedTransformer.
    """
    name = lens.cfg.original_architecture if hooked else type(lens.original_model).__name__
    # A HookedTransformer that was built from a configuration names no architecture.
    if name is not None and name not in _ARCHITECTURES:
        return None
    try:
        fused = (FusedHooked if hooked else FusedBridge)(engine, lens)
        fused.weights_of(0)
        fused.unembedding()
    except (AttributeError, KeyError, ValueError):
        return None
    return fused


class FusedHooked(FusedBlocks):
    """The fused blocks of a HookedTransformer, which stores keys before rotation."""

    def __init__(self, engine: "Engine", lens: Any) -> None:
        cfg = lens.cfg
        unusual = (
            *(cfg.parallel_attn_mlp, cfg.attn_only, cfg.use_local_attn, cfg.use_qk_norm),
            *(cfg.use_normalization_before_and_after, cfg.scale_attn_by_inverse_layer_idx),
            *(cfg.num_experts, cfg.rotary_adjacent_pairs, cfg.attn_scores_soft_cap > 0),
            cfg.attention_dir != "causal",
            cfg.positional_embedding_type not in ("standard", "rotary"),
            cfg.normalization_type not in ("LN", "LNPre", "RMS", "RMSPre"),
            not cfg.use_attn_scale or abs(float(cfg.attn_scale) - cfg.d_head**0.5) > 1e-6,
        )
        if any(unusual):
            raise ValueError("an unusual block")
        super().__init__(engine, lens, str(cfg.act_fn), float(cfg.eps))
        self._rotary = cfg.positional_embedding_type == "rotary"

    def weights_of(self, layer: int) -> Weights:
        """Return the current parameters of a block."""
        block = self._lens.blocks[layer]
        attn, mlp = block.attn, block.mlp
        maps = (
            (attn.W_Q, attn.b_Q),
            (getattr(attn, "_W_K", attn.W_K), getattr(attn, "_b_K", attn.b_K)),
            (getattr(attn, "_W_V", attn.W_V), getattr(attn, "_b_V", attn.b_V)),
        )
        # [head, d_model, d_head] -> [d_model, head * d_head]; no copy in the layout of `load_model`
        query, key, value = ((w.transpose(0, 1).flatten(1), b.flatten()) for w, b in maps)
        return Weights(
            norm_1=_scale_and_shift(block.ln1),
            qkv=(query, key, value),
            out=(attn.W_O.flatten(0, 1), attn.b_O),  # [head * d_head, d_model]
            norm_2=_scale_and_shift(block.ln2),
            gate=(mlp.W_gate, None) if self._lens.cfg.gated_mlp else None,
            up=(mlp.W_in, mlp.b_in),
            down=(mlp.W_out, mlp.b_out),
        )

    def unembedding(self) -> Affine:
        """Return the parameters of the unembedding."""
        return self._lens.unembed.W_U, self._lens.unembed.b_U

    def embed(
        self, tokens: Int[Tensor, " tokens"], positions: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens d_model"]:
        """Return `resid_pre` of block 0, for tokens at any positions."""
        embeddings: Tensor = self._lens.embed.W_E[tokens]
        return embeddings if self._rotary else embeddings + self._lens.pos_embed.W_pos[positions]

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor] | None:
        """Return cosines and sines of the first positions; None without rotation."""
        return self._table(0, 0, length) if self._rotary else None

    def _embed_modules(self) -> list[nn.Module]:
        lens = self._lens
        learned = [] if self._rotary else [lens.pos_embed, lens.hook_pos_embed]
        return [lens.embed, lens.hook_embed, *learned]

    def _table(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        attn = self._lens.blocks[layer].attn
        return attn.rotary_cos[start:stop], attn.rotary_sin[start:stop]

    def _angles(self, layer: int, run: "Pass", length: int) -> tuple[Tensor, Tensor] | None:
        if not self._rotary:
            return None
        if run.positions is None:
            return self._table(layer, run.offset, run.offset + length)
        attn = self._lens.blocks[layer].attn
        return attn.rotary_cos[run.positions], attn.rotary_sin[run.positions]

    def _join(
        self, layer: int, run: "Pass", key: Tensor, value: Tensor, turned: Tensor
    ) -> tuple[Tensor, Tensor]:
        # The stored keys are not rotated, so those of the past are rotated again here.
        if run.keep:
            key, value = run.join(layer, key, value)
            if self._rotary:
                key = rotated(key, *self._table(layer, 0, key.shape[1]))
            return key, value
        if run.past is None or not run.offset:
            return turned, value
        before = run.past.keys[layer]
        if self._rotary:
            before = rotated(before, *self._table(layer, 0, run.offset))
        return (
            torch.cat([run.rows_of(before, len(key)), turned], 1),
            torch.cat([run.rows_of(run.past.values[layer], len(value)), value], 1),
        )


class FusedBridge(FusedBlocks):
    """The fused blocks of a bridge, which stores rotated keys."""

    def __init__(self, engine: "Engine", lens: Any) -> None:
        config = lens.original_model.config
        windowed = getattr(config, "sliding_window", None) and getattr(
            config, "use_sliding_window", True
        )
        odd = getattr(config, "scale_attn_by_inverse_layer_idx", False) or not getattr(
            config, "scale_attn_weights", True
        )
        if windowed or odd:
            raise ValueError("an unusual block")
        self._gpt2 = config.model_type == "gpt2"
        activation = config.activation_function if self._gpt2 else config.hidden_act
        eps = config.layer_norm_epsilon if self._gpt2 else config.rms_norm_eps
        super().__init__(engine, lens, str(activation), float(eps))
        self._rms = not self._gpt2

    def weights_of(self, layer: int) -> Weights:
        """Return the current parameters of a block."""
        block = self._lens.blocks[layer]
        attn, mlp = block.attn, block.mlp
        return Weights(
            norm_1=_scale_and_shift(_inside(block.ln1)),
            qkv=(linear_map(attn.q), linear_map(attn.k), linear_map(attn.v)),
            out=linear_map(attn.o),
            norm_2=_scale_and_shift(_inside(block.ln2)),
            gate=None if self._gpt2 else linear_map(mlp.gate),
            up=linear_map(getattr(mlp, "in")),
            down=linear_map(mlp.out),
        )

    def unembedding(self) -> Affine:
        """Return the parameters of the unembedding."""
        return linear_map(self._lens.unembed)

    def embed(
        self, tokens: Int[Tensor, " tokens"], positions: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens d_model"]:
        """Return `resid_pre` of block 0, for tokens at any positions."""
        decoder = self._lens.original_model.base_model
        tokens_map = decoder.wte if self._gpt2 else decoder.embed_tokens
        embeddings: Tensor = _inside(tokens_map)(tokens)
        return embeddings + _inside(decoder.wpe)(positions) if self._gpt2 else embeddings

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor] | None:
        """Return cosines and sines of the first positions; None without rotation."""
        if self._gpt2:
            return None
        run = self._engine.begin(torch.zeros(1, length, dtype=torch.long))
        return self._angles(0, run, length)

    def fit_decoding(self) -> bool:
        """Return whether rows of unequal length may be computed together."""
        # These scale the angles by the length of the sequence, so no table holds for all lengths.
        rotary = getattr(self._lens.original_model.base_model, "rotary_emb", None)
        scaled = getattr(rotary, "rope_type", "default") in {"dynamic", "longrope"}
        return not scaled and super().fit_decoding()

    def _embed_modules(self) -> list[nn.Module]:
        decoder = self._lens.original_model.base_model
        names = ("wte", "wpe") if self._gpt2 else ("embed_tokens",)
        return [m for name in names for m in getattr(decoder, name).modules()]

    def _angles(self, layer: int, run: "Pass", length: int) -> tuple[Tensor, Tensor] | None:
        if self._gpt2:
            return None
        cos, sin = run.calls[layer][1]["position_embeddings"]
        return cos[0, -length:], sin[0, -length:]

    def _join(
        self,
        layer: int,
        run: "Pass",
        key: Tensor,  # noqa: ARG002 - a bridge stores the rotated keys
        value: Tensor,
        turned: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # Hugging Face's layout is [batch, head, pos, d_head].
        keys, values = run.join(layer, turned.transpose(1, 2), value.transpose(1, 2))
        return keys.transpose(1, 2), values.transpose(1, 2)


def _inside(module: Any) -> Any:
    """Return the module that a bridge's component wraps."""
    return getattr(module, "original_component", None) or module


def linear_map(module: Any) -> tuple[Tensor, Tensor | None]:
    """Return the matrix and the bias of a linear map, as they multiply from the right."""
    module = _inside(module)
    if isinstance(module, nn.Linear):
        return module.weight.T, module.bias
    if type(module).__name__ == "Conv1D":
        return module.weight, module.bias
    raise ValueError(f"{type(module).__name__} is not a linear map")


def _scale_and_shift(norm: Any) -> Scaling:
    """Return a norm's parameters; the folded norms of TransformerLens have none."""
    weight = norm.w if hasattr(norm, "w") else getattr(norm, "weight", None)
    bias = norm.b if hasattr(norm, "b") else getattr(norm, "bias", None)
    return weight, bias
