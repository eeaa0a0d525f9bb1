"""Sources of the patched-in state other than the counterfactual run.

*Ablations* remove a state: `zero` patches zeros into the clean run, `mean` the mean over the clean
runs of all pairs, position by position within each segment. *Causal tracing* (Meng et al. 2022,
arXiv 2202.05262) builds the corrupted run from the clean one, by adding Gaussian noise to the
embeddings of chosen tokens.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens.engine import Engine

# The number of tokens from which the spread of the embeddings is estimated.
_SAMPLE = 1024


@dataclass(frozen=True, kw_only=True)
class EmbeddingNoise:
    """Gaussian noise on the embeddings of the tokens of one segment.

    The corrupted run is then the clean row, under the clean weights, with noise added at the input
    of block 0. Each pair's noise depends only on the seed and on its tokens.

    Attributes:
        segment: Name of the segment whose embeddings get noise, such as `bias` or `user`.
        scale: Standard deviation of the noise, in units of the spread of the model's token
            embeddings (over all components, of at most 1024 evenly spaced tokens). Meng et al.
            take 3.
        seed: Seed of the noise.

    Raises:
        ValueError: If the scale is not positive.
    """

    segment: str = "bias"
    scale: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale is {self.scale}; use a positive number, such as 3")

    def __str__(self) -> str:
        """Its description in the metadata of results."""
        return f"noise on {self.segment} (scale {self.scale}, seed {self.seed})"

    def where(self, segments: tuple[str, ...]) -> Bool[np.ndarray, " pos"]:
        """Mask of the positions that get noise, for a row with these segments.

        Raises:
            ValueError: If no position is in the segment.
        """
        mask = np.array([name == self.segment for name in segments])
        if not mask.any():
            raise ValueError(
                f"no token is in the segment {self.segment!r} of the noise; "
                f"the row has {', '.join(dict.fromkeys(segments))}"
            )
        return mask

    @torch.no_grad()
    def draw(
        self, engine: Engine, row: Int64[Tensor, " pos"], segments: tuple[str, ...]
    ) -> Float[Tensor, "pos d_model"]:
        """Draw the noise of one clean row, in float32; it is zero outside the segment."""
        mask = torch.from_numpy(self.where(segments))
        # Seeded by the row itself, so that the noise does not depend on the order of the pairs; the
        # shift keeps the seed within 63 bits.
        digest = hashlib.sha256(f"{self.seed} {row.tolist()}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        noise = torch.randn(len(row), engine.d_model, generator=generator)  # [pos, d_model]
        noise[~mask] = 0.0
        return (noise * self.scale).to(engine.device) * embedding_spread(engine)


Corruption: TypeAlias = Literal["counterfactual", "mean", "zero"] | EmbeddingNoise


@torch.no_grad()
def embedding_spread(engine: Engine) -> float:
    """Standard deviation of the components of token embeddings around their mean."""
    step = -(-engine.d_vocab // _SAMPLE)
    tokens = torch.arange(0, engine.d_vocab, step, device=engine.device)
    # All tokens are at position 0, so subtracting the mean cancels a position embedding.
    embeddings = engine.begin(tokens[:, None]).resid[:, 0].float()  # [tokens, d_model]
    return float((embeddings - embeddings.mean(0)).square().mean().sqrt())
