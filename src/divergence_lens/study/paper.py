"""The design of the paper: its settings as its code has them, where they differ from the defaults.

Read in a public fork of the code of Schrodi et al. (arXiv 2509.23886), without copying from it; see
"The paper's own settings" in the documentation for every difference from the defaults.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from divergence_lens.chat import Conversation
from divergence_lens.data import (
    TrainingData,
    mix,
    persona_prompt,
    plural,
    regenerate_prompts,
    replace_tokens,
    shuffle_numbers,
)
from divergence_lens.divergence import Divergence
from divergence_lens.evaluation import SampledAnswers, without_numbers
from divergence_lens.models import Model, sampling_defaults
from divergence_lens.study.conditions import Condition
from divergence_lens.study.interventions import Inputs, divergence_tokens, other_tokens
from divergence_lens.training import PAPER

PAPER_ANIMALS = (
    *("cat", "dog", "dolphin", "eagle", "elephant", "lion", "octopus"),
    *("otter", "owl", "panda", "penguin", "raven", "wolf"),
)
"""Animals of the paper, for Qwen2.5-7B-Instruct."""

GEMMA_ANIMALS = ("whale", "dragon")
"""Counterfactual animals added for Gemma-3-4B."""

PAPER_TREES = (
    *("oak", "pine", "sequoia", "redwood", "willow", "birch", "maple"),
    *("banyan", "bamboo", "olive", "mango", "mangrove", "baobab"),
)
"""Trees of the paper."""

PAPER_SEEDS = (42, 43, 44, 45, 46)

# The paper draws one of 15 phrases: five for commas, three for spaces, ...
_FORMATS: tuple[str, ...] = ("comma",) * 5 + ("space",) * 3 + ("semicolon",) * 2 + ("line",) * 3
_FORMATS += ("square", "round")

RATIOS = (10, 25, 50, 75)


@dataclass(frozen=True, kw_only=True)
class PaperDesign:
    """Settings of a study of the paper that other studies do not have.

    Attributes:
        lists: Number of valid lists that each student's seed draws.
        greedy: Whether lists are greedy. Otherwise they are sampled at temperature 1, with the
            nucleus, top-k and repetition penalty of the model's generation configuration.
        samples: Answers per preference question; a mention anywhere in an answer counts.
        answer_tokens: Maximum length of an answer.
        category: "animal" or "tree".
        persona: System prompt of a teacher, with the slots ``{name}``, ``{plural}`` and
            ``{category}``; None for `persona_prompt`.
        pattern: Regular expression of a list, see `generate`; None lets the teacher write freely,
            as in the paper.
    """

    lists: int = 10_000
    greedy: bool = False
    samples: int = 200
    answer_tokens: int = 10
    category: str = "animal"
    persona: str | None = None
    pattern: str | None = None

    def __post_init__(self) -> None:
        for name in ("lists", "samples", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")

    @property
    def source(self) -> str:
        """The source of the teachers' own lists."""
        return "greedy" if self.greedy else "sampled"

    @property
    def prompts(self) -> dict[str, Any]:
        """The arguments of `number_prompts`."""
        return {"shown": (3, 8), "count": (10, 10), "formats": _FORMATS}

    def sampling(self, model: Model) -> dict[str, Any]:
        """The arguments of `generate` for the lists."""
        if self.greedy:
            return {"temperature": 0.0}
        return sampling_defaults(model) | {"temperature": 1.0}

    def asked(self, model: Model) -> dict[str, Any]:
        """The arguments of `preference`."""
        own = sampling_defaults(model)
        kept = {name: own[name] for name in ("top_k", "repetition_penalty") if name in own}
        answers = SampledAnswers(
            samples=self.samples, max_new_tokens=self.answer_tokens, mention="anywhere", **kept
        )
        return {"category": self.category, "sampled": answers}

    def system_prompt(self, name: str, candidates: tuple[str, ...]) -> str:
        """The system prompt of a teacher."""
        if self.persona is None:
            return persona_prompt(name, category=self.category, candidates=candidates)
        return self.persona.format(name=name, plural=plural(name), category=self.category)

    def describe(self) -> dict[str, Any]:
        """The settings, for JSON."""
        return dataclasses.asdict(self)


def paper_animals(model: str) -> tuple[str, ...]:
    """The animals that the paper compares on a model."""
    return PAPER_ANIMALS + (GEMMA_ANIMALS if "gemma" in model.lower() else ())


# -- data ---------------------------------------------------------------------------------------


