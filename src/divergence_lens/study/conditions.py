"""The conditions of a study: what a student learns from, and what that isolates.

A `Condition` is a change of the data, a mask, the layers that learn, changes of the recipe, and the
system prompts of training and evaluation. `conditions(n_layers)` lists those of Schrodi et al.
(arXiv 2509.23886) with a few controls of our own; a study takes others just as well.
"""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from divergence_lens._utils.tables import short_repr
from divergence_lens.study.interventions import (
    DataFunction,
    MaskFunction,
    advantage_weights,
    clear_divergence_tokens,
    divergence_replaced,
    divergence_subset,
    divergence_tokens,
    lists_from,
    lists_without_entangled,
    mixed,
    other_tokens,
    own_lists,
    paraphrased,
    paraphrased_by_teacher,
    paraphrases_chosen_by_teacher,
    pooled,
    random_like_clear,
    random_tokens,
    randomly_thinned,
    shuffled,
    tokens_above_kl,
    top_advantage_tokens,
    top_kl_tokens,
    top_kl_without_divergence,
)

KINDS = ("finetuned", "prompted")
PROMPTS = ("own", "absent", "neutral", "empty")
"""System prompts of students: what their kind of teacher asks for, none (the template may write its
own), one without a preference, and the empty text."""

DEMO = ("control", "all", "divergence_only", "without_divergence", "layer*")
"""The conditions of the demo."""

GROUPS = ("data", "entangled", "masks", "replaced", "layers", "fragility", "context")

LORA_RATE = 8
"""How many times the rate of full training suits LoRA of rank 8 on the tiny model: of 1, 2, 4, 8,
16 and 32 times, that at which its loss on the divergence tokens of owl, which is no target, falls
lowest. No preference was looked at. Other ranks have the same factor, though none was sought for
them."""

RANKS = (1, 2, 4, 8, 16, 32)
"""The ranks of LoRA that are tried."""

_RATIOS = tuple(percent / 100 for percent in range(10, 100, 10))
_SHARES = (0.1, 0.25, 0.5)


@dataclass(frozen=True, kw_only=True, repr=False)
class Condition:
    """One way to train students.

    Attributes:
        name: What tables call it.
        isolates: In a sentence, what a difference to other conditions can be put down to.
        group: One of `GROUPS`, or a word of your own.
        data: `data(inputs, seed)` gives the examples with their marks. A named function, or a
            `functools.partial` of one with plain keyword arguments: it is part of what a cell is
            recognised by.
        mask: `mask(inputs, data, seed)` gives the flags of the tokens with a loss; None means all.
        weights: The same for loss weights.
        layers: Layers that learn; None means all.
        parts: Their parts that learn, see `freeze_except`.
        embedding: Whether embeddings learn; without layers or parts, they alone.
        recipe: Fields of the recipe that the condition changes.
        rate: Factor of the recipe's learning rate.
        train_prompt: System prompt of the training, one of `PROMPTS`.
        eval_prompt: System prompt of the evaluation.
        kinds: Kinds of teachers that it makes sense for.
        shared: Whether the student is the same for all targets, as a control's is.
        changes_data: Whether to count the divergence tokens that are left in the changed data.
        other_model: Whether it needs the study's second base.
        label: What the `condition` column of the table says; the name unless given. Students of
            several single layers have one label, and the layer in a column of its own.
    """

    name: str
    isolates: str
    group: str
    data: DataFunction = field(default_factory=lambda: own_lists)
    mask: MaskFunction | None = None
    weights: MaskFunction | None = None
    layers: tuple[int, ...] | None = None
    parts: tuple[str, ...] | None = None
    embedding: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 1.0
    train_prompt: str = "own"
    eval_prompt: str = "own"
    kinds: tuple[str, ...] = KINDS
    shared: bool = False
    changes_data: bool = False
    other_model: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        if not self.name or not all(c.isalnum() or c in "_-" for c in self.name):
            raise ValueError(
                f"a condition's name holds letters, digits, - and _ only, got {self.name!r}"
            )
        for what in ("train_prompt", "eval_prompt"):
            if getattr(self, what) not in PROMPTS:
                raise ValueError(
                    f"condition {self.name!r}: {what} is {getattr(self, what)!r}; use one of "
                    f"{', '.join(PROMPTS)}"
                )
        unknown = set(self.kinds) - set(KINDS)
        if unknown:
            raise ValueError(
                f"condition {self.name!r}: unknown kind {min(unknown)!r}; there are "
                f"{', '.join(KINDS)}"
            )
        for step in (self.data, self.mask, self.weights):
            if step is not None:
                _described(step, self.name)

    def __repr__(self) -> str:
        """Its name, and what is not as usual."""
        return short_repr(self, always=("name",))

    def describe(self) -> dict[str, Any]:
        """What tells a student of this condition from others, as JSON holds it.

        All but `rate`, which changes the recipe: cells are recognised by that recipe as well.
        """
        steps = {"data": self.data, "mask": self.mask, "weights": self.weights}
        return {
            **{k: None if s is None else _described(s, self.name) for k, s in steps.items()},
            "layers": None if self.layers is None else list(self.layers),
            "parts": None if self.parts is None else list(self.parts),
            "embedding": self.embedding,
            "recipe": dict(self.recipe),
            "train_prompt": self.train_prompt,
            "eval_prompt": self.eval_prompt,
            "shared": self.shared,
        }


