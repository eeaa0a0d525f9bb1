"""A student that has already been trained: which tokens and answers moved, without candidates."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int64

from divergence_lens._utils.hub import OnHub
from divergence_lens._utils.interrupts import discard_partial
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens._utils.tables import preview
from divergence_lens.chat import row_texts, token_texts
from divergence_lens.deltas import Delta
from divergence_lens.divergence import read_teachers
from divergence_lens.evaluation import preference
from divergence_lens.examples import load_examples, with_ids
from divergence_lens.models import Model, check_model
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher, check_teacher

if TYPE_CHECKING:
    import pandas as pd

_KIND = "student audit"
_ARRAYS = ("offsets", "token_ids", "before", "after", "answers_before", "answers_after")


@dataclass(frozen=True, eq=False, repr=False)
class StudentAudit(OnHub):
    """How training moved a student's probabilities of tokens and of answers.

    Attributes:
        offsets: `[examples + 1]`, where each completion starts.
        token_ids: `[tokens]`, the completions' ids.
        before: `[tokens]`, log-probability under the base model.
        after: `[tokens]`, the same under the student.
        candidates: The answers that were asked for; empty if none were.
        answers_before: `[questions candidates]`, probability of each answer under the base model.
        answers_after: The same under the student.
        texts: Token id -> text.
        metadata: Package versions, model and settings.
    """

    offsets: Int64[np.ndarray, " boundaries"]
    token_ids: Int64[np.ndarray, " tokens"]
    before: Float32[np.ndarray, " tokens"]
    after: Float32[np.ndarray, " tokens"]
    candidates: tuple[str, ...]
    answers_before: np.ndarray
    answers_after: np.ndarray
    texts: Mapping[int, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shift(self) -> Float32[np.ndarray, " tokens"]:
        """Log-probability of each token under the student minus that under the base, in nats."""
        difference: np.ndarray = self.after - self.before
        return difference

    def to_dataframe(self) -> "pd.DataFrame":
        """Return the tokens, the one that rose most first.

        Returns:
            Columns: row, position, token, before, after, shift.
        """
        import pandas as pd

        owners = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        order = np.argsort(-self.shift, kind="stable")
        return pd.DataFrame(
            {
                "row": owners[order],
                "position": order - self.offsets[owners[order]],
                "token": [row_texts(self.texts, [i])[0] for i in self.token_ids[order]],
                "before": self.before[order],
                "after": self.after[order],
                "shift": self.shift[order],
            }
        )

    @cached_property
    def answers(self) -> "pd.DataFrame":
        """The candidates' shares before and after, the largest ratio first.

        Columns: candidate, before, after, ratio. Shares are means over the questions. Empty if no
        candidates were given.
        """
        import pandas as pd

        before, after = (
            (values / values.sum(1, keepdims=True)).mean(0) if values.size else values.reshape(-1)
            for values in (self.answers_before, self.answers_after)
        )
        table = pd.DataFrame(
            {
                "candidate": list(self.candidates),
                "before": before,
                "after": after,
                "ratio": after / before,
            }
        )
        return table.sort_values("ratio", ascending=False, ignore_index=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to one safetensors file, atomically."""
        header = {
            "candidates": list(self.candidates),
            "texts": {str(token_id): text for token_id, text in self.texts.items()},
            "metadata": dict(self.metadata),
        }
        save_tensors(path, {name: getattr(self, name) for name in _ARRAYS}, header, _KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "StudentAudit":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is damaged, or of another kind or version.
        """
        tensors, header = load_tensors(path, _KIND)
        return cls(
            **{name: tensors[name].numpy() for name in _ARRAYS},
            candidates=tuple(header["candidates"]),
            texts={int(token_id): text for token_id, text in header["texts"].items()},
            metadata=header["metadata"],
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __repr__(self) -> str:
        text = (
            f"{len(self):,} rows, {len(self.token_ids):,} tokens, mean shift "
            f"{float(self.shift.mean()):+.3f} nats"
        )
        if self.candidates:
            top = self.answers.iloc[0]
            text += (
                f"; {top['candidate']!r} rose most, {top['before']:.3f} to {top['after']:.3f} of "
                f"{len(self.candidates)} answers"
            )
        return f"StudentAudit({text})"

    def _repr_html_(self) -> str:
        return preview(self, self.answers if self.candidates else self.to_dataframe())


@discard_partial()
def audit_student(
    model: Model,
    student: Delta | Teacher,
    data: Any,
    *,
    candidates: Sequence[str] = (),
    category: str = "animal",
    questions: Sequence[str] | None = None,
    system_prompt: str | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> StudentAudit:
    """Measure what training changed in a student: the tokens of its data, and its answers.

    Args:
        model: The base model.
        student: The student: a delta, or a teacher with a delta or a model of its own.
        data: The data that it was trained on, in any form that `load_examples` reads.
        candidates: Answers to ask for, such as `ANIMALS`; none are needed for the tokens.
        category: See `preference`.
        questions: See `preference`.
        system_prompt: System prompt of both models; ignored for a teacher, which has its own.
        batch_tokens: Tokens per forward pass; None chooses by device.
        progress: Whether to show a progress bar.

    Returns:
        The shift of each token's log-probability, and of each candidate's share.

    Raises:
        ValueError: No rows, a row without a completion, one candidate, or see `find_divergence`.
        TypeError: `model` is not a TransformerLens model, or `student` is neither.
    """
    check_model(model)
    if isinstance(student, Delta):
        student = Teacher("student", system_prompt=system_prompt, delta=student)
    check_teacher(student, "student")
    base = Teacher("base", system_prompt=student.system_prompt)
    tokenizer: Any = model.tokenizer
    examples = with_ids(tokenizer, load_examples(data))
    if not examples:
        raise ValueError("there are no rows to read: the data is empty")
    forced = read_teachers(
        model, examples, [base, student], batch_tokens=batch_tokens, progress=progress
    )
    asked = [np.zeros((0, 0)), np.zeros((0, 0))]
    if candidates:
        asked = [
            preference(
                model,
                target=candidates[0],
                candidates=candidates,
                category=category,
                questions=questions,
                teacher=teacher,
            ).probabilities
            for teacher in (base, student)
        ]
    return StudentAudit(
        offsets=forced.offsets,
        token_ids=forced.tokens,
        before=forced.logprob[0],
        after=forced.logprob[1],
        candidates=tuple(candidates),
        answers_before=asked[0],
        answers_after=asked[1],
        texts=token_texts(tokenizer, set(forced.tokens.tolist())) if tokenizer else {},
        metadata=run_metadata(model, student=student.name, system_prompt=student.system_prompt),
    )
