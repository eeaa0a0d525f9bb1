"""Slow reference implementations of patching, and models with known answers."""

import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from divergence_lens.engine.factory import get_engine
from divergence_lens.models import lens_classes
from divergence_lens.pairs import Pairs

FOUR = (9, 12, 7, 10)


def random_pairs(
    vocab: int,
    *,
    lengths: tuple[int, ...] = FOUR,
    longer: tuple[int, ...] = (0, 0, 0, 0),
    seed: int = 0,
    **options: object,
) -> Pairs:
    """Pairs that differ in a span from position 2 on; `longer` adds tokens to corrupted spans."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupted = [], []
    for length, more in zip(lengths, longer, strict=True):
        row = torch.randint(0, vocab, (length,), generator=generator)
        span = torch.randint(0, vocab, (2 + more,), generator=generator)
        span[0] = (row[2] + 1) % vocab
        span[-1] = (row[3] + 1) % vocab
        clean.append(row)
        corrupted.append(torch.cat([row[:2], span, row[4:]]))
    n = len(clean)
    return Pairs.from_tokens(
        clean, corrupted, answers=list(range(1, n + 1)), foils=list(range(11, n + 11)), **options
    )


def assert_same(values: np.ndarray, expected: np.ndarray, atol: float = 1e-4) -> None:
    """Assert equality up to rounding, with NaN in the same cells."""
    np.testing.assert_array_equal(np.isnan(values), np.isnan(expected))
    np.testing.assert_allclose(values, expected, atol=atol)


def logit_difference(logits: Tensor, pairs: Pairs, i: int) -> Tensor:
    return logits[..., int(pairs.answers[i])] - logits[..., int(pairs.foils[i])]


def _writer(position: int, where: tuple, state: Tensor) -> Callable[[Tensor], Tensor]:
    def patch(activation: Tensor) -> Tensor:
        changed = activation.clone()
        changed[:, position][where] = state
        return changed

    return patch


@torch.no_grad()
def one_hook_per_cell(
    base_model: object,
    source_model: object,
    pairs: Pairs,
    site: str,
    *,
    noising: bool = True,
    metric: Callable[[Tensor, Pairs, int], Tensor] = logit_difference,
) -> np.ndarray:
    """The textbook loop: one whole forward pass for each cell, one pair at a time.

    In a unit, the state of the last base position is replaced by that of the last source position.
    """
    engine, other = get_engine(base_model), get_engine(source_model)
    heads = max(1, engine.site_heads(site))
    longest = max(len(pairs.columns(i)) for i in range(len(pairs)))
    values = np.full((len(pairs), engine.n_layers, longest, heads), np.nan, dtype=np.float32)
    for i in range(len(pairs)):
        base, source = pairs.clean[i][None], pairs.corrupted[i][None]
        if not noising:
            base, source = source, base
        states = other.activations(source, sites=(site,))[site]
        before = metric(engine.unembed(engine.final(base))[0, -1], pairs, i)
        for number, column in enumerate(pairs.columns(i)):
            here, there = column.clean[-1], column.corrupted[-1]
            if not noising:
                here, there = there, here
            for layer in range(engine.n_layers):
                for head in range(heads):
                    where = (slice(None), head) if engine.site_heads(site) else (slice(None),)
                    state = states[layer][:, there][where]
                    patch = _writer(here, where, state)
                    with engine.hooked([(layer, site, patch)]):
                        logits = engine.unembed(engine.final(base))[0, -1]
                    values[i, layer, number, head] = metric(logits, pairs, i) - before
    return values if engine.site_heads(site) else values[..., 0]


def hand_set(n_heads: int = 2, *, n_layers: int = 2, **options: object) -> object:
    """A HookedTransformer without norms and MLPs, all of whose weights are zero."""
    hooked = lens_classes().hooked
    if hooked is None:
        pytest.skip("weights are set by hand in a HookedTransformer, which this version lacks")
    from transformer_lens import HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=n_layers,
        d_model=32,
        n_ctx=8,
        d_head=8,
        n_heads=n_heads,
        d_vocab=8,
        attn_only=True,
        normalization_type=None,
        device="cpu",
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the class leaves in version 4
        model = hooked(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model.eval()


def induction_model() -> object:
    """A previous-token head (block 0, head 0) that feeds an induction head (block 1, head 0).

    The residual has four spans of 8: token, position, token before, output. After "... A B ... A"
    the model says B; head 1 of both blocks does nothing.
    """
    model = hand_set()
    token, position, before, output = (slice(8 * i, 8 * i + 8) for i in range(4))
    eye, sharp = torch.eye(8), 40.0
    with torch.no_grad():
        model.W_E[:, token] = eye
        model.W_pos[:, position] = eye
        model.W_U[output] = eye
        first, second = model.blocks[0].attn, model.blocks[1].attn
        first.W_Q[0, position] = sharp * torch.diag(torch.ones(7), -1)  # asks for position p - 1
        first.W_K[0, position] = eye
        first.W_V[0, token] = eye
        first.W_O[0][:, before] = eye
        second.W_Q[0, token] = sharp * eye  # asks for what came after this token
        second.W_K[0, before] = eye
        second.W_V[0, token] = eye
        second.W_O[0][:, output] = eye
    return model
