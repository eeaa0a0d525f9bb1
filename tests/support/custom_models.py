"""TransformerLens's own models, built from a configuration and without a tokenizer."""

from typing import Any

import numpy as np
import torch


def custom_model(**changes: Any) -> Any:
    """Build a small random HookedTransformer; every bias and norm weight is random as well."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 16, "n_ctx": 12, "d_head": 8, "n_heads": 4, "d_vocab": 30}
    options = {"act_fn": "relu", "d_mlp": 32, "seed": 1, "normalization_type": "LN"}
    model = HookedTransformer(HookedTransformerConfig(**{**sizes, **options, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.3 if parameter.ndim == 1 else 0.2)
    return model.eval()


def small_modular_addition() -> Any:
    """Build the shape of Nanda et al.'s modular addition (arXiv 2301.05217), p = 23: `a b =`."""
    return custom_model(n_layers=1, n_ctx=3, d_vocab=24, d_vocab_out=23, normalization_type=None)


def random_rows(model: Any, n: int, length: int, seed: int = 0) -> torch.Tensor:
    """Draw `[n, length]` ids of the model's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.cfg.d_vocab, (n, length), generator=generator)


@torch.no_grad()
def patched_by_hand(
    model: Any,
    clean: torch.Tensor,
    corrupted: torch.Tensor,
    target: int,
    answer_foil: tuple[int, int],
) -> np.ndarray:
    """Noising of resid_post at every layer and position, with `run_with_hooks`."""
    answer, foil = answer_foil

    def metric(logits: torch.Tensor) -> float:
        return float(logits[0, target, answer] - logits[0, target, foil])

    _, cache = model.run_with_cache(corrupted[None])
    base = metric(model(clean[None]))
    grid = np.zeros((model.cfg.n_layers, len(clean)))
    for layer in range(model.cfg.n_layers):
        name = f"blocks.{layer}.hook_resid_post"
        for position in range(len(clean)):

            def patch(state, hook, name=name, position=position):
                state[:, position] = cache[name][:, position]
                return state

            grid[layer, position] = (
                metric(model.run_with_hooks(clean[None], fwd_hooks=[(name, patch)])) - base
            )
    return grid