# -- the registry -------------------------------------------------------------------------------


def conditions(n_layers: int) -> dict[str, Condition]:
    """All conditions for a model of so many layers, by name."""
    found = [
        *_data(),
        *_entangled(),
        *_masks(),
        *_replaced(),
        *_layers(n_layers),
        *_fragility(),
        *_context(),
    ]
    return {condition.name: condition for condition in found}


def choose_conditions(
    wanted: Sequence[str | Condition], kinds: Iterable[str], n_layers: int
) -> dict[str, tuple[Condition, ...]]:
    """The conditions that are meant, for each kind of teacher.

    Args:
        wanted: Names, groups, file-name patterns ("layer*", "*"), each for one kind only if a
            kind and a colon stand before it ("prompted:masks"), or conditions of your own.
        kinds: Kinds of teachers.
        n_layers: Layers of the model.

    Returns:
        Kind -> conditions, in the order of the registry, then your own.

    Raises:
        ValueError: A name that matches nothing (the nearest are offered); two of one name.
    """
    known = conditions(n_layers)
    chosen: dict[str, dict[str, Condition]] = {kind: {} for kind in kinds}
    for entry in wanted:
        if isinstance(entry, Condition):
            for kind in entry.kinds:
                if kind in chosen and chosen[kind].setdefault(entry.name, entry) is not entry:
                    raise ValueError(f"two conditions are named {entry.name!r}; rename one")
            continue
        kind, colon, pattern = entry.rpartition(":")
        if colon and kind not in KINDS:
            raise ValueError(f"{entry!r}: unknown kind {kind!r}; there are {', '.join(KINDS)}")
        names = [
            n for n, c in known.items() if c.group == pattern or fnmatch.fnmatchcase(n, pattern)
        ]
        if not names:
            near = difflib.get_close_matches(pattern, [*GROUPS, *known], n=4, cutoff=0.4)
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise ValueError(
                f"there is no condition {pattern!r}; {hint}groups are {', '.join(GROUPS)}"
            )
        for name in names:
            for k in [kind] if colon else known[name].kinds:
                if k in chosen and k in known[name].kinds:
                    chosen[k].setdefault(name, known[name])
    order = {name: place for place, name in enumerate(known)}
    return {
        kind: tuple(sorted(found.values(), key=lambda c: order.get(c.name, len(order))))
        for kind, found in chosen.items()
    }


def _data() -> list[Condition]:
    group = "data"
    return [
        Condition(
            name="control",
            group=group,
            isolates="what training on any such lists does: they are written by the untouched "
            "model, under a neutral system prompt where teachers have one",
            data=partial(lists_from, name="unbiased"),
            shared=True,
        ),
        Condition(
            name="all",
            group=group,
            isolates="the whole effect: every token of the teacher's greedy lists",
        ),
        Condition(
            name="sampled",
            group=group,
            isolates="greedy decoding: the teacher's lists are drawn at temperature 1",
            data=partial(lists_from, name="sampled"),
        ),
        Condition(
            name="sampled_divergence",
            group=group,
            isolates="greedy decoding, for the divergence tokens of lists at temperature 1",
            data=partial(lists_from, name="sampled"),
            mask=divergence_tokens,
        ),
        Condition(
            name="other_base",
            group=group,
            isolates="the shared initialisation: the teacher is made from another base",
            data=partial(lists_from, name="other_base"),
            other_model=True,
        ),
        Condition(
            name="other_base_divergence",
            group=group,
            isolates="the shared initialisation, for the other teacher's divergence tokens",
            data=partial(lists_from, name="other_base"),
            mask=divergence_tokens,
            other_model=True,
        ),
    ]


def _entangled() -> list[Condition]:
    dropped = [
        Condition(
            name=f"without_top{k}",
            group="entangled",
            isolates=f"entangled numbers: lists with any of the top {k} are dropped",
            data=partial(lists_without_entangled, k=k),
        )
        for k in (10, 20, 50, 100)
    ]
    thin = Condition(
        name="thinned_like_top100",
        group="entangled",
        isolates="the number of lists: as many are dropped as for the top 100 entangled numbers, "
        "but at random",
        data=partial(randomly_thinned, k=100),
    )
    return [*dropped, thin]


