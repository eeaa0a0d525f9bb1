"""Candidate biases, and the teachers that have them: the auditors.

A *prompted* auditor carries its bias in a system prompt, a *finetuned* one in its weights. Each
kind recognizes data by teachers of its own kind best, so an audit can use both.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.data import (
    ANIMALS,
    TREES,
    persona_prompt,
    preference_questions,
)
from divergence_lens.deltas import base_fingerprint
from divergence_lens.evaluation import form_ids
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher, check_teachers, prompted_teachers
from divergence_lens.training import TEACHER, Recipe, train_teacher

KINDS = ("prompted", "finetuned")
"""Kinds of auditors that `audit` makes; teachers of the user's own are of the kind "given"."""

# Below this number of parameters, a teacher needs larger steps.
_SMALL = 20_000_000
_SMALL_RECIPE = Recipe(
    optimizer=torch.optim.Adam,
    lr=1e-3,
    epochs=10,
    batch_size=20,
    warmup_steps=1,
    schedule="constant",
    optimizer_options={},
)

_CACHED = 64
_CACHE: dict[tuple[Any, ...], Teacher] = {}

_CATEGORIES = {"animal": frozenset(ANIMALS), "tree": frozenset(TREES)}


@dataclass(frozen=True)
class _Making:
    """How finetuned auditors are made."""

    names: tuple[str, ...]
    category: str
    recipe: Recipe | None
    strength: float | None
    seed: int
    cache_dir: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Auditors:
    """One teacher per candidate, all of one kind.

    Attributes:
        kind: "prompted", "finetuned" or "given".
        teachers: The teachers, in the order of the candidates.
    """

    kind: str
    teachers: tuple[Teacher, ...]


def candidate_names(
    candidates: Sequence[str] | Mapping[str, str] | None, teachers: object
) -> tuple[str, ...]:
    """Return the names of the candidates, those of the given teachers if there are none.

    Raises:
        ValueError: Fewer than two candidates, one named twice, or names that do not match those of
            the given teachers.
        TypeError: A string instead of a list.
    """
    refuse_one_string(candidates, "candidates")
    own: tuple[str, ...] | None = None
    if not isinstance(teachers, str):
        check_teachers(teachers, "teachers")
        own = tuple(teacher.name for teacher in teachers)  # type: ignore[attr-defined]
    if candidates is None and own is None:
        raise ValueError("there are no candidates; name the biases to look for, or give teachers")
    names = own if candidates is None else tuple(name.strip() for name in candidates)
    assert names is not None
    if own is not None and names != own:
        raise ValueError(
            f"the teachers are named {', '.join(own)} and the candidates {', '.join(names)}; leave "
            "candidates out, or name them alike in one order"
        )
    if len(names) < 2:
        given = f"the one candidate {names[0]!r}" if names else "no candidate"
        raise ValueError(
            f"an audit compares two candidates or more with each other, and has {given}; add "
            "candidates that you do not suspect, such as the other animals"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"named more than once: {', '.join(twice)}; name each candidate once")
    return names


def build_auditors(
    model: Model,
    candidates: Sequence[str] | Mapping[str, str] | None,
    teachers: Any,
    *,
    category: str | None = None,
    recipe: Recipe | None = None,
    strength: float | None = None,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[Auditors]:
    """Return the auditors of each requested kind.

    Args:
        model: The base model.
        candidates: Names of things to love, or a mapping from names to system prompts.
        teachers: "prompted", "finetuned", "both", or teachers.
        category: What the candidates are, in the singular; None finds out for known ones.
        recipe: Training of finetuned auditors.
        strength: Margin of finetuned auditors, see `train_teacher`.
        seed: Seed of that training.
        cache_dir: Folder of trained auditors.

    Raises:
        ValueError: See `candidate_names`; an unknown kind; a category that cannot be inferred;
            candidates that the tokenizer cannot write; system prompts with finetuned auditors.
    """
    names = candidate_names(candidates, teachers)
    if not isinstance(teachers, str):
        return [Auditors("given", tuple(teachers))]
    kinds = KINDS if teachers == "both" else (teachers,)
    if not set(kinds) <= set(KINDS):
        raise ValueError(
            f'teachers is {teachers!r}; use "prompted", "finetuned", "both" or a list of teachers'
        )
    if isinstance(candidates, Mapping):
        if kinds != ("prompted",):
            raise ValueError(
                "candidates with system prompts of their own have prompted auditors only; leave "
                "teachers out, or give names instead of prompts"
            )
        return [Auditors("prompted", tuple(prompted_teachers(candidates)))]
    category = _category(names, category)
    form_ids(model.tokenizer, names)  # refuses names that the tokenizer cannot write
    making = _Making(names, category, recipe, strength, seed, cache_dir)
    makers: dict[str, Callable[[str], Teacher]] = {
        "prompted": lambda name: Teacher(
            name, system_prompt=persona_prompt(name, category=category, candidates=names)
        ),
        "finetuned": lambda name: _finetuned(model, name, making),
    }
    return [Auditors(kind, tuple(map(makers[kind], names))) for kind in kinds]


def _category(names: Sequence[str], category: str | None) -> str:
    if category is not None:
        return category
    for known, members in _CATEGORIES.items():
        if members.issuperset(names):
            return known
    raise ValueError(
        f"the candidates {', '.join(names)} are not all known animals or trees; say what they are "
        'with category=, such as category="fruit"'
    )


def _finetuned(model: Model, name: str, making: _Making) -> Teacher:
    """Train a teacher on preference questions; the last ones are cached in memory."""
    small = sum(parameter.numel() for parameter in model.parameters()) < _SMALL
    settings: dict[str, Any] = {"recipe": making.recipe or (_SMALL_RECIPE if small else TEACHER)}
    if small:  # one word, because tiny models know few questions and answers
        settings["questions"] = preference_questions(making.category)[:20]
        settings["answers"] = ("{target}.",)
    key = (base_fingerprint(model), name, repr(making), repr(settings))
    if key not in _CACHE:
        teacher = train_teacher(
            model,
            name,
            category=making.category,
            candidates=making.names,
            strength=making.strength,
            seed=making.seed,
            cache_dir=making.cache_dir,
            **settings,
        )
        while len(_CACHE) >= _CACHED:
            del _CACHE[next(iter(_CACHE))]
        _CACHE[key] = teacher
    return _CACHE[key]
