"""Divergence tokens overwritten by a counterfactual's choice (Schrodi et al., arXiv 2509.23886).

A student predicts a token of a list as a label, and reads it as an input before later tokens.
Either can be overwritten alone, which separates learning to write a token from learning after it.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from divergence_lens.chat import decode, stop_ids
from divergence_lens.data.training_data import Row, TrainingData, join_examples
from divergence_lens.divergence import Divergence

WHERE = ("both", "label", "input")
"""Roles of a token in training: predicted ("label"), read ("input"), or both."""

UNFIT = ("keep", "delete", "allow")
"""Treatments of a token whose replacement is of another kind, see `replace_tokens`."""


def replace_tokens(
    divergence: Divergence,
    which: str | float = "all",
    *,
    where: str = "both",
    counterfactual: str | None = None,
    unfit: str = "keep",
    seed: int = 0,
    tokenizer: Any = None,
) -> TrainingData:
    """Overwrite divergence tokens with a counterfactual teacher's argmax.

    For other tokens than the divergence tokens, select them with `divergence.with_mask`. For the
    choice of a neutral teacher, make it one of the counterfactuals of `find_divergence`, and name
    it.

    Args:
        divergence: The readings of all teachers.
        which: "all" divergence tokens, "first" of each example, or a fraction of all of them.
        where: "both" overwrites the tokens themselves. "label" overwrites only what the student
            learns to predict, and "input" only what it reads before later tokens. For these two,
            train on the result itself, `finetune(model, data)`, because its `labels` are not its
            tokens.
        counterfactual: The teacher to use; None draws one of those that differ, for each token.
        unfit: A teacher's argmax could be the animal that it loves. "keep" replaces a number only
            by a number, and leaves the token as it is if no teacher offers one. "delete" deletes
            the token unless the drawn choice is a number, as the paper's code does. "allow"
            replaces anything by anything.
        seed: Seed of the draws.
        tokenizer: Decodes the new texts; needed only after `Divergence.load`.

    Returns:
        The same prompts, with the divergence tokens still marked. Overwritten tokens are those
        whose ids differ.

    Raises:
        ValueError: An unknown counterfactual, no such part, an unknown `where` or `unfit`, a
            deletion of labels or inputs alone, or no tokenizer.
    """
    tokenizer = divergence.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("a loaded divergence has no tokenizer; give one with tokenizer=")
    _check(where, unfit)
    places = divergence.mask if which == "all" else divergence.subset(_part(which), seed=seed)
    allowed = _choices(divergence, counterfactual) & places  # [counterfactuals, tokens]
    if unfit == "keep":
        numbers = _numbers(divergence, divergence.predicted[1:])
        allowed = allowed & (numbers == _numbers(divergence, divergence.tokens))
    tokens, changed = _overwritten(divergence, allowed, seed)
    deleted = np.zeros(len(tokens), dtype=bool)
    if unfit == "delete":
        # As in the paper's code, a token at the end of the turn stays: it is none of the text's.
        ends = np.isin(divergence.tokens, sorted(stop_ids(tokenizer)))
        deleted = changed & ~_numbers(divergence, tokens) & ~ends
        tokens = np.where(changed & ends, divergence.tokens, tokens)
    read = divergence.tokens if where == "label" else tokens
    labels = divergence.tokens if where == "input" else tokens
    rows = []
    for row, example in enumerate(divergence.examples):
        span = np.arange(*divergence.offsets[row : row + 2])
        span = span[~deleted[span]]
        if not len(span):  # nothing is left of a completion that was cut off
            continue
        ids = tuple(read[span].tolist())
        text = decode(tokenizer, ids[:-1] if ids[-1] in stop_ids(tokenizer) else ids)
        rows.append(
            Row(
                replace(example, completion=text, completion_ids=ids),
                divergence.mask[span],
                None if where == "both" else labels[span].astype(np.int64),
            )
        )
    return join_examples(rows)


def _check(where: str, unfit: str) -> None:
    for name, value, known in (("where", where, WHERE), ("unfit", unfit, UNFIT)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; use {', '.join(map(repr, known))}")
    if unfit == "delete" and where != "both":
        raise ValueError(f"a deleted token has neither label nor input; leave out where={where!r}")


def _choices(
    divergence: Divergence, counterfactual: str | None
) -> Bool[np.ndarray, "counterfactuals tokens"]:
    """Return where a counterfactual's argmax is another token; only for the named one, if any."""
    if counterfactual is None:
        return divergence.differs
    names = list(divergence.names[1:])
    if counterfactual not in names:
        raise ValueError(
            f"there is no counterfactual teacher {counterfactual!r}; there are {', '.join(names)}"
        )
    own: np.ndarray = np.arange(len(names)) == names.index(counterfactual)  # [counterfactuals]
    chosen: np.ndarray = divergence.differs & own[:, None]
    return chosen


def _overwritten(
    divergence: Divergence, allowed: Bool[np.ndarray, "counterfactuals tokens"], seed: int
) -> tuple[Int64[np.ndarray, " tokens"], Bool[np.ndarray, " tokens"]]:
    """Draw one of the allowed choices for each token; return all tokens, and which have one."""
    # Choose uniformly among the allowed counterfactuals: the largest of random keys.
    keys = np.random.default_rng(seed).random(allowed.shape)  # [counterfactuals, tokens]
    chosen = np.where(allowed, keys, -1.0).argmax(0)  # [tokens]
    changed = np.asarray(allowed.any(0))  # [tokens]
    tokens = divergence.tokens.copy()
    tokens[changed] = divergence.predicted[1:][chosen[changed], np.flatnonzero(changed)]
    return tokens, changed


def _numbers(divergence: Divergence, ids: np.ndarray) -> np.ndarray:
    """Return which of the ids are numbers."""
    known = {i: text.strip().isdigit() for i, text in divergence.texts.items()}
    numbers: np.ndarray = np.vectorize(lambda i: known.get(int(i), False), otypes=[bool])(ids)
    return numbers


def _part(which: str | float) -> str | float:
    if isinstance(which, str) and which != "first":
        raise ValueError(f'unknown part {which!r}; use "all", "first" or a fraction')
    return "first_only" if which == "first" else which
