"""A transformer block in as few operations as torch has for it, for passes that nobody watches.

Both model classes of TransformerLens compute a block through dozens of hook points, and write out
attention scores and patterns so that they can be hooked. Where no hook is set and no parameter
learns, none of that is seen. `FusedBlocks` then computes the same from the same parameters: one
product for queries, keys and values, `scaled_dot_product_attention` instead of the patterns, and
the element-wise steps in place. Gradients may pass through it, and then nothing is done in place.

It knows plain causal decoders (GPT-2, Llama, Qwen2, Mistral without a window, and a
HookedTransformer of that kind built from a configuration): a norm before
attention and MLP, learned or rotary positions, query groups, gated or plain MLPs. What it computes
is compared with the model's own blocks before it is used; other models go without.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from divergence_lens.engine.base import Engine
    from divergence_lens.engine.passes import Pass

_ARCHITECTURES = ("GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")

Affine = tuple[Tensor, Tensor | None]
"""A matrix [d_in, d_out] and a bias [d_out]."""

Scaling = tuple[Tensor | None, Tensor | None]
"""What a norm multiplies by and adds, [d_model] each."""


_GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


def _gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form; on a CPU through the sigmoid, which takes half the time."""
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    # 0.5 (1 + tanh(u)) = sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3)
    inner = x * x
    return inner.mul_(0.044715 * _GELU_SLOPE).add_(_GELU_SLOPE).mul_(x).sigmoid_().mul_(x)


def _silu(x: Tensor) -> Tensor:
    return F.silu(x, inplace=True)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu,
    "swish": _silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
_IN_A_GRAPH: dict[str, Callable[[Tensor], Tensor]] = {
    name: partial(F.gelu, approximate="tanh") if function is _gelu_tanh else function
    for name, function in _ACTIVATIONS.items()
} | dict.fromkeys(("silu", "swish"), F.silu)


@dataclass(frozen=True)
class Weights:
    """The live parameters of one block, as matrices that multiply from the right."""

    norm_1: Scaling
    qkv: tuple[Affine, ...]
    out: Affine
    norm_2: Scaling
    gate: Affine | None
    up: Affine
    down: Affine


