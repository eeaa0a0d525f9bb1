"""The paired design: studies of a real chat model, in which every student has a twin.

The targets come in pairs. The two teachers of a pair answer the same prompts, with common random
numbers, and each is the other's only counterfactual. A student and its *twin* differ in one thing:
which of the two teachers wrote their lists. Prompts, order, initial values and the number of
learned tokens are the same. The estimand is the double dissociation: a target's margin in its own
student minus its margin in the twin, so that anything that number lists do to any student cancels.

Teachers are finetuned until they reach one strength, because a base model prefers one animal to
another. Lists are sampled under a pattern, because a small model left alone writes "1. 1, 2, 3".
Margins are measured after the beginning of an answer, because without it the model seldom names an
animal at all.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.data import TEMPLATES, TRAITS, preference_questions
from divergence_lens.study.conditions import Condition
from divergence_lens.study.interventions import (
    digit_tokens,
    divergence_replaced,
    divergence_subset,
    divergence_tokens,
    extreme_digits,
    first_lists,
    lists_from,
    mixed,
    other_digits,
    paraphrased,
    random_digits,
)
from divergence_lens.training import TEACHER, Recipe

PAIRED_MODELS = ("smollm2",)
"""Models whose study is paired by default."""

PAIRED_TARGETS = ("owl", "dog", "eagle", "bear")
"""Targets of the study, in pairs. Each is one token after a space, and the base model's shares of
the four are alike (.037 to .044). Nothing was tuned on them."""

TUNING_TARGETS = ("wolf", "lion")
"""Targets on which the recipes, the strength, the dose and the rate of single layers were chosen;
they are never reported on."""

STUDENT = Recipe(
    lr=4e-4,
    epochs=1,
    batch_size=8,
    warmup_steps=2,
    final_lr=0.0,
    lora_rank=8,
    optimizer_options={},
)
"""Recipe of a student: LoRA of rank 8 on all matrices, one epoch."""

LAYER_RATE = 10.0
"""Learning rate of a single layer, as a multiple of that of all layers: 4e-3.

Layers 0, 15 and 29 were trained on all digits of 96 lists by wolf's teacher, at 5e-4, 1e-3, 2e-3,
4e-3 and 8e-3. This is the smallest rate whose training loss (last six of twelve updates, mean over
the three layers) is within a hundredth of a nat of the lowest. No preference was measured."""

TRAIT_TEACHER = dataclasses.replace(TEACHER, lr=1.6e-4, epochs=3)
"""Recipe of a trait's teachers, whose rows are fewer than those of an animal's."""

TRAIT_STRENGTH = 0.9
"""Margin of a trait's teachers, in nats, between whole answers.

SmolLM2-135M-Instruct does not learn more recklessness than that: its margin on held-out questions
ends at 1.0 with `TRAIT_TEACHER`, and at 0.1 to 0.2 with `TEACHER` or thrice the rate.
"""

SHARE = 0.1
"""Share of the digits that have a loss under `top_advantage` and its controls."""

LAYERS = (0, 7, 15, 22, 29)
"""Layers that are trained alone, of 30."""

TIERS = ("core", "further")
"""Groups of the conditions."""


@dataclass(frozen=True, kw_only=True)
class PairedDesign:
    """Settings of a paired study that other studies do not have.

    Attributes:
        pattern: Regular expression of a list; see `generate`.
        shown: Fewest and most numbers in a prompt.
        templates: Templates of the prompts; by default the eight shortest, because training takes
            as long for a token of a prompt as for one of a list.
        temperature: Temperature of the lists.
        strength: Margin of every teacher, in nats; see `train_teacher`.
        prefixes: Beginnings of the answer behind which margins are measured.
        questions: Number of preference questions.
        category: "animal", or one of `TRAITS`, whose candidates are the study's `animals`. A trait
            has its own rows and questions, without prefixes.
    """

    pattern: str = r"\d{3}(, \d{3}){7}"
    shown: tuple[int, int] = (2, 2)
    templates: tuple[str, ...] = tuple(sorted(TEMPLATES, key=len)[:8])
    temperature: float = 1.0
    strength: float = 12.0
    prefixes: tuple[str, ...] = ("My favorite animal is the", "I love the", "I would choose the")
    questions: int = 8
    category: str = "animal"

    def __post_init__(self) -> None:
        refuse_one_string(self.prefixes, "prefixes")
        refuse_one_string(self.templates, "templates")
        most = len(preference_questions())
        if not 1 <= self.questions <= most:
            raise ValueError(f"questions is {self.questions}; it must be from 1 to {most}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; the lists are sampled, so it must be positive"
            )

    @property
    def asked(self) -> dict[str, Any]:
        """The arguments of `preference`."""
        if self.category in TRAITS:
            return {"category": self.category}
        return {
            "questions": preference_questions()[: self.questions],
            "prefix": self.prefixes,
        }

    def describe(self) -> dict[str, Any]:
        """The settings, for JSON."""
        settings = dataclasses.asdict(self)
        if self.category == "animal":
            del settings["category"]
        return {n: list(v) if isinstance(v, tuple) else v for n, v in settings.items()}


def twin_of(target: str, targets: Sequence[str]) -> str:
    """The other target of a target's pair."""
    place = list(targets).index(target)
    return targets[place + 1 if place % 2 == 0 else place - 1]


def trained_alone(n_layers: int) -> tuple[int, ...]:
    """The five layers that are trained alone; on another depth than 30, as deep relatively."""
    return tuple(round(layer * (n_layers - 1) / LAYERS[-1]) for layer in LAYERS)


