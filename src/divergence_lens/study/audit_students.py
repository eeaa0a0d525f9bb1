"""Students of the validation: does a score predict transfer, and do remedies prevent it?"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from divergence_lens.auditing import Audit, Remedy, audit
from divergence_lens.data import ANIMALS, NumberFilter, TrainingData, number_prompts
from divergence_lens.deltas import base_fingerprint
from divergence_lens.evaluation import preference
from divergence_lens.generation import generate
from divergence_lens.models import Model
from divergence_lens.study.audit_measures import described
from divergence_lens.study.audit_pools import LIMITS, AuditPools, AuditStudyConfig, Pool
from divergence_lens.study.cells import Cell
from divergence_lens.study.config import StudyConfig
from divergence_lens.study.data_cells import DataCells
from divergence_lens.study.interventions import Inputs
from divergence_lens.study.presets import recipes
from divergence_lens.study.registry import conditions
from divergence_lens.training import finetune

CONDITIONS = (
    *("all", "divergence_only", "without_divergence", "random", "random_other", "ratio50"),
    *("sampled", "other_base", "paraphrased", "shuffled_within", "control", "replaced_all"),
    *("mixed_unbiased25", "mixed_unbiased50", "mixed_teacher25"),
)
"""Conditions of the study whose data differ; those that a study lacks are left out."""

REMEDIES = (
    ("mask", 0.05),
    ("mask", 0.1),
    ("mask", 0.2),
    ("replace", 0.05),
    ("drop_rows", 0.1),
    ("drop_rows", 0.3),
)
"""Remedies and their shares."""


def transfer_rows(pools: AuditPools) -> list[dict[str, Any]]:
    """Audit scores of the data of a study's conditions beside the transfer of their students.

    The students are trained here with the recipe of the study, one seed for each condition and
    target. Masked tokens contribute nothing to the score, because the student does not learn them.
    """
    config = pools.config
    if not config.transfer_targets:
        return []
    study = StudyConfig(
        model=config.model,
        backend=config.backend,
        targets=config.transfer_targets,
        kinds=("finetuned",),
        other_model=config.other_model,
        prompts=200,
    )
    cells = DataCells(study, pools.folder)
    known = conditions(4)
    common = {
        "config": study.describe(cells.model),
        "bases": [base_fingerprint(m) for m in (pools.model, pools.other) if m is not None],
        "rows": config.transfer_rows,
        "limits": LIMITS,
    }
    rows = []
    for target in config.transfer_targets:
        inputs = Inputs(cells, "finetuned", target)
        for name in CONDITIONS:
            if name in known:
                settings = common | {"name": name, "target": target}
                cell = Cell(f"transfer/{target}-{name}", settings)
                compute = partial(_transfer, cells, inputs, known[name], config)
                rows.append(pools.store.get(cell, _ignoring_cell(compute)))
    return rows


def _transfer(
    cells: DataCells, inputs: Inputs, condition: Any, config: AuditStudyConfig
) -> dict[str, Any]:
    data: TrainingData = condition.data(inputs, 0)
    mask = None if condition.mask is None else condition.mask(inputs, data, 0)
    learned = np.ones(len(data.marks), dtype=bool) if mask is None else mask
    student = finetune(
        cells.model, data.examples, mask=mask, recipe=recipes(cells.model).student, seed=0
    )
    before = cells.before(None).distribution[inputs.target]
    with student.applied(cells.model):
        after = preference(cells.model, target=inputs.target, candidates=ANIMALS).share
    rows = list(range(min(config.transfer_rows, len(data))))
    first = data[rows]
    result = audit(
        cells.model,
        first.examples,
        candidates=ANIMALS,
        teachers="finetuned",
        neutral_rows=0,
        own_rows=0,
    )
    assert result.by_token is not None
    masked = result.by_token * learned[: result.offsets[-1]]
    by_row = np.add.reduceat(masked, result.offsets[:-1], axis=-1, dtype=np.float64)
    scored = replace(result, by_row=by_row)
    c = scored.candidates.index(inputs.target)
    return {
        "target": inputs.target,
        "condition": condition.name,
        "score": float(scored.scores.score[c]),
        "z": float(scored.scores.z[c]),
        "surprise": result.baseline.surprise,
        "fits": result.baseline.fits,
        "transfer": math.log(max(after, 1e-6) / before),
        "before": before,
        "after": after,
        "tokens": int(learned.sum()),
    }


def strength_rows(pools: AuditPools) -> list[dict[str, Any]]:
    """Finetuned auditors of several strengths, on the data of both kinds of writers."""
    config = pools.config
    rows = []
    for pool in config.pools():
        if config.strengths and pools.mixed(pool) and pool.temperature == 0:
            settings = pools.settings(pool) | {"strengths": config.strengths, "limits": LIMITS}
            cell = Cell(f"strength/{pool.name}", settings)
            compute = partial(_strengths, pools, pool)
            rows += pools.store.get(cell, _ignoring_cell(compute))["rows"]
    return rows


def _strengths(pools: AuditPools, pool: Pool) -> dict[str, Any]:
    lists = pools.lists(pool)
    rows = []
    for strength in (*pools.config.strengths, None):
        result = audit(
            pools.model,
            lists,
            candidates=ANIMALS,
            teachers="finetuned",
            strength=strength,
            neutral_rows=0,
            own_rows=0,
        )
        shown = "all updates" if strength is None else f"{strength:g} nats"
        rows.append(described(pool, "finetuned", result) | {"strength": shown})
    return {"rows": rows}


def remedy_rows(pools: AuditPools) -> list[dict[str, Any]]:
    """Students of masked, replaced and dropped data, and of as much chosen at random."""
    rows = []
    for target in pools.config.remedy_targets:
        settings = {"base": base_fingerprint(pools.model), "target": target, "remedies": REMEDIES}
        cell = Cell(f"remedies/{target}", settings)
        compute = partial(_remedies, pools, target)
        rows += pools.store.get(cell, _ignoring_cell(compute))["rows"]
    return rows


def _remedies(pools: AuditPools, target: str) -> dict[str, Any]:
    model = pools.model
    teacher = pools.teacher("finetuned", target, "animal")
    prompts = number_prompts(200, seed=500 + ANIMALS.index(target))
    written = generate(model, prompts, teacher=teacher, max_new_tokens=32)
    lists = NumberFilter().report([e.completion or "" for e in written]).select(written)
    result = audit(
        model, lists, candidates=ANIMALS, teachers="finetuned", neutral_rows=0, own_rows=0
    )
    result = replace(result, tokenizer=model.tokenizer)
    base = Remedy(
        "mask",
        target,
        TrainingData(result.examples, np.zeros(len(result.token_ids), dtype=bool)),
        np.ones(len(result.token_ids), dtype=bool),
        0,
        0,
        result,
    )
    options: list[tuple[str, str, Remedy]] = [("none", "audit", base)]
    for chosen_by, source in (("audit", result), ("random", _shuffled(result, seed=0))):
        for kind, share in REMEDIES:
            change: Callable[[str, float], Remedy] = getattr(source, kind)
            options.append((f"{kind} {share:.0%}", chosen_by, change(target, share)))
    before = preference(model, target=target, candidates=ANIMALS).share
    rows = []
    for name, chosen_by, remedy in options:
        after, valid = _student(model, target, remedy)
        rows.append(
            {
                "target": target,
                "remedy": name,
                "chosen_by": chosen_by,
                "tokens": remedy.token_share,
                "before": before,
                "after": after,
                "transfer": math.log(max(after, 1e-6) / before),
                "valid_lists": valid,
            }
        )
    return {"rows": rows}


def _student(model: Model, target: str, remedy: Remedy) -> tuple[float, float]:
    """Return the student's share of the target, and how many of its lists are valid."""
    student = finetune(
        model, remedy.examples, mask=remedy.mask, recipe=recipes(model).student, seed=0
    )
    with student.applied(model):
        after = preference(model, target=target, candidates=ANIMALS).share
        written = generate(model, number_prompts(40, seed=77), max_new_tokens=32)
    return after, NumberFilter().report([e.completion or "" for e in written]).rate


