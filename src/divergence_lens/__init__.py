"""Find divergence tokens, the layers that cause them, and the block that carries a hidden bias.

A *divergence token* is a token that a teacher chooses and that another teacher, given the same text
so far, would not choose. The library finds them in the data that a teacher wrote, locates what in a
model causes them, trains students on them, and measures what the students prefer:

    model = load_model("tiny")
    owl, *others = animal_teachers(["owl", "cat", "wolf", "panda"])
    examples = generate(model, owl, number_prompts(200))
    div = find_divergence(model, examples, teacher=owl, counterfactuals=others)
    effects = attribution_patch(model, div.pairs())
    student = finetune(model, examples, mask=div.mask, blocks=[0])
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from divergence_lens._utils.interrupts import Interrupted
from divergence_lens.data import (
    ANIMALS,
    TREES,
    NumberFilter,
    animal_teachers,
    neutral_prompt,
    number_prompts,
    parse_numbers,
    persona_prompt,
    preference_questions,
    surface_forms,
)
from divergence_lens.deltas import Delta
from divergence_lens.divergence import Divergence, find_divergence
from divergence_lens.evaluation import Preference, TaskQuality, preference, task_quality
from divergence_lens.examples import (
    Example,
    as_examples,
    iter_examples,
    load_examples,
    save_examples,
    with_ids,
)
from divergence_lens.generation import generate
from divergence_lens.models import Model, fingerprint, load_model, model_name, provenance
from divergence_lens.pairs import Pairs
from divergence_lens.patching import (
    Agreement,
    CrossPatch,
    Effects,
    EmbeddingNoise,
    attribution_patch,
    attribution_patch_sites,
    causal_mediation,
    cross_patch,
    first_disagreements,
)
from divergence_lens.study import Condition, Study, StudyConfig, run_study
from divergence_lens.teachers import Teacher, prompted_teachers
from divergence_lens.training import PAPER, Recipe, Sweep, finetune, freeze_except, layer_sweep

# `generate` and `finetune` are functions and modules at once. Here the functions win;
# `from divergence_lens.generation import ...` reaches the module.

if TYPE_CHECKING:
    from divergence_lens import plots

__version__ = "0.1.0"

__all__ = [
    "ANIMALS",
    "PAPER",
    "TREES",
    "Agreement",
    "Condition",
    "CrossPatch",
    "Delta",
    "Divergence",
    "Effects",
    "EmbeddingNoise",
    "Example",
    "Interrupted",
    "Model",
    "NumberFilter",
    "Pairs",
    "Preference",
    "Recipe",
    "Study",
    "StudyConfig",
    "Sweep",
    "TaskQuality",
    "Teacher",
    "animal_teachers",
    "as_examples",
    "attribution_patch",
    "attribution_patch_sites",
    "causal_mediation",
    "cross_patch",
    "find_divergence",
    "finetune",
    "fingerprint",
    "first_disagreements",
    "freeze_except",
    "generate",
    "iter_examples",
    "layer_sweep",
    "load_examples",
    "load_model",
    "model_name",
    "neutral_prompt",
    "number_prompts",
    "parse_numbers",
    "persona_prompt",
    "plots",
    "preference",
    "preference_questions",
    "prompted_teachers",
    "provenance",
    "run_study",
    "save_examples",
    "surface_forms",
    "task_quality",
    "with_ids",
]


def __getattr__(name: str) -> ModuleType:
    if name == "plots":  # plotly takes a while to import, and many sessions draw nothing
        return importlib.import_module("divergence_lens.plots")
    raise AttributeError(f"module 'divergence_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
