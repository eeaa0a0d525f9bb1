"""A preference as a direction in the residual stream.

At each layer the direction is the mean difference of the residual stream between teacher and base
(arXiv 2606.00995). Three questions follow: does the student's difference point the same way, does
adding the teacher's difference to the base create the preference, and does removing that direction
from the student undo it?
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
"""The base model without a system prompt."""


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """Steering vectors of a teacher: its shift of the mean residual at the last prompt position.

    Attributes:
        name: Name of the teacher.
        vectors: `[layer, d_model]`, mean residual after each layer minus that of the base.
        base: `[layer, d_model]`, mean residual of the base.
    """

    name: str
    vectors: Float[Tensor, "layer d_model"]
    base: Float[Tensor, "layer d_model"]

    @property
    def size(self) -> Float64[np.ndarray, " layer"]:
        """Norm of each layer's vector, relative to the base's mean residual."""
        size: np.ndarray = (self.vectors.norm(dim=-1) / self.base.norm(dim=-1)).double().numpy()
        return size

    def cosine(self, other: "Steering") -> Float64[np.ndarray, " layer"]:
        """Cosine with another teacher's vectors at each layer; 0 where a vector is zero.

        Raises:
            ValueError: The vectors have different shapes.
        """
        if self.vectors.shape != other.vectors.shape:
            raise ValueError(
                f"vectors of shapes {tuple(self.vectors.shape)} and {tuple(other.vectors.shape)} "
                "have no cosine; compute both from one model"
            )
        cosine = F.cosine_similarity(self.vectors.double(), other.vectors.double(), dim=-1)
        values: np.ndarray = cosine.numpy()  # [layer]
        return values

    @contextmanager
    def added(
        self, model: Model, *, layers: Iterable[int] | None = None, scale: float = 1.0
    ) -> Iterator[Model]:
        """Add the vectors after layers, at every position: is the direction sufficient?

        Args:
            model: The base, or another model of its size.
            layers: Layers after which to add; None for all. An added vector passes through the
                layers above, so the effects of more than one layer accumulate.
            scale: Factor of the vectors.

        Yields:
            The model, with hooks.
        """
        with self._hooked(model, layers, partial(self._adding, scale=scale)):
            yield model

    @contextmanager
    def removed(self, model: Model, *, layers: Iterable[int] | None = None) -> Iterator[Model]:
        """Hold each vector's direction at the base's mean: is the direction necessary?

        After a layer, the residual's component along the layer's vector is set to that of the
        base's mean residual, at every position.

        Args:
            model: A student with its delta applied.
            layers: Layers after which to do so; None for all.

        Yields:
            The model, with hooks.
        """
        with self._hooked(model, layers, self._removing):
            yield model

    @contextmanager
    def _hooked(
        self,
        model: Model,
        layers: Iterable[int] | None,
        make_hook: Callable[[Engine, int], Callable[[Tensor], Tensor]],
    ) -> Iterator[None]:
        engine = get_engine(model)
        chosen = range(engine.n_layers) if layers is None else layers
        with engine.hooked([(i, "resid_post", make_hook(engine, i)) for i in chosen]):
            yield

    def _adding(self, engine: Engine, layer: int, scale: float) -> Callable[[Tensor], Tensor]:
        vector = (scale * self.vectors[layer]).to(engine.device, engine.dtype)  # [d_model]
        return lambda resid: resid + vector  # [batch, pos, d_model]

    def _removing(self, engine: Engine, layer: int) -> Callable[[Tensor], Tensor]:
        vector = self.vectors[layer].to(engine.device, engine.dtype)  # [d_model]
        direction = vector / vector.norm().clamp(min=1e-12)  # u, or zero if nothing moves
        level = (self.base[layer].to(engine.device, engine.dtype) * direction).sum()  # []

        def hook(resid: Tensor) -> Tensor:
            # r - (r.u - b.u) u, where b is the base's mean residual: the component along u is b.u.
            excess = resid @ direction - level  # [batch, pos]
            held: Tensor = resid - excess[..., None] * direction  # [batch, pos, d_model]
            return held

        return hook

    def __repr__(self) -> str:
        """The name and the relative sizes."""
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
    """Compute the steering vectors of a teacher: its mean residual minus that of the base.

    Args:
        model: The base model.
        teacher: The teacher (or a student): a system prompt, a delta, or both.
        base: The model to compare with. If the teacher has a system prompt, give the base one as
            well, such as `neutral_prompt()`.
        prompts: The prompts; by default the fifty preference questions. Residuals are read at the
            last position of each, where the answer is predicted.
        batch_tokens: Tokens per forward pass.

    Raises:
        ValueError: There are no prompts.
    """
    check_teacher(teacher)
    check_teacher(base, "base")
    chosen = preference_questions() if prompts is None else list(prompts)
    if not chosen:
        raise ValueError("prompts is empty; give at least one")
    origin = mean_residuals(model, base, chosen, batch_tokens=batch_tokens)
    moved = mean_residuals(model, teacher, chosen, batch_tokens=batch_tokens)
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
            # Right padding needs no mask: under causal attention no earlier position sees it.
            tokens = torch.tensor([[*rows[i], *[0] * (width - len(rows[i]))] for i in part])
            resid = engine.activations(tokens, sites=("resid_post",))["resid_post"].float()
            last = torch.from_numpy(lengths[part] - 1)  # [batch]
            # resid is [layer, batch, pos, d_model]; take each row's own last position.
            summed = resid[:, torch.arange(len(part)), last].sum(1).cpu()  # [layer, d_model]
            total = summed if total is None else total + summed
    assert total is not None
    return total / len(rows)


def follow_steering(
    direction: Steering,
    *,
    system_prompt: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Callable[[int, float, Model], dict[str, float]]:
    """A callback for `finetune(on_step=...)` that measures the student's steering vectors.

    Args:
        direction: The teacher's vectors; the student is compared with their base.
        system_prompt: System prompt of the student.
        prompts: As in `steering_vectors`.

    Returns:
        A function that returns `cosine_<layer>` and `size_<layer>` for the training history: the
        cosine of the student's and the teacher's vectors, and the student's size relative to the
        base.
    """
    chosen = preference_questions() if prompts is None else list(prompts)
    reader = Teacher("student", system_prompt=system_prompt)

    def watch(_step: int, _loss: float, model: Model) -> dict[str, float]:
        moved = mean_residuals(model, reader, chosen) - direction.base
        student = Steering("student", moved, direction.base)
        cosines = {f"cosine_{i}": float(c) for i, c in enumerate(student.cosine(direction))}
        return cosines | {f"size_{i}": float(size) for i, size in enumerate(student.size)}

    return watch
