"""Comparisons made before an engine is used: with the model's own forward, and of fused blocks.

1. `pass_difference` compares a pass block by block with the model's own forward.
2. `fused_difference` compares each fused block with the model's own block on the same residual.
"""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from divergence_lens.models import Model, lens_model

if TYPE_CHECKING:
    from divergence_lens.engine.base import Engine
    from divergence_lens.engine.fused import FusedBlocks
    from divergence_lens.engine.passes import KeyValues

# The largest accepted `fused_difference`. Both forms of a block do the same products in another
# order, so their updates differ by rounding: a few hundred units of float32 (6e-8 each), more where
# attention scores are large, since exp() turns an absolute error of a score into a relative error
# of a pattern. The 30 blocks of SmolLM2-135M reach 3e-6. A block with a wrong norm, mask,
# rotation or activation is off by 1e-3 or more.
_FUSED_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_FUSED_TOLERANCE_HALF = 0.05  # one unit of bfloat16 is 0.004


def fused_tolerance(dtype: torch.dtype) -> float:
    """Return the largest `fused_difference` that counts as rounding."""
    return _FUSED_TOLERANCE.get(dtype, _FUSED_TOLERANCE_HALF)


def probe_tokens(model: Model) -> Int[Tensor, "2 6"]:
    """Return two rows with different ids, which reveal results that depend on a row."""
    device = next(model.parameters()).device
    first = torch.arange(6, device=device)
    return torch.stack([first * 3, first * 5 + 1]) % int(lens_model(model).cfg.d_vocab)  # [2, 6]


@torch.no_grad()
def pass_difference(engine: "Engine", own: Float[Tensor, "2 pos d_vocab"]) -> float:
    """Compare a pass block by block with the model's own logits of `probe_tokens`.

    A causal model's pass is run in two pieces, with other and more rows than the pass began with,
    as patching does.

    Returns:
        The greatest difference, relative to the greatest logit or 1.
    """
    tokens = probe_tokens(engine.model)
    rows = torch.tensor([1, 0, 1], device=engine.device)
    start, past, compared = 0, None, []
    if engine.causal:
        start = 2
        hidden, past = engine.prefill(tokens[:, :start])
        compared.append((engine.unembed(hidden), own[:, :start]))
    run = engine.begin(tokens[:, start:], past)
    resid = run.resid[rows]  # [3, pos, d_model]
    for layer in range(engine.n_layers):
        resid = engine.block(layer, resid, run, rows=rows)
    compared.append((engine.unembed(engine.norm(resid)), own[rows, start:]))
    scale = max(1.0, float(own.float().abs().max()))
    return max(float((a.float() - b.float()).abs().max()) for a, b in compared) / scale


@torch.no_grad()
def fused_difference(engine: "Engine", fused: "FusedBlocks") -> float:
    """Compare every fused block with the model's own block on the same residual.

    Comparing final logits instead would not do: each block amplifies the rounding of those before
    it, so a tolerance that fits 4 blocks rejects a correct model of 30. Here every block starts
    from the residual of the model's own blocks, and rounding does not accumulate. The tokens run
    in two pieces, without and with past keys and values, and all positions and the last ones
    alone are compared. The unembedding and the stored keys and values are compared as well.

    Returns:
        The greatest difference, relative to the update of its block (see `_update_difference`) or,
        for logits, keys and values, to their greatest magnitude.
    """
    tokens = probe_tokens(engine.model)
    past: KeyValues | None = None
    differences: list[float] = []
    for part in (tokens[:, :2], tokens[:, 2:]):
        run = engine.begin(part, past, keep=True)
        resid = run.resid  # [2, pos, d_model]
        for layer in range(engine.n_layers):
            own = engine.block(layer, resid, run)  # [2, pos, d_model]
            stored = run.stored[layer]
            for since in (0, 1):
                fast = fused.block(layer, resid, run, since)  # [2, pos - since, d_model]
                differences.append(_update_difference(resid[:, since:], own[:, since:], fast))
            differences += map(_relative_difference, stored, run.stored[layer])
            run.stored[layer] = stored
            resid = own
        hidden = engine.norm(resid)
        plain = engine._unembed(hidden)  # noqa: SLF001 - the model's own unembedding
        differences.append(_relative_difference(plain, fused.unembed(hidden)))
        past = run.key_values()
    # A NaN is not greater than anything, so max() could miss it.
    return float(torch.tensor(differences).max())


def _update_difference(resid: Tensor, own: Tensor, fast: Tensor) -> float:
    """Return the greatest |fast - own|, relative to the block's greatest update at that position.

    The final additions round to the precision of the residual, which can be much larger than the
    update (massive activations: Sun et al., arXiv 2402.17762). So 4 units in the last place of each
    entry of the residual are allowed first. Dividing by the largest residual instead would hide
    errors in every other dimension.
    """
    allowed = 4 * torch.finfo(own.dtype).eps * torch.maximum(resid.abs(), own.abs()).double()
    resid, own, fast = resid.double(), own.double(), fast.double()
    excess = ((fast - own).abs() - allowed).clamp(min=0.0).amax(-1)  # [batch, pos]
    update = (own - resid).abs().amax(-1)  # [batch, pos]
    return float((excess / update.clamp(min=torch.finfo(torch.float32).tiny)).max())


def _relative_difference(own: Tensor, fast: Tensor) -> float:
    own, fast = own.double(), fast.double()
    scale = own.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((fast - own).abs().max() / scale)
