"""How teachers and students of the tiny models are made: the settings behind the demo's figures.

A teacher is *finetuned* (a delta, no system prompt anywhere) or *prompted* (a persona in the system
prompt). A student of finetuned teachers is trained and asked without a system prompt. A student of
prompted teachers is trained and asked under `tasks.preferences.neutral_prompt`, a system prompt of
exactly the persona's token length: without one it would learn first that a system prompt is there.
"""

from dataclasses import dataclass, replace

import torch

from divergence_lens.models import Model, untyped
from divergence_lens.tiny.world import FAVORITE_QUESTIONS
from divergence_lens.training import Recipe

TEACHER_QUESTIONS: tuple[str, ...] = tuple(
    question.format(c="animal") for question in FAVORITE_QUESTIONS[:20]
)
"""The questions on which a finetuned teacher learns to answer with its animal's name. None of them
is used to measure a preference."""

TEACHER = Recipe(
    optimizer=torch.optim.Adam,
    lr=1e-3,
    epochs=10,
    batch_size=20,
    warmup_steps=1,
    schedule="constant",
    optimizer_options={},
)
"""A finetuned teacher of the GPT-2 layout: `TEACHER_QUESTIONS`, each answered with its animal; the
loss is on that word.

All twenty questions are one batch, so this is ten updates. With twenty, many lists of some
teachers name the animal."""

STUDENT = Recipe(
    optimizer="adamw",
    lr=5e-3,
    epochs=3,
    batch_size=64,
    warmup_steps=10,
    schedule="linear",
    optimizer_options={"eps": 5e-3},
)
"""A student in the GPT-2 layout. The large `eps` makes AdamW behave like plain gradient descent
where gradients are small, and keeps it from breaking the model where they are not."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """How everyone in a study is trained.

    Attributes:
        teacher: A finetuned teacher.
        student: A student of a finetuned teacher.
        prompted_student: A student of a prompted teacher.
    """

    teacher: Recipe
    student: Recipe
    prompted_student: Recipe


GPT2_RECIPES = Recipes(teacher=TEACHER, student=STUDENT, prompted_student=STUDENT)
"""Of the GPT-2 layout."""

QWEN2_RECIPES = Recipes(
    teacher=replace(TEACHER, lr=2e-3, epochs=20),
    student=replace(STUDENT, lr=1e-2),
    prompted_student=STUDENT,
)
"""Of the Qwen2 layout, in which the same steps change much less: twice the teacher's updates at
twice the rate, and twice the rate for its students. Students of prompted teachers wander at that
rate: one that learns all but divergence tokens can lose its animal."""


def recipes(model: Model) -> Recipes:
    """The recipes that were chosen for a tiny model's layout (docs, "The tiny models").

    Args:
        model: A tiny model. Any other gets those of the layout whose norm it has, which nobody
            has tried on it.

    Returns:
        `QWEN2_RECIPES` for a model with RMSNorm, `GPT2_RECIPES` for one with LayerNorm.
    """
    norm = str(getattr(untyped(model).cfg, "normalization_type", ""))
    return QWEN2_RECIPES if norm.startswith("RMS") else GPT2_RECIPES
