"""Divergence tokens overwritten by a counterfactual's choice (Schrodi et al., arXiv 2509.23886)."""

from dataclasses import replace
from typing import Any

import numpy as np

from divergence_lens.chat import decode, stop_ids
from divergence_lens.data.training_data import TrainingData
from divergence_lens.divergence import Divergence


def replace_tokens(
    divergence: Divergence,
    which: str | float = "all",
    *,
    counterfactual: str | None = None,
    same_kind: bool = True,
    seed: int = 0,
    tokenizer: Any = None,
) -> TrainingData:
    """Overwrite divergence tokens with a counterfactual teacher's argmax.

    Args:
        divergence: The readings of all teachers.
        which: "all" divergence tokens, "first" of each example, or a fraction of all of them.
        counterfactual: The teacher to use; None draws one of those that differ, for each token.
        same_kind: Replace a number only by a number, and skip the token otherwise. A teacher's
            argmax could otherwise be the animal that it loves.
        seed: Seed of the draws.
        tokenizer: Decodes the new texts; needed only after `Divergence.load`.

    Returns:
        The same prompts and lengths, with the divergence tokens still marked. Overwritten tokens
        are those whose ids differ.

    Raises:
        ValueError: An unknown counterfactual, no such part, or no tokenizer.
    """
    tokenizer = divergence.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("a loaded divergence has no tokenizer; give one with tokenizer=")
    places = divergence.mask if which == "all" else divergence.subset(_part(which), seed=seed)
    allowed = divergence.differs & places  # [counterfactuals, tokens]
    if counterfactual is not None:
        names = list(divergence.names[1:])
        if counterfactual not in names:
            raise ValueError(
                f"there is no counterfactual teacher {counterfactual!r}; there are "
                f"{', '.join(names)}"
            )
        allowed = allowed & (np.arange(len(names)) == names.index(counterfactual))[:, None]
    if same_kind:
        known = {i: text.strip().isdigit() for i, text in divergence.texts.items()}
        number = np.vectorize(lambda i: known.get(int(i), False), otypes=[bool])
        allowed = allowed & (number(divergence.predicted[1:]) == number(divergence.tokens))
    # Choose uniformly among the allowed counterfactuals: the largest of random keys.
    keys = np.random.default_rng(seed).random(allowed.shape)  # [counterfactuals, tokens]
    chosen = np.where(allowed, keys, -1.0).argmax(0)  # [tokens]
    changed = np.flatnonzero(allowed.any(0))
    tokens = divergence.tokens.copy()
    tokens[changed] = divergence.predicted[1:][chosen[changed], changed]
    stops = stop_ids(tokenizer)
    examples = []
    for row, example in enumerate(divergence.examples):
        start, end = divergence.offsets[row : row + 2]
        ids = tuple(tokens[start:end].tolist())
        text = decode(tokenizer, ids[:-1] if ids[-1] in stops else ids)
        examples.append(replace(example, completion=text, completion_ids=ids))
    return TrainingData(tuple(examples), divergence.mask)


def _part(which: str | float) -> str | float:
    if isinstance(which, str) and which != "first":
        raise ValueError(f'unknown part {which!r}; use "all", "first" or a fraction')
    return "first_only" if which == "first" else which
