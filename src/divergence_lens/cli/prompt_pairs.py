"""Clean and corrupted prompts given on the command line, or in a file of JSON lines."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from divergence_lens.models import Model
    from divergence_lens.pairs import Pairs

KEYS = ("clean", "corrupted", "answer", "foil")

# The keys that each metric reads, in addition to the prompts.
_READS = {
    "logit_difference": ("answer", "foil"),
    "probability_difference": ("answer", "foil"),
    "log_probability": ("answer",),
    "kl": (),
}


@dataclass(frozen=True)
class PromptPair:
    """One pair of prompts, and the tokens that a metric compares after them."""

    clean: str
    corrupted: str
    answer: str | None = None
    foil: str | None = None


def read_prompt_pairs(path: Path) -> list[PromptPair]:
    """Read pairs from a file with one JSON object per line.

    Args:
        path: Its objects have the keys `clean` and `corrupted`, and those of `answer` and `foil`
            that the metric needs.

    Raises:
        ValueError: Names the line and the problem.
    """
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or not {"clean", "corrupted"} <= row.keys():
            raise ValueError(
                f'{path}, line {number}: write an object with the keys "clean" and "corrupted", '
                'and for most metrics "answer" and "foil"'
            )
        unknown = sorted(row.keys() - set(KEYS))
        if unknown or not all(isinstance(value, str) for value in row.values()):
            what = f"the unknown key {unknown[0]!r}" if unknown else "a value that is no text"
            raise ValueError(f"{path}, line {number}: {what}; the keys are {', '.join(KEYS)}")
        pairs.append(PromptPair(**row))
    if not pairs:
        raise ValueError(f"{path} contains no pairs")
    return pairs


def check_prompt_pairs(pairs: list[PromptPair], metric: str) -> None:
    """Refuse pairs that lack a text that the metric reads.

    Raises:
        ValueError: Names the pair and the missing text.
    """
    for i, pair in enumerate(pairs):
        if pair.clean == pair.corrupted:
            raise ValueError(f"pair {i} has the same clean and corrupted prompt: {pair.clean!r}")
        for key in _READS[metric]:
            if not getattr(pair, key):
                raise ValueError(
                    f"pair {i} has no {key}, which the metric {metric} reads; give --{key} (in a "
                    f'file: "{key}"), or choose --metric kl'
                )


def encode_prompt_pairs(
    model: "Model", pairs: list[PromptPair], *, chat: bool, system: str | None
) -> "Pairs":
    """Encode the pairs with the model's tokenizer.

    Args:
        model: The model.
        pairs: The prompts.
        chat: Whether each prompt is a user's message in the model's chat template.
        system: The system prompt of all of them.
    """
    from divergence_lens.pairs import Pairs

    answers = [pair.answer for pair in pairs if pair.answer is not None]
    foils = [pair.foil for pair in pairs if pair.foil is not None]
    return Pairs.from_prompts(
        model,
        clean=[pair.clean for pair in pairs],
        corrupted=[pair.corrupted for pair in pairs],
        answers=answers if len(answers) == len(pairs) else None,
        foils=foils if len(foils) == len(pairs) else None,
        system_prompt=system,
        chat=chat,
    )
