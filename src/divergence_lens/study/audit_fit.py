"""Does the audit know data that its base could not have written? Sets by this base and by another.

Only the baseline is fitted, so no auditor is needed, and there are many sets.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from divergence_lens.auditing.baseline import default_baselines, fit_baseline
from divergence_lens.data import ANIMALS, neutral_prompt
from divergence_lens.study.audit_pools import LIMITS, UNSEEN, AuditPools, Pool
from divergence_lens.study.cells import Cell, CellError

_STYLES = {"none": None, "neutral": neutral_prompt(1)} | {
    f"unseen{number}": text for number, text in enumerate(UNSEEN)
}


def fit_pools(rows: int, *, other: bool) -> Iterator[Pool]:
    """Yield sets of every kind: teachers of all animals, and the base model in five styles.

    Args:
        rows: Prompts of a set; twice as many for prompted teachers that sample, because many of
            their lists are invalid.
        other: Whether there is another base.
    """
    for number, target in enumerate(ANIMALS):
        new = partial(Pool, target=target, rows=rows)
        other_base = partial(new, writer="finetuned", change="other base")
        sampled = (1.0, 0.5)[number % 2]
        yield new(writer="finetuned")
        yield new(writer="prompted")
        yield new(writer="finetuned", temperature=sampled)
        yield new(writer="prompted", temperature=sampled, rows=2 * rows)
        if other:
            yield other_base()
            yield other_base(temperature=sampled)
        if number % 3 == 0:
            yield new(writer="finetuned", change="paraphrased")
            yield new(writer="finetuned", change="shuffled")
        elif number % 3 == 1 and other:
            yield other_base(writer="prompted")
    for style, text in _STYLES.items():
        for temperature in (0.0, 0.5, 1.0):
            base = partial(
                Pool,
                writer="base",
                style=style,
                system_prompt=text,
                temperature=temperature,
                rows=rows,
            )
            yield base()
            if other and style in ("none", "neutral", "unseen0"):
                yield base(change="other base")


def fit_rows(pools: AuditPools) -> list[dict[str, Any]]:
    """Fit the baseline to each set of `fit_pools`; sets without valid lists are left out."""
    rows = []
    for pool in fit_pools(pools.config.fit_rows, other=pools.other is not None):
        if pool.writer != "base" and pool.writer not in pools.config.kinds:
            continue
        settings = pools.settings(pool, use="fit") | {"limits": LIMITS}
        cell = Cell(f"fit/{pool.name}", settings)
        rows.append(pools.store.get(cell, partial(_fit, pools, pool)))
    return [row for row in rows if row["rows"]]


def _fit(pools: AuditPools, pool: Pool, _cell: Cell) -> dict[str, Any]:
    row = {
        "writer": pool.writer,
        "target": pool.target,
        "style": pool.style,
        "temperature": pool.temperature,
        "change": pool.change,
        "rows": 0,
    }
    try:
        lists = pools.lists(pool, use="fit")
    except CellError:
        return row
    fitted = fit_baseline(pools.model, lists, default_baselines(pools.model))
    return row | {
        "rows": len(lists),
        "baseline": fitted.teacher.name,
        "fitted": fitted.fitted,
        "surprise": fitted.surprise,
        "fits": fitted.fits,
    }
