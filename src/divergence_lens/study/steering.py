"""A preference as a direction in the residual stream.

At each layer a preference is a mean difference of the residual stream between teacher and base
(arXiv 2606.00995). Three questions follow: does the student's difference point the same way, does
adding the teacher's difference to the base create the preference, and does removing that direction
from the student undo it?
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor

from divergence_lens._utils.batching import length_batches
from divergence_lens.chat import encode_prompts
from divergence_lens.data import preference_questions
from divergence_lens.engine import Engine, get_engine
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher, check_teacher

BASE = Teacher("base")
"""The untouched model without a system prompt."""


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """Where a condition moves the residual stream, mean over prompts, at their last position.

    Attributes:
        name: Of the condition.
        vectors: `[layer, d_model]`, its residual after each layer minus the base's.
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
        """The model with the vectors added after layers, at every position: is it sufficient?

        Args:
            model: The base, or anything of its size.
            layers: After which layers; None means all. A vector that is added passes through the
                layers above, so the effects of several layers add up.
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

        After a layer, the residual's component along the layer's vector is set to the component of
        the base's mean residual, at every position.

        Args:
            model: A student under its delta.
            layers: After which layers; None means all.

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


def steering_vectors(
    model: Model,
    teacher: Teacher,
    *,
    base: Teacher = BASE,
    prompts: Sequence[str] | None = None,
    batch_tokens: int = 8192,
) -> Steering:
    """How a condition differs from the base in the residual stream after each layer.

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
    """Mean residual after each layer at the last position of each prompt, float32 on the CPU."""
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
        prompts: As in `steering_vectors`.

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
