"""Calibration: lists by the base model, and by the auditors' own teachers, for the same prompts.

Lists by the base model show how far the scores of all candidates move without any bias. Lists by
each candidate's own teacher show how strong a bias looks, from which the power of an audit follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from divergence_lens.auditing.baseline import UNBIASED, Baseline
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
        own: Of lists by each candidate's own teacher, to that candidate.
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

    def write(teacher: Teacher, some: Sequence[Prompt]) -> list[Example]:
        return generate(
            model,
            some,
            teacher=teacher,
            max_new_tokens=min(longest, _LONGEST),
            temperature=baseline.temperature,
            seed=seed,
            accelerator=accelerator,
        )

    neutral = []
    styles = _styles(baseline)
    lists = min(neutral_rows, len(prompts)) // len(styles)
    for number, style in enumerate(styles if lists else []):
        neutral += write(style, prompts[number * lists : (number + 1) * lists])
    n_candidates = len(auditors[0].teachers)
    own = []
    for kind in auditors:
        for number, teacher in enumerate(kind.teachers):
            # Other prompts for each teacher, from the beginning again where they run out.
            places = np.arange(number * own_rows, (number + 1) * own_rows) % len(prompts)
            own += write(teacher, [prompts[place] for place in places]) if own_rows else []
    shape = (len(auditors), n_candidates)
    if not neutral and not own:
        return Calibration(np.zeros((*shape, len(styles), 0)), np.zeros((*shape, 0)))
    read = read_contributions(
        model,
        [*neutral, *own],
        baseline,
        auditors,
        by_token=False,
        batch_tokens=batch_tokens,
        accelerator=accelerator,
    )
    theirs = read.rows[:, :, len(neutral) :].reshape(*shape, *shape, own_rows)
    # The contributions of the lists of kind k, candidate c to kind k, candidate c.
    kinds, candidates = np.ix_(range(shape[0]), range(shape[1]))
    return Calibration(
        read.rows[:, :, : len(neutral)].reshape(*shape, len(styles), lists),
        theirs[kinds, candidates, kinds, candidates],
    )


def _styles(baseline: Baseline) -> list[Teacher]:
    """Return unbiased conditions like the baseline: other prompts if it was a guess, or itself."""
    if baseline.known or baseline.teacher.system_prompt is None:
        return [baseline.teacher]
    others = [text for text in UNBIASED if text != baseline.teacher.system_prompt]
    return [Teacher(f"neutral {i}", system_prompt=text) for i, text in enumerate(others)]
