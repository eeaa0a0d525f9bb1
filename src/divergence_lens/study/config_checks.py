"""Checks of a study's configuration: of its settings alone, and against its models."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from divergence_lens._utils.validation import refuse_one_number, refuse_one_string
from divergence_lens.chat import check_length, encode_prompts
from divergence_lens.data import check_candidate
from divergence_lens.engine import get_engine
from divergence_lens.models import Model, model_name
from divergence_lens.study.conditions import KINDS, Condition
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    from divergence_lens.study.config import StudyConfig

DTYPES = ("float32", "bfloat16", "float16")
"""Data types of the parameters."""


def check_settings(config: "StudyConfig") -> None:
    """Check the settings alone.

    Raises:
        ValueError: A setting is not possible, or two contradict each other.
    """
    _check_lists(config)
    _check_paired(config)
    if len(config.targets) < 2:
        raise ValueError(
            f"targets are {config.targets}; an interval over targets needs two or more"
        )
    for name in config.targets:
        check_candidate(name, candidates=config.animals)
    if config.dtype not in DTYPES:
        raise ValueError(f"dtype is {config.dtype!r}; it is one of {', '.join(DTYPES)}")
    if set(config.kinds) - set(KINDS) or not config.kinds:
        raise ValueError(f"kinds are {config.kinds}; choose from {', '.join(KINDS)}")
    minimums = {"prompts": 1, "max_new_tokens": 1, "held_out": 1, "workers": 1, "pairs": 0}
    for name, minimum in minimums.items():
        if getattr(config, name) < minimum:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be {minimum} or more")
    if not config.seeds:
        raise ValueError("a study needs at least one seed")
    chosen = config.chosen_conditions()
    for kind, conditions in chosen.items():
        if not conditions:
            raise ValueError(f"there is no condition for {kind} teachers; omit that kind")


def check_models(config: "StudyConfig", model: Model, other: Model | None) -> None:
    """Check the configuration against its models, before anything runs.

    Raises:
        ValueError: A condition names layers or parts that the model lacks, or needs a second
            base model that is not given; a recipe field does not exist; the tokenizer has no
            chat template but the teachers need system prompts; prompts exceed the context;
            the second base model has another tokenizer.
    """
    n_layers = get_engine(model).n_layers
    named = {c for c in config.conditions if isinstance(c, str) and not set(c) & set("*?[:")}
    chosen = config.chosen_conditions(n_layers)
    for kind, conditions in chosen.items():
        for condition in conditions:
            # A pattern skips conditions that need a second base model; a name requires one.
            explicit = condition.name in named or condition in config.conditions
            if explicit and condition.other_model and config.other_model is None:
                raise ValueError(
                    f"condition {condition.name!r} needs another base model; set other_model"
                )
            _check_condition(config, model, kind, condition)
        _check_prompts(config, model, kind)
    if other is not None:
        with Teacher("other", model=other).applied(model):
            pass


def _check_condition(config: "StudyConfig", model: Model, kind: str, condition: Condition) -> None:
    try:
        recipe = config.recipe_of(model, kind, condition)
        replace(recipe, parts=condition.parts, embedding=condition.embedding).choose(
            model, condition.layers
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"condition {condition.name!r}: {error}") from error


def _check_prompts(config: "StudyConfig", model: Model, kind: str) -> None:
    longest = max(config.number_prompts(config.prompts), key=len)
    systems: Sequence[str | None] = [config.system_prompt(kind, "own"), config.control_prompt(kind)]
    if kind == "prompted":
        systems = [
            *systems,
            *(config.persona(name) for name in config.animals),
        ]
    tokenizer: Any = model.tokenizer
    try:
        for system in dict.fromkeys(systems):
            encoded = encode_prompts(tokenizer, [longest], system_prompt=system)[0]
            check_length(encoded, get_engine(model).n_ctx, new_tokens=1, row=0)
    except ValueError as error:
        raise ValueError(f"{model_name(model)} cannot have {kind} teachers: {error}") from error


def _check_paired(config: "StudyConfig") -> None:
    """Refuse a paired study whose targets have no twins or whose teachers are prompts."""
    if config.paper_design is not None and (config.paired or config.kinds != ("prompted",)):
        raise ValueError("the paper's design has prompted teachers and no pairs of targets")
    if config.paired is None:
        return
    if len(config.targets) % 2:
        raise ValueError(
            f"targets are {config.targets}; a paired study needs an even number, two of each pair"
        )
    if config.kinds != ("finetuned",):
        raise ValueError(f"kinds are {config.kinds}; a paired study has finetuned teachers alone")
    if config.mechanism:
        raise ValueError("mechanism is True; a paired study does not measure it")


def _check_lists(config: "StudyConfig") -> None:
    """Refuse a single value instead of a list, and values that occur twice."""
    for name in ("targets", "animals", "kinds", "conditions"):
        refuse_one_string(getattr(config, name), name)
    for name in ("seeds", "layer_seeds"):
        refuse_one_number(getattr(config, name), name)
    for name in ("targets", "animals", "kinds", "seeds", "layer_seeds"):
        values = list(getattr(config, name) or ())
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{name} holds {value!r} more than once; list each once")
