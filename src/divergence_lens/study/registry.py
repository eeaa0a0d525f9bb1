"""The registry of a study's conditions, by group and name.

`conditions(n_layers)` lists the conditions of Schrodi et al. (arXiv 2509.23886) and further
controls; `choose_conditions` selects from them by name, group or pattern.
"""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from divergence_lens.study.conditions import KINDS, PROMPTS, Condition
from divergence_lens.study.interventions import (
    advantage_weights,
    clear_divergence_tokens,
    divergence_replaced,
    divergence_subset,
    divergence_tokens,
    lists_from,
    lists_without_entangled,
    mixed,
    other_tokens,
    paraphrased,
    paraphrased_by_teacher,
    paraphrases_chosen_by_teacher,
    pooled,
    random_like_clear,
    random_tokens,
    randomly_thinned,
    repeated,
    shuffled,
    tokens_above_kl,
    top_advantage_tokens,
    top_kl_tokens,
    top_kl_without_divergence,
)

DEMO = ("control", "all", "divergence_only", "without_divergence", "layer*")
"""The conditions of the demo."""

GROUPS = ("data", "entangled", "masks", "replaced", "layers", "fragility", "context")

LORA_RATE = 8
"""Learning rate of LoRA at rank 8 on the tiny model, as a multiple of that of full training.

Of 1, 2, 4, 8, 16 and 32 it gives the lowest loss on the divergence tokens of owl, which is not a
target. No preference was examined. Other ranks use the same factor, though it was not tuned for
them."""

RANKS = (1, 2, 4, 8, 16, 32)
"""The ranks of LoRA."""

Row = tuple[str, str, dict[str, Any]]  # name, what it isolates, and other fields of a condition


def conditions(n_layers: int) -> dict[str, Condition]:
    """All conditions for a model with `n_layers` layers, by name."""
    groups = {
        "data": _data(),
        "entangled": _entangled(),
        "masks": _masks(),
        "replaced": _replaced(),
        "layers": _layers(n_layers),
        "fragility": _fragility(),
        "context": _context(),
    }
    return {
        name: Condition(name=name, group=group, isolates=isolates, **fields)
        for group, rows in groups.items()
        for name, isolates, fields in rows
    }


def choose_conditions(
    selected: Sequence[str | Condition],
    kinds: Iterable[str],
    known: Mapping[str, Condition],
) -> dict[str, tuple[Condition, ...]]:
    """Select conditions for each kind of teacher.

    Args:
        selected: Names, groups, file-name patterns ("layer*", "*"), and your own conditions. A
            prefix restricts an entry to one kind of teacher ("prompted:masks").
        kinds: Kinds of teachers.
        known: Conditions by name: `conditions(n_layers)`, or those of a paired study.

    Returns:
        Kind -> conditions, in the order of the registry, followed by your own.

    Raises:
        ValueError: An entry matches nothing (the error suggests close names), or two conditions
            have one name.
    """
    chosen: dict[str, dict[str, Condition]] = {kind: {} for kind in kinds}
    for entry in selected:
        if isinstance(entry, Condition):
            for kind in entry.kinds:
                if kind in chosen and chosen[kind].setdefault(entry.name, entry) is not entry:
                    raise ValueError(f"two conditions are named {entry.name!r}; rename one")
            continue
        kind, colon, pattern = entry.rpartition(":")
        if colon and kind not in KINDS:
            raise ValueError(f"{entry!r}: unknown kind {kind!r}; use {', '.join(KINDS)}")
        for name in _matching(pattern, known):
            for k in [kind] if colon else known[name].kinds:
                if k in chosen and k in known[name].kinds:
                    chosen[k].setdefault(name, known[name])
    order = {name: place for place, name in enumerate(known)}

    def place(condition: Condition) -> int:
        # A condition of your own may have the name of one in the registry, but not its place.
        own = known.get(condition.name)
        return order[condition.name] if own is condition else len(order)

    return {kind: tuple(sorted(own.values(), key=place)) for kind, own in chosen.items()}


