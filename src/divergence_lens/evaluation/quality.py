"""Measure whether a student still does its task: valid number lists and held-out loss.

A higher preference says little about a broken student. Quality is therefore measured on the task
that it was trained on, with examples that it was not trained on.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np

from divergence_lens._utils.interrupts import discard_partial
from divergence_lens._utils.statistics import wilson_interval
from divergence_lens.data import NumberFilter
from divergence_lens.divergence import read_teachers
from divergence_lens.examples import load_examples, with_ids
from divergence_lens.generation import generate
from divergence_lens.models import Model, check_model
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher, check_teacher


@dataclass(frozen=True, kw_only=True)
class TaskQuality:
    """Result of `task_quality`.

    Attributes:
        lists: Number of prompts.
        valid: Number of completions that are valid number lists.
        reasons: Counts of the reasons why the others are not.
        loss: Mean negative log-probability of a held-out completion token, in nats.
        tokens: Number of held-out completion tokens.
        metadata: Package versions, model and settings.
    """

    lists: int
    valid: int
    loss: float
    tokens: int
    reasons: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def valid_rate(self) -> float:
        """Fraction of the completions that are valid number lists."""
        return self.valid / self.lists

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return float(np.exp(self.loss))

    def interval(self, *, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of `valid_rate`."""
        return wilson_interval(self.valid_rate, self.lists, level=level)

    def describe(self) -> dict[str, Any]:
        """Return all fields as JSON values; `TaskQuality(**described)` restores the result."""
        return {**dataclasses.asdict(self), "reasons": dict(self.reasons)}

    def __repr__(self) -> str:
        low, high = self.interval()
        return (
            f"TaskQuality({self.valid} of {self.lists} lists valid [{low:.3f}, {high:.3f}], "
            f"held-out loss {self.loss:.4f} over {self.tokens:,} tokens)"
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(reason)}</td><td>{count}</td></tr>"
            for reason, count in {"valid": self.valid, **self.reasons}.items()
        )
        return (
            f"<p>{escape(repr(self))}</p><table><thead><tr><th>lists</th><th>count</th></tr>"
            f"</thead><tbody>{rows}</tbody></table>"
        )


@discard_partial()
def task_quality(
    model: Model,
    held_out: Any,
    *,
    system_prompt: str | None = None,
    teacher: Teacher | None = None,
    number_filter: NumberFilter | None = None,
    max_new_tokens: int = 64,
    batch_tokens: int = 8192,
    accelerator: Any = None,
) -> TaskQuality:
    """Measure how well a model does the task of the number lists.

    The model completes the held-out prompts greedily, and the completions are checked. The mean
    loss on the held-out completions measures its distance from the teacher that generated them.

    Args:
        model: The base, or a student: `with student.applied(model): task_quality(model, ...)`.
        held_out: Prompts with completions, in any form that `load_examples` reads, which the
            student was not trained on.
        system_prompt: The system prompt of the evaluation.
        teacher: Evaluate under this teacher's system prompt and weights instead.
        number_filter: Defines valid lists; default `NumberFilter()`.
        max_new_tokens: The longest completion; one that is cut off is checked as it is.
        batch_tokens: Padded tokens in one forward pass.
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`, whose processes
            divide the examples. All processes make the same call, and each returns the result.

    Raises:
        ValueError: No examples, or one without a completion; a system prompt beside a teacher; a
            sequence longer than the context.
    """
    check_model(model)
    if teacher is not None and system_prompt is not None:
        raise ValueError("give system_prompt or teacher, not both: a teacher has its own prompt")
    if teacher is None:
        teacher = Teacher("model", system_prompt=system_prompt)
    check_teacher(teacher)
    tokenizer: Any = model.tokenizer
    examples = with_ids(tokenizer, load_examples(held_out))
    if not examples:
        raise ValueError("there are no held-out examples to measure on")
    read = read_teachers(
        model, examples, [teacher], batch_tokens=batch_tokens, accelerator=accelerator
    )
    written = generate(
        model,
        [example.prompt for example in examples],
        teacher=teacher,
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        accelerator=accelerator,
    )
    report = (number_filter or NumberFilter()).report([e.completion or "" for e in written])
    return TaskQuality(
        lists=report.total,
        valid=report.passed,
        reasons={str(reason.value): count for reason, count in report.counts.items()},
        loss=-float(read.logprob.astype(np.float64).mean()),
        tokens=len(read.tokens),
        metadata=run_metadata(
            model, system_prompt=teacher.system_prompt, max_new_tokens=max_new_tokens
        ),
    )
