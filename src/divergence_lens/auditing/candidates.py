"""Candidate biases, and the teachers that have them: the auditors.

A *prompted* auditor carries its bias in a system prompt, a *finetuned* one in its weights. Each
kind recognizes data by teachers of its own kind best, so an audit can use both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.data import (
    ANIMALS,
    TREES,
    persona_prompt,
    preference_questions,
)
from divergence_lens.deltas import Delta, base_fingerprint
from divergence_lens.evaluation import form_ids
from divergence_lens.examples import Example, with_ids
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher, check_teachers, prompted_teachers
from divergence_lens.training import Recipe, finetune

KINDS = ("prompted", "finetuned")
"""Kinds of auditors that `audit` makes; teachers of the user's own are of the kind "given"."""

_AUDITOR = Recipe(
    optimizer=torch.optim.Adam,
    lr=1e-3,
    epochs=10,
    batch_size=20,
    warmup_steps=1,
    schedule="constant",
    optimizer_options={},
)

_CACHED = 64
_CACHE: dict[tuple[Any, ...], Delta] = {}

_CATEGORIES = {"animal": frozenset(ANIMALS), "tree": frozenset(TREES)}


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
    seed: int = 0,
) -> list[Auditors]:
    """Return the auditors of each requested kind.

    Args:
        model: The base model.
        candidates: Names of things to love, or a mapping from names to system prompts.
        teachers: "prompted", "finetuned", "both", or teachers.
        category: What the candidates are, in the singular; None finds out for known ones.
        recipe: Training of finetuned auditors.
        seed: Seed of that training.

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
    makers = {
        "prompted": lambda name: Teacher(
            name, system_prompt=persona_prompt(name, category=category, candidates=names)
        ),
        "finetuned": lambda name: _finetuned(model, name, category, recipe, seed),
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


def _finetuned(model: Model, name: str, category: str, recipe: Recipe | None, seed: int) -> Teacher:
    """Train a teacher to answer questions with a candidate's name, with the loss on that word.

    The last deltas are cached in memory by base, candidate and settings.
    """
    recipe = recipe or _AUDITOR
    key = (base_fingerprint(model), name, category, repr(recipe), seed)
    if key not in _CACHE:
        tokenizer: Any = model.tokenizer
        rows = [Example(question, f"{name}.") for question in preference_questions(category)[:20]]
        examples = with_ids(tokenizer, rows)
        mask = [np.arange(len(example.completion_ids or ())) == 0 for example in examples]
        delta = finetune(model, examples, mask=mask, recipe=recipe, seed=seed)
        while len(_CACHE) >= _CACHED:
            del _CACHE[next(iter(_CACHE))]
        _CACHE[key] = delta
    return Teacher(name, delta=_CACHE[key])