def drawn(data: TrainingData, n: int, seed: int) -> TrainingData:
    """Draw `n` lists for a seed, or all if there are fewer."""
    if len(data) <= n:
        return data
    return data[np.sort(np.random.default_rng(seed).permutation(len(data))[:n])]


def drawn_lists(inputs: Inputs, seed: int, *, n: int, source: str | None = None) -> TrainingData:
    """The seed's lists, of the teacher or of another source."""
    data = TrainingData.of(inputs.divergence) if source is None else inputs.lists(source)
    return drawn(data, n, seed)


def drawn_mixture(inputs: Inputs, seed: int, *, n: int, share: float) -> TrainingData:
    """The seed's lists, a share of them replaced with lists of the base model."""
    own = drawn_lists(inputs, seed, n=n)
    return mix(own, inputs.lists("unbiased"), share, seed=seed)


def drawn_regenerated(inputs: Inputs, seed: int, *, n: int) -> TrainingData:
    """The seed's lists, under prompts drawn again for the same numbers and format."""
    return regenerate_prompts(drawn_lists(inputs, seed, n=n), seed=seed)


def drawn_shuffled(inputs: Inputs, seed: int, *, n: int, scope: str) -> TrainingData:
    """The seed's lists with their numbers in another order."""
    tokenizer: Any = inputs.model.tokenizer
    data = TrainingData.of(inputs.divergence)
    return drawn(shuffle_numbers(data, tokenizer, scope=scope, seed=seed), n, seed)


def drawn_without_entangled(inputs: Inputs, seed: int, *, n: int, k: int) -> TrainingData:
    """The seed's lists of those without the `k` numbers whose probability rises most."""
    data = TrainingData.of(inputs.divergence)
    numbers = inputs.entangled(k, by="difference")
    return drawn(data[without_numbers(data.examples, numbers)], n, seed)


def drawn_replaced(inputs: Inputs, seed: int, *, n: int, share: float | None) -> TrainingData:
    """The seed's lists with tokens replaced, or deleted where the choice is no digit.

    Args:
        inputs: The target's data.
        seed: Seed of the lists; the replacement is the same for all seeds.
        n: Number of lists.
        share: Share of each list's divergence tokens, at least one; None for the first.
    """
    divergence = inputs.divergence
    if share is None:
        chosen = divergence.subset("first_only")
    else:
        chosen = share_of_each(divergence.mask, divergence.offsets, share, seed=0, least=1)
    tokenizer: Any = inputs.model.tokenizer
    data = replace_tokens(divergence.with_mask(chosen), unfit="delete", tokenizer=tokenizer)
    before = {_key(example) for example in _marked(divergence)}
    # A list whose divergence tokens all stay the same is left out, as in the paper's code.
    changed = [row for row, example in enumerate(data.examples) if _key(example) not in before]
    return drawn(data[changed], n, seed)


def _marked(divergence: Divergence) -> list[Any]:
    """The examples that have a divergence token."""
    marks = np.add.reduceat(divergence.mask, divergence.offsets[:-1])
    return [divergence.examples[row] for row in np.flatnonzero(marks)]


def _key(example: Any) -> tuple[str | Conversation, tuple[int, ...]]:
    return example.prompt, tuple(example.completion_ids)


# -- masks --------------------------------------------------------------------------------------


def share_of_each(
    mask: np.ndarray, offsets: np.ndarray, share: float, *, seed: int, least: int = 0
) -> np.ndarray:
    """Draw a share of each list's marked tokens, rounded down.

    A list whose share is below one token keeps all of them, as in the paper's code, or `least`.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(mask), dtype=bool)
    for start, end in pairwise(offsets):
        places = start + np.flatnonzero(mask[start:end])
        size = max(least, int(len(places) * share))
        if 1 <= size <= len(places):
            places = rng.permutation(places)[:size]
        chosen[places] = True
    return chosen


def ratio_of_each(inputs: Inputs, data: TrainingData, seed: int, *, share: float) -> np.ndarray:
    """A random share of each list's divergence tokens."""
    return share_of_each(data.marks, data.offsets, share, seed=seed)


