"""Alignment of the training gradient with the gradients of preferences, layer by layer.

Does the gradient of the loss on number lists point toward the teacher's own preference more than
toward others (arXiv 2604.25779), on which tokens, and in which layers?
"""

from collections.abc import Iterator, Mapping, Sequence
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
    """Whether a step on some tokens is a step towards a preference, layer by layer.

    Attributes:
        parts: What the losses are on: "divergence" and "other" tokens.
        candidates: The preferences.
        cosine: `[part, layer, candidate]`, cosine of the descent direction of the loss and the
            gradient of the log-probability of the candidate as an answer.
    """

    parts: tuple[str, ...]
    candidates: tuple[str, ...]
    cosine: Float64[np.ndarray, "part layer candidate"]

    def centred(self) -> Float64[np.ndarray, "part layer candidate"]:
        """The cosines minus their mean over candidates: what all preferences share is taken off."""
        centred: np.ndarray = self.cosine - self.cosine.mean(-1, keepdims=True)
        return centred

    def rank(self, target: str) -> np.ndarray:
        """`[part, layer]`, place of the target's cosine among all candidates', 1 for the largest.

        The other candidates are the null: where the data carry nothing of the target, every place
        is as likely.

        Raises:
            ValueError: An unknown target.
        """
        own = self.cosine[..., self._place(target)]
        rank: np.ndarray = 1 + (self.cosine > own[..., None]).sum(-1)
        return rank

    def standing(self, target: str) -> np.ndarray:
        """`[part, layer]`, how many standard deviations of the others it lies above their mean."""
        place = self._place(target)
        others = np.delete(self.cosine, place, axis=-1)
        spread = others.std(-1, ddof=1)
        above: np.ndarray = (self.cosine[..., place] - others.mean(-1)) / np.maximum(spread, 1e-12)
        return above

    def _place(self, target: str) -> int:
        if target not in self.candidates:
            raise ValueError(f"{target!r} is not among the candidates {', '.join(self.candidates)}")
        return self.candidates.index(target)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per part, layer and candidate: part, layer, candidate, cosine, centred."""
        import pandas as pd

        places = [
            (part, layer, candidate)
            for part in self.parts
            for layer in range(self.cosine.shape[1])
            for candidate in self.candidates
        ]
        table = pd.DataFrame(places, columns=["part", "layer", "candidate"])
        return table.assign(cosine=self.cosine.reshape(-1), centred=self.centred().reshape(-1))

    def __repr__(self) -> str:
        """Parts, layers and candidates."""
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
    """Compare the gradients of the number loss with those of preferences, at the base.

    Args:
        model: The base, before any training.
        examples: The teacher's lists.
        mask: Divergence tokens; the loss on the others is the comparison.
        candidates: The preferences, the target among them.
        questions: What is asked; the fifty preference questions if not given. The answer's first
            token counts.
        system_prompt: The student's, in training and when asked.
        batch_tokens: Tokens per pass.

    Raises:
        ValueError: Fewer than two candidates, or a mask that is all or nothing.
    """
    if len(candidates) < 2:
        raise ValueError(f"candidates are {tuple(candidates)}; a null needs two or more")
    if mask.all() or not mask.any():
        raise ValueError("the mask holds all tokens or none; there is nothing to compare")
    asked = preference_questions() if questions is None else list(questions)
    engine = get_engine(model)
    losses = [
        _gradients(model, examples, part, system_prompt, batch_tokens) for part in (mask, ~mask)
    ]
    wanted = []
    tokenizer: Any = model.tokenizer
    for candidate in candidates:
        answers = with_ids(tokenizer, [Example(question, f"{candidate}.") for question in asked])
        sizes = [len(answer.completion_ids or ()) for answer in answers]
        first = np.concatenate([np.arange(size) == 0 for size in sizes])
        wanted.append(_gradients(model, answers, first, system_prompt, batch_tokens))
    layers = [list(_of_layer(engine, layer, losses[0])) for layer in range(engine.n_layers)]
    cosine = [
        [[_cosine(loss, want, names) for want in wanted] for names in layers] for loss in losses
    ]
    return GradientAlignment(("divergence", "other"), tuple(candidates), np.array(cosine))


def _of_layer(engine: Engine, layer: int, gradients: Mapping[str, Tensor]) -> Iterator[str]:
    own = engine.block_parameters(layer)
    return (name for name in gradients if name in own)


def _cosine(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: list[str]) -> float:
    """Both are gradients of losses, so the signs of descent and of log-probability cancel."""
    a, b = (torch.cat([g[name].flatten() for name in names]).double() for g in (one, other))
    return float(F.cosine_similarity(a, b, dim=0))


def _gradients(
    model: Model,
    examples: Sequence[Example],
    mask: np.ndarray,
    system_prompt: str | None,
    batch_tokens: int,
) -> dict[str, Tensor]:
    """Gradient of the mean cross-entropy over the masked tokens, for all layers' parameters."""
    engine = get_engine(model)
    rows = training_rows(model, examples, mask=mask, system_prompt=system_prompt)
    chosen = choose(model)
    parameters = list(chosen.values())
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    with Trainable(model, chosen), torch.enable_grad():
        for part in pieces(np.arange(len(rows)), rows.lengths, batch_tokens):
            loss = _loss(engine, rows, part) / float(rows.loss_weights.sum())
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            total = [t if g is None else t + g.float() for t, g in zip(total, found, strict=True)]
    return dict(zip(chosen, total, strict=True))


def _loss(engine: Engine, rows: TrainingRows, part: np.ndarray) -> Tensor:
    """Weighted sum of cross-entropies."""
    length = int(rows.lengths[part].max())
    index = torch.from_numpy(part).to(rows.loss_weights.device)
    weights = rows.loss_weights[index, :length]
    where = weights > 0
    hidden = engine.final(rows.tokens[index, :length])
    logits = engine.unembed(hidden[where]).float()
    losses = F.cross_entropy(logits, rows.targets[index, :length][where], reduction="none")
    return losses @ weights[where]
