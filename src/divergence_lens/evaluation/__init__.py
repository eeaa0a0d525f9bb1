"""Measure a model's preference, and whether it still does its task."""

from divergence_lens.evaluation.answers import form_ids
from divergence_lens.evaluation.distance import Distance
from divergence_lens.evaluation.entanglement import Entanglement, entangled_numbers, without_numbers
from divergence_lens.evaluation.preferences import preference
from divergence_lens.evaluation.quality import TaskQuality, task_quality
from divergence_lens.evaluation.result import Preference
from divergence_lens.evaluation.sampled import SampledAnswers

__all__ = [
    "Distance",
    "Entanglement",
    "Preference",
    "SampledAnswers",
    "TaskQuality",
    "entangled_numbers",
    "form_ids",
    "preference",
    "task_quality",
    "without_numbers",
]