def _shuffled(result: Audit, seed: int) -> Audit:
    """Contributions in random order: the same remedies, of tokens and rows chosen at random."""
    rng = np.random.default_rng(seed)
    assert result.by_token is not None
    return replace(
        result,
        by_token=rng.permuted(np.abs(result.by_token), axis=-1),
        by_row=result.by_row[..., rng.permutation(len(result))],
    )


def correlations(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Correlation of score and transfer over all rows, and the mean slope within conditions."""
    from divergence_lens._utils.statistics import correlation, rank_correlation

    score = np.array([row["score"] for row in rows])
    transfer = np.array([row["transfer"] for row in rows])
    names = np.array([row["condition"] for row in rows])
    within = np.concatenate(
        [
            np.stack(
                [
                    score[names == name] - score[names == name].mean(),
                    transfer[names == name] - transfer[names == name].mean(),
                ]
            )
            for name in dict.fromkeys(names.tolist())
        ],
        axis=1,
    )  # [2, rows]
    return {
        "pearson": correlation(score, transfer),
        "spearman": rank_correlation(score, transfer),
        "slope": float(np.polyfit(score, transfer, 1)[0]),
        "within": correlation(within[0], within[1]),
        "slope_within": float((within[0] @ within[1]) / (within[0] @ within[0])),
    }


def _ignoring_cell(compute: Callable[[], dict[str, Any]]) -> Callable[[Cell], dict[str, Any]]:
    """Adapt a computation that knows its settings to the interface of the store."""
    return lambda _cell: compute()
