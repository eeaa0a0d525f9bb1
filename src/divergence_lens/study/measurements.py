"""What a study measures on one target beside its students: effects, and the mechanism, as rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from divergence_lens.data import preference_questions
from divergence_lens.divergence import Divergence
from divergence_lens.evaluation import preference
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs
from divergence_lens.patching import Effects, agreement_row, attribution_patch, causal_mediation
from divergence_lens.study.gradients import gradient_alignment
from divergence_lens.study.steering import Steering, mean_residuals, steering_vectors
from divergence_lens.teachers import Teacher
from divergence_lens.training import Recipe, finetune

SITES = ("attn_out", "mlp_out")
_FOLLOW_EVERY = 5

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class PatchedEffects:
    """Effects on the first divergences of a target.

    Attributes:
        exact: Of resid_post, exact.
        approximate: The same by integrated attribution.
        layers: Rows: mean absolute effect of each site and layer.
        agreement: Rows: how well each method of attribution agrees with the exact effects.
    """

    exact: Effects
    approximate: Effects
    layers: list[Row]
    agreement: list[Row]


def patched_effects(model: Model, pairs: Pairs, about: Row) -> PatchedEffects:
    """Patch the pairs of one target; `about` stands at the beginning of every row."""
    exact = causal_mediation(model, pairs, site="resid_post")
    agreement = []
    for method in ("gradient", "integrated"):
        approximate = attribution_patch(model, pairs, site="resid_post", method=method)
        agreement.append(
            about
            | {"site": "resid_post", "method": method, "pairs": len(pairs)}
            | agreement_row(approximate, exact)
        )
    layers: list[Row] = []
    for site in SITES:
        outputs = causal_mediation(model, pairs, site=site).normalized()
        size = np.nansum(np.abs(outputs.values), axis=2)
        used = np.isfinite(outputs.values).any(axis=(1, 2))
        means = size[used].mean(0).tolist() if used.any() else []
        layers += [
            about
            | {"site": site, "layer": layer, "absolute_effect": value, "pairs": int(used.sum())}
            for layer, value in enumerate(means)
        ]
    return PatchedEffects(exact, approximate, layers, agreement)


def mechanism_rows(
    model: Model,
    divergence: Divergence,
    teacher: Teacher,
    others: Sequence[Teacher],
    *,
    animals: Sequence[str],
    system_prompt: str | None,
    recipe: Recipe,
) -> list[Row]:
    """How a preference gets into a student of divergence tokens.

    Args:
        model: The base.
        divergence: Of the teacher's lists.
        teacher: The target's.
        others: The other teachers, the null.
        animals: All candidates.
        system_prompt: The student's, in training and when asked; also the base's.
        recipe: How it is trained.

    Returns:
        Rows with `measure`, `layer` (None: all), `step` (None: after training; otherwise the update
        after which it was measured, "cosine" and "removed" every few), `value` and `null`, what the
        value is compared with:

        * "cosine": of the student's and its teacher's steering vector; the mean over other teachers
        * "added": preference of the base with the teacher's vector added; of the base
        * "removed": preference of the student without the direction; of the student
        * "gradient_divergence", "gradient_other": cosine of the gradients of the loss on those
          tokens and of the target's preference; the mean over the other preferences
    """
    base = Teacher("base", system_prompt=system_prompt)
    own = steering_vectors(model, teacher, base=base)
    rest = [steering_vectors(model, other, base=base) for other in others]

    def share() -> float:
        return preference(
            model, target=teacher.name, candidates=animals, system_prompt=system_prompt
        ).share

    delta = finetune(
        model,
        divergence.examples,
        mask=divergence.mask,
        recipe=recipe,
        system_prompt=system_prompt,
        on_step=partial(_looked_at, own, rest, share, base),
        every=_FOLLOW_EVERY,
    )
    student = Teacher("student", system_prompt=system_prompt, delta=delta)
    moved = steering_vectors(model, student, base=base)
    null = np.mean([moved.cosine(other) for other in rest], axis=0)
    layers = range(len(null))
    rows = [
        _row("cosine", layer, float(moved.cosine(own)[layer]), float(null[layer]))
        for layer in layers
    ]
    for entry in delta.metadata["history"]:
        if "whole" in entry:
            step = int(entry["step"])
            rows += [
                _row("cosine", i, entry[f"cosine_{i}"], entry[f"null_{i}"], step) for i in layers
            ]
            rows.append(_row("removed", None, entry["removed"], entry["whole"], step))
    places: list[int | None] = [*layers, None]
    untouched = share()
    for layer in places:
        with own.added(model, layers=None if layer is None else [layer]):
            rows.append(_row("added", layer, share(), untouched))
    with delta.applied(model):
        whole = share()
        for layer in places:
            with own.removed(model, layers=None if layer is None else [layer]):
                rows.append(_row("removed", layer, share(), whole))
    if divergence.mask.all():
        return rows
    alignment = gradient_alignment(
        model,
        divergence.examples,
        divergence.mask,
        candidates=animals,
        system_prompt=system_prompt,
    )
    place = alignment.candidates.index(teacher.name)
    ranks = alignment.rank(teacher.name).tolist()
    for part, cosines, places_of in zip(alignment.parts, alignment.cosine, ranks, strict=True):
        for layer, found in enumerate(cosines):
            mean = float(np.delete(found, place).mean())
            row = _row(f"gradient_{part}", layer, float(found[place]), mean)
            rows.append(row | {"rank": places_of[layer]})
    return rows


def _looked_at(
    own: Steering,
    rest: Sequence[Steering],
    share: Callable[[], float],
    base: Teacher,
    _step: int,
    _loss: float,
    model: Model,
) -> dict[str, float]:
    """Where a student in training has moved, and what it prefers with and without the direction."""
    moved = mean_residuals(model, base, preference_questions()) - own.base
    student = Steering("student", moved, own.base)
    nulls = np.mean([student.cosine(other) for other in rest], axis=0)
    found = {f"cosine_{i}": float(c) for i, c in enumerate(student.cosine(own))}
    found |= {f"null_{i}": float(c) for i, c in enumerate(nulls)} | {"whole": share()}
    with own.removed(model):
        return found | {"removed": share()}


def _row(
    measure: str, layer: int | None, value: float, null: float | None, step: int | None = None
) -> Row:
    return {
        "measure": measure,
        "layer": layer,
        "step": step,
        "value": value,
        "null": null,
        "rank": None,
    }
