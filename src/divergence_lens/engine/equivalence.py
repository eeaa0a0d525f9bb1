"""Comparisons made before an engine is used: with the model's own forward, and of fused blocks.

1. `OwnPass.run` runs a probe block by block through the model's own blocks.
2. `OwnPass.difference` compares its logits with those of the model's own forward.
3. `OwnPass.fused_difference` compares each fused block with the model's own block on the same
   residual.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from divergence_lens.models import Model, lens_model

if TYPE_CHECKING:
    from divergence_lens.engine.base import Engine
    from divergence_lens.engine.fused import FusedBlocks
    from divergence_lens.engine.passes import Pass

# The largest accepted `OwnPass.difference`. Measured on SmolLM2-135M (30 layers), stories260K and
# the bundled models, in both classes: at most 1.1e-5 in float32, 3.4e-9 in float64, and 0 in half
# precision on a CPU, where the same products are done; on a GPU they can depend on the batch.
_PASS_TOLERANCE = {
    torch.float32: 1e-4,
    torch.float64: 1e-6,
    torch.float16: 0.01,
    torch.bfloat16: 0.05,
}

# The largest accepted `fused_difference`. Both forms of a block do the same products in another
# order, so their updates differ by rounding, more where attention scores are large, since exp()
# turns an absolute error of a score into a relative error of a pattern. Measured on the same
# models: at most 4.7e-7 in float32, 7e-7 in float64 (Hugging Face's RMSNorm rounds to float32),
# 1.4e-3 in float16 and 0.026 in bfloat16 (whose unit is 0.004). Blocks with a wrong rotation,
# without the weight of a norm or without a bias are off by 0.16 or more in every type; an epsilon
# 100 times too large by 0.006 or more, which bfloat16 does not tell from rounding.
_FUSED_TOLERANCE = {
    torch.float32: 1e-4,
    torch.float64: 1e-5,
    torch.float16: 0.01,
    torch.bfloat16: 0.05,
}

_PROBE_TOKENS = 6


def pass_tolerance(dtype: torch.dtype) -> float:
    """Return the largest `OwnPass.difference` that counts as rounding."""
    return _PASS_TOLERANCE[dtype]


def fused_tolerance(dtype: torch.dtype) -> float:
    """Return the largest `fused_difference` that counts as rounding."""
    return _FUSED_TOLERANCE[dtype]


def probe_tokens(model: Model) -> Int[Tensor, "2 pos"]:
    """Return two rows of different ids, which reveal results that depend on a row.

    A row has six tokens, or fewer if the context is shorter.
    """
    cfg = lens_model(model).cfg
    device = next(model.parameters()).device
    first = torch.arange(min(_PROBE_TOKENS, int(cfg.n_ctx)), device=device)
    return torch.stack([first * 3, first * 5 + 1]) % int(cfg.d_vocab)  # [2, pos]


@dataclass(frozen=True)
class _Piece:
    """One piece of the probe, run through the model's own blocks.

    Attributes:
        run: The pass.
        start: Position of its first token in the probe.
        rows: The rows of the probe that it holds.
        resid: The residual before each block and after the last, `[row, pos, d_model]`.
        logits: `[row, pos, d_vocab]`, before the soft cap.
    """

    run: "Pass"
    start: int
    rows: Tensor
    resid: list[Tensor]
    logits: Tensor


class OwnPass:
    """The probe, run block by block through the model's own blocks.

    A causal model's probe is run in two pieces, the second with more and other rows than the first,
    as patching does.
    """

    def __init__(self, engine: "Engine", pieces: list[_Piece]) -> None:
        self._engine, self._pieces = engine, pieces

    @classmethod
    @torch.no_grad()
    def run(cls, engine: "Engine", tokens: Int[Tensor, "2 pos"]) -> "OwnPass":
        """Run a probe of two rows."""
        length = tokens.shape[1]
        # A context of one token has no second piece, and a bidirectional pass cannot be divided.
        cut = min(2, length - 1) if engine.causal else 0
        passes: list[tuple[Pass, int, Tensor, list[Tensor]]] = []
        past = None
        for start, stop in ((0, cut), (cut, length)):
            if start == stop:
                continue
            run = engine.begin(tokens[:, start:stop], past, keep=engine.causal)
            rows = torch.tensor([0, 1] if stop < length else [1, 0, 1], device=engine.device)
            resid = [run.resid[rows]]  # [row, pos, d_model]
            for layer in range(engine.n_layers):
                resid.append(engine.block(layer, resid[-1], run, rows=rows))
            passes.append((run, start, rows, resid))
            if stop < length:
                past = run.key_values()
        # The unembedding is often the largest matrix, so it is read once for both pieces.
        sizes = [resid[-1].shape[:2] for *_, resid in passes]
        flat = torch.cat([engine.norm(resid[-1]).flatten(0, 1) for *_, resid in passes])
        logits = engine._unembed(flat[None])[0]  # noqa: SLF001 - [row * pos, d_vocab], no soft cap
        parts = logits.split([size.numel() for size in sizes])
        pieces = [
            _Piece(*own, part.unflatten(0, size))
            for own, part, size in zip(passes, parts, sizes, strict=True)
        ]
        return cls(engine, pieces)

    @torch.no_grad()
    def difference(self, own: Float[Tensor, "2 pos d_vocab"]) -> float:
        """Compare with the model's own logits of `probe_tokens`.

        Returns:
            The largest difference, relative to the largest logit or 1.
        """
        scale = max(1.0, float(own.float().abs().max()))
        differences = []
        for piece in self._pieces:
            logits = self._engine.soft_cap(piece.logits).float()
            expected = own[piece.rows, piece.start : piece.start + logits.shape[1]].float()
            differences.append((logits - expected).abs().max())
        # A NaN is not greater than anything, so Python's max() could miss it.
        return float(torch.stack(differences).max()) / scale

    @torch.no_grad()
    def fused_difference(self, fused: "FusedBlocks") -> float:
        """Compare every fused block with the model's own block on the same residual.

        Final logits cannot be compared: each block amplifies the rounding of those
        before it, so a tolerance that fits 4 blocks rejects a correct model of 30. Here every block
        starts from the residual of the model's own blocks, and rounding does not accumulate. Blocks
        are compared without and with past keys and values; of the last block, the last positions
        alone are compared as well (`Engine.final` computes no others). So are the unembedding and
        the stored keys and values.

        Returns:
            The largest difference, relative to the update of its block (see `_update_difference`)
            or, for logits, keys and values, to their largest magnitude.
        """
        differences: list[float] = []
        last = self._engine.n_layers - 1
        for layer in range(last + 1):
            for piece in self._pieces:  # a block's weights are still in the cache for the second
                run, resid, own = piece.run, piece.resid[layer], piece.resid[layer + 1]
                run.rows = piece.rows
                stored = run.stored[layer]
                length = resid.shape[1]
                for since in {0, length - 1} if layer == last else {0}:
                    fast = fused.block(layer, resid, run, since)  # [row, pos - since, d_model]
                    differences.append(_update_difference(resid[:, since:], own[:, since:], fast))
                    differences += map(_relative_difference, stored, run.stored[layer])
                run.stored[layer] = stored
        piece = self._pieces[0]
        hidden = self._engine.norm(piece.resid[-1])
        differences.append(_relative_difference(piece.logits, fused.unembed(hidden)))
        return float(torch.tensor(differences).max())


def _update_difference(resid: Tensor, own: Tensor, fast: Tensor) -> float:
    """Return the largest |fast - own|, relative to the block's largest update at that position.

    The final additions round to the precision of the residual, which can be much larger than the
    update (massive activations: Sun et al., arXiv 2402.17762). So 4 units in the last place of each
    entry of the residual are allowed first. Dividing by the largest residual instead would hide
    errors in every other dimension.
    """
    allowed = 4 * torch.finfo(own.dtype).eps * torch.maximum(resid.abs(), own.abs()).double()
    resid, own, fast = resid.double(), own.double(), fast.double()
    excess = ((fast - own).abs() - allowed).clamp(min=0.0).amax(-1)  # [row, pos]
    update = (own - resid).abs().amax(-1)  # [row, pos]
    return float((excess / update.clamp(min=torch.finfo(torch.float32).tiny)).max())


def _relative_difference(own: Tensor, fast: Tensor) -> float:
    own, fast = own.double(), fast.double()
    scale = own.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float((fast - own).abs().max() / scale)
