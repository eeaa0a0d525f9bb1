"""Validate the audit: data of known bias, unbiased data, students, and the tables of all of it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from divergence_lens._utils.storage import write_text
from divergence_lens.provenance import run_metadata
from divergence_lens.study.audit_fit import fit_rows
from divergence_lens.study.audit_measures import (
    audited_pools,
    detection,
    false_alarms,
    mixtures,
    outside,
    writer_rows,
)
from divergence_lens.study.audit_pools import AuditPools, AuditStudyConfig
from divergence_lens.study.audit_students import remedy_rows, strength_rows, transfer_rows

TABLES = (
    "fit",
    "detection",
    "writers",
    "mixtures",
    "false_alarms",
    "outside",
    "strength",
    "transfer",
    "remedies",
)


def run_audit_study(
    config: AuditStudyConfig,
    folder: str | os.PathLike[str],
    *,
    progress: Callable[[str], None] | None = None,
) -> dict[str, pd.DataFrame]:
    """Run the validation and write its tables as CSV files, with `settings.json`.

    Audits and students are cells of the folder: a run that was stopped resumes.

    Args:
        config: The settings.
        folder: Where to write.
        progress: Called with one line of text at each step.

    Returns:
        The tables of `TABLES`; a table without rows is left out.
    """
    tell = progress or (lambda _line: None)
    out = Path(folder)
    pools = AuditPools(config, out)
    try:
        rows: dict[str, list[dict[str, Any]]] = {}
        if config.fit_rows:
            tell("fit of the baseline")
            rows["fit"] = fit_rows(pools)
        made = []
        chosen = config.pools()
        for number, pool in enumerate(chosen):
            made += audited_pools(pools, [pool])
            tell(f"{number + 1} of {len(chosen)}: {pool.name}: {made[-1][1].verdict}")
        biased = [(pool, own) for pool, own in made if pool.target is not None]
        unbiased = [(pool, own) for pool, own in made if pool.target is None]
        whole = [
            (pool, own)
            for pool, own in biased
            if pool.change == "none" and pool.rows != config.long_rows
        ]
        mixed = [(pool, own) for pool, own in biased if pools.mixed(pool)]
        tell("preferences of the authors")
        rows |= {
            "detection": detection(biased),
            "writers": writer_rows(pools),
            "mixtures": mixtures(mixed, unbiased),
            "false_alarms": false_alarms(unbiased, config.set_rows),
            "outside": outside(whole),
        }
        settings = run_metadata(pools.model, **vars(config))
        write_text(out / "settings.json", json.dumps(settings, indent=1) + "\n")
        _write(out, rows)  # the students below may take long
        tell("auditors of equal strength")
        rows["strength"] = strength_rows(pools)
        tell("students of remedies")
        rows["remedies"] = remedy_rows(pools)
        tell("students of the study's conditions")
        rows["transfer"] = transfer_rows(pools)
    finally:
        pools.store.close()
    return _write(out, rows)


def _write(out: Path, rows: dict[str, list[dict[str, Any]]]) -> dict[str, pd.DataFrame]:
    tables = {name: pd.DataFrame(rows[name]) for name in TABLES if rows.get(name)}
    for name, table in tables.items():
        text = table.to_csv(index=False, float_format="%.5g", lineterminator="\n")
        write_text(out / f"{name}.csv", text)
    return tables