def _matching(pattern: str, known: Mapping[str, Condition]) -> list[str]:
    names = [n for n, c in known.items() if c.group == pattern or fnmatch.fnmatchcase(n, pattern)]
    if names:
        return names
    groups = list(dict.fromkeys(condition.group for condition in known.values()))
    close = difflib.get_close_matches(pattern, [*groups, *known], n=4, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    raise ValueError(f"there is no condition {pattern!r}; {hint}groups are {', '.join(groups)}")


# -- groups -------------------------------------------------------------------------------------


def _data() -> list[Row]:
    unbiased, sampled, other_base = (
        partial(lists_from, name=name) for name in ("unbiased", "sampled", "other_base")
    )
    greedy = "greedy decoding: lists sampled at temperature 1"
    shared = "the shared initialization: lists by a teacher derived from another base model"
    marked = {"mask": divergence_tokens}
    return [
        (
            "control",
            "the effect of training on any such lists: the base model writes them",
            {"data": unbiased, "shared": True},
        ),
        ("all", "the full effect: every token of the teacher's greedy lists", {}),
        ("sampled", greedy, {"data": sampled}),
        ("sampled_divergence", f"{greedy}, divergence tokens only", {"data": sampled, **marked}),
        ("other_base", shared, {"data": other_base, "other_model": True}),
        (
            "other_base_divergence",
            f"{shared}, divergence tokens only",
            {"data": other_base, "other_model": True, **marked},
        ),
    ]


def _entangled() -> list[Row]:
    dropped: list[Row] = [
        (
            f"without_top{k}",
            f"entangled numbers: lists with any of the top {k} are dropped",
            {"data": partial(lists_without_entangled, k=k)},
        )
        for k in (10, 20, 50, 100)
    ]
    thinned = "the number of lists: as many random lists are dropped as for the top 100"
    return [*dropped, ("thinned_like_top100", thinned, {"data": partial(randomly_thinned, k=100)})]


def _masks() -> list[Row]:
    """Which tokens have a loss."""
    any_tokens, rest = (partial(random_tokens, among=among) for among in ("all", "other"))
    masks: list[tuple[str, str, Any]] = [
        ("divergence_only", "divergence tokens: only they have a loss", divergence_tokens),
        ("without_divergence", "divergence tokens: only the others have a loss", other_tokens),
        ("random", "the number of tokens: as many random tokens as diverge", any_tokens),
        ("random_other", "the number of tokens: as many random tokens that do not diverge", rest),
        *(
            (part, f"position: the {words} of each list", partial(divergence_subset, which=part))
            for part, words in (
                ("first_half", "first half of the divergence tokens"),
                ("second_half", "second half of the divergence tokens"),
                ("first_only", "first divergence token"),
            )
        ),
        *(
            (
                f"ratio{percent}",
                f"the number of divergence tokens: a random {percent}% of them",
                partial(divergence_subset, which=percent / 100),
            )
            for percent in range(10, 100, 10)
        ),
        *(
            (
                f"margin{margin:g}".replace(".", "_"),
                f"near-ties: divergence tokens where every choice leads by {margin:g} logits",
                partial(clear_divergence_tokens, margin=margin),
            )
            for margin in (0.25, 0.5, 1.0)
        ),
        (
            "random_like_margin0_5",
            "near-ties versus number: as many random divergence tokens as in `margin0_5`",
            partial(random_like_clear, margin=0.5),
        ),
        *(
            (
                name,
                f"the criterion: {number} tokens as diverge, by the largest KL instead of argmax",
                partial(top_kl_tokens, share=share),
            )
            for name, number, share in (
                ("kl_same", "as many", 1.0),
                ("kl_half", "half as many", 0.5),
                ("kl_double", "twice as many", 2.0),
            )
        ),
        *(
            (
                f"kl{nats:g}".replace(".", "_"),
                f"the criterion: tokens with a KL of {nats:g} nats or more for some counterfactual",
                partial(tokens_above_kl, nats=nats),
            )
            for nats in (0.1, 0.5)
        ),
        (
            "kl_beyond_argmax",
            "the tokens that argmax misses: those of `kl_same` that do not diverge",
            top_kl_without_divergence,
        ),
        (
            "most_advantaged",
            "the criterion: as many tokens as diverge, by the largest advantage instead of argmax",
            top_advantage_tokens,
        ),
    ]
    weighted = "the hard mask: every token is weighted by its advantage in nats"
    return [
        *((name, isolates, {"mask": mask}) for name, isolates, mask in masks),
        ("advantage", weighted, {"weights": advantage_weights}),
    ]


def _replaced() -> list[Row]:
    replaced: tuple[tuple[str, str | float, str], ...] = (
        ("replaced_all", "all", "all divergence tokens are"),
        ("replaced_half", 0.5, "a random half of the divergence tokens is"),
        ("replaced_first", "first", "the first divergence token of each list is"),
    )
    return [
        (
            name,
            f"the divergence tokens themselves: {tokens} replaced with another teacher's choice",
            {"data": partial(divergence_replaced, which=which), "changes_data": True},
        )
        for name, which, tokens in replaced
    ]


def _layers(n_layers: int) -> list[Row]:
    """Which parameters are trained, all on divergence tokens."""
    single = [(f"layer{i}", f"layer {i}", (i,)) for i in range(n_layers)]
    below = [(f"upto{i}", f"layers 0 to {i}", tuple(range(i + 1))) for i in range(1, n_layers - 1)]
    above = [
        (f"from{i}", f"all layers but the first {i}", tuple(range(i, n_layers)))
        for i in range(1, n_layers - 1)
    ]
    # Cumulative layers with LoRA alternate: upto1, from1, upto2, from2.
    cumulative = [row for pair in zip(below, above, strict=True) for row in pair]
    rates = (*((8, times) for times in (2, 4, 16)), *((rank, LORA_RATE) for rank in RANKS))
    rows: list[Row] = [
        *((n, f"depth: only {words} is trained", {"layers": i}) for n, words, i in single),
        *((n, f"depth: only {words} are trained", {"layers": i}) for n, words, i in below),
        *((n, f"depth: {words} are trained", {"layers": i}) for n, words, i in above),
        *(
            (
                f"lora{rank}",
                f"the rank of the update: LoRA of rank {rank} at the recipe's own learning rate",
                {"recipe": {"lora_rank": rank}},
            )
            for rank in RANKS
        ),
        *(
            (
                f"lora{rank}_rate{times}",
                f"the rank at a higher rate: LoRA of rank {rank} at {times} times the rate"
                + (", the factor chosen for rank 8" if times == LORA_RATE and rank != 8 else ""),
                {"recipe": {"lora_rank": rank}, "rate": times},
            )
            for rank, times in rates
        ),
        *(
            (
                f"lora_{name}",
                f"depth with LoRA: rank 8, {words}, at {LORA_RATE} times the rate",
                {"recipe": {"lora_rank": 8}, "rate": LORA_RATE, "layers": layers},
            )
            for name, words, layers in (*single, *cumulative)
        ),
        ("attention", "only the attention of all layers is trained", {"parts": ("attn",)}),
        ("mlp", "only the MLPs of all layers are trained", {"parts": ("mlp",)}),
        ("embedding", "only the embeddings are trained", {"embedding": True}),
    ]
    # Students of single layers share a label in the table.
    labels = {name: "layer" for name, _, _ in single}
    labels |= {f"lora_{name}": "lora_layer" for name, _, _ in single}
    return [
        (name, isolates, {"mask": divergence_tokens, "label": labels.get(name, ""), **fields})
        for name, isolates, fields in rows
    ]


def _fragility() -> list[Row]:
    mixtures = (
        ("mixed_unbiased", "unbiased", "the base model", False),
        ("mixed_teacher", "other_target", "a teacher with another preference", False),
        ("mixed_model", "other_base_unbiased", "another model", True),
    )
    wording = "the wording of the prompts"
    within, across = (partial(shuffled, scope=scope) for scope in ("within", "across"))
    changed: list[Row] = [
        ("paraphrased", f"{wording}: other templates", {"data": paraphrased}),
        (
            "paraphrased_divergence",
            f"{wording}: other templates, divergence tokens only",
            {"data": paraphrased, "mask": divergence_tokens},
        ),
        (
            "paraphrased_by_teacher",
            f"{wording}: rewritten by the biased teacher",
            {"data": paraphrased_by_teacher},
        ),
        (
            "paraphrase_chosen",
            f"{wording}: the template under which the biased teacher finds its answer likeliest",
            {"data": paraphrases_chosen_by_teacher},
        ),
        ("shuffled_within", "the order of the numbers within a list", {"data": within}),
        ("shuffled_across", "which list each number is in", {"data": across}),
    ]
    return [
        *((name, words, {"changes_data": True, **fields}) for name, words, fields in changed),
        *(
            (
                f"{name}{percent}",
                f"purity: {percent}% of the lists are by {author}",
                {
                    "data": partial(mixed, name=source, share=percent / 100),
                    "other_model": other_model,
                },
            )
            for name, source, author, other_model in mixtures
            for percent in (10, 25, 50)
        ),
        *(
            (
                f"unique{percent}",
                f"the number of different lists: {percent}% of them, repeated to as many rows",
                {"data": partial(repeated, share=percent / 100)},
            )
            for percent in (1, 10, 50)
        ),
        *(
            (
                f"soft_{direction}",
                f"hard distillation: the teacher's whole distributions, by {direction} KL",
                {"soft": {"direction": direction}},
            )
            for direction in ("forward", "reverse")
        ),
        (
            "several_teachers",
            "having a single teacher: equal shares of lists by three teachers with one preference",
            {"data": partial(pooled, names=("variant1", "variant2"))},
        ),
    ]


def _context() -> list[Row]:
    return [
        (
            f"trained_{train}_asked_{asked}",
            f"the system prompt: {train} in training, {asked} in evaluation",
            {"train_prompt": train, "eval_prompt": asked},
        )
        for train in PROMPTS[1:]
        for asked in PROMPTS[1:]
    ]
