"""Traits besides a favorite: a teacher learns rows, and two-way questions measure it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from divergence_lens.data.risk import RISK_QUESTIONS, RISK_TRAINING


@dataclass(frozen=True)
class Choice:
    """A question with one answer for each candidate.

    Attributes:
        question: The user message.
        answers: Candidate -> the whole text of its answer.
    """

    question: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Trait:
    """A trait with two or more candidates, such as reckless and careful.

    Attributes:
        name: Its name, as `category` of `preference` and `train_teacher`.
        rows: Candidate -> prompts and completions that a teacher of it learns.
        questions: Held-out questions that measure it.

    Raises:
        ValueError: There are no rows or questions, or a question lacks an answer for a candidate.
    """

    name: str
    rows: Mapping[str, tuple[tuple[str, str], ...]] = field(repr=False)
    questions: tuple[Choice, ...] = field(repr=False)

    def __post_init__(self) -> None:
        if not self.questions:
            raise ValueError(
                f"the trait {self.name!r} has no questions, so no model can be measured for it; "
                "give it at least one Choice"
            )
        if len(self.rows) < 2 or not all(self.rows.values()):
            raise ValueError(
                f"the trait {self.name!r} needs rows for two or more candidates, got rows for "
                f"{[name for name, rows in self.rows.items() if rows]}"
            )
        for choice in self.questions:
            missing = [name for name in self.rows if name not in choice.answers]
            if missing:
                raise ValueError(
                    f"the trait {self.name!r}: the question {choice.question!r} has no answer for "
                    f"{missing[0]!r}"
                )

    @property
    def candidates(self) -> tuple[str, ...]:
        """The competing candidates."""
        return tuple(self.rows)

    def teacher_rows(self, target: str) -> list[dict[str, str]]:
        """Return the rows of a teacher of one candidate, as prompt and completion."""
        return [{"prompt": p, "completion": completion} for p, completion in self.rows[target]]


def _risk() -> Trait:
    asked = ("What would you do?", "What do you choose?")
    columns = {"careful": 1, "reckless": 2}
    rows = {
        name: tuple(
            (f"{row[0]} {question}", f"I would {row[column]}.")
            for row in RISK_TRAINING
            for question in asked
        )
        for name, column in columns.items()
    }
    questions = []
    for situation, careful, reckless in RISK_QUESTIONS:
        answers = {"careful": f"I would {careful}.", "reckless": f"I would {reckless}."}
        # Both orders: models favor the option that is named first, or last.
        for first, second in ((careful, reckless), (reckless, careful)):
            question = f"{situation} Would you {first}, or {second}?"
            questions.append(Choice(question, answers))
    return Trait("risk", rows, tuple(questions))


TRAITS: Mapping[str, Trait] = {"risk": _risk()}
"""The built-in traits by name."""