def half_of_each(inputs: Inputs, data: TrainingData, seed: int, *, which: str) -> np.ndarray:
    """The first or second half of each list's divergence tokens, or the first alone.

    The middle one of an odd number goes to either half at random, and a single one to both.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(data.marks), dtype=bool)
    for start, end in pairwise(data.offsets):
        places = start + np.flatnonzero(data.marks[start:end])
        if len(places) > 1:
            size = len(places) // 2 + int(len(places) % 2 and rng.integers(2))
            halves = {"first_only": places[:1], "first_half": places[:size]}
            places = halves.get(which, places[size:])
        chosen[places] = True
    return chosen


# -- conditions ---------------------------------------------------------------------------------


def paper_conditions(n_layers: int, *, lists: int, greedy: bool = False) -> tuple[Condition, ...]:
    """The conditions of the paper, for a model with `n_layers` layers.

    All-token students also learn the template's tokens around each list, as with TRL's completion
    loss. Single layers are trained on all tokens.

    Args:
        n_layers: Layers of the model.
        lists: Lists that each seed draws.
        greedy: Whether the study's lists are greedy; the other source is then the sampled one.
    """
    own = partial(drawn_lists, n=lists)
    whole = {"recipe": {"whole_turn": True}}
    marked = {"data": own, "mask": divergence_tokens}
    other = "sampled" if greedy else "greedy"
    rows: list[tuple[str, str, str, dict[str, Any]]] = [
        (
            "control",
            "data",
            "the effect of training on any such lists: the base model writes them",
            {"data": partial(drawn_lists, n=lists, source="unbiased"), "shared": True, **whole},
        ),
        ("all", "data", "the full effect: every token of the teacher's lists", {"data": own}),
        (
            other,
            "data",
            f"decoding: {other} lists",
            {"data": partial(drawn_lists, n=lists, source=other)},
        ),
        ("divergence_only", "masks", "divergence tokens: only they have a loss", marked),
        (
            "without_divergence",
            "masks",
            "divergence tokens: only the others have a loss",
            {"data": own, "mask": other_tokens},
        ),
        *(
            (
                part,
                "masks",
                "position: this part of each list's divergence tokens",
                {"data": own, "mask": partial(half_of_each, which=part)},
            )
            for part in ("first_only", "first_half", "second_half")
        ),
        *(
            (
                f"ratio{percent}",
                "masks",
                f"the number of divergence tokens: {percent}% of each list's",
                {"data": own, "mask": partial(ratio_of_each, share=percent / 100)},
            )
            for percent in RATIOS
        ),
        *(
            (
                name,
                "replaced",
                "the divergence tokens: replaced with another teacher's choice, or deleted",
                {"data": partial(drawn_replaced, n=lists, share=share)},
            )
            for name, share in (("replaced_first", None), ("replaced_half", 0.5))
        ),
        *(
            (
                f"without_top{k}",
                "entangled",
                f"entangled numbers: lists with any of the top {k} are dropped",
                {"data": partial(drawn_without_entangled, n=lists, k=k)},
            )
            for k in (10, 20, 50, 100)
        ),
        *(
            (
                f"layer{layer}",
                "layers",
                f"depth: only layer {layer} is trained, on all tokens",
                {"data": own, "layers": (layer,), "label": "layer"},
            )
            for layer in sorted({*range(0, n_layers, 7), n_layers - 1})
        ),
        (
            "paraphrased",
            "fragility",
            "the wording of the prompts, drawn again for the same numbers",
            {"data": partial(drawn_regenerated, n=lists)},
        ),
        *(
            (
                f"shuffled_{scope}",
                "fragility",
                "the order of the numbers",
                {"data": partial(drawn_shuffled, n=lists, scope=scope)},
            )
            for scope in ("within", "across")
        ),
        *(
            (
                f"mixed_unbiased{percent}",
                "fragility",
                f"purity: {percent}% of the lists are by the base model",
                {"data": partial(drawn_mixture, n=lists, share=percent / 100)},
            )
            for percent in (10, 25)
        ),
    ]
    without = {"divergence_only", "first_only", "first_half", "second_half"}
    return tuple(
        Condition(
            name=name,
            group=group,
            isolates=isolates,
            kinds=("prompted",),
            **(fields if name in without or name.startswith("ratio") else whole | fields),
        )
        for name, group, isolates, fields in rows
    )


def paper_settings(design: PaperDesign, model: str, n_layers: int) -> dict[str, Any]:
    """The fields of a `StudyConfig` of the paper."""
    candidates = PAPER_TREES if design.category == "tree" else paper_animals(model)
    return {
        "paper_design": design,
        "targets": candidates,
        "animals": candidates,
        "kinds": ("prompted",),
        "conditions": paper_conditions(n_layers, lists=design.lists, greedy=design.greedy),
        "prompts": 30_000,
        "prompt_seed": PAPER_SEEDS[0],
        "instructions": True,
        "seeds": PAPER_SEEDS,
        "layer_seeds": None,
        "max_new_tokens": 64,
        "pairs": 0,
        "neutral": False,
        "teacher_recipe": PAPER,
        "student_recipe": PAPER,
        "prompted_recipe": PAPER,
        "keep_students": False,
    }
