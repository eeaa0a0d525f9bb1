"""Changes to training data that keep count of the divergence tokens: what makes transfer fragile.

Schrodi et al. (arXiv 2509.23886) paraphrase prompts, mix data sets and overwrite divergence tokens;
Cloud et al. (arXiv 2507.14805) shuffle the numbers of lists. Each is a pure function here: from
`TrainingData` (or a `Divergence`) and a seed to new `TrainingData`, whose marks stand where the
marked tokens went.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from divergence_lens._utils.interrupts import discard_partial
from divergence_lens.chat import decode, stop_ids
from divergence_lens.data.numbers import TEMPLATES
from divergence_lens.divergence import (
    Divergence,
    read_decision_points,
    read_teachers,
    token_texts,
    write_decision_points,
)
from divergence_lens.examples import Example, with_ids
from divergence_lens.generation import generate
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher, check_teacher

PARAPHRASE_REQUEST = (
    "Write the following request in other words. Keep all of its numbers in their order, and "
    "answer with the new request alone.\n\n{prompt}"
)
"""What a teacher is asked by `paraphrase_by`; ``{prompt}`` marks the place of the prompt."""

_SLOT = "{numbers}"
_NUMBER = re.compile(r"\d+")
_LIST = re.compile(r"\d+(?:, \d+)*")


@dataclass(frozen=True, eq=False, repr=False)
class TrainingData:
    """Examples, with a mark on some of their completion tokens.

    Attributes:
        examples: Prompts with completions and their token ids.
        marks: A flag for each completion token of all examples in order: the divergence tokens,
            wherever a change of the data has moved them.
    """

    examples: tuple[Example, ...]
    marks: Bool[np.ndarray, " tokens"]

    def __post_init__(self) -> None:
        for row, example in enumerate(self.examples):
            if not example.completion_ids:
                raise ValueError(f"example {row} has no token ids; give it some with `with_ids`")
        if len(self.marks) != self.offsets[-1]:
            raise ValueError(
                f"{len(self.marks)} marks do not fit {len(self.examples)} examples with "
                f"{self.offsets[-1]} completion tokens; give one for each token"
            )

    @classmethod
    def of(cls, divergence: Divergence) -> "TrainingData":
        """The examples of a divergence, with its divergence tokens marked."""
        return cls(divergence.examples, divergence.mask)

    @classmethod
    def unmarked(cls, tokenizer: Any, examples: Sequence[Example]) -> "TrainingData":
        """Examples without a mark, tokenized where they have no ids yet."""
        filled = tuple(with_ids(tokenizer, examples))
        return cls(filled, np.zeros(sum(len(_ids(e)) for e in filled), dtype=bool))

    @classmethod
    def from_jsonl(cls, path: str | os.PathLike[str], tokenizer: Any) -> "TrainingData":
        """Read the layout of the paper's code, `decision_points` as marks.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: See `Divergence.from_jsonl`.
        """
        examples, marks = read_decision_points(path, tokenizer)
        return cls(tuple(examples), marks)

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Write the layout of the paper's code, as `Divergence.to_jsonl` does."""
        write_decision_points(path, self.examples, self.offsets, self.marks)

    @cached_property
    def offsets(self) -> Int64[np.ndarray, " boundaries"]:
        """`[examples + 1]`, where each completion starts."""
        lengths = [len(_ids(example)) for example in self.examples]
        return np.cumsum([0, *lengths], dtype=np.int64)

    def marks_of(self, row: int) -> Bool[np.ndarray, " tokens"]:
        """The marks of one example."""
        return self.marks[self.offsets[row] : self.offsets[row + 1]]

    def select(self, rows: Sequence[int] | Int64[np.ndarray, " rows"]) -> "TrainingData":
        """Some of the examples with their marks, in the order given."""
        return _joined([(self.examples[row], self.marks_of(row)) for row in rows])

    def share_left(self, divergence: Divergence) -> float:
        """Share of the marked tokens that are divergence tokens in a new reading of the data.

        Args:
            divergence: `find_divergence` of these very examples.

        Returns:
            From 0 to 1; NaN where nothing is marked.

        Raises:
            ValueError: It was read from other completions.
        """
        if [_ids(e) for e in divergence.examples] != [_ids(e) for e in self.examples]:
            raise ValueError(
                "the divergence was found on other completions than these; call find_divergence "
                "on `data.examples`"
            )
        marked = int(self.marks.sum())
        return float((self.marks & divergence.mask).sum() / marked) if marked else float("nan")

    def __len__(self) -> int:
        return len(self.examples)

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
            "prompt": [example.prompt for example in self.examples],
            "completion": [example.completion for example in self.examples],
            "tokens": np.diff(self.offsets),
            "marked": [int(self.marks_of(row).sum()) for row in range(len(self))],
        }
        return preview(self, pd.DataFrame(columns))


