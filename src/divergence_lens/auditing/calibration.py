"""Calibration: lists by the base model, and by the auditors' own teachers, for the same prompts.

Lists by the base model show how far the scores of all candidates move without any bias. Lists by
each candidate's own teacher show how strong a bias looks, from which the power of an audit follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from divergence_lens.auditing.baseline import UNBIASED, Baseline, possible_ids
from divergence_lens.auditing.candidates import Auditors
from divergence_lens.auditing.reading import read_contributions
from divergence_lens.chat import Prompt
from divergence_lens.examples import Example
from divergence_lens.generation import generate
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher

_LONGEST = 64


@dataclass(frozen=True, eq=False)
class Calibration:
    """Contributions of lists whose author is known.

    Attributes:
        neutral: Of lists by the base model, under each of some unbiased prompts, to all candidates.
        own: Of lists by each candidate's own teacher, to that candidate; NaN where too few lists
            consist of the data's kinds of tokens.
    """

    neutral: Float64[np.ndarray, "kinds candidates styles lists"]
    own: Float64[np.ndarray, "kinds candidates own_rows"]


def calibrate(
    model: Model,
    examples: Sequence[Example],
    baseline: Baseline,
    auditors: Sequence[Auditors],
    *,
    neutral_rows: int,
    own_rows: int,
    seed: int = 0,
    batch_tokens: int | None = None,
    accelerator: Any = None,
) -> Calibration:
    """Write and read calibration lists.

    Args:
        model: The base model.
        examples: The data, whose prompts are used.
        baseline: The condition and temperature of the data.
        auditors: The auditors.
        neutral_rows: Most lists by the base model; one for each of as many prompts.
        own_rows: Lists by each auditor.
        seed: Seed of the choice of prompts and of the sampling.
        batch_tokens: Tokens per forward pass of the reading.
        accelerator: Divides the lists among its processes.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    prompts = [examples[row].prompt for row in order.tolist()]
    longest = max(len(example.completion_ids or ()) for example in examples)

    def write(teacher: Teacher, asked: Sequence[Prompt]) -> list[Example]:
        return generate(
            model,
            asked,
            teacher=teacher,
            max_new_tokens=min(longest, _LONGEST),
            temperature=baseline.temperature,
            pattern=baseline.pattern,
            seed=seed,
            accelerator=accelerator,
        )

    possible = possible_ids(model, baseline.kinds)

    def valid(examples: Sequence[Example], count: int) -> list[Example]:
        """The first lists whose tokens are all of the data's kinds."""
        fit = [
            e for e in examples if possible is None or possible[list(e.completion_ids or ())].all()
        ]
        return fit[:count]

    styles = _styles(baseline)
    lists = min(neutral_rows, len(prompts)) // len(styles)
    neutral = [
        valid(write(style, prompts[number * lists : (number + 1) * lists]), lists)
        for number, style in enumerate(styles if lists else [])
    ]
    # A style under which the base model hardly writes such lists is left out.
    neutral = [written for written in neutral if len(written) >= max(2, lists / 2)]
    n_styles, lists = len(neutral), min(map(len, neutral), default=0)
    own = []
    for number, teacher in enumerate(t for kind in auditors for t in kind.teachers):
        # Other prompts for each teacher, some to spare, again from the beginning if they run out.
        places = np.arange(number * own_rows, number * own_rows + 2 * own_rows) % len(prompts)
        asked = [prompts[place] for place in places]
        own.append(valid(write(teacher, asked), own_rows) if own_rows else [])
    shape = (len(auditors), len(auditors[0].teachers))
    theirs = np.full((*shape, own_rows), np.nan)
    rows = [example for style in neutral for example in style[:lists]]
    count = len(rows)
    rows += [example for one in own for example in one]
    if not rows:
        return Calibration(np.zeros((*shape, n_styles, 0)), theirs)
    read = read_contributions(
        model,
        rows,
        baseline,
        auditors,
        by_token=False,
        batch_tokens=batch_tokens,
        accelerator=accelerator,
    )
    at = count
    for number, one in enumerate(own):
        kind, candidate = divmod(number, shape[1])
        theirs[kind, candidate, : len(one)] = read.rows[kind, candidate, at : at + len(one)]
        at += len(one)
    return Calibration(read.rows[:, :, :count].reshape(*shape, n_styles, lists), theirs)


def _styles(baseline: Baseline) -> list[Teacher]:
    """Return unbiased conditions like the baseline: other prompts if it was a guess, or itself."""
    if baseline.is_condition_of_data:
        return [baseline.teacher]
    others = [text for text in UNBIASED if text != baseline.teacher.system_prompt]
    return [Teacher(f"neutral {i}", system_prompt=text) for i, text in enumerate(others)]
