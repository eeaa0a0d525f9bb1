"""What a study runs, and what is wrong with it before anything runs."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from divergence_lens._utils.tables import short_repr
from divergence_lens._utils.validation import refuse_one_number, refuse_one_string
from divergence_lens.chat import check_length, encode_prompts
from divergence_lens.data import (
    ANIMALS,
    check_candidate,
    neutral_prompt,
    number_prompts,
    persona_prompt,
)
from divergence_lens.engine import get_engine
from divergence_lens.models import Model, load_model, model_name
from divergence_lens.study.conditions import KINDS, Condition
from divergence_lens.study.presets import Recipes, recipes
from divergence_lens.study.registry import DEMO, GROUPS, RANKS, choose_conditions
from divergence_lens.teachers import Teacher
from divergence_lens.tiny import TINY_MODELS
from divergence_lens.training import PAPER, Recipe, choose

STUDY = (
    *(f"finetuned:{group}" for group in GROUPS if group != "fragility"),
    *(
        f"finetuned:{pattern}"
        for pattern in (
            "paraphrased",
            "*_divergence",
            "*_chosen",
            "shuffled*",
            "mixed*",
            "several*",
        )
    ),
    "prompted:control",
    "prompted:all",
    "prompted:divergence_only",
    "prompted:without_divergence",
    "prompted:random",
    "prompted:layer*",
    "prompted:paraphrased",
)
"""The conditions of `divergence-lens study` on a tiny model: for finetuned teachers all but
paraphrases in a teacher's own words (a tiny model has none), for prompted teachers, whose effect is
weaker there, the main ones."""

LARGE = (
    *("data", "entangled", "masks", "replaced", "fragility"),
    *("layer*", "upto*", "from*", "attention", "mlp", "embedding"),
)
"""The conditions of `divergence-lens study` on any other model, to which the ranks of LoRA other
than that of all students are added. Its students are LoRA's at a rate for LoRA, so those at
multiples of a full rate are left out, and the rank that all have would be `divergence_only` again;
what needs a second base cannot be had without the user's choice of one."""

_DEEPEST = 1000  # to look for a layer's name before the model is loaded


DTYPES = ("float32", "bfloat16", "float16")
"""What the parameters of a study's models can be."""


