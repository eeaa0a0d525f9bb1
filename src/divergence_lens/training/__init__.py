"""Train students: finetuning, recipes, freezing, and one-layer sweeps."""

from divergence_lens.training.finetuning import finetune
from divergence_lens.training.freezing import Trainable, choose, freeze_except
from divergence_lens.training.recipe import PAPER, Recipe
from divergence_lens.training.rows import Rows, pieces, training_rows
from divergence_lens.training.sweep import Sweep, layer_sweep

__all__ = [
    "PAPER",
    "Recipe",
    "Rows",
    "Sweep",
    "Trainable",
    "choose",
    "finetune",
    "freeze_except",
    "layer_sweep",
    "pieces",
    "training_rows",
]