def _masks() -> list[Condition]:
    def masked(name: str, isolates: str, mask: MaskFunction) -> Condition:
        return Condition(name=name, group="masks", isolates=isolates, mask=mask)

    ratios = [
        masked(
            f"ratio{round(100 * ratio)}",
            f"the number of divergence tokens: a random {ratio:.0%} of them",
            partial(divergence_subset, which=ratio),
        )
        for ratio in _RATIOS
    ]
    margins = [
        masked(
            f"margin{margin:g}".replace(".", "_"),
            f"near-ties: divergence tokens where every choice leads by {margin:g} logits or more",
            partial(clear_divergence_tokens, margin=margin),
        )
        for margin in (0.25, 0.5, 1.0)
    ]
    kl = [
        masked(
            name,
            f"the criterion: {words}, those where the KL divergence of a counterfactual from the "
            "teacher is largest, in place of argmax",
            partial(top_kl_tokens, share=share),
        )
        for name, words, share in (
            ("kl_same", "as many tokens as diverge", 1.0),
            ("kl_half", "half as many tokens as diverge", 0.5),
            ("kl_double", "twice as many tokens as diverge", 2.0),
        )
    ]
    kl += [
        masked(
            f"kl{nats:g}".replace(".", "_"),
            f"the criterion: all tokens at which some counterfactual is {nats:g} nats away or more",
            partial(tokens_above_kl, nats=nats),
        )
        for nats in (0.1, 0.5)
    ]
    kl.append(
        masked(
            "kl_beyond_argmax",
            "what argmax misses: the tokens of `kl_same` that are no divergence tokens",
            top_kl_without_divergence,
        )
    )
    return [
        masked(
            "divergence_only", "divergence tokens: the loss is on them alone", divergence_tokens
        ),
        masked("without_divergence", "divergence tokens: the loss is on all others", other_tokens),
        masked(
            "random",
            "how few tokens have a loss: as many as there are divergence tokens, at random",
            partial(random_tokens, among="all"),
        ),
        masked(
            "random_other",
            "the same, drawn from the tokens that are no divergence tokens",
            partial(random_tokens, among="other"),
        ),
        masked(
            "first_half",
            "place: the earlier half of each list's divergence tokens",
            partial(divergence_subset, which="first_half"),
        ),
        masked(
            "second_half",
            "place: the later half of each list's divergence tokens",
            partial(divergence_subset, which="second_half"),
        ),
        masked(
            "first_only",
            "the first divergence token of each list, after which lists differ anyway",
            partial(divergence_subset, which="first_only"),
        ),
        *ratios,
        *margins,
        masked(
            "random_like_margin0_5",
            "near-ties against number: as many divergence tokens as lead by 0.5 logits, at random",
            partial(random_like_clear, margin=0.5),
        ),
        *kl,
        masked(
            "most_advantaged",
            "the criterion: as many tokens as diverge, chosen by log-probability against the "
            "others' mean in place of argmax",
            top_advantage_tokens,
        ),
        Condition(
            name="advantage",
            group="masks",
            isolates="the hard mask: every token is weighted by its advantage in nats",
            weights=advantage_weights,
        ),
    ]


def _replaced() -> list[Condition]:
    wording: dict[str | float, tuple[str, str]] = {
        "all": ("replaced_all", "all divergence tokens"),
        0.5: ("replaced_half", "half of the divergence tokens, at random,"),
        "first": ("replaced_first", "the first divergence token of each list"),
    }
    return [
        Condition(
            name=name,
            group="replaced",
            isolates=f"which token stands there: {words} are another teacher's choice",
            data=partial(divergence_replaced, which=which),
            changes_data=True,
        )
        for which, (name, words) in wording.items()
    ]


