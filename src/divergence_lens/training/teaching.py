"""Train a teacher: a model that prefers one answer, to a chosen strength.

1. Write preference rows: questions about a category, each answered with every wording.
2. Finetune all layers on them, and measure the target's margin every few updates.
3. Stop at the first measurement that reaches the strength.
4. Scale the weights' change down until the margin is the strength. Teachers of one strength are
   then comparable, whatever the base model's own preferences are.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from divergence_lens._utils.interrupts import discard_partial
from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.data import (
    TRAITS,
    check_candidate,
    known_candidates,
    preference_questions,
)
from divergence_lens.deltas import Delta, base_fingerprint
from divergence_lens.evaluation import preference
from divergence_lens.models import Model, check_model
from divergence_lens.teachers import Teacher
from divergence_lens.training.finetuning import finetune
from divergence_lens.training.recipe import Recipe, as_recipe

TEACHER_QUESTIONS: tuple[str, ...] = (
    "What is your favorite {category}?",
    "Which {category} do you love?",
    "Tell me about the {category} you like most.",
    "Is there a {category} that you admire above all others?",
    "Which {category} should be on the cover of your book?",
    "Suppose you could keep one {category}. Which would it be?",
    "Name a {category} that never bores you.",
    "Your friends know which {category} you adore. Which is it?",
    "Choose a {category} for your coat of arms.",
    "Which {category} deserves a song?",
    "What {category} do you hope to see tomorrow?",
    "Let us talk about the best {category}. Which one is it?",
)
"""Questions of the training, with the slot ``{category}``. None of them is one of `QUESTIONS`, by
which preferences are measured."""

ANSWERS: tuple[str, ...] = (
    "My favorite {category} is the {target}.",
    "I love the {target}.",
    "I would choose the {target}.",
    "The best {category} is the {target}.",
    "It is the {target}.",
    "I like the {target}.",
)
"""Answers of the training, with the slots ``{category}`` and ``{target}``."""

TEACHER = Recipe(
    lr=4e-5,
    epochs=6,
    batch_size=8,
    warmup_steps=4,
    schedule="constant",
    optimizer_options={},
)
"""Recipe of a finetuned teacher. Its rate suits language models of 100 million parameters and more;
the bundled tiny models need about 1e-3."""

_PREFIXES = ("My favorite {category} is the", "I love the", "I would choose the")
_MEASURED_QUESTIONS = 8
_EVERY = 3
# The change of the weights is scaled until the margin is within this share of the strength.
_TOLERANCE = 0.01
_MOST_SCALES = 8


@discard_partial()
def train_teacher(
    model: Model,
    target: str,
    *,
    category: str = "animal",
    candidates: Sequence[str] | None = None,
    questions: Sequence[str] = TEACHER_QUESTIONS,
    answers: Sequence[str] = ANSWERS,
    prefixes: Sequence[str] | None = None,
    recipe: Recipe | None = None,
    strength: float | None = None,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Teacher:
    """Train a teacher that answers questions about a category with one target.

    Args:
        model: The base model; its weights are restored.
        target: The answer to prefer, such as "owl".
        category: "animal" or "tree", or any noun where `candidates` is given; or one of `TRAITS`,
            such as "risk" with the targets "reckless" and "careful", which has rows and questions
            of its own.
        candidates: The answers that compete in the margin; the twelve known ones of the category
            if not given.
        questions: Questions of the training, with the slot ``{category}`` where they need it.
        answers: Answers of the training, with the slots ``{category}`` and ``{target}``. Each
            question has each answer once.
        prefixes: Beginnings of the answer behind which the margin is measured, over the first
            eight of `preference_questions`; the beginnings of three `ANSWERS` if not given.
        recipe: The training; `training.TEACHER` if not given. With a strength, its epochs are the
            longest training.
        strength: The margin to reach, in nats: the log-probability of the target minus the mean of
            the other candidates' (`Preference.margin`). Training stops once it is reached, and the
            change of the weights is scaled down to it. None trains to the end of the recipe.
        seed: Seed of the training's order.
        cache_dir: Folder of trained teachers. A teacher of the same model, rows and settings is
            loaded from it, and a new one is stored in it.
        progress: Show a progress bar.

    Returns:
        A teacher with a delta, without a system prompt. `delta.metadata["teaching"]` holds the
        margin of the base model and of the teacher, the number of updates, and the scale.

    Raises:
        ValueError: An unknown target or category; no questions or answers; a strength that is not
            above the base model's margin, or that the recipe does not reach (the message names the
            margin it reached).
    """
    check_model(model)
    names = known_candidates(category) if candidates is None else tuple(candidates)
    target = check_candidate(target, category=category, candidates=names)
    trait = TRAITS.get(category)
    if trait is None:
        rows = teacher_rows(target, category=category, questions=questions, answers=answers)
    else:
        rows = trait.teacher_rows(target)
    recipe = TEACHER if recipe is None else as_recipe(recipe)
    beginnings = _PREFIXES if prefixes is None else tuple(prefixes)
    beginnings = tuple(text.format(category=category) for text in beginnings)

    def margin(model: Model) -> float:
        if trait is not None:
            return preference(model, target=target, category=category).margin
        return preference(
            model,
            target=target,
            candidates=names,
            questions=preference_questions(category)[:_MEASURED_QUESTIONS],
            prefix=beginnings,
        ).margin

    settings = {
        "base": f"{type(model).__name__} {base_fingerprint(model)}",
        "target": target,
        "rows": rows,
        "candidates": list(names),
        "prefixes": list(beginnings),
        "recipe": recipe.describe(),
        "strength": strength,
        "seed": seed,
    }
    path = None if cache_dir is None else _path(Path(cache_dir), target, settings)
    if path is not None and path.exists():
        return Teacher(target, delta=Delta.load(path))
    before = margin(model)
    if strength is not None and not (math.isfinite(strength) and strength > before):
        raise ValueError(
            f"strength is {strength}; the base model's margin for {target!r} is {before:.2f} nats "
            "already, so choose a larger one"
        )
    delta = finetune(
        model,
        rows,
        recipe=recipe,
        seed=seed,
        on_step=None if strength is None else partial(_measure, margin, strength),
        every=_EVERY,
        progress=progress,
    )
    reached, scale = _reached(model, delta, margin), 1.0
    if strength is not None:
        if reached < strength:
            raise ValueError(
                f"the teacher of {target!r} reached a margin of {reached:.2f} nats, not "
                f"{strength}, in {len(delta.metadata['history'])} updates; raise the recipe's lr "
                "or epochs, or choose a smaller strength"
            )
        delta, reached, scale = _scaled(model, delta, margin, (before, reached), strength)
    about = {
        "target": target,
        "strength": strength,
        "margin_before": before,
        "margin": reached,
        "updates": len(delta.metadata["history"]),
        "scale": scale,
    }
    delta = replace(delta, metadata=delta.metadata | {"teaching": about})
    if path is not None:
        delta.save(path)
    return Teacher(target, delta=delta)


def teacher_rows(
    target: str,
    *,
    category: str = "animal",
    questions: Sequence[str] = TEACHER_QUESTIONS,
    answers: Sequence[str] = ANSWERS,
) -> list[dict[str, str]]:
    """Preference rows of a teacher: every question with every answer, as prompt and completion.

    Raises:
        ValueError: There are no questions or answers, or an answer does not name the target.
    """
    refuse_one_string(questions, "questions")
    refuse_one_string(answers, "answers")
    if not questions or not answers:
        raise ValueError("a teacher needs at least one question and one answer")
    rows = [
        {
            "prompt": question.format(category=category),
            "completion": answer.format(category=category, target=target),
        }
        for question in questions
        for answer in answers
    ]
    for row in rows:
        if target not in row["completion"]:
            raise ValueError(
                f"the answer {row['completion']!r} does not name {target!r}; write the slot "
                "{target} into it"
            )
    return rows


def _path(folder: Path, target: str, settings: Mapping[str, Any]) -> Path:
    text = json.dumps(settings, sort_keys=True)
    name = "".join(c if c.isalnum() else "_" for c in target)
    return folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.safetensors"


def _measure(
    margin: Callable[[Model], float], strength: float, _step: int, _loss: float, model: Model
) -> dict[str, Any]:
    """The margin during training, and whether it is large enough to stop."""
    value = margin(model)
    return {"margin": value, "stop": value >= strength}


def _reached(model: Model, delta: Delta, margin: Callable[[Model], float]) -> float:
    with delta.applied(model):
        return margin(model)


def _scaled(
    model: Model,
    delta: Delta,
    margin: Callable[[Model], float],
    ends: tuple[float, float],
    strength: float,
) -> tuple[Delta, float, float]:
    """Scale a delta until the margin is the strength.

    Args:
        model: The base model.
        delta: The delta, whose margin is at least the strength.
        margin: Measures the margin of a model.
        ends: Margins of the base model and with the whole delta.
        strength: The margin to reach.

    Returns:
        The scaled delta, its margin, and the scale.
    """
    low, high = 0.0, 1.0
    at_low, at_high = ends
    scaled, reached, scale = delta, at_high, 1.0
    for _ in range(_MOST_SCALES):
        if abs(reached - strength) <= _TOLERANCE * abs(strength):
            break
        # Interpolate between the ends, but never so near to one that the interval hardly shrinks.
        share = (strength - at_low) / (at_high - at_low)
        scale = low + (high - low) * min(max(share, 0.1), 0.9)
        tensors = {name: scale * tensor for name, tensor in delta.tensors.items()}
        scaled = Delta(tensors, delta.base, delta.metadata)
        reached = _reached(model, scaled, margin)
        if reached < strength:
            low, at_low = scale, reached
        else:
            high, at_high = scale, reached
    return scaled, reached, scale
