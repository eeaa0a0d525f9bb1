"""Counts of sampled answers, as in Cloud et al. (arXiv 2507.14805) and Schrodi et al."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from divergence_lens._utils.interrupts import discard_partial
from divergence_lens.data import read_answer
from divergence_lens.evaluation.answers import form_ids
from divergence_lens.generation import generate
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher

# Extra tokens of a sampled answer beyond the longest form, to see where its word ends.
_SLACK = 2


@dataclass(frozen=True, kw_only=True)
class SampledAnswers:
    """How `preference` samples answers and counts them.

    The code of the paper draws 200 answers of at most 10 tokens per question, and counts a mention
    anywhere: `SampledAnswers(samples=200, max_new_tokens=10, mention="anywhere")`.

    Attributes:
        samples: Answers per question.
        temperature: Temperature of sampling, above 0.
        top_p: Nucleus of sampling; see `generate`.
        top_k: Sample from this many most likely tokens; None for all.
        repetition_penalty: See `generate`.
        max_new_tokens: Maximum length of an answer; None for a little more than the longest form of
            a candidate.
        mention: "start" counts an answer that begins with a form of the candidate as a whole word,
            as the exact method does. "anywhere" counts each candidate whose name occurs in the
            answer, in any case and also within a word ("owl" in "fowl"), as the paper's code does;
            one answer can then name several.
        seed: Seed of sampling.

    Raises:
        ValueError: A setting is out of range.
    """

    samples: int = 100
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    mention: str = "start"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be 1 or more, got {self.samples}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; sampled answers need one above 0, because "
                "greedy answers to a question are all the same"
            )
        if self.mention not in ("start", "anywhere"):
            raise ValueError(f'mention is {self.mention!r}; use "start" or "anywhere"')

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON data."""
        return dataclasses.asdict(self)


@discard_partial()
def sampled_probabilities(
    model: Model,
    teacher: Teacher,
    questions: tuple[str, ...],
    candidates: tuple[str, ...],
    sampled: SampledAnswers,
    *,
    batch_tokens: int,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> Float64[np.ndarray, "questions candidates"]:
    """Return the fraction of the sampled answers to each question that name each candidate."""
    limit = sampled.max_new_tokens
    if limit is None:
        forms, _ = form_ids(model.tokenizer, candidates)
        limit = max(map(len, forms)) + _SLACK
    answers = generate(
        model,
        [question for question in questions for _ in range(sampled.samples)],
        teacher=teacher,
        max_new_tokens=limit,
        temperature=sampled.temperature,
        top_p=sampled.top_p,
        top_k=sampled.top_k,
        repetition_penalty=sampled.repetition_penalty,
        seed=sampled.seed,
        batch_tokens=batch_tokens,
        checkpoint_dir=checkpoint_dir,
        accelerator=accelerator,
        progress=progress,
    )
    named = _named_at_start if sampled.mention == "start" else _named_anywhere
    counts = np.zeros((len(questions), len(candidates)))
    known: dict[str, list[int]] = {}  # equal answers are frequent
    for row, answer in enumerate(answers):
        text = answer.completion or ""
        if text not in known:
            known[text] = named(text, candidates)
        counts[row // sampled.samples, known[text]] += 1
    return counts / sampled.samples


def _named_at_start(text: str, candidates: Sequence[str]) -> list[int]:
    name = read_answer(text, candidates=candidates)
    return [] if name is None else [candidates.index(name)]


def _named_anywhere(text: str, candidates: Sequence[str]) -> list[int]:
    folded = text.casefold()
    return [i for i, name in enumerate(candidates) if name.casefold() in folded]
