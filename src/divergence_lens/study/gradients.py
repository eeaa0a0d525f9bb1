"""Alignment of the training gradient with the gradients of preferences, layer by layer.

Does the gradient of the loss on number lists point toward the teacher's own preference more than
toward others (arXiv 2604.25779), and on which tokens and in which layers?
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64
from torch import Tensor

from divergence_lens.data import preference_questions
from divergence_lens.engine import Engine, get_engine
from divergence_lens.examples import Example, with_ids
from divergence_lens.models import Model
from divergence_lens.training import Trainable, TrainingRows, choose, pieces, training_rows

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class GradientAlignment:
    """Alignment of an update on number lists with updates toward preferences, per layer.

    Attributes:
        parts: The tokens of the losses: "divergence" and "other".
        candidates: The preferences.
        cosine: `[part, layer, candidate]`, cosine between the descent direction of the loss and the
            gradient of the candidate's log-probability as an answer.
    """

    parts: tuple[str, ...]
    candidates: tuple[str, ...]
    cosine: Float64[np.ndarray, "part layer candidate"]

    def centered(self) -> Float64[np.ndarray, "part layer candidate"]:
        """The cosines minus their mean over candidates, which removes their shared part."""
        centered: np.ndarray = self.cosine - self.cosine.mean(-1, keepdims=True)
        return centered

    def rank(self, target: str) -> np.ndarray:
        """`[part, layer]`, rank of the target's cosine among all candidates, 1 for the largest.

        The other candidates are the null: if the data carry nothing of the target, all ranks are
        equally likely.

        Raises:
            ValueError: The target is not a candidate.
        """
        own = self.cosine[..., self._index(target)]  # [part, layer]
        rank: np.ndarray = 1 + (self.cosine > own[..., None]).sum(-1)  # [part, layer]
        return rank

    def z_score(self, target: str) -> np.ndarray:
        """`[part, layer]`, distance from the others' mean, in their standard deviations."""
        index = self._index(target)
        others = np.delete(self.cosine, index, axis=-1)  # [part, layer, candidate - 1]
        spread = np.maximum(others.std(-1, ddof=1), 1e-12)
        score: np.ndarray = (self.cosine[..., index] - others.mean(-1)) / spread  # [part, layer]
        return score

    def _index(self, target: str) -> int:
        if target not in self.candidates:
            raise ValueError(f"{target!r} is not among the candidates {', '.join(self.candidates)}")
        return self.candidates.index(target)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per part, layer and candidate: part, layer, candidate, cosine, centered."""
        import pandas as pd

        axes = [self.parts, range(self.cosine.shape[1]), self.candidates]
        index = pd.MultiIndex.from_product(axes, names=["part", "layer", "candidate"])
        values = {"cosine": self.cosine.reshape(-1), "centered": self.centered().reshape(-1)}
        return pd.DataFrame(values, index=index).reset_index()

    def __repr__(self) -> str:
        """The numbers of parts, layers and candidates."""
        return (
            f"GradientAlignment({' and '.join(self.parts)} tokens, {self.cosine.shape[1]} layers, "
            f"{len(self.candidates)} candidates)"
        )

    def _repr_html_(self) -> str:
        from divergence_lens._utils.tables import preview

        return preview(self, self.to_dataframe())


def gradient_alignment(
    model: Model,
    examples: Sequence[Example],
    mask: Bool[np.ndarray, " tokens"],
    *,
    candidates: Sequence[str],
    questions: Sequence[str] | None = None,
    system_prompt: str | None = None,
    batch_tokens: int = 8192,
) -> GradientAlignment:
    """Compare the gradient of the number loss with those of preferences, at the base model.

    Args:
        model: The base model, before any training.
        examples: The teacher's lists.
        mask: Flags of the divergence tokens; the loss on all others is the comparison.
        candidates: The preferences, including the target.
        questions: The questions; by default the fifty preference questions. The loss is on the
            first token of the answer.
        system_prompt: System prompt of the student.
        batch_tokens: Tokens per forward pass.

    Raises:
        ValueError: There are fewer than two candidates, or the mask selects all tokens or none.
    """
    if len(candidates) < 2:
        raise ValueError(f"candidates are {tuple(candidates)}; the null needs two or more")
    if mask.all() or not mask.any():
        raise ValueError(
            "the mask selects all tokens or none; select some, and leave some to compare"
        )
    chosen = preference_questions() if questions is None else list(questions)
    engine = get_engine(model)
    losses = [
        _gradients(model, examples, part, system_prompt, batch_tokens) for part in (mask, ~mask)
    ]
    answers = []
    tokenizer: Any = model.tokenizer
    for candidate in candidates:
        texts = with_ids(tokenizer, [Example(question, f"{candidate}.") for question in chosen])
        sizes = [len(text.completion_ids or ()) for text in texts]
        first = np.concatenate([np.arange(size) == 0 for size in sizes])  # [tokens]
        answers.append(_gradients(model, texts, first, system_prompt, batch_tokens))
    parameters = [engine.block_parameters(layer) for layer in range(engine.n_layers)]
    names = [[name for name in losses[0] if name in own] for own in parameters]
    cosine = [[[_cosine(loss, a, own) for a in answers] for own in names] for loss in losses]
    return GradientAlignment(("divergence", "other"), tuple(candidates), np.array(cosine))


def _cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: list[str]) -> float:
    # Both are gradients of losses: descent on the lists is -g, and the gradient of the answer's
    # log-probability is -h. The signs cancel.
    a, b = (torch.cat([g[name].flatten() for name in names]).double() for g in (one, other))
    return float(F.cosine_similarity(a, b, dim=0))


def _gradients(
    model: Model,
    examples: Sequence[Example],
    mask: np.ndarray,
    system_prompt: str | None,
    batch_tokens: int,
) -> dict[str, Tensor]:
    """Gradient of the mean cross-entropy of the masked tokens, for the parameters of all layers."""
    engine = get_engine(model)
    rows = training_rows(model, examples, mask=mask, system_prompt=system_prompt)
    chosen = choose(model)
    parameters = list(chosen.values())
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    with Trainable(model, chosen), torch.enable_grad():
        for part in pieces(np.arange(len(rows)), rows.lengths, batch_tokens):
            # Divide by the weights of all batches, so that gradients of batches add up to the mean.
            loss = _loss(engine, rows, part) / float(rows.loss_weights.sum())
            batch = torch.autograd.grad(loss, parameters, allow_unused=True)
            total = [t if g is None else t + g.float() for t, g in zip(total, batch, strict=True)]
    return dict(zip(chosen, total, strict=True))


def _loss(engine: Engine, rows: TrainingRows, part: np.ndarray) -> Tensor:
    """Weighted sum of the cross-entropies of the rows `part`."""
    length = int(rows.lengths[part].max())
    index = torch.from_numpy(part).to(rows.loss_weights.device)
    weights = rows.loss_weights[index, :length]  # [batch, pos]
    where = weights > 0
    hidden = engine.final(rows.tokens[index, :length])  # [batch, pos, d_model]
    # Unembed only tokens with a loss: the vocabulary is the largest axis.
    logits = engine.unembed(hidden[where]).float()  # [tokens, vocabulary]
    losses = F.cross_entropy(logits, rows.targets[index, :length][where], reduction="none")
    return losses @ weights[where]
