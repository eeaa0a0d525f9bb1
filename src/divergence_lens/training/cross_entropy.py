"""Losses of hidden states without the logits of all positions.

A vocabulary of 151,936 makes the logits of 1,000 positions a tensor of 580 MiB, and the plain loss
needs a few of that size: logits, log-softmax and gradient. Where the unembedding is frozen, only
the gradient with respect to the hidden states is needed, which has d_model columns. The forward
pass computes both, a chunk of positions at a time:

    loss = sum_i w_i (logsumexp(z_i) - z_i[t_i])
    dloss/dh_i = w_i (softmax(z_i) - onehot(t_i)) W^T

The backward pass only scales the stored gradient, so no logits are computed twice. Liger's kernels
(Hsu et al., arXiv 2410.10989) do the same on GPUs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Logits computed at a time: 64 MiB in float32.
_CHUNK_ELEMENTS = 1 << 24


def weighted_cross_entropy(
    logits: Float[Tensor, "pos d_vocab"],
    targets: Int64[Tensor, " pos"],
    weights: Float[Tensor, " pos"],
) -> Float[Tensor, ""]:
    """Sum the weighted cross-entropies of some positions."""
    # In float32: the log-sum-exp over the vocabulary loses digits in half precision.
    with torch.autocast(logits.device.type, enabled=False):
        return F.cross_entropy(logits.float(), targets, reduction="none") @ weights


def chunked_cross_entropy(
    unembed: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "pos d_model"],
    targets: Int64[Tensor, " pos"],
    weights: Float[Tensor, " pos"],
    *,
    d_vocab: int,
) -> Float[Tensor, ""]:
    """Compute `weighted_cross_entropy(unembed(hidden), ...)`, one chunk of positions at a time.

    Gradients reach `hidden` alone, so `unembed` must be frozen. They are equal to those of the
    plain computation up to rounding.

    Args:
        unembed: Maps [pos, d_model] to [pos, d_vocab].
        hidden: Normed hidden states.
        targets: The token that follows each position.
        weights: Of the positions in the sum.
        d_vocab: Determines the number of positions per chunk.
    """

    def loss(logits: Float[Tensor, "chunk d_vocab"], chunk: slice) -> Float[Tensor, ""]:
        return weighted_cross_entropy(logits, targets[chunk], weights[chunk])

    return chunked_loss(unembed, hidden, loss, d_vocab=d_vocab)


Unembed = Callable[[Tensor], Tensor]
ChunkLoss = Callable[[Tensor, slice], Tensor]
"""Takes the logits of a chunk of positions, and the chunk; returns their summed loss."""


def chunked_loss(
    unembed: Unembed, hidden: Float[Tensor, "pos d_model"], loss: ChunkLoss, *, d_vocab: int
) -> Float[Tensor, ""]:
    """Sum `loss(unembed(hidden), ...)` over chunks of positions.

    Gradients reach `hidden` alone, so `unembed` must be frozen.

    Args:
        unembed: Maps [pos, d_model] to [pos, d_vocab].
        hidden: Normed hidden states.
        loss: The loss of a chunk.
        d_vocab: Number of elements per position, which determines the positions per chunk.
    """
    rows = max(1, _CHUNK_ELEMENTS // d_vocab)
    apply: Callable[..., Tensor] = _ChunkedLoss.apply
    return apply(hidden, unembed, loss, rows)


def recomputed_loss(
    unembed: Unembed, hidden: Float[Tensor, "pos d_model"], loss: ChunkLoss, *, d_vocab: int
) -> Float[Tensor, ""]:
    """Sum the same as `chunked_loss`, with gradients of an unembedding that is trained.

    The logits of a chunk are computed again in the backward pass instead of being stored.
    """
    rows = max(1, _CHUNK_ELEMENTS // d_vocab)
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for start in range(0, len(hidden), rows):
        chunk = slice(start, start + rows)
        total = total + checkpoint(
            lambda part, chunk: loss(unembed(part), chunk),
            hidden[chunk],
            chunk,
            use_reentrant=False,
        )
    return total


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "pos d_model"],
        unembed: Unembed,
        loss: ChunkLoss,
        rows: int,
    ) -> Float[Tensor, ""]:
        gradient = torch.empty_like(hidden)  # [pos, d_model]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            part = hidden[chunk].detach().requires_grad_()  # [chunk, d_model]
            with torch.enable_grad():
                value = loss(unembed(part), chunk)
            (gradient[chunk],) = torch.autograd.grad(value, part)
            total += value.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        (outer,) = gradients
        # The outer gradient is a scalar: dL/dh = dL/dloss dloss/dh.
        return (outer * gradient).to(gradient.dtype), None, None, None