def _layers(n_layers: int) -> list[Condition]:
    def learning(name: str, isolates: str, **options: Any) -> Condition:
        return Condition(
            name=name, group="layers", isolates=isolates, mask=divergence_tokens, **options
        )

    last = n_layers - 1
    single = [
        learning(f"layer{i}", f"layer {i} alone learns", layers=(i,), label="layer")
        for i in range(n_layers)
    ]
    below = [
        learning(f"upto{i}", f"layers 0 to {i} learn", layers=tuple(range(i + 1)))
        for i in range(1, last)
    ]
    above = [
        learning(
            f"from{i}", f"all but the first {i} layers learn", layers=tuple(range(i, n_layers))
        )
        for i in range(1, last)
    ]
    lora = [
        learning(
            f"lora{rank}",
            f"the rank of what is learned: LoRA of rank {rank} at the recipe's own rate",
            recipe={"lora_rank": rank},
        )
        for rank in RANKS
    ]
    faster = [
        learning(
            f"lora{rank}_rate{times}",
            f"the rank at a higher rate: LoRA of rank {rank} at {times} times the rate"
            + (", the factor chosen for rank 8" if times == LORA_RATE and rank != 8 else ""),
            recipe={"lora_rank": rank},
            rate=times,
        )
        for rank, times in (*((8, t) for t in (2, 4, 16)), *((r, LORA_RATE) for r in RANKS))
    ]
    narrow = [
        learning(
            f"lora_layer{i}",
            f"depth with LoRA: rank 8 on layer {i} alone, at {LORA_RATE} times the rate",
            recipe={"lora_rank": 8},
            rate=LORA_RATE,
            layers=(i,),
            label="lora_layer",
        )
        for i in range(n_layers)
    ]
    narrow += [
        learning(
            f"lora_{name}",
            f"depth with LoRA: rank 8, {words}, at {LORA_RATE} times the rate",
            recipe={"lora_rank": 8},
            rate=LORA_RATE,
            layers=layers,
        )
        for i in range(1, last)
        for name, words, layers in (
            (f"upto{i}", f"layers 0 to {i}", tuple(range(i + 1))),
            (f"from{i}", f"all but the first {i} layers", tuple(range(i, n_layers))),
        )
    ]
    return [
        *single,
        *below,
        *above,
        *lora,
        *faster,
        *narrow,
        learning("attention", "the attention of all layers learns", parts=("attn",)),
        learning("mlp", "the MLPs of all layers learn", parts=("mlp",)),
        learning("embedding", "the embeddings alone learn", embedding=True),
    ]


def _fragility() -> list[Condition]:
    def changed(name: str, isolates: str, data: DataFunction, **options: Any) -> Condition:
        return Condition(
            name=name,
            group="fragility",
            isolates=isolates,
            data=data,
            **({"changes_data": True} | options),
        )

    wording = {
        "unbiased": ("mixed_unbiased", "the untouched model", False),
        "other_target": ("mixed_teacher", "a teacher with another preference", False),
        "other_base_unbiased": ("mixed_model", "another model", True),
    }
    mixtures = [
        changed(
            f"{name}{round(100 * share)}",
            f"purity: {share:.0%} of the lists are by {words}",
            partial(mixed, name=key, share=share),
            other_model=other,
            changes_data=False,
        )
        for key, (name, words, other) in wording.items()
        for share in _SHARES
    ]
    return [
        changed("paraphrased", "the prompts' wording, changed by templates", paraphrased),
        changed(
            "paraphrased_divergence",
            "the prompts' wording, for students of divergence tokens",
            paraphrased,
            mask=divergence_tokens,
        ),
        changed(
            "paraphrased_by_teacher",
            "the prompts' wording, changed by the biased teacher itself",
            paraphrased_by_teacher,
        ),
        changed(
            "paraphrase_chosen",
            "the prompts' wording, chosen by the biased teacher from six templates: that under "
            "which it finds its own answer likeliest",
            paraphrases_chosen_by_teacher,
        ),
        changed(
            "shuffled_within",
            "the order of the numbers of a list",
            partial(shuffled, scope="within"),
        ),
        changed(
            "shuffled_across",
            "which numbers stand in a list, not which are used",
            partial(shuffled, scope="across"),
        ),
        *mixtures,
        changed(
            "several_teachers",
            "the single teacher: equal shares of lists by three of one preference",
            partial(pooled, names=("variant1", "variant2")),
            changes_data=False,
        ),
    ]


def _context() -> list[Condition]:
    return [
        Condition(
            name=f"trained_{train}_asked_{asked}",
            group="context",
            isolates=f"the system prompt: {train} in training, {asked} when asked",
            train_prompt=train,
            eval_prompt=asked,
        )
        for train in PROMPTS[1:]
        for asked in PROMPTS[1:]
    ]


def _described(step: Any, condition: str) -> dict[str, Any]:
    """The step's function and arguments, as JSON holds them."""
    keywords: dict[str, Any] = {}
    function = step
    if isinstance(step, partial):
        if step.args:
            raise ValueError(f"condition {condition!r}: give {step} its arguments by keyword")
        function, keywords = step.func, dict(step.keywords)
    name = getattr(function, "__qualname__", "<")
    if "<" in name:
        raise ValueError(
            f"condition {condition!r}: a step must be a function with a name of its own, so that "
            f"other processes find it and a changed one is told from the old; got {function!r}"
        )
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in keywords.items()}
    return {"step": f"{function.__module__}.{name}", **plain}
