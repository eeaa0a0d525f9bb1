"""Helpers for tests that run a small study."""

import shutil

from divergence_lens.study.conditions import Condition


def tables_of(study):
    """The results of a study without its settings, which contain times."""
    return {k: v for k, v in study.results.items() if k != "settings"}


def cell_times(folder):
    """The modification time of each cell."""
    cells = folder / "cells"
    return {str(p.relative_to(cells)): p.stat().st_mtime_ns for p in cells.rglob("*.json")}


def copy_folder(folder, out):
    shutil.copytree(folder, out)
    return out


def own_condition(name, **options):
    return Condition(name=name, group="mine", isolates="nothing in particular", **options)
