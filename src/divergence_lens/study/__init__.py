"""The full experiment: configuration, conditions, cells, claims, findings, and the report."""

from divergence_lens.study.conditions import Condition
from divergence_lens.study.loading import read_study
from divergence_lens.study.report import findings_table, write_study_report
from divergence_lens.study.run import Study, StudyConfig, run_study

__all__ = [
    "Condition",
    "Study",
    "StudyConfig",
    "findings_table",
    "read_study",
    "run_study",
    "write_study_report",
]
