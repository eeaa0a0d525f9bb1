"""What is put into the patched run, when it is not the counterfactual's own state.

*Ablations* take a state away: `zero` puts zeros into the clean run, `mean` the mean of the clean
runs of all pairs at the same place. *Causal tracing* (Meng et al. 2022, arXiv 2202.05262) makes a
corrupted run of the clean one, by adding Gaussian noise to the embeddings of chosen tokens.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens.engine import Engine

_SAMPLE = 1024


@dataclass(frozen=True, kw_only=True)
class EmbeddingNoise:
    """Gaussian noise on the embeddings of the tokens of one segment; the weights stay the clean's.

    The corrupted run then is the clean row with noise added where it enters block 0, so that it has
    the clean row's length. Every pair draws its own noise, from the seed and its tokens alone.

    Attributes:
        segment: Name of the segment whose tokens are disturbed, such as `bias` or `user`.
        scale: Standard deviation of the noise, in units of the spread of the model's token
            embeddings (over all components, of at most 1024 evenly spaced tokens). Meng et al.
            take 3.
        seed: Of the draws.

    Raises:
        ValueError: If the scale is not positive.
    """

    segment: str = "bias"
    scale: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale is {self.scale}; noise needs a positive one, such as 3")

    def __str__(self) -> str:
        """As headers of results name it."""
        return f"noise on {self.segment} (scale {self.scale}, seed {self.seed})"

    def where(self, segments: tuple[str, ...]) -> Bool[np.ndarray, " pos"]:
        """Which positions of a row with these segments are disturbed.

        Raises:
            ValueError: If there is none.
        """
        there = np.array([name == self.segment for name in segments])
        if not there.any():
            raise ValueError(
                f"no token is in the segment {self.segment!r} that the noise is for; "
                f"the row has {', '.join(dict.fromkeys(segments))}"
            )
        return there

    @torch.no_grad()
    def draw(
        self, engine: Engine, row: Int64[Tensor, " pos"], segments: tuple[str, ...]
    ) -> Float[Tensor, "pos d_model"]:
        """The noise of one clean row, float32, on the model's device; zero outside the segment."""
        there = torch.from_numpy(self.where(segments))
        digest = hashlib.sha256(f"{self.seed} {row.tolist()}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        noise = torch.randn(len(row), engine.d_model, generator=generator)
        noise[~there] = 0.0
        return (noise * self.scale).to(engine.device) * embedding_spread(engine)


Corruption: TypeAlias = Literal["counterfactual", "mean", "zero"] | EmbeddingNoise


@torch.no_grad()
def embedding_spread(engine: Engine) -> float:
    """Standard deviation of the components of token embeddings about their mean."""
    step = -(-engine.d_vocab // _SAMPLE)
    tokens = torch.arange(0, engine.d_vocab, step, device=engine.device)
    # At one position, a position embedding is the same for all and falls out with the mean.
    embeddings = engine.begin(tokens[:, None]).resid[:, 0].float()
    return float((embeddings - embeddings.mean(0)).square().mean().sqrt())
