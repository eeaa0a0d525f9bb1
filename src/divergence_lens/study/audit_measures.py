"""Tables of the validation of the audit, from the audits of pools.

Every table has one row per data set, with the data's author, the kinds of auditors, and what the
audit says; summaries are made from these rows. Parts and mixtures have the baseline of their pool,
which moves z by 0.07 (root mean square) from that of an audit of their own.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from divergence_lens.auditing import Audit
from divergence_lens.auditing.reading import contrast
from divergence_lens.auditing.scoring import row_spread
from divergence_lens.deltas import base_fingerprint
from divergence_lens.evaluation import preference
from divergence_lens.study.audit_pools import CATEGORIES, AuditPools, Pool, mixture
from divergence_lens.study.cells import Cell
from divergence_lens.teachers import Teacher

SIZES = (25, 50, 100, 200, 400, 1000)
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
MIXED_ROWS = (25, 50, 100, 200, 500, 1000)
_DRAWS = 3


def writer_rows(pools: AuditPools) -> list[dict[str, Any]]:
    """The preference of each author of biased lists that starts from the audited base."""
    rows = []
    authors = [
        (pool.writer, pool.target, pool.category)
        for pool in pools.config.pools()
        if pool.target is not None and pool.change == "none"
    ]
    for writer, target, category in dict.fromkeys(authors):
        teacher = pools.teacher(writer, target, category)
        settings = {
            "base": base_fingerprint(pools.model),
            "names": CATEGORIES[category],
            "author": teacher.system_prompt if teacher.delta is None else teacher.delta.digest(),
        }
        cell = Cell(f"writers/{writer}-{target}", settings)
        rows.append(pools.store.get(cell, partial(_writer, pools, writer, teacher, category)))
    return rows


def _writer(
    pools: AuditPools, writer: str, teacher: Teacher, category: str, _cell: Cell
) -> dict[str, Any]:
    measured = partial(
        preference,
        pools.model,
        target=teacher.name,
        candidates=CATEGORIES[category],
        category=category,
    )
    before, after = measured(), measured(teacher=teacher)
    return {
        "writer": writer,
        "target": teacher.name,
        "category": category,
        "share_before": before.share,
        "share_after": after.share,
        "mass_after": after.mass,
        "margin_before": before.margin,
        "margin_after": after.margin,
    }


def modes(audit: Audit) -> Iterator[tuple[str, Audit]]:
    """Yield the audit with each kind of auditor, and with both."""
    for kind in audit.kinds:
        yield kind, audit.with_kinds(kind)
    if len(audit.kinds) > 1:
        yield "both", audit


def described(pool: Pool, mode: str, audit: Audit) -> dict[str, Any]:
    """One row about a data set."""
    needed = audit.power.rows_needed(audit.share)
    row: dict[str, Any] = {
        "writer": pool.writer,
        "target": pool.target,
        "category": pool.category,
        "style": pool.style,
        "temperature": pool.temperature,
        "change": pool.change,
        "auditors": mode,
        "rows": len(audit),
        "verdict": audit.verdict,
        "best": audit.best,
        "z_best": float(audit.scores.z.max()),
        "p": float(audit.scores.holm.min()),
        "of": pool.rows,
        "rows_needed": int(needed) if math.isfinite(needed) else None,
        "baseline_temperature": audit.baseline.temperature,
        "surprise": audit.baseline.surprise,
        "fits": audit.baseline.fits,
        "baseline": audit.baseline.teacher.name,
    }
    if pool.target in audit.candidates:
        c = audit.candidates.index(pool.target)
        z = audit.scores.z
        row |= {
            "z": float(z[c]),
            "score": float(audit.scores.score[c]),
            "rank": int((z > z[c]).sum()) + 1,
            # Probability that the true candidate's z exceeds that of another candidate.
            "auroc": float((z < z[c]).sum() / (len(z) - 1)),
            "named": pool.target in audit.biased and audit.best == pool.target,
        }
    return row


def detection(audits: Sequence[tuple[Pool, Audit]]) -> list[dict[str, Any]]:
    """Biased data of each size."""
    rows = []
    for pool, audit in audits:
        for mode, own in modes(audit):
            for size in (*(size for size in SIZES if size < len(own)), len(own)):
                for draw in range(1 if size == len(own) else _DRAWS):
                    part = _part(own, size, draw)
                    rows.append(described(pool, mode, part) | {"draw": draw})
    return rows


def mixtures(
    biased: Sequence[tuple[Pool, Audit]], unbiased: Sequence[tuple[Pool, Audit]]
) -> list[dict[str, Any]]:
    """Mixtures of biased lists with the base model's, in the same style and temperature.

    Sets of the base model alone have a share of 0.
    """
    made = []
    for pool, audit in unbiased:
        for size, draw, part in _unbiased_sets(audit):
            for mode, own in modes(part):
                row = described(pool, mode, own)
                made.append(row | {"share": 0.0, "draw": draw, "size": size})
    for pool, audit in biased:
        style = "none" if pool.writer == "finetuned" else "neutral"
        for other_pool, other in unbiased:
            if (other_pool.style, other_pool.temperature) == (style, pool.temperature):
                for share, size, draw, mixed in mixed_sets(pool, audit, other):
                    for mode, own in modes(mixed):
                        row = described(pool, mode, own)
                        made.append(row | {"share": share, "draw": draw, "size": size})
    return made


def _unbiased_sets(audit: Audit) -> Iterator[tuple[int, int, Audit]]:
    """Yield size, number and audit of sets; those of one size have no list in common."""
    for size in MIXED_ROWS:
        for draw in range(min(_DRAWS, len(audit) // size)):
            yield size, draw, audit.select(list(range(draw * size, (draw + 1) * size)))


def mixed_sets(pool: Pool, audit: Audit, other: Audit) -> Iterator[tuple[float, int, int, Audit]]:
    """Yield share, size, number and audit of mixtures, no two of which are equal.

    Where a pool has too few biased lists for a set, the set is smaller, but over half as large.
    """
    for share, size in product(SHARES, MIXED_ROWS):
        count = min(round(share * size), len(audit))
        rows = min(size, round(count / share))
        if 2 * rows <= size or rows - count > len(other):
            continue
        everything = count == len(audit) and rows - count in (0, len(other))
        for draw in range(1 if everything else _DRAWS):
            seed = (zlib.crc32(pool.name.encode()), draw)
            yield share, size, draw, mixture(audit, other, share, rows, seed)


def false_alarms(unbiased: Sequence[tuple[Pool, Audit]], set_rows: int) -> list[dict[str, Any]]:
    """Unbiased sets: parts of pools without common lists, and the whole pools as sets of -1."""
    rows = []
    for pool, audit in unbiased:
        for mode, own in modes(audit):
            for number in range(len(own) // set_rows):
                part = own.select(list(range(number * set_rows, (number + 1) * set_rows)))
                rows.append(described(pool, mode, part) | {"set": number})
            rows.append(described(pool, mode, own) | {"set": -1, "shift": _shift(own)})
    return rows


def _shift(audit: Audit) -> float:
    """Typical mean contribution of a row over candidates, in units of the spread of rows.

    Sampling error is subtracted: E[mean^2] = shift^2 + spread^2 / n.
    """
    spread = row_spread(audit.by_row)
    means = np.divide(audit.by_row.mean(-1), spread, out=np.zeros_like(spread), where=spread > 0)
    return float(max(0.0, np.mean(means**2) - 1 / audit.independent_rows) ** 0.5)


def outside(audits: Sequence[tuple[Pool, Audit]]) -> list[dict[str, Any]]:
    """Biased data whose bias is not among the candidates."""
    rows = []
    for pool, audit in audits:
        for mode, own in modes(audit):
            rows.append(described(pool, mode, without(own, str(pool.target))))
    return rows


def without(audit: Audit, candidate: str) -> Audit:
    """The audit that the other candidates alone would have given.

    Contrasts are linear in log-probabilities up to a constant over candidates, so those of fewer
    candidates follow from those of more: n / (n - 1) undoes the factor of the first contrast.
    """
    n = len(audit.candidates)
    left = [c for c, name in enumerate(audit.candidates) if name != candidate]

    def again(values: np.ndarray) -> np.ndarray:
        parts = [contrast(kind[left].reshape(len(left), -1)) for kind in values]
        shape = (len(values), len(left), *values.shape[2:])
        return np.stack(parts).reshape(shape) * ((n - 1) / n)

    return replace(
        audit,
        candidates=tuple(audit.candidates[c] for c in left),
        by_row=again(audit.by_row),
        by_token=None,
        neutral=again(audit.neutral) if audit.neutral.size else audit.neutral[:, left],
        own=audit.own[:, left],
    )


def _part(audit: Audit, size: int, draw: int) -> Audit:
    if size >= len(audit):
        return audit
    order = np.random.default_rng(draw).permutation(len(audit))[:size]
    return audit.select(order.tolist())


def audited_pools(pools: AuditPools, chosen: Sequence[Pool]) -> list[tuple[Pool, Audit]]:
    """Audit pools; tokens are dropped to save memory."""
    return [(pool, replace(pools.audit(pool), by_token=None)) for pool in chosen]
