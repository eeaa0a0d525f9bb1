"""Find the divergence tokens of a data set.

1. Validate the teachers, the rule and the examples, and tokenize completions without ids.
2. Run one teacher-forced pass per teacher over all examples (`reading`).
3. Store the readings in a `Divergence`, which applies any rule and margin without another pass.

A *divergence token* is defined as in Schrodi et al., "Towards Understanding Subliminal Learning"
(arXiv 2509.23886): the factual teacher's argmax is the token, and the argmax of at least one
counterfactual teacher is another token.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from divergence_lens._utils.interrupts import convert_partial
from divergence_lens.chat import decode, token_texts
from divergence_lens.divergence.forced import TeacherForced
from divergence_lens.divergence.reading import read_teachers
from divergence_lens.divergence.result import Divergence
from divergence_lens.divergence.rules import Rule, check_rule
from divergence_lens.examples import Example, load_examples, with_ids
from divergence_lens.models import Model, check_model
from divergence_lens.provenance import model_probe, run_metadata
from divergence_lens.teachers import Teacher, check_teacher, check_teachers


def find_divergence(
    model: Model,
    examples: Any,
    *,
    teacher: Teacher,
    counterfactuals: Sequence[Teacher],
    rule: Rule = "any",
    require_agreement: bool = True,
    min_margin: float = 0.0,
    kl: bool = False,
    pattern: str | None = None,
    batch_tokens: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> Divergence:
    """Find the divergence tokens of `examples` among the teachers.

    Each teacher runs one teacher-forced pass: token k of a completion is compared with the argmax
    of the logits at the position before it, given the teacher's own prompt and the completion so
    far. No text is generated. Only the argmax, its margin over the second choice and the
    log-probability of the given token are stored.

    Args:
        model: The base model, in eval mode; its tokenizer encodes prompts and texts. A model
            without one reads rows of token ids under teachers without system prompts.
        examples: The factual teacher's completions: anything that `load_examples` reads. Token ids
            are used where given; other texts are tokenized as in the chat template.
        teacher: The factual teacher, which generated the data.
        counterfactuals: One or more teachers to compare with. They differ from the factual teacher
            in system prompt, in weights (a delta or another model with the same tokenizer), or
            both.
        rule: How many counterfactuals must differ: "any" (at least one, as in the paper), "all",
            or a number k (at least k).
        require_agreement: Whether the factual teacher's argmax must be the token (as in the paper).
        min_margin: An argmax with a smaller logit margin over the second choice does not count as
            different. Rule, agreement and margin can be changed later: `Divergence.with_rule`.
        kl: Whether to also compute KL(factual || counterfactual) for every token and
            counterfactual, for `Divergence.scores` and `Divergence.top`.
        pattern: The pattern of `generate` that the completions follow. Argmaxes, margins,
            log-probabilities and KL divergences are then those among the tokens that it allows at
            each position. None reads whole distributions.
        batch_tokens: Tokens per forward pass, padding included; None chooses by device. Results
            depend on it only through floating-point rounding. Smaller batches take less memory,
            and a batch that does not fit the device is halved.
        checkpoint_dir: A folder for this run's finished shards. After an interruption, the same
            call resumes from them and returns the same bits as an undisturbed run. Delete the
            folder once the result is saved.
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`, whose processes
            share the work. All of them must make the same call, and each returns the full result.
        progress: Whether to show a progress bar with tokens per second and the time left.

    Returns:
        The divergence over all completion tokens, in the order of the examples.

    Raises:
        Interrupted: The call was stopped; `partial` is the divergence of the examples that every
            teacher had read (the metadata's setting `finished_examples` holds their row numbers).
        ValueError: Empty data; an empty completion; no counterfactuals; the factual teacher among
            them; two teachers with one name; a prompt and completion longer than the context;
            token ids outside the vocabulary; a completion that does not follow the pattern; a model
            with dropout in training mode; logits that are not finite. Each message names the
            example or teacher. Also an invalid rule or margin, a damaged `checkpoint_dir` or one of
            another run, and processes that made different calls.
        TypeError: `model` is not a TransformerLens model, or a teacher is not a `Teacher`.
    """
    check_model(model)
    teachers = _check_teachers(teacher, counterfactuals)
    check_rule(rule, len(counterfactuals), min_margin)  # before hours of work, not after
    data = load_examples(examples)
    if not data:
        raise ValueError("there are no examples to read: the data is empty")
    for index, example in enumerate(data):
        if example.completion_ids is None and not example.completion:
            raise ValueError(f"example {index} has an empty completion; leave it out of the data")
    tokenizer: Any = model.tokenizer
    data = with_ids(tokenizer, data)
    probe = model_probe(model)

    def result(rows: Sequence[int], forced: TeacherForced, **settings: Any) -> Divergence:
        texts: dict[int, str] = {}  # without a tokenizer, tokens are shown by their ids
        if tokenizer is not None:
            texts = token_texts(tokenizer, np.union1d(forced.tokens, forced.predicted).tolist())
        special = frozenset(texts).intersection(getattr(tokenizer, "all_special_ids", ()))
        return Divergence(
            examples=tuple(_with_text(tokenizer, data[row]) for row in rows),
            teacher=teacher,
            counterfactuals=tuple(counterfactuals),
            offsets=forced.offsets,
            tokens=forced.tokens,
            predicted=forced.predicted,
            margin=forced.margin,
            logprob=forced.logprob,
            kl=forced.kl,
            rule=rule,
            require_agreement=require_agreement,
            min_margin=float(min_margin),
            texts=texts,
            special=special,
            metadata=run_metadata(model, batch_tokens=batch_tokens, pattern=pattern, **settings)
            | {"probe": probe},
            tokenizer=tokenizer,
        )

    with convert_partial(lambda part: result(*part, finished_examples=part[0])):
        forced = read_teachers(
            model,
            data,
            teachers,
            batch_tokens=batch_tokens,
            kl=kl,
            pattern=pattern,
            checkpoint_dir=checkpoint_dir,
            accelerator=accelerator,
            progress=progress,
        )
    return result(range(len(data)), forced)


def _with_text(tokenizer: Any, example: Example) -> Example:
    """Add the text of a completion given as ids; the paper's file layout needs one."""
    if example.completion is not None or tokenizer is None:
        return example
    return replace(example, completion=decode(tokenizer, example.completion_ids or ()))


def _check_teachers(teacher: Teacher, counterfactuals: Sequence[Teacher]) -> list[Teacher]:
    check_teacher(teacher)
    check_teachers(counterfactuals, "counterfactuals")
    if not counterfactuals:
        raise ValueError("there are no counterfactual teachers; give at least one to compare with")
    for other in counterfactuals:
        if other is teacher or other == teacher:
            raise ValueError(
                f"the factual teacher {teacher.name!r} is among the counterfactuals; leave it out"
            )
        if replace(other, name=teacher.name) == teacher:
            warnings.warn(
                f"the counterfactual {other.name!r} has the system prompt and the weights of the "
                f"factual teacher {teacher.name!r}, so no token can diverge; give it another "
                "system_prompt=, delta= or model=",
                stacklevel=3,
            )
    teachers = [teacher, *counterfactuals]
    names = [t.name for t in teachers]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two teachers are named {name!r}; give each its own name")
    return teachers
