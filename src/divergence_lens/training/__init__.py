"""Train students and teachers: finetuning, recipes, freezing, soft targets, sweeps over layers."""

from divergence_lens.training.finetuning import finetune
from divergence_lens.training.freezing import Trainable, choose, freeze_except
from divergence_lens.training.logger import log_to
from divergence_lens.training.recipe import PAPER, Recipe
from divergence_lens.training.rows import TrainingRows, pieces, training_rows
from divergence_lens.training.soft import SoftTargets
from divergence_lens.training.sweep import layer_sweep
from divergence_lens.training.sweep_result import Sweep, SweepStudent, Values
from divergence_lens.training.teaching import TEACHER, teacher_rows, train_teacher

__all__ = [
    "PAPER",
    "TEACHER",
    "Recipe",
    "SoftTargets",
    "Sweep",
    "SweepStudent",
    "Trainable",
    "TrainingRows",
    "Values",
    "choose",
    "finetune",
    "freeze_except",
    "layer_sweep",
    "log_to",
    "pieces",
    "teacher_rows",
    "train_teacher",
    "training_rows",
]
