"""Control masks: as many tokens as there are divergence tokens, selected by another rule."""

import numpy as np
from jaxtyping import Bool

from divergence_lens.divergence import Divergence


def random_mask(
    divergence: Divergence, *, among: str = "all", seed: int = 0
) -> Bool[np.ndarray, " tokens"]:
    """Draw as many random tokens as there are divergence tokens: a control for their number.

    Args:
        divergence: Determines the number.
        among: "all" completion tokens, or only tokens that are not divergence tokens ("other").
        seed: Seed of the draw.

    Raises:
        ValueError: There are too few other tokens, or `among` is neither.
    """
    if among not in ("all", "other"):
        raise ValueError(f'among is {among!r}; use "all" or "other"')
    n = int(divergence.mask.sum())
    places = np.flatnonzero(~divergence.mask if among == "other" else divergence.tokens >= 0)
    if n > len(places):
        raise ValueError(f"{n} tokens cannot be drawn from the {len(places)} others")
    mask = np.zeros(len(divergence.tokens), dtype=bool)
    mask[np.random.default_rng(seed).permutation(places)[:n]] = True
    return mask


def highest(scores: np.ndarray, n: int) -> Bool[np.ndarray, " tokens"]:
    """Mask of the `n` tokens with the highest score; ties go to the earlier token.

    Args:
        scores: One number per completion token, such as `Divergence.advantage`.
        n: Number of tokens.

    Raises:
        ValueError: There are fewer tokens, or a score is NaN.
    """
    if not 0 <= n <= len(scores):
        raise ValueError(f"n is {n}; there are {len(scores)} tokens")
    if np.isnan(scores).any():
        raise ValueError("the scores hold NaN")
    mask = np.zeros(len(scores), dtype=bool)
    mask[np.argsort(-scores, kind="stable")[:n]] = True
    return mask
