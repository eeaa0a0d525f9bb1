"""Audit a data set for the hidden biases that it would transfer, before anyone trains on it."""

from divergence_lens.auditing.baseline import Baseline
from divergence_lens.auditing.candidates import Auditors
from divergence_lens.auditing.remedies import Remedy
from divergence_lens.auditing.result import Audit
from divergence_lens.auditing.running import audit
from divergence_lens.auditing.students import StudentAudit, audit_student
from divergence_lens.auditing.view import RowAudit

__all__ = [
    "Audit",
    "Auditors",
    "Baseline",
    "Remedy",
    "RowAudit",
    "StudentAudit",
    "audit",
    "audit_student",
]
