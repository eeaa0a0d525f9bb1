"""Cross-entropy of hidden states without the logits of all positions.

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
    rows = max(1, _CHUNK_ELEMENTS // d_vocab)
    apply: Callable[..., Tensor] = _ChunkedCrossEntropy.apply
    return apply(hidden, targets, weights, unembed, rows)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - `apply` takes no keywords
        ctx: Any,
        hidden: Float[Tensor, "pos d_model"],
        targets: Int64[Tensor, " pos"],
        weights: Float[Tensor, " pos"],
        unembed: Callable[[Tensor], Tensor],
        rows: int,
    ) -> Float[Tensor, ""]:
        gradient = torch.empty_like(hidden)  # [pos, d_model]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            part = hidden[chunk].detach().requires_grad_()  # [chunk, d_model]
            with torch.enable_grad():
                loss = weighted_cross_entropy(unembed(part), targets[chunk], weights[chunk])
            (gradient[chunk],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        (outer,) = gradients
        # The outer gradient is a scalar: dL/dh = dL/dloss dloss/dh.
        return (outer * gradient).to(gradient.dtype), None, None, None, None
