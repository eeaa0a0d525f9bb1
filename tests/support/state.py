"""What a call must leave as it was: a model's weights, flags and hooks, and all random states."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from divergence_lens.provenance import fingerprint


def state(model: nn.Module) -> dict[str, object]:
    """Everything about `model` and the process that the library's calls must not change."""
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    return {
        "weights": fingerprint(model),
        "parameters": {name: id(parameter) for name, parameter in parameters.items()},
        "requires_grad": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": [name for name, p in parameters.items() if p.grad is not None],
        "training": [name for name, module in modules.items() if module.training],
        "hooks": {
            name: (
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                len(module._backward_hooks),
                len(module._backward_pre_hooks),
            )
            for name, module in modules.items()
        },
        "forwards": [name for name, module in modules.items() if "forward" in module.__dict__],
        "gradient mode": torch.is_grad_enabled(),
        "type": torch.get_default_dtype(),
        "torch's random state": torch.random.get_rng_state().tolist(),
        "numpy's random state": str(np.random.get_state()),  # noqa: NPY002
        # Not Python's: beartype draws from it, to look at one item of each list.
    }


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Fail if anything of `state` changes in the block, also where the block raises."""
    before = state(model)
    try:
        yield
    finally:
        after = state(model)
        changed = [name for name, value in before.items() if after[name] != value]
        assert not changed, f"{', '.join(changed)} changed"
