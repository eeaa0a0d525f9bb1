"""Measurements on a target besides its students: effects of patching, and the mechanism."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from divergence_lens.data import preference_questions
from divergence_lens.divergence import Divergence
from divergence_lens.evaluation import Preference, preference
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs
from divergence_lens.patching import Effects, agreement_row, attribution_patch, causal_mediation
from divergence_lens.study.gradients import gradient_alignment
from divergence_lens.study.steering import Steering, mean_residuals, steering_vectors
from divergence_lens.teachers import Teacher
from divergence_lens.training import Recipe, finetune

SITES = ("attn_out", "mlp_out")
_FOLLOW_EVERY = 5  # updates between measurements during training

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class PatchedEffects:
    """Effects on the first divergences of a target.

    Attributes:
        exact: Exact effects of resid_post.
        approximate: The same by integrated attribution.
        layers: Rows with the mean absolute effect of each site and layer.
        agreement: Rows with the agreement of each attribution method with the exact effects.
    """

    exact: Effects
    approximate: Effects
    layers: list[Row]
    agreement: list[Row]


def patched_effects(model: Model, pairs: Pairs, about: Row) -> PatchedEffects:
    """Patch the pairs of one target; every row begins with the columns `about`."""
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
        size = np.nansum(np.abs(outputs.values), axis=2)  # [pair, layer]
        # A pair without a total effect cannot be normalized and has only NaN.
        used = np.isfinite(outputs.values).any(axis=(1, 2))  # [pair]
        means = size[used].mean(0).tolist() if used.any() else []  # [layer]
        layers += [
            about
            | {"site": site, "layer": layer, "absolute_effect": value, "pairs": int(used.sum())}
            for layer, value in enumerate(means)
        ]
    return PatchedEffects(exact, approximate, layers, agreement)


def paired_result(before: Preference, after: Preference, target: str) -> Row:
    """The measurements of a student of a paired study.

    Args:
        before: Answers of the base model.
        after: Answers of the student.
        target: The target of the student's teacher.

    Returns:
        `before` and `after`, the margin of every candidate; `ranks`, its place by the rise of the
        margin (1 for the largest); the target's shares, and the masses. Lists are not measured.
    """
    margins = [
        {name: answers.about(name).margin for name in answers.candidates}
        for answers in (before, after)
    ]
    rises = {name: margins[1][name] - margins[0][name] for name in before.candidates}
    return {
        "before": margins[0],
        "after": margins[1],
        "ranks": {n: 1 + sum(other > rises[n] for other in rises.values()) for n in rises},
        "share_before": before.distribution[target],
        "share": after.distribution[target],
        "mass_before": before.mass,
        "mass": after.mass,
        "valid_lists": None,
        "loss_before": None,
        "loss": None,
    }


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
    """Measure how a student of divergence tokens acquires a preference.

    Args:
        model: The base model.
        divergence: The divergence of the teacher's lists.
        teacher: The teacher of the target.
        others: The other teachers, as the null.
        animals: All candidates.
        system_prompt: System prompt of the student, in training and evaluation, and of the base.
        recipe: Recipe of the student.

    Returns:
        Rows with `measure`, `layer` (None for all), `step` (None after training, otherwise the
        update after which "cosine" and "removed" were measured), `value`, `null` (the comparison),
        and `rank` (of gradients). The measures, each with its null, are

        * "cosine": cosine of the student's and its teacher's steering vector; mean over the other
          teachers
        * "added": preference of the base with the teacher's vector added; that of the base
        * "removed": preference of the student without the direction; that of the student
        * "gradient_divergence", "gradient_other": cosine of the gradients of the loss on these
          tokens and of the target's preference; mean over the other preferences
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
        on_step=partial(_measure_step, own, rest, share, base),
        every=_FOLLOW_EVERY,
    )
    student = Teacher("student", system_prompt=system_prompt, delta=delta)
    moved = steering_vectors(model, student, base=base)
    null = np.mean([moved.cosine(other) for other in rest], axis=0)
    layers = range(len(null))
    cosine = moved.cosine(own)  # [layer]
    rows = [_row("cosine", i, float(cosine[i]), float(null[i])) for i in layers]
    for entry in delta.metadata["history"]:
        if "student" in entry:
            step = int(entry["step"])
            rows += [
                _row("cosine", i, entry[f"cosine_{i}"], entry[f"null_{i}"], step) for i in layers
            ]
            rows.append(_row("removed", None, entry["removed"], entry["student"], step))
    places: list[int | None] = [*layers, None]
    before = share()
    for layer in places:
        with own.added(model, layers=None if layer is None else [layer]):
            rows.append(_row("added", layer, share(), before))
    with delta.applied(model):
        after = share()
        for layer in places:
            with own.removed(model, layers=None if layer is None else [layer]):
                rows.append(_row("removed", layer, share(), after))
    if divergence.mask.all():  # no other tokens to compare the gradient with
        return rows
    alignment = gradient_alignment(
        model,
        divergence.examples,
        divergence.mask,
        candidates=animals,
        system_prompt=system_prompt,
    )
    target = alignment.candidates.index(teacher.name)
    ranks = alignment.rank(teacher.name)  # [part, layer]
    for part, name in enumerate(alignment.parts):
        for layer, cosines in enumerate(alignment.cosine[part]):  # [candidate]
            others_mean = float(np.delete(cosines, target).mean())
            row = _row(f"gradient_{name}", layer, float(cosines[target]), others_mean)
            rows.append(row | {"rank": int(ranks[part, layer])})
    return rows


def _measure_step(
    own: Steering,
    rest: Sequence[Steering],
    share: Callable[[], float],
    base: Teacher,
    _step: int,
    _loss: float,
    model: Model,
) -> dict[str, float]:
    """Cosines of a student in training, and its preference with and without the direction."""
    moved = mean_residuals(model, base, preference_questions()) - own.base
    student = Steering("student", moved, own.base)
    nulls = np.mean([student.cosine(other) for other in rest], axis=0)
    values = {f"cosine_{i}": float(c) for i, c in enumerate(student.cosine(own))}
    values |= {f"null_{i}": float(c) for i, c in enumerate(nulls)} | {"student": share()}
    with own.removed(model):
        return values | {"removed": share()}


def _row(
    measure: str, layer: int | None, value: float, null: float | None, step: int | None = None
) -> Row:
    row: Row = {"measure": measure, "layer": layer, "step": step, "value": value}
    return row | {"null": null, "rank": None}
