"""Audit a data set: which hidden bias would training on it transfer?

1. Validate the candidates and the data, and make the auditors (`candidates`).
2. Fit the baseline: the unbiased condition under which the base model would most likely have
   written the data, and their temperature (`baseline`).
3. Read the data under all auditors, and compare each token with what the baseline expects
   (`reading`).
4. Write and read calibration lists (`calibration`): the spread of unbiased scores, and the power.
5. Test the candidates against each other (`scoring`).

The idea of contrasting candidates follows the log-likelihood of data under system prompts, and the
remedies the masking and replacing of divergence tokens (Schrodi et al., arXiv 2509.23886).
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from divergence_lens._utils.interrupts import discard_partial
from divergence_lens.auditing.baseline import default_baselines, fit_baseline
from divergence_lens.auditing.calibration import calibrate
from divergence_lens.auditing.candidates import Auditors, build_auditors, candidate_names
from divergence_lens.auditing.reading import read_contributions
from divergence_lens.auditing.result import Audit
from divergence_lens.chat import prompt_ids, token_texts
from divergence_lens.engine import get_engine
from divergence_lens.examples import Example, load_examples, with_ids
from divergence_lens.models import Model, check_model
from divergence_lens.provenance import model_probe, run_metadata
from divergence_lens.teachers import Teacher, check_teacher
from divergence_lens.training import Recipe

FEWEST_ROWS = 2
"""The spread of rows needs two."""


@discard_partial()
def audit(
    model: Model,
    data: Any,
    *,
    candidates: Sequence[str] | Mapping[str, str] | None = None,
    teachers: str | Sequence[Teacher] = "prompted",
    category: str | None = None,
    recipe: Recipe | None = None,
    strength: float | None = None,
    teacher_dir: str | os.PathLike[str] | None = None,
    baseline: Teacher | None = None,
    temperature: float | None = None,
    pattern: str | None = None,
    alpha: float = 0.05,
    share: float = 0.25,
    neutral_rows: int = 200,
    own_rows: int = 4,
    seed: int = 0,
    batch_tokens: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> Audit:
    """Score the candidate biases of a data set before anyone trains on it.

    A hidden bias transfers only between models of a shared initialization, so `model` must be the
    one that the student would start from: another model neither transfers the bias nor sees it.

    Each candidate has a teacher with that bias. A row's score for a candidate is the sum, over its
    tokens, of the log-probability under that teacher minus the mean over the other candidates'
    teachers, minus what the same difference would be if the base model had written the token.

    Args:
        model: The base model, in eval mode, with a tokenizer.
        data: Prompts and completions, in any form that `load_examples` reads.
        candidates: Names of the things that a teacher might love, such as `ANIMALS`; or a mapping
            from names to system prompts, for any other bias. None takes the names of `teachers`.
        teachers: "prompted", a persona prompt for each candidate; "finetuned", a short finetune on
            preference questions; "both"; or teachers of your own, one per candidate. Auditors of
            the data's own kind are much more sensitive. "both" costs twice as much.
        category: What the candidates are, in the singular, unless they are known animals or trees.
        recipe: Training of finetuned auditors; None chooses by the size of the model.
        strength: Margin that each finetuned auditor gets, in nats, so that all are equally strong;
            see `train_teacher`. None trains each to the end of the recipe.
        teacher_dir: Folder in which finetuned auditors are stored, and loaded by base,
            candidate and settings.
        baseline: The unbiased condition to compare with, such as the system prompt that the data
            were written under, without the bias. None chooses between no system prompt and a few
            neutral ones, by the likelihood of the data. An unknown system prompt moves the scores,
            so a neutral baseline that was chosen costs power.
        temperature: The temperature of the data; None fits it.
        pattern: The pattern of `generate` that the completions follow. Probabilities are then taken
            among the tokens that it allows.
        alpha: Level of the tests, over all candidates together.
        share: The share of biased rows that "nothing found" has to rule out.
        neutral_rows: Most calibration lists by the base model.
        own_rows: Calibration lists by each auditor; below 2, the power is unknown.
        seed: Seed of the calibration and of finetuned auditors.
        batch_tokens: Tokens per forward pass; None chooses by device.
        checkpoint_dir: A folder for this run's finished shards; the same call resumes from them.
            Delete the folder once the result is saved.
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`, whose processes
            share the work. All of them must make the same call, and each returns the full result.
        progress: Whether to show progress bars.

    Returns:
        The audit.

    Raises:
        ValueError: Fewer than two rows, or two candidates; a row without a completion, or longer
            than the context, or one that does not follow the pattern; candidates that the tokenizer
            cannot write; a setting out of range.
            Each message names the row or candidate.
        TypeError: `model` is not a TransformerLens model, or a teacher is not a `Teacher`.
    """
    check_model(model)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; it must lie between 0 and 1, such as 0.05")
    _check_settings(share, neutral_rows, own_rows, temperature)
    names = candidate_names(candidates, teachers)
    examples = _examples(model, data)
    if baseline is not None:
        check_teacher(baseline, "baseline")
    auditors = build_auditors(
        model,
        candidates,
        teachers,
        category=category,
        recipe=recipe,
        strength=strength,
        seed=seed,
        cache_dir=teacher_dir,
    )
    baselines = [baseline] if baseline is not None else default_baselines(model)
    _check_lengths(model, examples, baselines, auditors)
    fitted = fit_baseline(
        model,
        examples,
        baselines,
        temperature=temperature,
        pattern=pattern,
        seed=seed,
    )
    read = read_contributions(
        model,
        examples,
        fitted,
        auditors,
        batch_tokens=batch_tokens,
        checkpoint_dir=checkpoint_dir,
        accelerator=accelerator,
        progress=progress,
    )
    calibration = calibrate(
        model,
        examples,
        fitted,
        auditors,
        neutral_rows=neutral_rows,
        own_rows=own_rows,
        seed=seed,
        batch_tokens=batch_tokens,
        accelerator=accelerator,
    )
    metadata = run_metadata(
        model,
        teachers=_described(auditors),
        neutral_rows=neutral_rows,
        own_rows=own_rows,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    return Audit(
        candidates=names,
        kinds=tuple(kind.kind for kind in auditors),
        examples=tuple(examples),
        offsets=read.offsets,
        token_ids=read.tokens,
        choice=read.choice,
        by_row=read.rows,
        by_token=read.by_token,
        neutral=calibration.neutral,
        own=calibration.own,
        baseline=fitted,
        alpha=alpha,
        share=share,
        texts=token_texts(model.tokenizer, np.union1d(read.tokens, read.choice).tolist()),
        metadata=metadata | {"probe": model_probe(model)},
        auditors=tuple(auditors),
        tokenizer=model.tokenizer,
    )


def _examples(model: Model, data: Any) -> list[Example]:
    """Read and tokenize the data."""
    if model.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, which an audit needs to write calibration lists; load it "
            "with tokenizer="
        )
    examples = load_examples(data)
    if len(examples) < FEWEST_ROWS:
        raise ValueError(
            f"the data have {len(examples)} rows; an audit needs {FEWEST_ROWS} or more"
        )
    for row, example in enumerate(examples):
        if not example.completion_ids and not example.completion:
            raise ValueError(
                f"row {row} has no completion; an audit reads completions, not prompts alone"
            )
    tokenizer: Any = model.tokenizer
    return with_ids(tokenizer, examples)


def _check_lengths(
    model: Model,
    examples: Sequence[Example],
    baselines: Sequence[Teacher],
    auditors: Sequence[Auditors],
) -> None:
    """Refuse rows over the context before any work, under the longest system prompt."""
    teachers = [*baselines, *(teacher for kind in auditors for teacher in kind.teachers)]
    system = max((teacher.system_prompt or "" for teacher in teachers), key=len) or None
    tokenizer: Any = model.tokenizer
    (prompts,) = prompt_ids(tokenizer, [example.prompt for example in examples], [system])
    n_ctx = get_engine(model).n_ctx
    for row, (prompt, example) in enumerate(zip(prompts, examples, strict=True)):
        length = len(prompt) + len(example.completion_ids or ())
        # The last completion token is predicted, but not read.
        if length - 1 > n_ctx:
            raise ValueError(
                f"row {row} is {length:,} tokens long ({len(prompt):,} of prompt, with the longest "
                f"system prompt), over the context of {n_ctx:,}; shorten it or leave it out"
            )


def _check_settings(
    share: float, neutral_rows: int, own_rows: int, temperature: float | None
) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must lie above 0 and at most at 1")
    for name, value in (("neutral_rows", neutral_rows), ("own_rows", own_rows)):
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more")
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 or more")


def _described(auditors: Sequence[Auditors]) -> list[dict[str, Any]]:
    return [
        {
            "kind": kind.kind,
            "name": teacher.name,
            "system_prompt": teacher.system_prompt,
            "delta": None if teacher.delta is None else teacher.delta.digest(),
        }
        for kind in auditors
        for teacher in kind.teachers
    ]