class FusedBlocks(ABC):
    """The blocks of one model, without hook points. Get it with `FusedBlocks.of(engine)`."""

    def __init__(self, engine: "Engine", lens: Any, activation: str, eps: float) -> None:
        self._engine, self._lens = engine, lens
        self._activation = activation
        self._eps = eps
        self._rms = "RMS" in str(lens.cfg.normalization_type)
        self._kv_heads = int(getattr(lens.cfg, "n_key_value_heads", None) or engine.n_heads)
        self._modules = [list(block.modules()) for block in lens.blocks]
        self._unembed_modules = list(lens.unembed.modules())

    # -- what the two classes do differently ------------------------------------------------

    @abstractmethod
    def weights_of(self, layer: int) -> Weights:
        """The parameters of a block, as they are now."""

    @abstractmethod
    def unembedding(self) -> Affine:
        """The parameters that make logits of normed hidden states."""

    @abstractmethod
    def embed(
        self, tokens: Int[Tensor, " tokens"], positions: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens d_model"]:
        """`resid_pre` of block 0, for tokens at any positions."""

    @abstractmethod
    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [pos, rotary_dim] of the first positions; None without rotation."""

    @abstractmethod
    def _embed_modules(self) -> list[nn.Module]: ...

    @abstractmethod
    def _angles(self, layer: int, run: "Pass", length: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines [pos, rotary_dim] of the last `length` positions, or None."""

    @abstractmethod
    def _join(
        self, layer: int, run: "Pass", key: Tensor, value: Tensor, turned: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All keys and values [batch, pos, head, d_head], the past before the new ones.

        Args:
            layer: which block.
            run: the pass, which has the past and may keep the result.
            key: the new keys before rotation.
            value: the new values.
            turned: the new keys after rotation.
        """

    # -- the block --------------------------------------------------------------------------

    def fit(self, layer: int) -> bool:
        """Whether nobody would notice: nothing learns, is dropped out or hooked in the block."""
        if self._ungrouped:
            return False
        if torch.is_grad_enabled() and (
            torch.is_autocast_enabled(self._engine.device.type)
            or any(map(_takes_gradients, self._modules[layer]))
        ):
            return False
        return self._unseen(self._modules[layer])

    def fit_unembed(self) -> bool:
        """Likewise for the unembedding, where no gradient is taken at all."""
        return not torch.is_grad_enabled() and self._unseen(self._unembed_modules)

    def fit_decoding(self) -> bool:
        """Whether nobody would notice that rows of unequal length are computed together."""
        layers = range(self._engine.n_layers)
        return self._unseen(self._embed_modules()) and all(map(self.fit, layers))

    def _unseen(self, modules: list[nn.Module]) -> bool:
        return not (self._lens.training or any(map(_is_watched, modules)))

    @property
    def _ungrouped(self) -> bool:
        """Whether the model repeats keys and values for every query head before it stores them."""
        return self._engine.n_kv_heads != self._kv_heads

    def unembed(self, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Logits of normed hidden states, before any soft cap."""
        matrix, bias = self.unembedding()
        # Bridges add a bias of zeros to models without one, which costs a pass over the logits.
        return _affine(hidden, (matrix, bias if bias is not None and bool(bias.any()) else None))

    def block(
        self, layer: int, resid: Float[Tensor, "batch pos d_model"], run: "Pass", since: int = 0
    ) -> Float[Tensor, "batch asked d_model"]:
        """`resid_post` of a block, at the positions from `since` on."""
        weights, length = self.weights_of(layer), resid.shape[1]
        self._engine.work.fused += resid.shape[:2].numel()
        query, key, value = self.project(resid, weights, slice(since, None) if since else None)
        angles = self._angles(layer, run, length)
        turned = key
        if angles is not None:
            cos, sin = angles
            query = rotated(query, cos[since:], sin[since:])
            turned = rotated(key, cos, sin)
        keys, values = self._join(layer, run, key, value, turned)
        mixed = self._attend(query, keys, values, run)  # [batch, asked, head, d_head]
        return self.update(resid[:, since:], mixed, weights)

    def project(
        self,
        resid: Float[Tensor, "*batch pos d_model"],
        weights: Weights,
        asked: slice | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [*batch, pos, head, d_head] before rotation.

        `asked` selects the positions whose queries are needed; None for all.
        """
        normed = self._norm(resid, weights.norm_1)
        if len(weights.qkv) == 1 and asked is None:
            heads = _affine(normed, weights.qkv[0]).unflatten(-1, (-1, self._engine.d_head))
            query, key, value = heads.split(
                [self._engine.n_heads, self._kv_heads, self._kv_heads], dim=-2
            )
        else:
            chosen = normed if asked is None else normed[..., asked, :]
            query, key, value = (
                _affine(x, w).unflatten(-1, (-1, self._engine.d_head))
                for x, w in zip((chosen, normed, normed), self._apart(weights.qkv), strict=True)
            )
        return query, key, value

    def update(
        self,
        resid: Float[Tensor, "*batch d_model"],
        mixed: Float[Tensor, "*batch head d_head"],
        weights: Weights,
    ) -> Float[Tensor, "*batch d_model"]:
        """The rest of a block after its attention: `resid_post`."""
        graph = torch.is_grad_enabled()
        activation = (_IN_A_GRAPH if graph else _ACTIVATIONS)[self._activation]
        resid = resid + _affine(mixed.flatten(-2), weights.out)
        normed = self._norm(resid, weights.norm_2)
        inner = _affine(normed, weights.up)
        if weights.gate is None:
            inner = activation(inner)
        else:
            gate = activation(_affine(normed, weights.gate))
            inner = inner * gate if graph else inner.mul_(gate)
        added = _affine(inner, weights.down)
        return resid + added if graph else resid.add_(added)

    def _apart(self, qkv: tuple[Affine, ...]) -> tuple[Affine, ...]:
        if len(qkv) == 3:
            return qkv
        ((matrix, bias),) = qkv
        d_head = self._engine.d_head
        widths = [n * d_head for n in (self._engine.n_heads, self._kv_heads, self._kv_heads)]
        biases = (None,) * 3 if bias is None else bias.split(widths)
        return tuple(zip(matrix.split(widths, dim=1), biases, strict=True))

    def _norm(self, x: Tensor, scaling: Scaling) -> Tensor:
        weight, bias = scaling
        if self._rms:
            return F.rms_norm(x, (x.shape[-1],), weight, self._eps)
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self._eps)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, run: "Pass") -> Tensor:
        """Causal attention of the last positions to all; [batch, pos, head, d_head]."""
        asked, length = query.shape[1], keys.shape[1]
        whole = asked == length
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=None if whole else _mask(run, query, asked, length),
            is_causal=whole,
            enable_gqa=self._kv_heads != self._engine.n_heads,
        )
        return mixed.transpose(1, 2)

    @staticmethod
    def of(engine: "Engine", lens: Any, *, hooked: bool) -> "FusedBlocks | None":
        """The fused blocks of a model, or None if it is not one that they know."""
        name = lens.cfg.original_architecture if hooked else type(lens.original_model).__name__
        # A HookedTransformer that was built from a configuration names no architecture.
        if name is not None and name not in _ARCHITECTURES:
            return None
        try:
            fused = (_FusedHooked if hooked else _FusedBridge)(engine, lens)
            fused.weights_of(0)
            fused.unembedding()
        except (AttributeError, KeyError, ValueError):
            return None
        return fused


class _FusedHooked(FusedBlocks):
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
        block = self._lens.blocks[layer]
        attn, mlp = block.attn, block.mlp
        matrices = (attn.W_Q, getattr(attn, "_W_K", attn.W_K), getattr(attn, "_W_V", attn.W_V))
        biases = (attn.b_Q, getattr(attn, "_b_K", attn.b_K), getattr(attn, "_b_V", attn.b_V))
        return Weights(
            norm_1=_scale_and_shift(block.ln1),
            qkv=(
                (
                    torch.cat([w.transpose(0, 1).flatten(1) for w in matrices], 1),
                    torch.cat([b.flatten() for b in biases]),
                ),
            ),
            out=(attn.W_O.flatten(0, 1), attn.b_O),
            norm_2=_scale_and_shift(block.ln2),
            gate=(mlp.W_gate, None) if self._lens.cfg.gated_mlp else None,
            up=(mlp.W_in, mlp.b_in),
            down=(mlp.W_out, mlp.b_out),
        )

    def unembedding(self) -> Affine:
        return self._lens.unembed.W_U, self._lens.unembed.b_U

    def embed(
        self, tokens: Int[Tensor, " tokens"], positions: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens d_model"]:
        embeddings: Tensor = self._lens.embed.W_E[tokens]
        if not self._rotary:
            embeddings = embeddings + self._lens.pos_embed.W_pos[positions]
        return embeddings

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor] | None:
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
        # This class keeps keys as they are before rotation.
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


class _FusedBridge(FusedBlocks):
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
        block = self._lens.blocks[layer]
        attn, mlp = block.attn, block.mlp
        return Weights(
            norm_1=_scale_and_shift(_inside(block.ln1)),
            qkv=(_linear(attn.q), _linear(attn.k), _linear(attn.v)),
            out=_linear(attn.o),
            norm_2=_scale_and_shift(_inside(block.ln2)),
            gate=None if self._gpt2 else _linear(mlp.gate),
            up=_linear(getattr(mlp, "in")),
            down=_linear(mlp.out),
        )

    def unembedding(self) -> Affine:
        return _linear(self._lens.unembed)

    def embed(
        self, tokens: Int[Tensor, " tokens"], positions: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens d_model"]:
        decoder = self._lens.original_model.base_model
        embeddings: Tensor
        if self._gpt2:
            embeddings = _inside(decoder.wte)(tokens) + _inside(decoder.wpe)(positions)
        else:
            embeddings = _inside(decoder.embed_tokens)(tokens)
        return embeddings

    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor] | None:
        if self._gpt2:
            return None
        run = self._engine.begin(torch.zeros(1, length, dtype=torch.long))
        return self._angles(0, run, length)

    def fit_decoding(self) -> bool:
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
        key: Tensor,  # noqa: ARG002 - this class keeps the rotated keys
        value: Tensor,
        turned: Tensor,
    ) -> tuple[Tensor, Tensor]:
        keys, values = run.join(layer, turned.transpose(1, 2), value.transpose(1, 2))
        return keys.transpose(1, 2), values.transpose(1, 2)


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook is set that is not the model class's own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)  # noqa: SLF001 - no public name
    # A bridge's norms hand their input to hook points, which are modules of their own.
    return any(
        "_maybe_wire_capture_hooks" not in getattr(hook, "__qualname__", "")
        for kind in hooks
        for hook in kind.values()
    )


def _takes_gradients(module: nn.Module) -> bool:
    """Whether a module's parameters learn, or gradients are looked at as they pass it."""
    return (
        any(p is not None and p.requires_grad for p in module._parameters.values())  # noqa: SLF001
        or bool(module._backward_hooks)  # noqa: SLF001
        or bool(module._backward_pre_hooks)  # noqa: SLF001
        or "forward" in module.__dict__
    )


def _inside(module: Any) -> Any:
    """The module that a bridge's component wraps."""
    return getattr(module, "original_component", None) or module


def _linear(module: Any) -> Affine:
    module = _inside(module)
    if isinstance(module, nn.Linear):
        return module.weight.T, module.bias
    if type(module).__name__ == "Conv1D":
        return module.weight, module.bias
    raise ValueError(f"{type(module).__name__} is no linear map")


def _scale_and_shift(norm: Any) -> Scaling:
    """A norm's parameters; the folded norms of TransformerLens have none."""
    weight = norm.w if hasattr(norm, "w") else getattr(norm, "weight", None)
    bias = norm.b if hasattr(norm, "b") else getattr(norm, "bias", None)
    return weight, bias


def _affine(x: Tensor, affine: Affine) -> Tensor:
    matrix, bias = affine
    return F.linear(x, matrix.T, bias)


def rotated(
    x: Float[Tensor, "*batch pos head d_head"],
    cos: Float[Tensor, "pos rotary"],
    sin: Float[Tensor, "pos rotary"],
) -> Float[Tensor, "*batch pos head d_head"]:
    """Rotary position embedding of the first `rotary` numbers of each head, halves as pairs."""
    width = cos.shape[-1]
    half = width // 2
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned = x[..., :width] * cos
    turned[..., :half].addcmul_(x[..., half:width], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


def _mask(run: "Pass", query: Tensor, asked: int, length: int) -> Tensor:
    """0 where one of the last `asked` positions may look among `length`, else -inf."""
    key = (asked, length)
    if key not in run.masks:
        allowed = torch.ones(asked, length, dtype=torch.bool, device=query.device)
        allowed.tril_(length - asked)
        run.masks[key] = torch.zeros(
            asked, length, dtype=query.dtype, device=query.device
        ).masked_fill_(~allowed, -torch.inf)
    return run.masks[key]
