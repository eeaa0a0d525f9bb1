"""Work that training can leave out without changing what is learned.

What the last block writes at a position whose logits nobody reads is not needed, and LoRA has no
use for the gradient of a whole matrix.
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
    """Run modules that treat each position by itself at some positions, with zeros at the others.

    Args:
        modules: They map [row, pos, width] to [row, pos, other width]; one that takes more than
            that, or gives something else, runs as it is.
        where: The positions that are read.
    """
    index = where.flatten().nonzero()[:, 0]

    def narrowed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Any, *args: Any, **kwargs: Any) -> Any:
            fits = isinstance(x, Tensor) and x.ndim == 3 and x.shape[:2] == where.shape
            if args or kwargs or not fits:
                return forward(x, *args, **kwargs)
            out = forward(x.flatten(0, 1).index_select(0, index)[None])
            if not isinstance(out, Tensor) or out.ndim != 3:
                return forward(x)
            whole = out.new_zeros(where.numel(), out.shape[-1]).index_copy(0, index, out[0])
            return whole.reshape(*where.shape, -1)

        return run

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(_forward(module, narrowed(module.forward)))
        yield


@contextmanager
def low_rank_gradients(linear: nn.Module, down: Tensor, up: Tensor, scale: float) -> Iterator[None]:
    """Let a linear layer whose weight holds `scale * down @ up` give gradients to these two alone.

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
    """Whether `low_rank_gradients` can serve this module."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


class _LowRank(torch.autograd.Function):
    """x W + b, where W holds `scale * down @ up`: the gradient of W itself is never formed."""

    @staticmethod
    def forward(  # noqa: PLR0917 - `apply` takes no keywords
        ctx: Any,
        x: Float[Tensor, "*batch n_in"],
        down: Float[Tensor, "n_in rank"],
        up: Float[Tensor, "rank n_out"],
        weight: Float[Tensor, "n_out n_in"],
        bias: Float[Tensor, "n_out"] | None,
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
        to_down = ctx.scale * (x.T @ (gradient @ up.T))
        to_up = ctx.scale * ((x @ down).T @ gradient)
        return inner, to_down, to_up, None, None, None


@contextmanager
def _forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's `forward`; its hooks stay."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = own
