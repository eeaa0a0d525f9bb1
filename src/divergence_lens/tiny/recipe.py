"""How teachers and students of the tiny models are made: the settings behind the demo's figures.

A teacher is *finetuned* (a delta, no system prompt anywhere) or *prompted* (a persona in the system
prompt). A student of finetuned teachers is trained and asked without a system prompt. A student of
prompted teachers is trained and asked under `tasks.preferences.neutral_prompt`, a system prompt of
exactly the persona's token length: without one it would learn first that a system prompt is there.
"""

import torch

from divergence_lens.recipe import Recipe
from divergence_lens.tiny.world import FAVORITE_QUESTIONS

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
"""A finetuned teacher: `TEACHER_QUESTIONS`, each answered with its animal; the loss is on that
word.

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
"""A student of a finetuned teacher. The large `eps` makes AdamW behave like plain gradient descent
where gradients are small, and keeps it from breaking the model where they are not."""

PROMPTED_STUDENT = STUDENT
"""A student of a prompted teacher."""
