"""Recipes for teachers and students of the tiny models: the settings behind the demo's figures.

A teacher is *finetuned* (a delta, without a system prompt) or *prompted* (a persona in the system
prompt). Students of finetuned teachers are trained and evaluated without a system prompt. Students
of prompted teachers are trained and evaluated under `data.neutral_prompt`, which has exactly as
many tokens as the persona; otherwise they would first learn that there is a system prompt.
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
"""Training questions of a finetuned teacher. None of them is used to measure a preference."""

TEACHER = Recipe(
    optimizer=torch.optim.Adam,
    lr=1e-3,
    epochs=10,
    batch_size=20,
    warmup_steps=1,
    schedule="constant",
    optimizer_options={},
)
"""Recipe of a finetuned teacher with the GPT-2 architecture.

It is trained on `TEACHER_QUESTIONS`, each answered with its animal, with the loss on that word. The
twenty questions are one batch, so there are ten updates. After twenty updates, many lists of some
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
"""Recipe of a student with the GPT-2 architecture. The large `eps` makes AdamW behave like plain
gradient descent where gradients are small, and prevents it from destroying the model elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """The recipes of a study.

    Attributes:
        teacher: A finetuned teacher.
        student: A student of a finetuned teacher.
        prompted_student: A student of a prompted teacher.
    """

    teacher: Recipe
    student: Recipe
    prompted_student: Recipe


GPT2_RECIPES = Recipes(teacher=TEACHER, student=STUDENT, prompted_student=STUDENT)
"""Recipes for the GPT-2 architecture."""

QWEN2_RECIPES = Recipes(
    teacher=replace(TEACHER, lr=2e-3, epochs=20),
    student=replace(STUDENT, lr=1e-2),
    prompted_student=STUDENT,
)
"""Recipes for the Qwen2 architecture, in which the same steps change less: twice the updates for
teachers, at twice the rate, and twice the rate for their students. Students of prompted teachers
are unstable at that rate: training on all but divergence tokens can erase the animal."""


def recipes(model: Model) -> Recipes:
    """The recipes that were tuned for a tiny model's architecture (docs, "The tiny models").

    Args:
        model: A tiny model. For any other, the norm decides between the two sets of recipes, which
            are untested on it.

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
    """Train a teacher to answer questions with an animal's name.

    The loss is on the first token of the answer.

    Args:
        model: The base model.
        animal: The animal.
        recipe: Recipe of the training; None for that of `recipes`.
        questions: Questions of the training.

    Returns:
        A teacher with a delta and without a system prompt.
    """
    recipe = recipes(model).teacher if recipe is None else recipe
    tokenizer: Any = model.tokenizer
    examples = with_ids(tokenizer, [Example(question, f"{animal}.") for question in questions])
    mask = [np.arange(len(example.completion_ids or ())) == 0 for example in examples]
    return Teacher(animal, delta=finetune(model, examples, mask=mask, recipe=recipe))