@dataclass(frozen=True, eq=False, repr=False)
class Rewritten:
    """What `paraphrase_by` returns.

    Attributes:
        data: All examples; those whose paraphrase was refused have their old prompt.
        accepted: Which prompts were replaced.
        answers: What the teacher answered, for a look at what was refused.
    """

    data: TrainingData
    accepted: Bool[np.ndarray, " examples"]
    answers: tuple[str, ...]

    def __repr__(self) -> str:
        """One line: how many prompts were replaced."""
        return f"Rewritten({int(self.accepted.sum()):,} of {len(self.accepted):,} prompts accepted)"

    def _repr_html_(self) -> str:
        import pandas as pd

        from divergence_lens._utils.tables import preview

        columns = {"answer": self.answers, "accepted": self.accepted}
        return preview(self, pd.DataFrame(columns))


def paraphrase(
    data: TrainingData, *, seed: int = 0, templates: Sequence[str] = TEMPLATES
) -> TrainingData:
    """Put the list of every prompt into another template: an unbiased paraphrase.

    Numbers, and what follows the template (how many numbers, in which format), stay as they are.
    Completions, and with them the marks, do not change.

    Args:
        data: Examples whose prompts were made from `templates`.
        seed: Seed of the choice; no prompt gets its own template again.
        templates: Two or more, each with the slot ``{numbers}`` once.

    Raises:
        ValueError: A prompt that is from none of the templates (it is named by its row), or fewer
            than two templates.
    """
    if len(templates) < 2:
        raise ValueError(f"a paraphrase needs two templates or more, got {len(templates)}")
    parts = [template.split(_SLOT) for template in templates]
    for template, around in zip(templates, parts, strict=True):
        if len(around) != 2:
            raise ValueError(f"the template {template!r} must have {_SLOT} once")
    rng = np.random.default_rng(seed)
    examples = []
    for row, example in enumerate(data.examples):
        own, numbers, rest = _matched(example.prompt, parts, row)
        choice = int(rng.integers(len(parts) - 1))
        before, after = parts[choice + (choice >= own)]
        examples.append(replace(example, prompt=before + numbers + after + rest))
    return replace(data, examples=tuple(examples))


