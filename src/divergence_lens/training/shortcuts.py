"""Computations that training skips without changing the result.

The last layer's output is needed only at positions whose logits are read, and LoRA does not need
the gradient of a full matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


@contextmanager
def only_at(modules: Sequence[nn.Module], where: Bool[Tensor, "row pos"]) -> Iterator[None]:
    """Run position-wise modules at some positions only, with zeros at the others.

    Args:
        modules: Modules that map [row, pos, width] to [row, pos, other width]. A module with other
            inputs or outputs runs unchanged.
        where: The positions that are read.
    """
    index = where.flatten().nonzero()[:, 0]

    def narrowed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Any, *args: Any, **kwargs: Any) -> Any:
            fits = isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] == where.shape
            if args or kwargs or not fits:
                return forward(x, *args, **kwargs)
            out = forward(x.flatten(0, 1).index_select(0, index)[None])  # [1, selected, width]
            if not isinstance(out, Tensor) or out.ndim != 3:
                return forward(x)
            whole = out.new_zeros(where.numel(), out.shape[-1]).index_copy(0, index, out[0])
            return whole.reshape(*where.shape, -1)  # [row, pos, width]

        return run

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_forward(module, narrowed(module.forward)))
        yield


@contextmanager
def low_rank_gradients(linear: nn.Module, down: Tensor, up: Tensor, scale: float) -> Iterator[None]:
    """Let a linear layer whose weight contains `scale * down @ up` compute only their gradients.

    Args:
        linear: An `nn.Linear`, or transformers' `Conv1D`, whose weight is [in, out].
        down: [in, rank].
        up: [rank, out].
        scale: See above.
    """
    weight: Any = linear.weight
    bias: Any = linear.bias
    stored = weight if isinstance(linear, nn.Linear) else weight.T

    def run(x: Tensor) -> Tensor:
        apply: Callable[..., Tensor] = _LowRank.apply
        return apply(x, down, up, stored, bias, scale)

    with _forward(linear, run):
        yield


def has_low_rank_gradients(module: nn.Module) -> bool:
    """Whether `low_rank_gradients` supports this module."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


class _LowRank(torch.autograd.Function):
    """x W + b, where W = W0 + s A B: the gradient of W itself is never computed.

    With G = dL/dy: dL/dA = s x^T (G B^T) and dL/dB = s (x A)^T G. Both go through [.., rank] and
    never form the [n_in, n_out] matrix x^T G.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - `apply` takes no keywords
        ctx: Any,
        x: Float[Tensor, "*batch n_in"],
        down: Float[Tensor, "n_in rank"],
        up: Float[Tensor, "rank n_out"],
        weight: Float[Tensor, "n_out n_in"],
        bias: Float[Tensor, " n_out"] | None,
        scale: float,
    ) -> Float[Tensor, "*batch n_out"]:
        ctx.save_for_backward(x, down, up, weight)
        ctx.scale = scale
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, down, up, weight = ctx.saved_tensors
        (gradient,) = gradients
        inner = gradient @ weight if ctx.needs_input_grad[0] else None
        x, gradient = x.flatten(0, -2).to(down.dtype), gradient.flatten(0, -2).to(down.dtype)
        to_down = ctx.scale * (x.T @ (gradient @ up.T))  # [n_in, rank]
        to_up = ctx.scale * ((x @ down).T @ gradient)  # [rank, n_out]
        return inner, to_down, to_up, None, None, None


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's `forward`; its hooks still run."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own
