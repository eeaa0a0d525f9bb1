"""Find divergence tokens, the layers that cause them, and the layer that transfers a hidden bias.

A *divergence token* is a token that a teacher chooses and that another teacher, given the same text
so far, would not choose. The library finds them in the data that a teacher wrote, locates their
causes in the model, trains students on them, and measures what the students prefer:

    model = load_model("tiny")
    owl, *others = animal_teachers(["owl", "cat", "wolf", "panda"])
    examples = generate(model, number_prompts(200), teacher=owl)
    div = find_divergence(model, examples, teacher=owl, counterfactuals=others)
    effects = attribution_patch(model, div.pairs())
    student = finetune(model, examples, mask=div.mask, layers=[0])
"""

import importlib

# The constant of `typing`, whose import would be most of the time that this module takes.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from divergence_lens import plots
    from divergence_lens._utils.interrupts import Interrupted
    from divergence_lens.auditing import Audit, StudentAudit, audit, audit_student
    from divergence_lens.circuits import (
        Circuit,
        EdgeScores,
        Faithfulness,
        edge_scores,
        faithfulness,
        faithfulness_curve,
        path_patch,
    )
    from divergence_lens.data import (
        ANIMALS,
        TREES,
        NumberFilter,
        animal_teachers,
        neutral_prompt,
        number_prompts,
        persona_prompt,
        preference_questions,
    )
    from divergence_lens.deltas import Delta
    from divergence_lens.divergence import Divergence, find_divergence
    from divergence_lens.evaluation import (
        Preference,
        SampledAnswers,
        TaskQuality,
        preference,
        task_quality,
    )
    from divergence_lens.examples import Example, load_examples, save_examples
    from divergence_lens.generation import Server, generate
    from divergence_lens.models import Model, load_model
    from divergence_lens.pairs import Pairs
    from divergence_lens.patching import (
        Agreement,
        AttentionPatterns,
        CrossPatch,
        Effects,
        EmbeddingNoise,
        attention_patterns,
        attribution_patch,
        causal_mediation,
        cross_patch,
    )
    from divergence_lens.study import Condition, Study, StudyConfig, run_study
    from divergence_lens.teachers import Teacher, prompted_teachers
    from divergence_lens.training import (
        Recipe,
        SoftTargets,
        Sweep,
        finetune,
        freeze_except,
        layer_sweep,
        log_to,
        train_teacher,
    )

__version__ = "0.1.0"

__all__ = [
    "ANIMALS",
    "TREES",
    "Agreement",
    "AttentionPatterns",
    "Audit",
    "Circuit",
    "Condition",
    "CrossPatch",
    "Delta",
    "Divergence",
    "EdgeScores",
    "Effects",
    "EmbeddingNoise",
    "Example",
    "Faithfulness",
    "Interrupted",
    "Model",
    "NumberFilter",
    "Pairs",
    "Preference",
    "Recipe",
    "SampledAnswers",
    "Server",
    "SoftTargets",
    "StudentAudit",
    "Study",
    "StudyConfig",
    "Sweep",
    "TaskQuality",
    "Teacher",
    "animal_teachers",
    "attention_patterns",
    "attribution_patch",
    "audit",
    "audit_student",
    "causal_mediation",
    "cross_patch",
    "edge_scores",
    "faithfulness",
    "faithfulness_curve",
    "find_divergence",
    "finetune",
    "freeze_except",
    "generate",
    "layer_sweep",
    "load_examples",
    "load_model",
    "log_to",
    "neutral_prompt",
    "number_prompts",
    "path_patch",
    "persona_prompt",
    "plots",
    "preference",
    "preference_questions",
    "prompted_teachers",
    "run_study",
    "save_examples",
    "task_quality",
    "train_teacher",
]

# Names load on first use: torch and TransformerLens take seconds to import, and neither
# `--help` nor a typing error in a command should wait for them.
_HOMES = {
    "_utils.interrupts": ("Interrupted",),
    "auditing": ("Audit", "StudentAudit", "audit", "audit_student"),
    "circuits": (
        "Circuit",
        "EdgeScores",
        "Faithfulness",
        "edge_scores",
        "faithfulness",
        "faithfulness_curve",
        "path_patch",
    ),
    "data": (
        "ANIMALS",
        "NumberFilter",
        "TREES",
        "animal_teachers",
        "neutral_prompt",
        "number_prompts",
        "persona_prompt",
        "preference_questions",
    ),
    "deltas": ("Delta",),
    "divergence": ("Divergence", "find_divergence"),
    "evaluation": ("Preference", "SampledAnswers", "TaskQuality", "preference", "task_quality"),
    "examples": ("Example", "load_examples", "save_examples"),
    "generation": ("Server", "generate"),
    "models": ("Model", "load_model"),
    "pairs": ("Pairs",),
    "patching": (
        "Agreement",
        "AttentionPatterns",
        "CrossPatch",
        "Effects",
        "EmbeddingNoise",
        "attention_patterns",
        "attribution_patch",
        "causal_mediation",
        "cross_patch",
    ),
    "study": ("Condition", "Study", "StudyConfig", "run_study"),
    "teachers": ("Teacher", "prompted_teachers"),
    "training": (
        *("Recipe", "SoftTargets", "Sweep", "finetune", "freeze_except", "layer_sweep"),
        *("log_to", "train_teacher"),
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
        globals()[name] = value
        return value
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
