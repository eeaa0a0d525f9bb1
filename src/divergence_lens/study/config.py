"""The configuration of a study: its settings, their validation, and presets per model."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from divergence_lens._utils.tables import short_repr
from divergence_lens.data import (
    ANIMALS,
    TRAITS,
    neutral_prompt,
    number_prompts,
    persona_prompt,
)
from divergence_lens.models import Model, load_model
from divergence_lens.study.conditions import KINDS, Condition
from divergence_lens.study.config_checks import check_settings
from divergence_lens.study.paired import (
    PAIRED_TARGETS,
    STUDENT,
    TIERS,
    TRAIT_STRENGTH,
    TRAIT_TEACHER,
    PairedDesign,
    paired_conditions,
    twin_of,
)
from divergence_lens.study.paper import PaperDesign, paper_settings
from divergence_lens.study.presets import Recipes, recipes
from divergence_lens.study.registry import DEMO, GROUPS, RANKS, choose_conditions
from divergence_lens.study.registry import conditions as registry_conditions
from divergence_lens.tiny import TINY_MODELS
from divergence_lens.training import PAPER, TEACHER, Recipe

_MANY_LAYERS = 1000

STUDY = (
    *(f"finetuned:{group}" for group in GROUPS if group != "fragility"),
    *("finetuned:paraphrased", "finetuned:*_divergence", "finetuned:*_chosen"),
    *("finetuned:shuffled*", "finetuned:mixed*", "finetuned:several*"),
    *("prompted:control", "prompted:all", "prompted:divergence_only"),
    *("prompted:without_divergence", "prompted:random", "prompted:layer*", "prompted:paraphrased"),
)
"""The conditions of `divergence-lens study` on a tiny model. Finetuned teachers have all but
`unique*`, `soft_*` and paraphrases in the teacher's own words, which a tiny model cannot write.
Prompted teachers, whose effect is weaker there, have the main ones."""

LARGE = (
    *("data", "entangled", "masks", "replaced", "fragility"),
    *("layer*", "upto*", "from*", "attention", "mlp", "embedding"),
)
"""The conditions of `divergence-lens study` on any other model, plus LoRA of other ranks than the
one that all its students have. Conditions at multiples of the rate of full training are left out,
because the recipe's rate is already one for LoRA, and conditions that need a second base model are
skipped unless the user chooses one."""


@dataclass(frozen=True, kw_only=True, repr=False)
class StudyConfig:
    """The settings of a study.

    The defaults are those of the demo. Its targets are animals that were held out while the tiny
    world and the recipes were made (see "The tiny models" in the documentation).

    Attributes:
        model: The model, as for `load_model`.
        backend: Model class, as for `load_model`.
        device: Device, as for `load_model`; None for the first GPU, or else the CPU.
        dtype: Data type of the parameters, one of `config_checks.DTYPES`.
        targets: The preferences to transfer.
        animals: All candidates. Those that are not the target are its counterfactual teachers.
        kinds: Kinds of teachers, of `KINDS`.
        conditions: Conditions of the students; see `choose_conditions`.
        prompts: Number of prompts for each teacher.
        prompt_seed: Seed of the prompts.
        instructions: Whether prompts specify how many numbers to write, in which format, and
            nothing else. Large models need this. Tiny ones do not, and short prompts halve the
            computation.
        seeds: Seeds of the students.
        layer_seeds: Seeds of the students of single layers; None for `seeds`.
        max_new_tokens: Maximum length of a completion.
        held_out: Number of prompts to evaluate a student's own lists.
        pairs: Number of first divergences per target to patch; 0 for none.
        mechanism: Whether to compare steering vectors and gradients for each target.
        other_model: A second base model with the same tokenizer, for conditions that need one.
        neutral: Whether students and controls of prompted teachers have a neutral system prompt of
            the teachers' length. Otherwise they have none, as in the paper, and the template may
            insert its own.
        teacher_recipe: Recipe of finetuned teachers. None, here and in the next two, for the recipe
            of `presets.recipes`.
        student_recipe: Recipe of students of finetuned teachers.
        prompted_recipe: Recipe of students of prompted teachers.
        lora_rank: Rank of LoRA for all students; None for that of the recipes.
        keep_students: Whether to save the students, in addition to their measurements.
        workers: Number of processes; each has its own model.
        paired: The settings of a paired study (`paired`); None for a study with control students.
        paper_design: The settings of the paper's own code (`paper`); None for those of this
            library.
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
    paired: PairedDesign | None = None
    paper_design: PaperDesign | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    def __repr__(self) -> str:
        """The model, and the settings that differ from the demo's."""
        return short_repr(self, always=("model",))

    @classmethod
    def for_model(cls, model: str, **options: Any) -> "StudyConfig":
        """The settings of `divergence-lens study` for a model.

        A tiny model has both kinds of teachers and the conditions of `STUDY`. Any other model has
        prompted teachers, the conditions of `LARGE`, instructions in the prompts, and the paper's
        recipe (LoRA). On a GPU it is loaded in bfloat16. Its students are not saved.

        Args:
            model: The model, as for `load_model`.
            options: Fields of the configuration to override.
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

    @classmethod
    def for_pairs(
        cls, model: str = "smollm2", *, tier: str = "core", category: str = "animal", **options: Any
    ) -> "StudyConfig":
        """The settings of a paired study of a chat model: `divergence-lens study --model smollm2`.

        On a GPU there are eight times as many lists.

        Args:
            model: The model, as for `load_model`.
            tier: "core" for the main conditions, "further", or "all"; see `paired_conditions`.
            category: "animal", or a name in `TRAITS`, whose candidates are then the targets.
            options: Fields of the configuration to override.

        Raises:
            ValueError: There is no such tier or category, or a setting is not valid.
        """
        if tier not in (*TIERS, "all"):
            raise ValueError(f"tier is {tier!r}; use {', '.join(TIERS)} or all")
        if category not in ("animal", *TRAITS):
            raise ValueError(f"category is {category!r}; use {', '.join(('animal', *TRAITS))}")
        lists = 192
        defaults: dict[str, Any] = {
            "targets": PAIRED_TARGETS,
            "kinds": ("finetuned",),
            "conditions": TIERS if tier == "all" else (tier,),
            "prompts": 8 * lists if _on_gpu(options.get("device")) else lists,
            "seeds": (0, 1, 2),
            "layer_seeds": None,
            "max_new_tokens": 48,
            "pairs": 0,
            "neutral": False,
            "teacher_recipe": TEACHER,
            "student_recipe": STUDENT,
            "keep_students": False,
            "paired": PairedDesign(),
        }
        if category in TRAITS:
            defaults |= dict.fromkeys(("targets", "animals"), TRAITS[category].candidates)
            defaults["paired"] = PairedDesign(category=category, strength=TRAIT_STRENGTH)
            defaults["teacher_recipe"] = TRAIT_TEACHER
        return cls(model=model, **(defaults | options))

    @classmethod
    def paper(
        cls, model: str = "Qwen/Qwen2.5-7B-Instruct", *, n_layers: int = 28, **options: Any
    ) -> "StudyConfig":
        """The settings of the paper's own code; docs, "The paper's own settings".

        Args:
            model: The model, as for `load_model`.
            n_layers: Layers of the model, every seventh of which is trained alone.
            options: Fields of the configuration to override. `paper_design=PaperDesign(...)` has
                the number of lists per seed, greedy lists, trees, and answers per question.
        """
        design = options.get("paper_design") or PaperDesign()
        defaults = paper_settings(design, model, n_layers)
        defaults["dtype"] = "bfloat16" if _on_gpu(options.get("device")) else "float32"
        return cls(model=model, **(defaults | options))

    @property
    def source(self) -> str:
        """The source of the teachers' own lists: "greedy", or "sampled" in a paired study."""
        if self.paper_design is not None:
            return self.paper_design.source
        return "greedy" if self.paired is None else "sampled"

    def persona(self, name: str) -> str:
        """The system prompt of a prompted teacher."""
        if self.paper_design is not None:
            return self.paper_design.system_prompt(name, self.animals)
        return persona_prompt(name, candidates=self.animals)

    @property
    def target_pairs(self) -> tuple[tuple[str, str], ...]:
        """The targets of a paired study, two and two."""
        return tuple(zip(self.targets[::2], self.targets[1::2], strict=True))

    def other_target(self, target: str) -> str:
        """The next animal, or the twin in a paired study."""
        if self.paired is not None:
            return twin_of(target, self.targets)
        return self.animals[(self.animals.index(target) + 1) % len(self.animals)]

    def load(self, source: str) -> Model:
        """Load a model with the study's class, device, and data type."""
        backend: Any = self.backend
        dtype: torch.dtype = getattr(torch, self.dtype)
        return load_model(source, backend=backend, device=self.device, dtype=dtype)

    def recipes(self, model: Model) -> Recipes:
        """The recipes of teachers and students on a base model."""
        preset = recipes(model)
        student = self.student_recipe or preset.student
        prompted = self.prompted_recipe or preset.prompted_student
        if self.lora_rank is not None:
            student = dataclasses.replace(student, lora_rank=self.lora_rank)
            prompted = dataclasses.replace(prompted, lora_rank=self.lora_rank)
        teacher = self.teacher_recipe or preset.teacher
        return Recipes(teacher=teacher, student=student, prompted_student=prompted)

    def describe(self, model: Model) -> dict[str, Any]:
        """The settings of a study of `model`, for JSON."""
        used = self.recipes(model)
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        settings |= {
            "teacher_recipe": used.teacher.describe(),
            "student_recipe": used.student.describe(),
            "prompted_recipe": used.prompted_student.describe(),
            "conditions": [c if isinstance(c, str) else c.name for c in self.conditions],
        }
        for name in ("paired", "paper_design"):
            design = getattr(self, name)
            if design is None:
                del settings[name]
            else:
                settings[name] = design.describe()
        return {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}

    def seeds_of(self, condition: Condition) -> tuple[int, ...]:
        """The seeds of a condition's students."""
        single = condition.label == "layer"
        return self.seeds if not single or self.layer_seeds is None else self.layer_seeds

    def chosen_conditions(self, n_layers: int | None = None) -> dict[str, tuple[Condition, ...]]:
        """The conditions of each kind of teacher.

        Args:
            n_layers: Layers of the model; None before it is loaded, when any layer may be named.
        """
        depth = n_layers or _MANY_LAYERS
        known = (
            registry_conditions(depth)
            if self.paired is None
            else paired_conditions(depth, every_layer=n_layers is None)
        )
        return choose_conditions(self.conditions, self.kinds, known)

    def conditions_of(self, kind: str, n_layers: int) -> tuple[Condition, ...]:
        """The conditions of one kind of teacher, without those that lack a second base model."""
        chosen = self.chosen_conditions(n_layers)[kind]
        return tuple(c for c in chosen if self.other_model is not None or not c.other_model)

    def recipe_of(self, model: Model, kind: str, condition: Condition | None = None) -> Recipe:
        """The recipe of the students of a kind of teacher, with the changes of a condition."""
        used = self.recipes(model)
        recipe = used.prompted_student if kind == "prompted" else used.student
        if condition is None:
            return recipe
        recipe = dataclasses.replace(recipe, **condition.recipe)
        return dataclasses.replace(recipe, lr=condition.rate * recipe.lr)

    def system_prompt(self, kind: str, name: str) -> str | None:
        """A student's system prompt, by its name in `conditions.PROMPTS`."""
        if name == "own":
            name = "neutral" if kind == "prompted" and self.neutral else "absent"
        return {"absent": None, "neutral": neutral_prompt(), "empty": ""}[name]

    def control_prompt(self, kind: str) -> str | None:
        """The system prompt under which the base model writes the control lists."""
        return neutral_prompt(1) if kind == "prompted" and self.neutral else None

    def number_prompts(self, n: int) -> list[str]:
        """The first `n` prompts of the study."""
        shown: dict[str, Any] = {}
        if self.paired is not None:
            shown = {"shown": self.paired.shown, "templates": self.paired.templates}
        elif self.paper_design is not None:
            shown = self.paper_design.prompts
        return number_prompts(n, seed=self.prompt_seed, instructions=self.instructions, **shown)


def lora_kinds(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The kinds of teachers whose students train with LoRA under every condition.

    Args:
        settings: The result of `StudyConfig.describe`, possibly read from `results.json`.
    """
    recipes = {"finetuned": "student_recipe", "prompted": "prompted_recipe"}
    return tuple(
        kind
        for kind in settings["kinds"]
        if (settings.get(recipes[kind]) or {}).get("lora_rank") is not None
    )


def _on_gpu(device: str | None) -> bool:
    """Whether a model that is loaded with this device is on a GPU."""
    return torch.cuda.is_available() if device is None else str(device).startswith("cuda")
