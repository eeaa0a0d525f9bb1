"""How the preference gets into the student: as a direction, and through which gradients.

Two views beyond Schrodi et al. (arXiv 2509.23886). *Steering*: a preference is, at each layer, a
mean difference of the residual stream between teacher and base (arXiv 2606.00995); does a
student's difference point the same way, does adding the teacher's to the base make the preference,
and does taking it out of the student undo it? *Gradients*: does the gradient of the loss on number
lists point to the teacher's own preference more than to others (arXiv 2604.25779), on which tokens,
in which blocks?
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from divergence_lens._utils.batching import length_batches
from divergence_lens.chat import encode_prompts
from divergence_lens.data import preference_questions
from divergence_lens.engine import Engine, get_engine
from divergence_lens.examples import Example, with_ids
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher, check_teacher
from divergence_lens.training import Rows, Trainable, choose, pieces, training_rows

if TYPE_CHECKING:
    import pandas as pd

BASE = Teacher("base")
"""The untouched model without a system prompt."""


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """Where a condition moves the residual stream, mean over prompts, at their last position.

    Attributes:
        name: Of the condition.
        vectors: `[layer, d_model]`, its residual after each block minus the base's.
        base: `[layer, d_model]`, the base's.
    """

    name: str
    vectors: Float[Tensor, "layer d_model"]
    base: Float[Tensor, "layer d_model"]

    @property
    def size(self) -> Float64[np.ndarray, " layer"]:
        """Norm of each layer's vector over that of the base's mean residual."""
        size: np.ndarray = (self.vectors.norm(dim=-1) / self.base.norm(dim=-1)).double().numpy()
        return size

    def cosine(self, other: "Steering") -> Float64[np.ndarray, " layer"]:
        """Cosine of two conditions' vectors, layer by layer; 0 where one does not move.

        Raises:
            ValueError: They are of models of other sizes.
        """
        if self.vectors.shape != other.vectors.shape:
            raise ValueError(
                f"vectors of shapes {tuple(self.vectors.shape)} and {tuple(other.vectors.shape)} "
                "have no cosine; take both from one model"
            )
        found = F.cosine_similarity(self.vectors.double(), other.vectors.double(), dim=-1)
        cosine: np.ndarray = found.numpy()
        return cosine

    @contextmanager
    def added(
        self, model: Model, *, layers: Iterable[int] | None = None, scale: float = 1.0
    ) -> Iterator[Model]:
        """The model with the vectors added after blocks, at every position: is it sufficient?

        Args:
            model: The base, or anything of its size.
            layers: After which blocks; None means all. A vector that is added passes through the
                blocks above, so the effects of several layers add up.
            scale: Factor of the vectors.

        Yields:
            The model.
        """
        engine = get_engine(model)
        chosen = range(engine.n_layers) if layers is None else layers
        hooks = [(layer, "resid_post", self._adding(engine, layer, scale)) for layer in chosen]
        with engine.hooked(hooks):
            yield model

    @contextmanager
    def removed(self, model: Model, *, layers: Iterable[int] | None = None) -> Iterator[Model]:
        """The model with each vector's direction held at the base's mean: is it necessary?

        After a block, the residual's component along the block's vector is set to the component of
        the base's mean residual, at every position.

        Args:
            model: A student under its delta.
            layers: After which blocks; None means all.

        Yields:
            The model.
        """
        engine = get_engine(model)
        chosen = range(engine.n_layers) if layers is None else layers
        hooks = [(layer, "resid_post", self._removing(engine, layer)) for layer in chosen]
        with engine.hooked(hooks):
            yield model

    def _adding(self, engine: Engine, layer: int, scale: float) -> Callable[[Tensor], Tensor]:
        vector = (scale * self.vectors[layer]).to(engine.device, engine.dtype)
        return lambda resid: resid + vector

    def _removing(self, engine: Engine, layer: int) -> Callable[[Tensor], Tensor]:
        vector = self.vectors[layer].to(engine.device, engine.dtype)
        direction = vector / vector.norm().clamp(min=1e-12)
        level = (self.base[layer].to(engine.device, engine.dtype) * direction).sum()
        return lambda resid: resid - ((resid @ direction - level)[..., None] * direction)

    def __repr__(self) -> str:
        """Name and sizes."""
        sizes = ", ".join(f"{size:.2f}" for size in self.size)
        return f"Steering({self.name!r}, relative sizes by layer: {sizes})"

    def _repr_html_(self) -> str:
        import pandas as pd

        from divergence_lens._utils.tables import preview

        table = pd.DataFrame({"relative size": list(self.size)})
        return preview(self, table.rename_axis("layer"), rows=len(table))


def steering(
    model: Model,
    teacher: Teacher,
    *,
    base: Teacher = BASE,
    prompts: Sequence[str] | None = None,
    batch_tokens: int = 8192,
) -> Steering:
    """How a condition differs from the base in the residual stream after each block.

    Args:
        model: The base.
        teacher: The condition: a system prompt, a delta (a teacher's or a student's), or both.
        base: What it is compared with; with its own system prompt where the condition has one, such
            as `neutral_prompt()`.
        prompts: What is asked; the fifty preference questions if not given. The last position of
            each is read, where the answer is predicted.
        batch_tokens: Tokens per forward pass.

    Raises:
        ValueError: No prompts.
    """
    check_teacher(teacher)
    check_teacher(base, "base")
    asked = preference_questions() if prompts is None else list(prompts)
    if not asked:
        raise ValueError("there are no prompts; give at least one")
    origin = mean_residuals(model, base, asked, batch_tokens=batch_tokens)
    moved = mean_residuals(model, teacher, asked, batch_tokens=batch_tokens)
    return Steering(teacher.name, moved - origin, origin)


@torch.no_grad()
def mean_residuals(
    model: Model, teacher: Teacher, prompts: Sequence[str], *, batch_tokens: int = 8192
) -> Float[Tensor, "layer d_model"]:
    """Mean residual after each block at the last position of each prompt, float32 on the CPU."""
    tokenizer: Any = model.tokenizer
    encoded = encode_prompts(tokenizer, list(prompts), system_prompt=teacher.system_prompt)
    rows = [e.ids for e in encoded]
    lengths = np.array([len(row) for row in rows])
    total: Tensor | None = None
    with teacher.applied(model) as active:
        engine = get_engine(active)
        for part in length_batches(lengths, batch_tokens):
            width = int(lengths[part].max())
            tokens = torch.tensor([[*rows[i], *[0] * (width - len(rows[i]))] for i in part])
            kept = engine.activations(tokens, sites=("resid_post",))["resid_post"].float()
            last = torch.from_numpy(lengths[part] - 1)
            found = kept[:, torch.arange(len(part)), last].sum(1).cpu()
            total = found if total is None else total + found
    assert total is not None
    return total / len(rows)


def follow_steering(
    direction: Steering,
    *,
    system_prompt: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Callable[[int, float, Model], dict[str, float]]:
    """A watcher for `finetune(on_step=...)`: where the student has moved, update by update.

    Args:
        direction: Of the teacher; its base is the student's origin.
        system_prompt: The student's when asked.
        prompts: As in `steering`.

    Returns:
        A function that gives `cosine_<layer>` and `size_<layer>` for the history: the cosine of the
        student's and the teacher's vectors, and the student's size relative to the base.
    """
    asked = preference_questions() if prompts is None else list(prompts)
    reader = Teacher("student", system_prompt=system_prompt)

    def watch(_step: int, _loss: float, model: Model) -> dict[str, float]:
        moved = mean_residuals(model, reader, asked) - direction.base
        student = Steering("student", moved, direction.base)
        found = {f"cosine_{i}": float(c) for i, c in enumerate(student.cosine(direction))}
        return found | {f"size_{i}": float(size) for i, size in enumerate(student.size)}

    return watch


@dataclass(frozen=True, eq=False, repr=False)
class GradientAlignment:
    """Whether a step on some tokens is a step towards a preference, block by block.

    Attributes:
        parts: What the losses are on: "divergence" and "other" tokens.
        candidates: The preferences.
        cosine: `[part, block, candidate]`, cosine of the descent direction of the loss and the
            gradient of the log-probability of the candidate as an answer.
    """

    parts: tuple[str, ...]
    candidates: tuple[str, ...]
    cosine: Float64[np.ndarray, "part block candidate"]

    def centred(self) -> Float64[np.ndarray, "part block candidate"]:
        """The cosines minus their mean over candidates: what all preferences share is taken off."""
        centred: np.ndarray = self.cosine - self.cosine.mean(-1, keepdims=True)
        return centred

    def rank(self, target: str) -> np.ndarray:
        """`[part, block]`, place of the target's cosine among all candidates', 1 for the largest.

        The other candidates are the null: where the data carry nothing of the target, every place
        is as likely.

        Raises:
            ValueError: An unknown target.
        """
        own = self.cosine[..., self._place(target)]
        rank: np.ndarray = 1 + (self.cosine > own[..., None]).sum(-1)
        return rank

    def standing(self, target: str) -> np.ndarray:
        """`[part, block]`, how many standard deviations of the others it lies above their mean."""
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
        """One row per part, block and candidate: part, block, candidate, cosine, centred."""
        import pandas as pd

        places = [
            (part, block, candidate)
            for part in self.parts
            for block in range(self.cosine.shape[1])
            for candidate in self.candidates
        ]
        table = pd.DataFrame(places, columns=["part", "block", "candidate"])
        return table.assign(cosine=self.cosine.reshape(-1), centred=self.centred().reshape(-1))

    def __repr__(self) -> str:
        """Parts, blocks and candidates."""
        return (
            f"GradientAlignment({' and '.join(self.parts)} tokens, {self.cosine.shape[1]} blocks, "
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
    blocks = [list(_of_block(engine, layer, losses[0])) for layer in range(engine.n_layers)]
    cosine = [
        [[_cosine(loss, want, names) for want in wanted] for names in blocks] for loss in losses
    ]
    return GradientAlignment(("divergence", "other"), tuple(candidates), np.array(cosine))


def _of_block(engine: Engine, layer: int, gradients: Mapping[str, Tensor]) -> Iterator[str]:
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
    """Gradient of the mean cross-entropy over the masked tokens, for all blocks' parameters."""
    engine = get_engine(model)
    rows = training_rows(model, examples, mask=mask, system_prompt=system_prompt)
    chosen = choose(model)
    parameters = list(chosen.values())
    total = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    with Trainable(model, chosen), torch.enable_grad():
        for part in pieces(np.arange(len(rows)), rows.lengths, batch_tokens):
            loss = _loss(engine, rows, part) / float(rows.weights.sum())
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            total = [t if g is None else t + g.float() for t, g in zip(total, found, strict=True)]
    return dict(zip(chosen, total, strict=True))


def _loss(engine: Engine, rows: Rows, part: np.ndarray) -> Tensor:
    """Weighted sum of cross-entropies."""
    length = int(rows.lengths[part].max())
    index = torch.from_numpy(part).to(rows.weights.device)
    weights = rows.weights[index, :length]
    where = weights > 0
    hidden = engine.final(rows.tokens[index, :length])
    logits = engine.unembed(hidden[where]).float()
    losses = F.cross_entropy(logits, rows.targets[index, :length][where], reduction="none")
    return losses @ weights[where]
