"""The rows of pairs: their checks, target positions, and aligned columns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from divergence_lens.pairs.alignment import (
    Column,
    columns_of,
    common_prefix,
    differing,
    given_alignment,
)
from divergence_lens.pairs.answers import check_answers, without_padding
from divergence_lens.pairs.inputs import weights_key
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class PairRows:
    """The rows of `Pairs`, which documents the attributes and builds them."""

    clean: tuple[Int64[Tensor, " _"], ...]
    corrupted: tuple[Int64[Tensor, " _"], ...]
    answers: Int64[Tensor, "pairs tokens"]
    foils: Int64[Tensor, "pairs foil_tokens"]
    segments: tuple[tuple[str, ...], ...]
    alignment: tuple[Int64[np.ndarray, " _"], ...]
    clean_teacher: tuple[Teacher | None, ...]
    corrupted_teacher: tuple[Teacher | None, ...]
    labels: tuple[tuple[str, ...], ...]
    corrupted_labels: tuple[tuple[str, ...], ...]
    answer_labels: tuple[tuple[str, ...], ...]
    foil_labels: tuple[tuple[str, ...], ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    targets: Int64[Tensor, " pairs"] | None = None
    cut: bool = False

    def __post_init__(self) -> None:
        n = len(self.clean)
        if n == 0:
            raise ValueError("there are no pairs: clean has no rows")
        for name in (
            "corrupted",
            "answers",
            "foils",
            "segments",
            "alignment",
            "clean_teacher",
            "corrupted_teacher",
            "labels",
            "corrupted_labels",
            "answer_labels",
            "foil_labels",
        ):
            if len(getattr(self, name)) != n:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, but clean has {n} rows"
                )
        check_answers(self.answers, self.foils)
        for i in range(n):
            self._check(i)

    def _check(self, i: int) -> None:
        clean, corrupted = self.clean[i], self.corrupted[i]
        for name, row in (("clean", clean), ("corrupted", corrupted)):
            if len(row) == 0:
                raise ValueError(f"the {name} row of pair {i} is empty")
            if int(row.min()) < 0:
                raise ValueError(
                    f"the {name} row of pair {i} holds the negative token id {int(row.min())}"
                )
        for name in ("segments", "alignment", "labels"):
            if len(getattr(self, name)[i]) != len(clean):
                raise ValueError(
                    f"{name} of pair {i} has {len(getattr(self, name)[i])} entries, "
                    f"but its clean row has {len(clean)} tokens"
                )
        if len(self.corrupted_labels[i]) != len(corrupted):
            raise ValueError(
                f"corrupted_labels of pair {i} has {len(self.corrupted_labels[i])} entries, "
                f"but its corrupted row has {len(corrupted)} tokens"
            )
        self._check_alignment(i)
        if torch.equal(clean, corrupted) and weights_key(self.clean_teacher[i]) == weights_key(
            self.corrupted_teacher[i]
        ):
            raise ValueError(
                f"the two runs of pair {i} are identical (same tokens, same weights); "
                "give it another corrupted row or a teacher with other weights"
            )

    def _check_alignment(self, i: int) -> None:
        alignment, length = self.alignment[i], len(self.corrupted[i])
        if np.array_equal(alignment, np.arange(length)):
            return
        if not np.array_equal(alignment, given_alignment(i, alignment, len(alignment), length)):
            raise ValueError(
                f"the alignment of pair {i} leaves tokens of one side without text on the other; "
                "give it to Pairs.from_tokens, which extends such spans"
            )

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def target_position(self) -> Int64[Tensor, " pairs"]:
        """Position in each clean row whose logits predict the answer: its last."""
        if self.targets is not None:
            return self.targets
        return torch.tensor([len(row) - 1 for row in self.clean])

    @property
    def corrupted_target_position(self) -> Int64[Tensor, " pairs"]:
        """Position in each corrupted row whose logits predict the answer: its last."""
        if self.targets is not None:
            return self.targets
        return torch.tensor([len(row) - 1 for row in self.corrupted])

    def check_direction(self, *, causal: bool) -> None:
        """Refuse rows that a model reads otherwise than they are stored.

        Args:
            causal: Whether no position of the model attends to a later one.

        Raises:
            ValueError: Tokens after a target position were cut, and the model would read them; or
                they are there, and a causal model does not read them.
        """
        if not causal and self.cut:
            raise ValueError(
                "the rows end at the target position, but this model attends in both directions "
                "and reads the tokens after it too; build the pairs with whole_rows=True"
            )
        if causal and self.targets is not None:
            raise ValueError(
                "the pairs hold tokens after the target position, which this causal model does "
                "not read; build them without whole_rows"
            )

    def columns(self, i: int) -> tuple[Column, ...]:
        """The columns of pair `i`: its aligned positions and its units, from left to right.

        Every token of both rows is in exactly one column.
        """
        return columns_of(self.alignment[i], len(self.corrupted[i]))

    def units(self, i: int) -> tuple[Column, ...]:
        """The differing spans of pair `i` that have different numbers of tokens on its sides."""
        if (self.alignment[i] >= 0).all():
            return ()
        return tuple(column for column in self.columns(i) if column.is_unit)

    def differs(self, i: int) -> list[bool]:
        """Whether each clean token of pair `i` is in a unit or has another counterpart."""
        return differing(self.clean[i], self.corrupted[i], self.alignment[i])

    def first_difference(self, i: int) -> int:
        """The first position of clean row `i` at which the two runs can differ.

        It is 0 where the weights differ. Otherwise every position before it has the same tokens,
        and therefore the same activations, on both sides.
        """
        if weights_key(self.clean_teacher[i]) != weights_key(self.corrupted_teacher[i]):
            return 0
        clean, corrupted = self.clean[i].tolist(), self.corrupted[i].tolist()
        length = common_prefix(clean, corrupted)
        # One row may be a prefix of the other; then the runs differ only in their target positions.
        return min(length, len(clean) - 1, len(corrupted) - 1)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per pair: lengths, tokens of answer and foil, teachers, number of units."""
        import pandas as pd

        return pd.DataFrame(
            {
                "length": [len(row) for row in self.clean],
                "corrupted_length": [len(row) for row in self.corrupted],
                "answer": list(self.answer_labels),
                "answer_ids": without_padding(self.answers),
                "foil": list(self.foil_labels),
                "foil_ids": without_padding(self.foils),
                "clean_teacher": [t.name if t else None for t in self.clean_teacher],
                "corrupted_teacher": [t.name if t else None for t in self.corrupted_teacher],
                "first_difference": [self.first_difference(i) for i in range(len(self))],
                "units": [len(self.units(i)) for i in range(len(self))],
            }
        )
