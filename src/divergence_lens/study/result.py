"""The result of a study: tables, findings, divergences, effects, and students."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from divergence_lens._utils.tables import preview
from divergence_lens.deltas import Delta
from divergence_lens.divergence import Divergence
from divergence_lens.patching import Effects
from divergence_lens.study.findings import Finding
from divergence_lens.study.loading import StudentKey, load_parts


@dataclass(frozen=True)
class Study:
    """The result of a study.

    Attributes:
        results: The tables and findings, as stored in `results.json`.
        findings: The claims with their verdicts.
        divergences: For each kind and target, the divergence of its data.
        exact: For each kind and target, the exact effects on its first divergences (resid_post).
        approximate: The same by integrated attribution.
        files: For each student (kind, target, condition, seed), the file of its delta. A student
            shared by all targets has the target "any".
    """

    results: dict[str, Any]
    findings: tuple[Finding, ...]
    divergences: Mapping[tuple[str, str], Divergence]
    exact: Mapping[tuple[str, str], Effects]
    approximate: Mapping[tuple[str, str], Effects]
    files: Mapping[StudentKey, Path]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Study":
        """Load a study that `run_study`, `divergence-lens demo` or `study` wrote.

        No model is loaded and nothing is computed.

        Raises:
            FileNotFoundError: The folder has no `results.json`.
            ValueError: `results.json` was not written by a study.
        """
        return cls(**load_parts(folder))

    def table(self, name: str) -> pd.DataFrame:
        """A table by name: `teachers`, `data`, `divergence`, `students`, `layers`, `agreement`.

        A study with `mechanism=True` also has the table `mechanism`.
        """
        effects = self.results["effects"]
        return pd.DataFrame(effects[name] if name in effects else self.results[name])

    def student(self, kind: str, target: str, condition: str, seed: int = 0) -> Delta:
        """Load the delta of a student.

        Raises:
            KeyError: There is no such student, or the study does not store students.
        """
        path = self.files.get((kind, target, condition, seed))
        if path is None or not path.exists():
            raise KeyError(
                f"no student of {condition!r} (kind {kind!r}, target {target!r}, seed {seed}) is "
                "stored; control students have the target 'any'"
            )
        return Delta.load(path)

    @property
    def failures(self) -> list[dict[str, str]]:
        """The cells that could not be computed: `cell` and `error` of each."""
        failures: list[dict[str, str]] = self.results["failures"]
        return failures

    def __repr__(self) -> str:
        """Verdicts, and number of students."""
        counts = Counter(finding.verdict for finding in self.findings)
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        failed = f", {len(self.failures)} cells failed" if self.failures else ""
        students = len(self.results["students"])
        claims = f"{len(self.findings)} claims: {verdicts}"
        return f"Study({claims}; {students:,} rows of students{failed})"

    def _repr_html_(self) -> str:
        columns = ("verdict", "measured", "interval", "claim")
        rows = [{name: getattr(finding, name) for name in columns} for finding in self.findings]
        return preview(self, pd.DataFrame(rows, columns=columns), rows=len(rows))
