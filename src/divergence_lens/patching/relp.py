"""The propagation rules of RelP (Jafari et al. 2025, arXiv 2508.21258), as backward hooks."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from divergence_lens.engine import Engine, SiteFunction

# An input x nearer to zero than this is replaced by it in the secant f(x) / x.
_NEAR_ZERO = 1e-4


@contextmanager
def relevance_rules(engine: Engine) -> Iterator[None]:
    """Make backward passes follow the rules of RelP inside the context.

    Forward values do not change. In the backward pass, the scale of a norm is a constant (LN-rule),
    attention patterns are constants (AH-rule), an activation function f is the multiplication by
    f(x) / x (identity rule), and each factor of a gated product gets half of its relevance (half
    rule).

    Raises:
        ValueError: If the model does not expose its queries, keys or MLP activations.
    """
    functions: list[tuple[int, str, SiteFunction]] = []
    for layer in range(engine.n_layers):
        # AH-rule: without gradients of q and k, the attention pattern is a constant.
        functions += [(layer, name, Tensor.detach) for name in ("q", "k")]
        if "mlp_out" in engine.sites:
            functions += _mlp_rules(engine, layer)
    with ExitStack() as stack:
        for norm in engine.norms():
            handle = norm.register_forward_hook(_norm_rule)
            stack.callback(handle.remove)
        stack.enter_context(engine.hooked(functions))
        yield


def _norm_rule(norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The same output, with the norm's scale as a constant for the gradient (LN-rule).

    An output y = w x / s gets the gradient of y (s / s.detach()): the factor is 1, and its
    derivative cancels that of 1 / s.
    """
    centered, bias, eps = Engine.norm_kind(norm)
    x = inputs[0].float()
    if centered:
        x = x - x.mean(-1, keepdim=True)
    scale = (x.square().mean(-1, keepdim=True) + eps).sqrt()  # [..., 1]
    ratio = (scale / scale.detach()).to(output.dtype)
    scaled = output.detach() if bias is None else output.detach() - bias
    # Added, not multiplied: ratio - 1 is exactly 0, so the output keeps its bits.
    result: Tensor = output + scaled * (ratio - 1)
    return result


def _mlp_rules(engine: Engine, layer: int) -> list[tuple[int, str, SiteFunction]]:
    function, gated = engine.activation(layer)
    inputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[Tensor], None]:
        def record(activation: Tensor) -> None:
            inputs[name] = activation

        return record

    def post(activation: Tensor) -> Tensor:
        x = inputs.pop("pre")
        safe = torch.where(x.abs() < _NEAR_ZERO, _NEAR_ZERO, x).detach()
        # Identity rule: f(x) = x (f(x) / x), with the ratio as a constant.
        path = x * (function(safe) / safe)
        if gated:
            # Half rule: the gradient of the product a b is (b da + a db) / 2.
            other = inputs.pop("pre_linear")
            path = (path * other.detach() + path.detach() * other) / 2
        # The forward value is the activation's own; only the gradient is that of the path.
        return activation.detach() + (path - path.detach())

    rules: list[tuple[int, str, SiteFunction]] = [(layer, "mlp_pre", recorder("pre"))]
    if gated:
        rules.append((layer, "mlp_pre_linear", recorder("pre_linear")))
    return [*rules, (layer, "mlp_post", post)]