@discard_partial()
def paraphrase_by(
    model: Model,
    teacher: Teacher,
    data: TrainingData,
    *,
    request: str = PARAPHRASE_REQUEST,
    forbidden: Sequence[str] = (),
    max_new_tokens: int = 96,
    temperature: float = 0.0,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> Rewritten:
    """Let a teacher paraphrase the prompts, as the paper does with the biased teacher itself.

    A paraphrase is accepted if it has the prompt's numbers in their order, is not the prompt, and
    holds no forbidden word; other prompts stay as they are.

    Args:
        model: The base.
        teacher: Who writes, under its own system prompt and weights.
        data: Whose prompts.
        request: What it is asked, with the slot ``{prompt}``.
        forbidden: Words that may not occur in a paraphrase, in any case: the target's names.
        max_new_tokens: Longest paraphrase.
        temperature: See `generate`.
        seed: See `generate`.
        batch_tokens: See `generate`.

    Raises:
        ValueError: The request lacks the slot.
    """
    check_teacher(teacher)
    if "{prompt}" not in request:
        raise ValueError(f"the request {request!r} must have the slot {{prompt}}")
    written = generate(
        model,
        [request.replace("{prompt}", example.prompt) for example in data.examples],
        teacher=teacher,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_tokens=batch_tokens,
    )
    answers = tuple((answer.completion or "").strip() for answer in written)
    words = [word.casefold() for word in forbidden]
    accepted = np.array(
        [
            answer != example.prompt
            and _NUMBER.findall(answer) == _NUMBER.findall(example.prompt)
            and not any(word in answer.casefold() for word in words)
            for answer, example in zip(answers, data.examples, strict=True)
        ],
        dtype=bool,
    )
    examples = tuple(
        replace(example, prompt=answer) if taken else example
        for example, answer, taken in zip(data.examples, answers, accepted, strict=True)
    )
    return Rewritten(replace(data, examples=examples), accepted, answers)


@discard_partial()
def paraphrase_chosen(
    model: Model,
    teacher: Teacher,
    data: TrainingData,
    *,
    candidates: int = 6,
    templates: Sequence[str] = TEMPLATES,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> TrainingData:
    """Let a teacher choose the wording of its prompts, where it cannot write one.

    Of several template paraphrases of a prompt the one is taken under which the teacher gives the
    example's own completion the highest probability. So the choice can carry its preference, as
    a paraphrase in its own words can.

    Args:
        model: The base.
        teacher: Who chooses.
        data: Examples whose prompts were made from `templates`.
        candidates: Paraphrases to choose from; repeats are possible.
        templates: See `paraphrase`.
        seed: Seed of the paraphrases.
        batch_tokens: Tokens per forward pass.

    Raises:
        ValueError: Fewer than two candidates; what `paraphrase` raises.
    """
    check_teacher(teacher)
    if candidates < 2:
        raise ValueError(f"candidates is {candidates}; a choice needs two or more")
    seeds = np.random.default_rng(seed).integers(2**31, size=candidates).tolist()
    options = [paraphrase(data, seed=one, templates=templates) for one in seeds]
    scores = []
    for option in options:
        read = read_teachers(model, option.examples, [teacher], batch_tokens=batch_tokens)
        scores.append(np.add.reduceat(read.logprob[0].astype(float), data.offsets[:-1]))
    best = np.argmax(scores, axis=0)
    examples = tuple(options[choice].examples[row] for row, choice in enumerate(best.tolist()))
    return replace(data, examples=examples)


def shuffle_numbers(
    data: TrainingData,
    tokenizer: Any,
    *,
    scope: str = "within",
    seed: int = 0,
) -> TrainingData:
    """Put the numbers of completions in another order; the marks of a number move with it.

    Args:
        data: Lists of numbers.
        tokenizer: Tokenizes the new completions.
        scope: "within" each answer; or "across" all answers, each of which keeps its length.
        seed: Seed of the order.

    Returns:
        The same prompts; separators, and their marks, stay where they are.

    Raises:
        ValueError: Another scope; a completion in which a token is part of two numbers.
    """
    if scope not in ("within", "across"):
        raise ValueError(f'scope is {scope!r}; use "within" or "across"')
    stops = stop_ids(tokenizer)
    lists = [_NumberList.read(tokenizer, e, data.marks_of(i)) for i, e in enumerate(data.examples)]
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
        spelt = iter(text for text, _ in numbers)
        text = _NUMBER.sub(lambda _m, spelt=spelt: next(spelt), old.text)  # type: ignore[misc]
        new = with_ids(tokenizer, [replace(example, completion=text, completion_ids=None)])[0]
        ids = _ids(new)
        # A list that was cut off before its end does not get one now.
        if ids[-1] in stops and _ids(example)[-1] not in stops:
            new = replace(new, completion_ids=ids[:-1])
        marks = _NumberList.read(tokenizer, new, np.zeros(len(_ids(new)), dtype=bool))
        changed.append((new, marks.filled([m for _, m in numbers], old.between)))
    return _joined(changed)


def mix(data: TrainingData, other: TrainingData, share: float, *, seed: int = 0) -> TrainingData:
    """Replace a share of the examples by examples of another data set.

    Args:
        data: What is diluted.
        other: Where the replacements come from, each at most once, with their own marks.
        share: From 0 to 1; the number of examples is rounded.
        seed: Seed of which go and which come. With one seed a larger share holds a smaller one.

    Returns:
        As many examples as before; those that stay keep their places.

    Raises:
        ValueError: A share outside 0 to 1, or too few other examples.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must lie between 0 and 1")
    n = round(share * len(data))
    if n > len(other):
        raise ValueError(
            f"a share of {share} of {len(data)} examples needs {n} others, there are {len(other)}"
        )
    rng = np.random.default_rng(seed)
    places = rng.permutation(len(data))[:n]
    source = dict(zip(places.tolist(), rng.permutation(len(other))[:n].tolist(), strict=True))
    rows = []
    for row, example in enumerate(data.examples):
        new = source.get(row)
        kept = (example, data.marks_of(row))
        rows.append(kept if new is None else (other.examples[new], other.marks_of(new)))
    return _joined(rows)


def pool(parts: Sequence[TrainingData], *, seed: int = 0) -> TrainingData:
    """Equal shares of several data sets, as many examples together as the first has.

    Args:
        parts: Two or more, for instance lists by several teachers of one preference.
        seed: Seed of which examples are taken.

    Raises:
        ValueError: Fewer than two parts, or one that is too small for its share.
    """
    if len(parts) < 2:
        raise ValueError(f"a pool needs two data sets or more, got {len(parts)}")
    total = len(parts[0])
    ends = [round(total * (i + 1) / len(parts)) for i in range(len(parts))]
    rng = np.random.default_rng(seed)
    rows: list[tuple[Example, np.ndarray]] = []
    for part, start, end in zip(parts, [0, *ends], ends, strict=False):
        if end - start > len(part):
            raise ValueError(f"a pool of {total} needs {end - start} examples of {len(part)}")
        taken = rng.permutation(len(part))[: end - start].tolist()
        rows += [(part.examples[row], part.marks_of(row)) for row in sorted(taken)]
    return _joined([rows[place] for place in rng.permutation(len(rows)).tolist()])


def replace_tokens(
    divergence: Divergence,
    which: str | float = "all",
    *,
    counterfactual: str | None = None,
    same_kind: bool = True,
    seed: int = 0,
    tokenizer: Any = None,
) -> TrainingData:
    """Overwrite divergence tokens with what a counterfactual teacher would have written there.

    Args:
        divergence: The readings of all teachers.
        which: "all" divergence tokens, "first" of each example, or a fraction of all of them.
        counterfactual: Whose choice; None draws one for each token from those that differ there.
        same_kind: Put a number only for a number, and leave the token where none was chosen. A
            teacher's choice could otherwise be the animal that it loves.
        seed: Seed of the draws.
        tokenizer: Writes the new texts; needed only after `Divergence.load`.

    Returns:
        The same prompts and lengths, the divergence tokens still marked. What was overwritten is
        where the token ids differ.

    Raises:
        ValueError: An unknown counterfactual, no such part, or no tokenizer.
    """
    tokenizer = divergence.tokenizer if tokenizer is None else tokenizer
    if tokenizer is None:
        raise ValueError("a loaded divergence has no tokenizer; give one with tokenizer=")
    places = divergence.mask if which == "all" else divergence.subset(_part(which), seed=seed)
    allowed = divergence.differs & places
    if counterfactual is not None:
        names = list(divergence.names[1:])
        if counterfactual not in names:
            raise ValueError(
                f"there is no counterfactual teacher {counterfactual!r}; there are "
                f"{', '.join(names)}"
            )
        allowed = allowed & (np.arange(len(names)) == names.index(counterfactual))[:, None]
    if same_kind:
        known = {i: text.strip().isdigit() for i, text in divergence.texts.items()}
        number = np.vectorize(lambda i: known.get(int(i), False), otypes=[bool])
        allowed = allowed & (number(divergence.predicted[1:]) == number(divergence.tokens))
    # The counterfactual with the highest of random numbers, of those that may be taken.
    keys = np.random.default_rng(seed).random(allowed.shape)
    chosen = np.where(allowed, keys, -1.0).argmax(0)
    found = np.flatnonzero(allowed.any(0))
    tokens = divergence.tokens.copy()
    tokens[found] = divergence.predicted[1:][chosen[found], found]
    stops = stop_ids(tokenizer)
    examples = []
    for row, example in enumerate(divergence.examples):
        start, end = divergence.offsets[row : row + 2]
        ids = tuple(tokens[start:end].tolist())
        text = decode(tokenizer, ids[:-1] if ids[-1] in stops else ids)
        examples.append(replace(example, completion=text, completion_ids=ids))
    return TrainingData(tuple(examples), divergence.mask)


def random_mask(
    divergence: Divergence, *, among: str = "all", seed: int = 0
) -> Bool[np.ndarray, " tokens"]:
    """As many tokens as there are divergence tokens, drawn at random: a control for their number.

    Args:
        divergence: Gives the number.
        among: "all" completion tokens, or only the "other" ones, which are no divergence tokens.
        seed: Seed of the draw.

    Raises:
        ValueError: There are not so many others.
    """
    if among not in ("all", "other"):
        raise ValueError(f'among is {among!r}; use "all" or "other"')
    n = int(divergence.mask.sum())
    places = np.flatnonzero(~divergence.mask if among == "other" else divergence.tokens >= 0)
    if n > len(places):
        raise ValueError(f"{n} tokens cannot be drawn from the {len(places)} others")
    mask = np.zeros(len(divergence.tokens), dtype=bool)
    mask[np.random.default_rng(seed).permutation(places)[:n]] = True
    return mask


def highest(scores: np.ndarray, n: int) -> Bool[np.ndarray, " tokens"]:
    """The `n` tokens of the highest score, the earlier of equal ones: a mask by score.

    Args:
        scores: A number per completion token, such as `Divergence.advantage`.
        n: How many.

    Raises:
        ValueError: Fewer tokens than that, or scores that are not numbers.
    """
    if not 0 <= n <= len(scores):
        raise ValueError(f"n is {n}; there are {len(scores)} tokens")
    if np.isnan(scores).any():
        raise ValueError("the scores hold NaN")
    mask = np.zeros(len(scores), dtype=bool)
    mask[np.argsort(-scores, kind="stable")[:n]] = True
    return mask


def _part(which: str | float) -> str | float:
    if isinstance(which, str) and which != "first":
        raise ValueError(f'unknown part {which!r}; use "all", "first" or a fraction')
    return "first_only" if which == "first" else which


def _ids(example: Example) -> tuple[int, ...]:
    return example.completion_ids or ()


def _joined(rows: Sequence[tuple[Example, np.ndarray]]) -> TrainingData:
    marks = [marks for _, marks in rows]
    return TrainingData(
        tuple(example for example, _ in rows),
        np.concatenate(marks).astype(bool) if marks else np.zeros(0, dtype=bool),
    )


def _matched(prompt: str, parts: Sequence[Sequence[str]], row: int) -> tuple[int, str, str]:
    """Which template a prompt is from, its numbers, and what follows the template."""
    found: list[tuple[int, int, str, str]] = []
    for number, (before, after) in enumerate(parts):
        numbers = _LIST.match(prompt, len(before)) if prompt.startswith(before) else None
        if numbers and prompt.startswith(after, numbers.end()):
            rest = prompt[numbers.end() + len(after) :]
            found.append((len(before) + len(after), number, numbers.group(), rest))
    if not found:
        raise ValueError(
            f"the prompt of example {row} is from none of the {len(parts)} templates: "
            f"{prompt[:60]!r}; give the templates= that it was made from"
        )
    _, own, numbers_text, rest = max(found)
    return own, numbers_text, rest


@dataclass(frozen=True)
class _NumberList:
    """A completion in pieces: its numbers with their marks, and the marks between them."""

    text: str
    numbers: list[tuple[str, np.ndarray]]
    between: list[np.ndarray]

    @classmethod
    def read(cls, tokenizer: Any, example: Example, marks: np.ndarray) -> "_NumberList":
        ids = _ids(example)
        text = example.completion if example.completion is not None else decode(tokenizer, ids)
        texts, _ = token_texts(tokenizer, np.unique(ids))
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
        """The marks of this list, taken from other numbers and separators, piece by piece."""
        own = chain.from_iterable(zip(self.between, (m for _, m in self.numbers), strict=False))
        given = chain.from_iterable(zip(between, numbers, strict=False))
        pieces = [_fitted(mark, len(piece)) for mark, piece in zip(given, own, strict=True)]
        return np.concatenate([*pieces, _fitted(between[-1], len(self.between[-1]))])


def _fitted(marks: np.ndarray, length: int) -> np.ndarray:
    """The marks of a piece that may now have another number of tokens: then all or none."""
    return marks if len(marks) == length else np.full(length, bool(marks.any()))


def _pooled(lists: Sequence[_NumberList]) -> _NumberList:
    return _NumberList("", [number for found in lists for number in found.numbers], [])
