"""Transformer blocks in few torch operations, for passes without hooks.

Both model classes of TransformerLens compute a block through dozens of hook points, and
materialize attention scores and patterns so that they can be hooked. Where no hook is set and no
parameter is trained, `FusedBlocks` computes the same from the same parameters: one product for
queries, keys and values, `scaled_dot_product_attention` instead of patterns, and element-wise steps
in place. Gradients may pass through it; nothing is done in place then.

It supports plain causal decoders (GPT-2, Llama, Qwen2, Mistral without a window, and a
HookedTransformer of that kind built from a configuration): a norm before attention and MLP, learned
or rotary positions, grouped queries, gated or plain MLPs. Each fused block is compared with the
model's own block before it is used; other models run their own blocks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from divergence_lens.engine.packing import (
    PackedMatrix,
    Packs,
    affine,
    can_pack,
    packed_matrix,
    packing_gain,
)

if TYPE_CHECKING:
    from divergence_lens.engine.base import Engine
    from divergence_lens.engine.passes import Pass

Affine = tuple[Tensor | PackedMatrix, Tensor | None]
"""A matrix [d_in, d_out] and a bias [d_out]."""

Scaling = tuple[Tensor | None, Tensor | None]
"""The weight and the bias of a norm, [d_model] each."""


_GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


def _gelu_tanh(x: Tensor) -> Tensor:
    """Compute GELU in its tanh form; on a CPU through the sigmoid, which takes half the time."""
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
    qkv: tuple[Affine, Affine, Affine]
    out: Affine
    norm_2: Scaling
    gate: Affine | None
    up: Affine
    down: Affine

    def packed(self) -> "Weights":
        """Return the same weights with packed matrices."""
        query, key, value = map(_packed, self.qkv)
        return replace(
            self,
            qkv=(query, key, value),
            out=_packed(self.out),
            gate=None if self.gate is None else _packed(self.gate),
            up=_packed(self.up),
            down=_packed(self.down),
        )


def _packed(plain: Affine) -> Affine:
    matrix, bias = plain
    return (packed_matrix(matrix) if isinstance(matrix, Tensor) else matrix), bias


class FusedBlocks(ABC):
    """The blocks of one model, without hook points. Get it with `fused_blocks(engine, lens)`."""

    def __init__(self, engine: "Engine", lens: Any, activation: str, eps: float) -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"no fused block has the activation function {activation!r}")
        self._engine, self._lens = engine, lens
        self._activation = activation
        self._eps = eps
        self._rms = "RMS" in str(lens.cfg.normalization_type)
        self._kv_heads = int(getattr(lens.cfg, "n_key_value_heads", None) or engine.n_heads)
        self._modules = [list(block.modules()) for block in lens.blocks]
        self._unembed_modules = list(lens.unembed.modules())
        self._packs: tuple[Packs[Weights], Packs[Affine]] | None = None

    # -- differences between the two model classes ------------------------------------------

    @abstractmethod
    def weights_of(self, layer: int) -> Weights:
        """Return the current parameters of a block."""

    @abstractmethod
    def unembedding(self) -> Affine:
        """Return the parameters of the unembedding."""

    @abstractmethod
    def embed(
        self, tokens: Int[Tensor, " tokens"], positions: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens d_model"]:
        """Return `resid_pre` of block 0, for tokens at any positions."""

    @abstractmethod
    def rotary_tables(self, length: int) -> tuple[Tensor, Tensor] | None:
        """Return cosines and sines [pos, rotary_dim] of the first positions, or None."""

    @abstractmethod
    def _embed_modules(self) -> list[nn.Module]: ...

    @abstractmethod
    def _angles(self, layer: int, run: "Pass", length: int) -> tuple[Tensor, Tensor] | None:
        """Return cosines and sines [pos, rotary_dim] of the last `length` positions, or None."""

    @abstractmethod
    def _join(
        self, layer: int, run: "Pass", key: Tensor, value: Tensor, turned: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return all keys and values [batch, pos, head, d_head], the past before the new ones.

        Args:
            layer: The block.
            run: The pass, which holds the past and may store the result.
            key: The new keys before rotation.
            value: The new values.
            turned: The new keys after rotation.
        """

    # -- the block --------------------------------------------------------------------------

    def fit(self, layer: int) -> bool:
        """Return whether nothing in the block is trained, dropped out or hooked."""
        if self._ungrouped:
            return False
        if torch.is_grad_enabled() and (
            torch.is_autocast_enabled(self._engine.device.type)
            or any(map(_takes_gradients, self._modules[layer]))
        ):
            return False
        return self._unseen(self._modules[layer])

    def fit_unembed(self) -> bool:
        """Return the same for the unembedding, through which no gradient may pass either."""
        return not torch.is_grad_enabled() and self._unseen(self._unembed_modules)

    def fit_decoding(self) -> bool:
        """Return whether rows of unequal length may be computed together: nothing is hooked."""
        layers = range(self._engine.n_layers)
        return self._unseen(self._embed_modules()) and all(map(self.fit, layers))

    def _unseen(self, modules: list[nn.Module]) -> bool:
        return not (self._lens.training or any(map(_is_watched, modules)))

    @property
    def _ungrouped(self) -> bool:
        """Whether the model repeats keys and values for every query head before storing them."""
        return self._engine.n_kv_heads != self._kv_heads

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Multiply by packed copies of the weights within the context, where that is faster."""
        if self._packs is not None or not can_pack(self._engine.model):
            yield
            return
        self._packs = (Packs(Weights.packed), Packs(_packed))
        try:
            yield
        finally:
            self._packs = None

    def weights(self, layer: int, gain: int) -> Weights:
        """Return the parameters of a block, packed if that pays off (see `packing_gain`)."""
        if self._packs is None:
            return self.weights_of(layer)
        parameters = _parameters(self._modules[layer])
        return self._packs[0].get(layer, parameters, gain, lambda: self.weights_of(layer))

    def unembed(
        self, hidden: Float[Tensor, "*batch d_model"], ids: Int64[Tensor, " ids"] | None = None
    ) -> Float[Tensor, "*batch columns"]:
        """Return logits of normed hidden states, of all ids or some, before any soft cap."""

        def read() -> Affine:
            matrix, bias = self.unembedding()
            # Bridges add a bias of zeros to models without one: a pass over the logits.
            return matrix, bias if bias is not None and bool(bias.any()) else None

        if ids is not None:
            matrix, bias = self.unembedding()
            assert isinstance(matrix, Tensor)
            return affine(hidden, matrix[:, ids], None if bias is None else bias[ids])
        if self._packs is None:
            return affine(hidden, *read())
        gain = packing_gain(hidden.shape[:-1].numel())
        parameters = _parameters(self._unembed_modules)
        return affine(hidden, *self._packs[1].get("unembedding", parameters, gain, read))

    def block(
        self, layer: int, resid: Float[Tensor, "batch pos d_model"], run: "Pass", since: int = 0
    ) -> Float[Tensor, "batch requested d_model"]:
        """Return `resid_post` of a block, at the positions from `since` on."""
        length = resid.shape[1]
        weights = self.weights(layer, packing_gain(resid.shape[:2].numel()))
        self._engine.work.fused += resid.shape[:2].numel()
        query, key, value = self.project(resid, weights, slice(since, None) if since else None)
        angles = self._angles(layer, run, length)
        turned = key
        if angles is not None:
            cos, sin = angles
            query = rotated(query, cos[since:], sin[since:])
            turned = rotated(key, cos, sin)
        keys, values = self._join(layer, run, key, value, turned)
        mixed = self._attend(query, keys, values, run)  # [batch, requested, head, d_head]
        return self.update(resid[:, since:], mixed, weights)

    def project(
        self,
        resid: Float[Tensor, "*batch pos d_model"],
        weights: Weights,
        requested: slice | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [*batch, pos, head, d_head] before rotation.

        `requested` selects the positions whose queries are needed; None for all.
        """
        normed = self._norm(resid, weights.norm_1)  # [*batch, pos, d_model]
        chosen = normed if requested is None else normed[..., requested, :]
        query, key, value = (
            affine(x, *w).unflatten(-1, (-1, self._engine.d_head))
            for x, w in zip((chosen, normed, normed), weights.qkv, strict=True)
        )
        return query, key, value

    def update(
        self,
        resid: Float[Tensor, "*batch d_model"],
        mixed: Float[Tensor, "*batch head d_head"],
        weights: Weights,
    ) -> Float[Tensor, "*batch d_model"]:
        """Compute the rest of a block after its attention, and return `resid_post`."""
        resid = resid + affine(mixed.flatten(-2), *weights.out)  # resid_mid, [*batch, d_model]
        added = self._mlp_out(resid, weights)  # [*batch, d_model]
        # `resid` is a new tensor, so without a graph it can be changed in place.
        return resid + added if torch.is_grad_enabled() else resid.add_(added)

    def mlp_out(
        self, layer: int, resid: Float[Tensor, "*batch d_model"]
    ) -> Float[Tensor, "*batch d_model"]:
        """Return what the MLP of a block adds, from the residual before its norm."""
        return self._mlp_out(resid, self.weights(layer, packing_gain(resid.shape[:-1].numel())))

    def _mlp_out(
        self, resid: Float[Tensor, "*batch d_model"], weights: Weights
    ) -> Float[Tensor, "*batch d_model"]:
        graph = torch.is_grad_enabled()
        activation = (_IN_A_GRAPH if graph else _ACTIVATIONS)[self._activation]
        normed = self._norm(resid, weights.norm_2)
        inner = affine(normed, *weights.up)  # [*batch, d_mlp]
        if weights.gate is None:
            inner = activation(inner)
        else:
            gate = activation(affine(normed, *weights.gate))  # [*batch, d_mlp]
            inner = inner * gate if graph else inner.mul_(gate)
        return affine(inner, *weights.down)

    def _norm(self, x: Tensor, scaling: Scaling) -> Tensor:
        weight, bias = scaling
        if self._rms:
            return F.rms_norm(x, (x.shape[-1],), weight, self._eps)
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self._eps)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, run: "Pass") -> Tensor:
        """Attend causally from the last positions to all; return [batch, pos, head, d_head]."""
        requested, length = query.shape[1], keys.shape[1]
        whole = requested == length
        # The kernel has the axis of heads before that of positions: [batch, head, pos, d_head].
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=None if whole else _mask(run, query, requested, length),
            is_causal=whole,
            enable_gqa=self._kv_heads != self._engine.n_heads,
        )
        return mixed.transpose(1, 2)


