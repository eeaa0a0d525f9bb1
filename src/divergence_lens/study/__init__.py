"""The full experiment: configuration, conditions, cells, claims, findings, and the report."""

from divergence_lens.study.audit_pools import AuditStudyConfig
from divergence_lens.study.audit_run import run_audit_study
from divergence_lens.study.conditions import Condition
from divergence_lens.study.config import StudyConfig
from divergence_lens.study.config_file import config_to_yaml, read_config
from divergence_lens.study.gradients import GradientAlignment, gradient_alignment
from divergence_lens.study.paired import PAIRED_MODELS, PairedDesign, paired_conditions
from divergence_lens.study.paper import PaperDesign, paper_conditions
from divergence_lens.study.presets import finetuned_teacher
from divergence_lens.study.report import findings_table, write_study_report
from divergence_lens.study.result import Study
from divergence_lens.study.run import run_study
from divergence_lens.study.steering import Steering, follow_steering, steering_vectors

__all__ = [
    "PAIRED_MODELS",
    "AuditStudyConfig",
    "Condition",
    "GradientAlignment",
    "PairedDesign",
    "PaperDesign",
    "Steering",
    "Study",
    "StudyConfig",
    "config_to_yaml",
    "findings_table",
    "finetuned_teacher",
    "follow_steering",
    "gradient_alignment",
    "paired_conditions",
    "paper_conditions",
    "read_config",
    "run_audit_study",
    "run_study",
    "steering_vectors",
    "write_study_report",
]