@dataclass(frozen=True, kw_only=True, repr=False)
class StudyConfig:
    """What a study runs.

    The defaults are those of the demo. The targets are animals at which nobody looked while the
    tiny world and the recipes were being chosen (docs, "The tiny models").

    Attributes:
        model: What `load_model` takes.
        backend: Which model class.
        device: Where models go, as in `load_model`; None for the first GPU, or the CPU.
        dtype: Type of the parameters, of `DTYPES`.
        targets: The preferences that are to be transferred.
        animals: All candidates: those that are not the target are its counterfactual teachers.
        kinds: Kinds of teachers, of `KINDS`.
        conditions: What students learn from; see `choose_conditions`.
        prompts: Number prompts for each teacher.
        prompt_seed: Seed of the prompts.
        instructions: Whether prompts say how many numbers, in which format, and that nothing else
            is wanted. Large models need it; the tiny ones do not, and
            shorter prompts halve the work.
        seeds: Seeds of the students.
        layer_seeds: Seeds of the students of single layers; None means `seeds`.
        max_new_tokens: Longest completion.
        held_out: Prompts on which a student's own lists are checked.
        pairs: First divergences per target that are patched; 0 for none.
        mechanism: Whether steering vectors and gradients are compared for each target.
        other_model: A second base with the same tokenizer, for the conditions that need one.
        neutral: Whether students and controls of prompted teachers get a neutral system prompt of
            the teachers' length; otherwise none, as in the paper, and the template may write its
            own.
        teacher_recipe: How finetuned teachers are trained; None, here and in the next two, for
            what `tiny.recipe.recipes` has for the model's layout.
        student_recipe: How students of finetuned teachers are trained.
        prompted_recipe: How students of prompted teachers are trained.
        lora_rank: Rank of LoRA for all students; None leaves it to the recipes.
        keep_students: Whether the students' deltas are kept, and not only what was measured.
        workers: Processes that work on cells side by side; each holds a model of its own.
    """

    model: str = "tiny"
    backend: str = "bridge"
    device: str | None = None
    dtype: str = "float32"
    targets: tuple[str, ...] = ("wolf", "lion", "eagle", "panda")
    animals: tuple[str, ...] = ANIMALS
    kinds: tuple[str, ...] = KINDS
    conditions: tuple[str | Condition, ...] = DEMO
    prompts: int = 400
    prompt_seed: int = 0
    instructions: bool = False
    seeds: tuple[int, ...] = (0, 1)
    layer_seeds: tuple[int, ...] | None = (0,)
    max_new_tokens: int = 32
    held_out: int = 40
    pairs: int = 16
    mechanism: bool = False
    other_model: str | None = None
    neutral: bool = True
    teacher_recipe: Recipe | None = None
    student_recipe: Recipe | None = None
    prompted_recipe: Recipe | None = None
    lora_rank: int | None = None
    keep_students: bool = True
    workers: int = 1

    def __post_init__(self) -> None:
        _refuse_singles(self)
        if len(self.targets) < 2:
            raise ValueError(
                f"a study needs two targets or more for an interval, got {self.targets}"
            )
        for name in self.targets:
            check_candidate(name, candidates=self.animals)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it is one of {', '.join(DTYPES)}")
        unknown = set(self.kinds) - set(KINDS)
        if unknown or not self.kinds:
            raise ValueError(f"kinds are {self.kinds}; choose from {', '.join(KINDS)}")
        for name in ("targets", "animals", "kinds", "seeds", "layer_seeds"):
            _refuse_repeats(name, getattr(self, name) or ())
        least = {"prompts": 1, "max_new_tokens": 1, "held_out": 1, "workers": 1, "pairs": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {smallest} or more")
        if not self.seeds:
            raise ValueError("a study needs at least one seed")
        chosen = choose_conditions(self.conditions, self.kinds, _DEEPEST)
        idle = [kind for kind, found in chosen.items() if not found]
        if idle:
            raise ValueError(f"there is no condition for {idle[0]} teachers; leave the kind out")

    def __repr__(self) -> str:
        """The model, and what is not as in the demo."""
        return short_repr(self, always=("model",))

    @classmethod
    def for_model(cls, model: str, **options: Any) -> "StudyConfig":
        """The settings of `divergence-lens study` for a model.

        A tiny model has all conditions, with both kinds of teachers. Any other model has prompted
        teachers, instructions in the prompts and the paper's recipe (LoRA), is in bfloat16 where it
        goes to a GPU, and its students are not kept.

        Args:
            model: What `load_model` takes.
            options: Fields of the configuration that are given by hand.
        """
        tiny = model in TINY_MODELS
        defaults: dict[str, Any] = {
            "targets": ("wolf", "lion", "eagle", "panda", "fox", "dolphin"),
            "seeds": (0, 1, 2),
            "layer_seeds": None,
            "conditions": STUDY if tiny else ("*",),
        }
        if tiny:
            other = next(name for name in TINY_MODELS if name != model)
            defaults |= {"other_model": other, "mechanism": True, "workers": 2}
        else:
            rank = options.get("lora_rank") or PAPER.lora_rank
            ranks = [f"lora{other}" for other in RANKS if other != rank]
            defaults |= {
                "kinds": ("prompted",),
                "dtype": "bfloat16" if _on_gpu(options.get("device")) else "float32",
                "prompts": 10_000,
                "instructions": True,
                "max_new_tokens": 64,
                "neutral": False,
                "teacher_recipe": PAPER,
                "student_recipe": PAPER,
                "prompted_recipe": PAPER,
                "keep_students": False,
                "conditions": (*LARGE, *ranks),
            }
        return cls(model=model, **(defaults | options))

    def load(self, source: str) -> Model:
        """A model of the study, of the class, at the place and in the type that it asks for."""
        backend: Any = self.backend
        dtype: torch.dtype = getattr(torch, self.dtype)
        return load_model(source, backend=backend, device=self.device, dtype=dtype)

    def recipes(self, model: Model) -> Recipes:
        """How everyone is trained if `model` is the base."""
        found = recipes(model)
        students = [
            self.student_recipe or found.student,
            self.prompted_recipe or found.prompted_student,
        ]
        if self.lora_rank is not None:
            students = [dataclasses.replace(one, lora_rank=self.lora_rank) for one in students]
        return Recipes(
            teacher=self.teacher_recipe or found.teacher,
            student=students[0],
            prompted_student=students[1],
        )

    def describe(self, model: Model) -> dict[str, Any]:
        """The settings of a study of `model`, as JSON holds them."""
        used = self.recipes(model)
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain |= {
            "teacher_recipe": used.teacher.describe(),
            "student_recipe": used.student.describe(),
            "prompted_recipe": used.prompted_student.describe(),
            "conditions": [c if isinstance(c, str) else c.name for c in self.conditions],
        }
        return {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()}

    def seeds_of(self, condition: Condition) -> tuple[int, ...]:
        """The seeds of a condition's students."""
        single = condition.label == "layer"
        return self.seeds if not single or self.layer_seeds is None else self.layer_seeds

    def conditions_of(self, kind: str, n_layers: int) -> tuple[Condition, ...]:
        """The conditions of one kind of teacher, without those that lack a second base."""
        chosen = choose_conditions(self.conditions, self.kinds, n_layers)[kind]
        return tuple(c for c in chosen if self.other_model is not None or not c.other_model)

    def recipe_of(self, model: Model, kind: str, condition: Condition | None = None) -> Recipe:
        """How students of a condition, or of none in particular, are trained."""
        used = self.recipes(model)
        recipe = used.prompted_student if kind == "prompted" else used.student
        if condition is None:
            return recipe
        recipe = dataclasses.replace(recipe, **condition.recipe)
        return dataclasses.replace(recipe, lr=condition.rate * recipe.lr)

    def system_prompt(self, kind: str, which: str) -> str | None:
        """A student's system prompt: one of `conditions.PROMPTS`."""
        if which == "own":
            which = "neutral" if kind == "prompted" and self.neutral else "absent"
        return {"absent": None, "neutral": neutral_prompt(), "empty": ""}[which]

    def control_prompt(self, kind: str) -> str | None:
        """The system prompt under which the untouched model writes."""
        return neutral_prompt(1) if kind == "prompted" and self.neutral else None

    def check(self, model: Model, other: Model | None) -> None:
        """Refuse what cannot run on this model, before anything is run.

        Raises:
            ValueError: A condition that names layers or parts that the model lacks, or needs
                another base that is not given; a recipe field that does not exist; a tokenizer
                without a chat template where system prompts are needed; prompts that leave no
                place in the context; another base with another tokenizer.
        """
        engine = get_engine(model)
        choose_conditions(self.conditions, self.kinds, engine.n_layers)
        named = {c for c in self.conditions if isinstance(c, str) and not set(c) & set("*?[:")}
        for kind in self.kinds:
            for condition in choose_conditions(self.conditions, self.kinds, engine.n_layers)[kind]:
                asked = condition.name in named or condition in self.conditions
                if asked and condition.other_model and self.other_model is None:
                    raise ValueError(
                        f"condition {condition.name!r} needs another base: give other_model="
                    )
                self._check_condition(model, kind, condition)
            self._check_prompts(model, kind)
        if other is not None:
            with Teacher("other", model=other).applied(model):
                pass

    def _check_condition(self, model: Model, kind: str, condition: Condition) -> None:
        try:
            self.recipe_of(model, kind, condition)
            choose(
                model,
                layers=condition.layers,
                parts=condition.parts,
                embedding=condition.embedding,
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"condition {condition.name!r}: {error}") from error

    def _check_prompts(self, model: Model, kind: str) -> None:
        prompts = number_prompts(
            self.prompts, seed=self.prompt_seed, instructions=self.instructions
        )
        longest = max(prompts, key=len)
        used: Sequence[str | None] = [self.system_prompt(kind, "own"), self.control_prompt(kind)]
        if kind == "prompted":
            used = [*used, *(persona_prompt(n, candidates=self.animals) for n in self.animals)]
        tokenizer: Any = model.tokenizer
        try:
            for system in dict.fromkeys(used):
                encoded = encode_prompts(tokenizer, [longest], system_prompt=system)[0]
                check_length(encoded, get_engine(model).n_ctx, new_tokens=1, row=0)
        except ValueError as error:
            raise ValueError(f"{model_name(model)} cannot have {kind} teachers: {error}") from error


def lora_kinds(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of teachers whose students are trained with LoRA whatever the condition.

    Args:
        settings: What `StudyConfig.describe` returned, perhaps read from `results.json`.
    """
    recipes = {"finetuned": "student_recipe", "prompted": "prompted_recipe"}
    return tuple(
        kind
        for kind in settings["kinds"]
        if (settings.get(recipes[kind]) or {}).get("lora_rank") is not None
    )


def _on_gpu(device: str | None) -> bool:
    """Whether a model that is loaded with this device goes to a GPU."""
    return torch.cuda.is_available() if device is None else str(device).startswith("cuda")


def _refuse_singles(config: StudyConfig) -> None:
    for name in ("targets", "animals", "kinds", "conditions"):
        refuse_one_string(getattr(config, name), name)
    for name in ("seeds", "layer_seeds"):
        refuse_one_number(getattr(config, name), name)


def _refuse_repeats(name: str, values: Sequence[Any]) -> None:
    twice = [value for value in dict.fromkeys(values) if list(values).count(value) > 1]
    if twice:
        raise ValueError(f"{name} holds {twice[0]!r} more than once; name each once")
