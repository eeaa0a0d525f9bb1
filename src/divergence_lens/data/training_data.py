"""Examples with marked tokens: the input and output of every change to training data."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from divergence_lens._utils.indexing import Index, row_numbers
from divergence_lens.divergence import Divergence, read_decision_points, write_decision_points
from divergence_lens.examples import Example, with_ids


@dataclass(frozen=True, eq=False, repr=False)
class TrainingData:
    """Examples, with a mark on some of their completion tokens.

    `data[3]`, `data[:10]`, `data[mask]` and `data[[0, 2]]` select examples, and always return
    `TrainingData`.

    Attributes:
        examples: Prompts with completions and their token ids.
        marks: A flag for each completion token of all examples in order: the divergence tokens,
            at their position after any change of the data.
        labels: Token ids that a student learns to predict at the completion's positions, where they
            are not the tokens that it reads; see `replace_tokens`. None where the two are equal.
    """

    examples: tuple[Example, ...]
    marks: Bool[np.ndarray, " tokens"]
    labels: Int64[np.ndarray, " tokens"] | None = None

    def __post_init__(self) -> None:
        for row, example in enumerate(self.examples):
            if not example.completion_ids:
                raise ValueError(f"example {row} has no token ids; tokenize it with `with_ids`")
        if len(self.marks) != self.offsets[-1]:
            raise ValueError(
                f"{len(self.marks)} marks do not fit {len(self.examples)} examples with "
                f"{self.offsets[-1]} completion tokens; give one for each token"
            )
        if self.labels is not None and len(self.labels) != len(self.marks):
            raise ValueError(
                f"{len(self.labels)} labels do not fit {len(self.marks)} completion tokens; give "
                "one for each token"
            )

    @classmethod
    def of(cls, divergence: Divergence) -> "TrainingData":
        """Mark the divergence tokens of a divergence's examples."""
        return cls(divergence.examples, divergence.mask)

    @classmethod
    def unmarked(cls, tokenizer: Any, examples: Sequence[Example]) -> "TrainingData":
        """Tokenize examples where they have no ids, and mark nothing."""
        filled = tuple(with_ids(tokenizer, examples))
        return cls(filled, np.zeros(sum(len(token_ids(e)) for e in filled), dtype=bool))

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], tokenizer: Any) -> "TrainingData":
        """Read the layout of the paper's code, `decision_points` as marks.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: See `read_decision_points`.
        """
        examples, marks = read_decision_points(path, tokenizer)
        return cls(tuple(examples), marks)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write the layout of the paper's code, as `Divergence.to_jsonl` does."""
        write_decision_points(path, self.examples, self.offsets, self.marks)

    @cached_property
    def offsets(self) -> Int64[np.ndarray, " boundaries"]:
        """`[examples + 1]`, where each completion starts."""
        lengths = [len(token_ids(example)) for example in self.examples]
        return np.cumsum([0, *lengths], dtype=np.int64)

    def marks_of(self, row: int) -> Bool[np.ndarray, " tokens"]:
        """Return the marks of one example."""
        return self.marks[self.offsets[row] : self.offsets[row + 1]]

    def row(self, row: int) -> "Row":
        """Return one example with its marks and labels."""
        span = slice(self.offsets[row], self.offsets[row + 1])
        labels = None if self.labels is None else self.labels[span]
        return Row(self.examples[row], self.marks[span], labels)

    def share_left(self, divergence: Divergence) -> float:
        """Fraction of the marked tokens that are still divergence tokens after a change.

        Args:
            divergence: `find_divergence` of these examples.

        Returns:
            From 0 to 1; NaN where nothing is marked.

        Raises:
            ValueError: It was read from other completions.
        """
        if [token_ids(e) for e in divergence.examples] != [token_ids(e) for e in self.examples]:
            raise ValueError(
                "the divergence was computed on other completions; call find_divergence "
                "on `data.examples`"
            )
        marked = int(self.marks.sum())
        return float((self.marks & divergence.mask).sum() / marked) if marked else float("nan")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Index) -> "TrainingData":
        """Select examples by number, slice, boolean mask or list of numbers, with their marks.

        Raises:
            IndexError: A number is out of range, or a mask has another length.
        """
        rows = row_numbers(index, len(self), "example")
        return join_examples([self.row(row) for row in rows])

    def __repr__(self) -> str:
        """One line: examples, tokens and marks."""
        return (
            f"TrainingData({len(self):,} examples, {len(self.marks):,} tokens, "
            f"{int(self.marks.sum()):,} marked)"
        )

    def _repr_html_(self) -> str:
        import pandas as pd

        from divergence_lens._utils.tables import preview

        columns = {
            "prompt": [str(example.prompt) for example in self.examples],
            "completion": [example.completion for example in self.examples],
            "tokens": np.diff(self.offsets),
            "marked": [int(self.marks_of(row).sum()) for row in range(len(self))],
        }
        return preview(self, pd.DataFrame(columns))


def token_ids(example: Example) -> tuple[int, ...]:
    """Return the completion's token ids, empty where unknown."""
    return example.completion_ids or ()


class Row(NamedTuple):
    """One example, its marks, and its labels where they are not its tokens."""

    example: Example
    marks: np.ndarray
    labels: np.ndarray | None = None


def join_examples(rows: Sequence[Row]) -> TrainingData:
    """Build training data from rows."""
    labels = None
    if any(row.labels is not None for row in rows):
        parts = [token_ids(r.example) if r.labels is None else r.labels for r in rows]
        labels = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    return TrainingData(
        tuple(row.example for row in rows),
        np.concatenate([row.marks for row in rows]).astype(bool) if rows else np.zeros(0, bool),
        labels,
    )