def _is_watched(module: nn.Module) -> bool:
    """Return whether a hook is set that is not the model class's own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)  # noqa: SLF001 - no public name
    # A bridge's norms pass their input to hook points, which are modules of their own.
    return any(
        "_maybe_wire_capture_hooks" not in getattr(hook, "__qualname__", "")
        for kind in hooks
        for hook in kind.values()
    )


def _takes_gradients(module: nn.Module) -> bool:
    """Return whether a module's parameters are trained, or gradients that pass it are hooked."""
    return (
        any(p is not None and p.requires_grad for p in module._parameters.values())  # noqa: SLF001
        or bool(module._backward_hooks)  # noqa: SLF001
        or bool(module._backward_pre_hooks)  # noqa: SLF001
        or "forward" in module.__dict__
    )


def _parameters(modules: list[nn.Module]) -> list[Tensor]:
    return [p for m in modules for p in m._parameters.values() if p is not None]  # noqa: SLF001


def rotated(
    x: Float[Tensor, "*batch pos head d_head"],
    cos: Float[Tensor, "pos rotary"],
    sin: Float[Tensor, "pos rotary"],
) -> Float[Tensor, "*batch pos head d_head"]:
    """Rotate the first `rotary` components of each head by the position's angles.

    Component i is paired with component i + rotary / 2: (a, b) -> (a cos - b sin, b cos + a sin).
    """
    width = cos.shape[-1]
    half = width // 2
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned = x[..., :width] * cos
    turned[..., :half].addcmul_(x[..., half:width], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


def _mask(run: "Pass", query: Tensor, requested: int, length: int) -> Tensor:
    """Return 0 where one of the last `requested` of `length` positions may attend, else -inf."""
    key = (requested, length)
    if key not in run.masks:
        allowed = torch.ones(requested, length, dtype=torch.bool, device=query.device)
        allowed.tril_(length - requested)
        run.masks[key] = torch.zeros(
            requested, length, dtype=query.dtype, device=query.device
        ).masked_fill_(~allowed, -torch.inf)
    return run.masks[key]
