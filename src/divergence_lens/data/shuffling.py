"""Numbers of completions in another order, as in Cloud et al. (arXiv 2507.14805)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from divergence_lens.chat import decode, stop_ids, token_texts
from divergence_lens.data.training_data import Row, TrainingData, join_examples, token_ids
from divergence_lens.examples import Example, with_ids

_NUMBER = re.compile(r"\d+")


def shuffle_numbers(
    data: TrainingData,
    tokenizer: Any,
    *,
    scope: str = "within",
    seed: int = 0,
) -> TrainingData:
    """Shuffle the numbers of completions; the marks of a number move with it.

    Args:
        data: Lists of numbers.
        tokenizer: Tokenizes the new completions.
        scope: "within" each answer; or "across" all answers, each of which keeps its length.
        seed: Seed of the order.

    Returns:
        The same prompts; separators, and their marks, stay where they are.

    Raises:
        ValueError: Another scope; a completion in which a token is part of two numbers; data whose
            labels are not its tokens.
    """
    if data.labels is not None:
        raise ValueError(
            "the data have labels that are not their tokens; shuffle the numbers before replacing "
            "tokens"
        )
    if scope not in ("within", "across"):
        raise ValueError(f'scope is {scope!r}; use "within" or "across"')
    stops = stop_ids(tokenizer)
    lists = [_MarkedList.read(tokenizer, e, data.marks_of(i)) for i, e in enumerate(data.examples)]
    rng = np.random.default_rng(seed)
    groups = lists if scope == "within" else [_pooled(lists)]
    drawn = iter(
        [
            group.numbers[place]
            for group in groups
            for place in rng.permutation(len(group.numbers)).tolist()
        ]
    )
    changed = []
    for old, example in zip(lists, data.examples, strict=True):
        numbers = [next(drawn) for _ in old.numbers]
        texts = iter(text for text, _ in numbers)
        text = _NUMBER.sub(lambda _m, texts=texts: next(texts), old.text)  # type: ignore[misc]
        new = with_ids(tokenizer, [replace(example, completion=text, completion_ids=None)])[0]
        ids = token_ids(new)
        # A list that was cut off before its end of turn must not gain one.
        if ids[-1] in stops and token_ids(example)[-1] not in stops:
            new = replace(new, completion_ids=ids[:-1])
        marks = _MarkedList.read(tokenizer, new, np.zeros(len(token_ids(new)), dtype=bool))
        changed.append(Row(new, marks.filled([m for _, m in numbers], old.between)))
    return join_examples(changed)


@dataclass(frozen=True)
class _MarkedList:
    """A completion split into numbers with their marks and the marks between them."""

    text: str
    numbers: list[tuple[str, np.ndarray]]
    between: list[np.ndarray]

    @classmethod
    def read(cls, tokenizer: Any, example: Example, marks: np.ndarray) -> "_MarkedList":
        ids = token_ids(example)
        text = example.completion if example.completion is not None else decode(tokenizer, ids)
        texts = token_texts(tokenizer, set(ids))
        pieces = [texts.get(i, "").strip() for i in ids]
        numbers, between, at = [], [], 0
        for number in _NUMBER.findall(text):
            start = at
            while start < len(pieces) and not pieces[start].isdigit():
                start += 1
            end, left = start, len(number)
            while left > 0 and end < len(pieces) and pieces[end].isdigit():
                left -= len(pieces[end])
                end += 1
            if left:
                raise ValueError(
                    f"the tokens of {text[:60]!r} do not end where its number {number} ends; "
                    "this tokenizer joins numbers, so they cannot be shuffled"
                )
            between.append(marks[at:start])
            numbers.append((number, marks[start:end]))
            at = end
        return cls(text, numbers, [*between, marks[at:]])

    def filled(self, numbers: Sequence[np.ndarray], between: Sequence[np.ndarray]) -> np.ndarray:
        """Return marks for this list, taken piece by piece from other numbers and separators."""
        own = chain.from_iterable(zip(self.between, (m for _, m in self.numbers), strict=False))
        given = chain.from_iterable(zip(between, numbers, strict=False))
        pieces = [_fitted(mark, len(piece)) for mark, piece in zip(given, own, strict=True)]
        return np.concatenate([*pieces, _fitted(between[-1], len(self.between[-1]))])


def _fitted(marks: np.ndarray, length: int) -> np.ndarray:
    """Fit marks to a piece of another length by marking all of it or nothing."""
    return marks if len(marks) == length else np.full(length, bool(marks.any()))


def _pooled(lists: Sequence[_MarkedList]) -> _MarkedList:
    return _MarkedList("", [number for one in lists for number in one.numbers], [])
