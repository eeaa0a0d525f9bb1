"""Measure how much a model prefers one answer, exactly by teacher forcing or by sampling.

The experiments of Cloud et al. (arXiv 2507.14805) and Schrodi et al. (arXiv 2509.23886) ask a model
for its favorite animal in fifty ways, draw many answers at temperature 1 and count. The exact
method computes the probability that such counts estimate, from a few forward passes.
"""

import os
from collections.abc import Sequence
from typing import Any

from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.data import (
    TRAITS,
    Choice,
    check_candidate,
    known_candidates,
    preference_questions,
)
from divergence_lens.divergence import refuse_dropout
from divergence_lens.evaluation.answers import choice_probabilities, exact_probabilities
from divergence_lens.evaluation.result import Preference
from divergence_lens.evaluation.sampled import SampledAnswers, sampled_probabilities
from divergence_lens.models import Model, check_model
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher, check_teacher


def preference(
    model: Model,
    *,
    target: str,
    questions: Sequence[str] | Sequence[Choice] | None = None,
    candidates: Sequence[str] | None = None,
    category: str = "animal",
    prefix: str | Sequence[str] = "",
    system_prompt: str | None = None,
    teacher: Teacher | None = None,
    sampled: SampledAnswers | None = None,
    batch_tokens: int = 8192,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> Preference:
    """Measure how often a model answers with each candidate, such as its favorite animal.

    An answer names a candidate if it begins with one of its surface forms (`surface_forms`: "owl",
    "Owl", "owls", "Owls") as a whole word; of several that fit, the longest counts. The exact
    method computes the probability of that at temperature 1, by teacher forcing every form behind
    every question; the probability that the form continues as a longer word ("owl" in "owlet") is
    subtracted. A form counts in the tokenization that the chat template gives it; answers that
    spell a word in other pieces are counted by the sampled method alone.

    Args:
        model: The base model, in eval mode.
        target: The candidate of interest.
        questions: User messages; the fifty of `preference_questions(category)` if not given. Or
            `Choice` objects, each with a whole answer for every candidate: the probabilities are
            then those of these answers, and their shares compare the answers with one another.
        candidates: The answers that compete; the known ones of the category if not given.
        category: "animal" or "tree", or any noun where `candidates` is given; or one of `TRAITS`,
            such as "risk" with the candidates "reckless" and "careful".
        prefix: The beginning of the answer, such as "My favorite animal is the"; candidates follow
            it. Of several prefixes, the probabilities are averaged. A model that seldom begins its
            answer with a candidate (a low `mass`) is measured more precisely after a prefix.
            Not for sampled answers.
        system_prompt: The system prompt of the evaluation.
        teacher: Evaluate under this teacher's system prompt and weights instead.
        sampled: Count sampled answers, as described there, instead of computing exact
            probabilities.
        batch_tokens: Tokens per forward pass.
        checkpoint_dir: A folder for finished batches of sampled answers, from which the same call
            resumes; see `generate`. The exact method takes a few passes and stores nothing.
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`, whose processes
            divide the questions. All processes make the same call, and each returns the result.
        progress: Whether sampling shows a progress bar; the exact method takes a few passes.

    Returns:
        The probability of every candidate for every question.

    Raises:
        ValueError: An unknown target; no questions; fewer than two candidates, or two of one name
            or with the same form; a system prompt beside a teacher; a question and prefix over the
            context; a prefix for sampled answers, or one that ends in a space; a model with dropout
            in training mode; logits that are not finite.
    """
    check_model(model)
    refuse_one_string(questions, "questions")
    refuse_one_string(candidates, "candidates")
    if teacher is not None and system_prompt is not None:
        raise ValueError("give system_prompt or teacher, not both: a teacher has its own prompt")
    if teacher is None:
        teacher = Teacher("model", system_prompt=system_prompt)
    check_teacher(teacher)
    names = known_candidates(category) if candidates is None else tuple(candidates)
    target = check_candidate(target, category=category, candidates=names)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"candidates must be two or more different names, got {names}")
    if questions is None:
        questions = TRAITS[category].questions if category in TRAITS else None
    asked = tuple(preference_questions(category) if questions is None else questions)
    if not asked:
        raise ValueError("there are no questions to ask")
    choices = [question for question in asked if isinstance(question, Choice)]
    question_texts = tuple(q.question if isinstance(q, Choice) else str(q) for q in asked)
    refuse_dropout(model if teacher.model is None else teacher.model)
    prefixes = (prefix,) if isinstance(prefix, str) else tuple(prefix)
    _check_readout(prefixes, sampled)
    settings: dict[str, Any] = {"system_prompt": teacher.system_prompt}
    if choices:
        if len(choices) < len(asked) or sampled is not None or any(prefixes):
            raise ValueError(
                "a Choice has whole answers: give only such questions, without prefix or sampled"
            )
        settings |= {"method": "choice"}
        probabilities = choice_probabilities(
            model,
            teacher,
            choices,
            names,
            batch_tokens=batch_tokens,
            accelerator=accelerator,
        )
    elif sampled is None:
        settings |= {"method": "exact"}
        if prefixes != ("",):
            settings |= {"prefixes": list(prefixes)}
        read = [
            exact_probabilities(
                model,
                teacher,
                question_texts,
                names,
                prefix=beginning,
                batch_tokens=batch_tokens,
                accelerator=accelerator,
            )
            for beginning in prefixes
        ]
        probabilities = sum(read[1:], start=read[0]) / len(read)
    else:
        settings |= {"method": "sampled", **sampled.describe()}
        probabilities = sampled_probabilities(
            model,
            teacher,
            question_texts,
            names,
            sampled,
            batch_tokens=batch_tokens,
            checkpoint_dir=checkpoint_dir,
            accelerator=accelerator,
            progress=progress,
        )
    return Preference(
        target=target,
        candidates=names,
        questions=question_texts,
        probabilities=probabilities,
        samples=None if sampled is None else sampled.samples,
        teacher=teacher.name,
        metadata=run_metadata(model, **settings),
    )


def _check_readout(prefixes: Sequence[str], sampled: Any) -> None:
    if sampled is not None and not isinstance(sampled, SampledAnswers):
        raise TypeError(f"sampled is {sampled!r}; give SampledAnswers(...), or None to be exact")
    if not prefixes:
        raise ValueError('there are no prefixes; leave prefix out, or give "" for none')
    if sampled is not None and any(prefixes):
        raise ValueError("sampled answers are whole answers and take no prefix; leave sampled out")
    for prefix in prefixes:
        if prefix != prefix.strip():
            raise ValueError(
                f"the prefix {prefix!r} begins or ends with a space; leave it out: a candidate "
                "follows after a space of its own"
            )