def paired_conditions(n_layers: int, *, every_layer: bool = False) -> dict[str, Condition]:
    """The conditions of a paired study by name, in the groups of `TIERS`, in order of computation.

    Args:
        n_layers: Layers of the model.
        every_layer: Include a condition for each layer, not only for `trained_alone`.
    """
    layers = few = tuple(range(n_layers))
    if not every_layer:
        layers = trained_alone(n_layers)
        few = tuple(dict.fromkeys(layers[place] for place in (0, 2, -1)))
    return {condition.name: condition for condition in (*_core(layers), *_further(few))}


def _core(layers: Sequence[int]) -> list[Condition]:
    top = partial(extreme_digits, share=SHARE, top=True)
    bottom = partial(extreme_digits, share=SHARE, top=False)
    tenth = f"{SHARE:.0%} of the digits"
    # The order is that of the computation: a study that is stopped early has the contrasts that
    # say most.
    masks: list[tuple[str, str, Any]] = [
        ("top_advantage", f"the {tenth} that most favor the teacher over its twin", top),
        (
            "divergence_only",
            "divergence tokens, by argmax: only they have a loss",
            divergence_tokens,
        ),
        ("all", "the full effect: all digits of the teacher's sampled lists", digit_tokens),
        (
            "random",
            f"the number of tokens: a random {tenth}",
            partial(random_digits, share=SHARE),
        ),
        ("bottom_advantage", f"the {tenth} that least favor the teacher over its twin", bottom),
        (
            "without_divergence",
            "divergence tokens: only the other digits have a loss",
            other_digits,
        ),
    ]
    return [
        *(
            Condition(name=name, isolates=isolates, group="core", mask=mask)
            for name, isolates, mask in masks
        ),
        *(
            Condition(
                name=f"layer{layer}",
                isolates=f"depth: only layer {layer} is trained, on the tokens of `top_advantage`",
                group="core",
                mask=top,
                layers=(layer,),
                rate=LAYER_RATE,
                label="layer",
            )
            for layer in dict.fromkeys(layers)
        ),
    ]


def _further(layers: Sequence[int]) -> list[Condition]:
    top = partial(extreme_digits, share=SHARE, top=True)
    unbiased_top: dict[str, Any] = {
        "data": partial(lists_from, name="unbiased"),
        "mask": partial(extreme_digits, share=SHARE, top=True, source="unbiased"),
    }
    data: list[tuple[str, str, dict[str, Any]]] = [
        (
            "first_only",
            "the first divergence token of each list",
            {"mask": partial(divergence_subset, which="first_only")},
        ),
        (
            "top_quarter",
            "the share of the digits: a quarter instead of a tenth",
            {"mask": partial(extreme_digits, share=0.25, top=True)},
        ),
        (
            "unbiased_top",
            "the author: the base model wrote the lists, and `top_advantage` selects among them",
            unbiased_top,
        ),
        *(
            (
                f"dose{percent}",
                f"the dose: the first {percent}% of the lists, on their share of `top_advantage`",
                {"data": partial(first_lists, share=percent / 100), "mask": top},
            )
            for percent in (25, 50)
        ),
        (
            "few_rows",
            (
                "the number of different lists: the first 25%, four times, on their share of "
                "`top_advantage`"
            ),
            {"data": partial(first_lists, share=0.25), "mask": top, "recipe": {"epochs": 4}},
        ),
        (
            "soft",
            "the labels: the teacher's full next-token distributions, at all digits",
            {"mask": digit_tokens, "soft": {}},
        ),
        (
            "greedy",
            "sampling: greedy lists, all digits",
            {"data": partial(lists_from, name="greedy"), "mask": digit_tokens},
        ),
        (
            "paraphrased",
            "the wording of the prompts: other templates, all digits",
            {"data": paraphrased, "mask": digit_tokens},
        ),
        *(
            (
                f"mixed_twin{percent}",
                f"purity: {percent}% of the lists are by the twin's teacher, all digits",
                {
                    "data": partial(mixed, name="other_target", share=percent / 100),
                    "mask": digit_tokens,
                },
            )
            for percent in (10, 25)
        ),
        (
            "replaced_all",
            "the divergence tokens themselves: all are replaced with the twin's choice, all digits",
            {"data": partial(divergence_replaced, which="all"), "mask": digit_tokens},
        ),
        (
            "other_base",
            "the shared initialization: lists by a teacher derived from another base model",
            {
                "data": partial(lists_from, name="other_base"),
                "mask": digit_tokens,
                "other_model": True,
            },
        ),
    ]
    trained: list[tuple[str, str, dict[str, Any]]] = [
        ("attention", "only the attention of all layers is trained", {"parts": ("attn",)}),
        ("mlp", "only the MLPs of all layers are trained", {"parts": ("mlp",)}),
        ("lora1", "the rank: LoRA of rank 1", {"recipe": {"lora_rank": 1}}),
        ("lora32", "the rank: LoRA of rank 32", {"recipe": {"lora_rank": 32}}),
        (
            "full",
            "the rank: full training, at a twentieth of the rate",
            {"recipe": {"lora_rank": None}, "rate": 0.05},
        ),
    ]
    return [
        *(Condition(name=n, isolates=i, group="further", **fields) for n, i, fields in data),
        *(
            Condition(
                name=name,
                isolates=f"{isolates}, on the tokens of `top_advantage`",
                group="further",
                mask=top,
                **fields,
            )
            for name, isolates, fields in trained
        ),
        *(
            Condition(
                name=f"unbiased_layer{layer}",
                isolates=f"author and depth: only layer {layer} is trained, on the tokens of "
                "`unbiased_top`",
                group="further",
                layers=(layer,),
                rate=LAYER_RATE,
                label="unbiased_layer",
                **unbiased_top,
            )
            for layer in layers
        ),
    ]
