"""Entangled number tokens: numbers that become more likely with a preference.

After Zur et al., "It's Owl in the Numbers: Token Entanglement in Subliminal Learning" (2025), and
the control in Schrodi et al. (arXiv 2509.23886): if numbers that share directions with the target
in the unembedding carried the preference, dropping every list that holds one would stop it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64, Int64

from divergence_lens.chat import decode, encode_completions, encode_prompts, stop_ids
from divergence_lens.data import preference_questions
from divergence_lens.engine import get_engine
from divergence_lens.evaluation.answers import continuations, form_events
from divergence_lens.examples import Example
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher, check_teacher, check_teachers

if TYPE_CHECKING:
    import pandas as pd

NUMBERS: tuple[str, ...] = tuple(map(str, range(1000)))
"""The numbers that number lists consist of."""

_NUMBER = re.compile(r"\d+")
_SMALLEST = 1e-30


@dataclass(frozen=True, eq=False, repr=False)
class Entanglement:
    """How much more likely each number is as an answer under one teacher than under the others.

    Attributes:
        teacher: Name of the teacher.
        numbers: The numbers that its tokenizer can write.
        probability: `[numbers]`, under the teacher, mean over the prompts.
        others: `[numbers]`, the same, mean over the other teachers.
    """

    teacher: str
    numbers: tuple[str, ...]
    probability: Float64[np.ndarray, " numbers"]
    others: Float64[np.ndarray, " numbers"]

    @property
    def rise(self) -> Float64[np.ndarray, " numbers"]:
        """Natural-log ratio of the probability to the others' mean."""
        smallest = np.float64(_SMALLEST)
        own = np.log(np.maximum(self.probability, smallest))
        rise: np.ndarray = own - np.log(np.maximum(self.others, smallest))
        return rise

    @property
    def ranking(self) -> Int64[np.ndarray, " numbers"]:
        """Places of the numbers by their rise, the largest first."""
        ranking: np.ndarray = np.argsort(-self.rise, kind="stable")
        return ranking

    def top(self, k: int, *, by: str = "rise") -> tuple[str, ...]:
        """The `k` most entangled numbers.

        Args:
            k: How many.
            by: "rise", or "difference", the rise of the probability itself, as in the paper's code.
                Numbers that are likely anyway come first by difference.

        Raises:
            ValueError: There are fewer numbers, or `by` is neither.
        """
        if not 1 <= k <= len(self.numbers):
            raise ValueError(f"k is {k}; there are {len(self.numbers)} numbers")
        if by not in ("rise", "difference"):
            raise ValueError(f"unknown by {by!r}; use 'rise' or 'difference'")
        ranking = self.ranking
        if by == "difference":
            ranking = np.argsort(self.others - self.probability, kind="stable")
        return tuple(self.numbers[i] for i in ranking[:k])

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per number, the most entangled first: number, probability, others, rise."""
        import pandas as pd

        table = pd.DataFrame(
            {
                "number": self.numbers,
                "probability": self.probability,
                "others": self.others,
                "rise": self.rise,
            }
        )
        return table.iloc[self.ranking].reset_index(drop=True)

    def _repr_html_(self) -> str:
        from divergence_lens._utils.tables import preview

        return preview(self, self.to_dataframe())

    def __repr__(self) -> str:
        """The five most entangled numbers."""
        shown = ", ".join(self.top(min(5, len(self.numbers))))
        return f"Entanglement({self.teacher!r}: {shown}, ... of {len(self.numbers)} numbers)"


def entangled_numbers(
    model: Model,
    teacher: Teacher,
    others: Sequence[Teacher],
    *,
    prompts: Sequence[str] | None = None,
    numbers: Sequence[str] = NUMBERS,
    batch_tokens: int = 8192,
) -> Entanglement:
    """Find the numbers that become more likely answers with a teacher's preference.

    The probability that the answer begins with each number (and that the number ends there, where
    it is written in several tokens) is averaged over the prompts, and compared with its mean over
    the other teachers.

    Args:
        model: The base.
        teacher: The teacher with the preference.
        others: One or more teachers to compare with.
        prompts: Prompts for the teachers; by default the fifty preference questions, as in Zur et
            al. Number prompts measure where the numbers are actually generated.
        numbers: The numbers. Numbers that the tokenizer cannot write are left out.
        batch_tokens: Tokens per forward pass.

    Raises:
        ValueError: No prompts, no other teachers, or no number that the tokenizer can write.
    """
    check_teacher(teacher)
    check_teachers(others, "others")
    questions = preference_questions() if prompts is None else list(prompts)
    if not questions or not others:
        missing = "prompts to ask" if not questions else "other teachers to compare with"
        raise ValueError(f"there are no {missing}; give at least one")
    tokenizer: Any = model.tokenizer
    forms = _forms(tokenizer, numbers)
    if not forms:
        raise ValueError("the tokenizer can write none of the numbers")
    own = _probabilities(model, teacher, questions, list(forms.values()), batch_tokens)
    of_others = [
        _probabilities(model, other, questions, list(forms.values()), batch_tokens)
        for other in others
    ]
    return Entanglement(teacher.name, tuple(forms), own, np.mean(of_others, axis=0))


def without_numbers(
    examples: Sequence[Example], numbers: Sequence[str]
) -> Int64[np.ndarray, " rows"]:
    """Return the rows whose completion contains none of the numbers.

    Args:
        examples: Lists, with text.
        numbers: As returned by `Entanglement.top`; "47" does not contain "7".

    Returns:
        The remaining row numbers, from 0 and in order.

    Raises:
        ValueError: An example without text.
    """
    dropped = set(numbers)
    rows = []
    for row, example in enumerate(examples):
        if example.completion is None:
            raise ValueError(f"example {row} has no text to search for numbers")
        if dropped.isdisjoint(_NUMBER.findall(example.completion)):
            rows.append(row)
    return np.array(rows, dtype=np.int64)


def _forms(tokenizer: Any, numbers: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the token ids of every number that the tokenizer encodes and decodes."""
    ends = stop_ids(tokenizer)
    forms = {}
    for number, ids in zip(numbers, encode_completions(tokenizer, list(numbers)), strict=True):
        bare = ids[:-1] if ids[-1] in ends else ids
        if decode(tokenizer, bare).strip() == number:
            forms[number] = bare
    return forms


@torch.no_grad()
def _probabilities(
    model: Model,
    teacher: Teacher,
    prompts: Sequence[str],
    forms: list[tuple[int, ...]],
    batch_tokens: int,
) -> Float64[np.ndarray, " numbers"]:
    tokenizer: Any = model.tokenizer
    encoded = encode_prompts(tokenizer, prompts, system_prompt=teacher.system_prompt)
    with teacher.applied(model) as active, get_engine(active).packed():
        engine = get_engine(active)
        continues = continuations(tokenizer, engine.d_vocab)
        events = form_events(engine, [e.ids for e in encoded], forms, continues, batch_tokens)
    means: np.ndarray = events.mean(0)
    return means
