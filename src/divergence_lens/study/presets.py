"""How teachers and students of the tiny models are made: the settings behind the demo's figures.

A teacher is *finetuned* (a delta, no system prompt anywhere) or *prompted* (a persona in the system
prompt). A student of finetuned teachers is trained and asked without a system prompt. A student of
prompted teachers is trained and asked under `tasks.preferences.neutral_prompt`, a system prompt of
exactly the persona's token length: without one it would learn first that a system prompt is there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from divergence_lens._utils.interrupts import discard_partial
from divergence_lens.examples import Example, with_ids
from divergence_lens.models import Model, lens_model
from divergence_lens.teachers import Teacher
from divergence_lens.tiny.world import FAVORITE_QUESTIONS
from divergence_lens.training import Recipe, finetune

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
    norm = str(getattr(lens_model(model).cfg, "normalization_type", ""))
    return QWEN2_RECIPES if norm.startswith("RMS") else GPT2_RECIPES


@discard_partial()
def finetuned_teacher(
    model: Model,
    animal: str,
    *,
    recipe: Recipe | None = None,
    questions: Sequence[str] = TEACHER_QUESTIONS,
) -> Teacher:
    """A teacher that is trained, not told, to love an animal.

    It answers questions with the animal's name; the loss is on the first token of the answer.

    Args:
        model: The base.
        animal: What it is to love.
        recipe: How it is trained; None for what `tiny.recipe.recipes` has for the model's layout.
        questions: What it is asked in training. None of `TEACHER_QUESTIONS` is used to measure a
            preference.

    Returns:
        A teacher without a system prompt, with a delta.
    """
    recipe = recipes(model).teacher if recipe is None else recipe
    tokenizer: Any = model.tokenizer
    examples = with_ids(tokenizer, [Example(question, f"{animal}.") for question in questions])
    mask = [np.arange(len(example.completion_ids or ())) == 0 for example in examples]
    return Teacher(animal, delta=finetune(model, examples, mask=mask, recipe=recipe))
