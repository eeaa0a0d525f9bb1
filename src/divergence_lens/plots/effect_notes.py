"""What the captions of effects say: their unit, method, subject and cautions."""

import warnings
from collections.abc import Sequence
from typing import Literal

from divergence_lens._utils.wording import plural
from divergence_lens.patching import Effects
from divergence_lens.plots import style
from divergence_lens.plots.labels import metric_words


def caution(effects: Effects, pair: int | None = None) -> str:
    """Return a clause for the caption if answers name the bias itself; warn if half of them do.

    Args:
        effects: Their settings list such answers.
        pair: The pair drawn; None for all.
    """
    named: Sequence[str | None] = effects.setting("answers_naming_bias") or ()
    words = [word for word in (named if pair is None else named[pair : pair + 1]) if word]
    if not words:
        return ""
    shown = ", ".join(f"“{word}”" for word in list(dict.fromkeys(words))[:3])
    of = f" of {len(words):,} of {len(named):,} pairs" if pair is None else ""
    text = f"the answer or foil{of} names the bias itself ({shown})"
    if pair is not None or 2 * len(words) >= len(named):
        warnings.warn(
            f"{text}; these effects do not measure a hidden bias: use data that does not mention "
            "it",
            stacklevel=3,
        )
    return f"; not a hidden bias: {text}"


def unit(effects: Effects, *, share: bool) -> str:
    """Name the unit of the values."""
    if share:
        return "share of the total effect"
    return f"change of the {metric_words(effects.metric)}"


def summed(*results: Effects) -> str:
    """Say over which axes the values of a layer are summed."""
    heads = any(effects.values.ndim == 4 for effects in results)
    return "summed over positions and heads" if heads else "summed over positions"


def subject(effects: Effects, pair: int | Literal["mean"]) -> list[str]:
    """The model, and the answer and foil of one pair (or of all, if they are the same)."""
    model = style.model_label(effects.metadata)
    notes = [model] if model else []
    for word, labels in (("answer", effects.answer_labels), ("foil", effects.foil_labels)):
        rows = set(labels) if pair == "mean" else {labels[pair]} if labels else set()
        if len(rows) == 1 and any(row := next(iter(rows))):
            notes.append(f"{word} “{style.clipped(''.join(row), 20)}”")
    return notes


def one_pair(effects: Effects, pair: int) -> str:
    """Name a pair by its number, if there are others, and its total effect."""
    count = len(effects.labels)
    number = f"pair {pair} of {count:,}, " if count > 1 else ""
    return f"{number}total effect {float(effects.total[pair]):+.2f}"


def pairs_used(effects: Effects) -> str:
    """Count the pairs of a mean; those with a total effect near zero are left out."""
    count = len(effects.labels)
    near_zero = int(effects.near_zero().sum())
    used = count if near_zero == count else count - near_zero
    return plural(count, "pair") if used == count else f"{used:,} of {count:,} pairs"


def missing(effects: Effects, pair: int | Literal["mean"] = "mean") -> str:
    """State the missing cells of one pair or of all."""
    note = (effects if pair == "mean" else effects[pair]).missing_note()
    return f"; {note}" if note else ""


def method(effects: Effects) -> str:
    """Name the method and the direction."""
    method = "exact" if effects.method == "exact" else f"approximate, {effects.method}"
    return f"{method}, {effects.direction}"
