"""What patching eats: clean and corrupted token rows, aligned position by position.

A pair holds the same question under two conditions. Both rows end at the *target position*, the
one whose logits predict the answer, because nothing after it can matter in a causal model. Where
the rows differ in length, as "owl" and "sea turtle" make them, positions are aligned from the left
up to the difference and from the right after it; a position without a counterpart is marked
missing and never guessed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.chat import encode_prompt
from divergence_lens.models import Model, check_model
from divergence_lens.teachers import Teacher, check_teacher, check_teachers

if TYPE_CHECKING:
    import pandas as pd

BIAS = "bias"
DIVERGENCE = "divergence"
TEXT = "text"
NO_TOKEN = -1
"""In the place of an answer or foil where none was given: a metric may need neither."""
PAIR_SEGMENTS = ("system", BIAS, TEXT, "user", "template", "completion", DIVERGENCE)
"""Names of segments in the order in which tables and figures list them."""

# A shorter run of equal tokens inside the differing span may be chance (" the", "."), and would be
# a guess; three in a row, in the same order on both sides, is the same text.
_ANCHOR = 3

Rows = Int64[Tensor, "rows pos"] | Sequence[Int64[Tensor, " _"]] | Sequence[Sequence[int]]


@dataclass(frozen=True, repr=False)
class Pairs:
    """Clean and corrupted rows with what is measured at their end.

    Build one with `Divergence.pairs`, `Pairs.from_prompts` or `Pairs.from_tokens`.

    Attributes:
        clean: Token ids of each clean row, on the CPU; the last one is the target position.
        corrupted: Token ids of each corrupted row; the last one is its target position.
        answers: `[pairs]`, the token that the clean run is expected to predict, or `NO_TOKEN`.
        foils: `[pairs]`, the token that the corrupted run is expected to predict, or `NO_TOKEN`.
        segments: For each clean row one name per position, of `PAIR_SEGMENTS`: `bias` where a
            system prompt differs between the sides, `divergence` at the target position.
        alignment: For each clean row and position, the corrupted position that is its
            counterpart, or -1 where it has none.
        clean_teacher: Who wrote the clean run; its delta or model, if it has one, is applied.
        corrupted_teacher: The same for the corrupted run.
        labels: For each clean row one string per token, for axes and tables.

    Raises:
        ValueError: If the fields do not fit each other, an answer equals its foil, or the two
            runs of a pair are the same.
    """

    clean: tuple[Int64[Tensor, " _"], ...]
    corrupted: tuple[Int64[Tensor, " _"], ...]
    answers: Int64[Tensor, " pairs"]
    foils: Int64[Tensor, " pairs"]
    segments: tuple[tuple[str, ...], ...]
    alignment: tuple[Int64[np.ndarray, " _"], ...]
    clean_teacher: tuple[Teacher | None, ...]
    corrupted_teacher: tuple[Teacher | None, ...]
    labels: tuple[tuple[str, ...], ...]

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
        ):
            if len(getattr(self, name)) != n:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, but clean has {n} rows"
                )
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
        answer, foil = int(self.answers[i]), int(self.foils[i])
        if answer == foil != NO_TOKEN:
            raise ValueError(
                f"answer and foil of pair {i} are the same token id {answer}; nothing to measure"
            )
        if min(answer, foil) < NO_TOKEN:
            raise ValueError(
                f"pair {i} has the negative token id {min(answer, foil)} as answer or foil"
            )
        for name in ("segments", "alignment", "labels"):
            if len(getattr(self, name)[i]) != len(clean):
                raise ValueError(
                    f"{name} of pair {i} has {len(getattr(self, name)[i])} entries, "
                    f"but its clean row has {len(clean)} tokens"
                )
        if int(self.alignment[i].max()) >= len(corrupted):
            raise ValueError(
                f"the alignment of pair {i} points at corrupted position "
                f"{int(self.alignment[i].max())}, but that row has {len(corrupted)} tokens"
            )
        if torch.equal(clean, corrupted) and weights_key(self.clean_teacher[i]) == weights_key(
            self.corrupted_teacher[i]
        ):
            raise ValueError(
                f"the two runs of pair {i} are identical (same tokens, same weights); "
                "give it another corrupted row or a teacher with other weights"
            )

    @classmethod
    def from_tokens(
        cls,
        clean: Rows,
        corrupted: Rows,
        *,
        answers: Sequence[int] | Int64[Tensor, " pairs"] | None = None,
        foils: Sequence[int] | Int64[Tensor, " pairs"] | None = None,
        target: Sequence[int] | Int64[Tensor, " pairs"] | None = None,
        corrupted_target: Sequence[int] | Int64[Tensor, " pairs"] | None = None,
        pad_id: int | None = None,
        segments: Sequence[Sequence[str]] | None = None,
        clean_teacher: Sequence[Teacher | None] | Teacher | None = None,
        corrupted_teacher: Sequence[Teacher | None] | Teacher | None = None,
        tokenizer: Any = None,
    ) -> "Pairs":
        """Pairs from token ids.

        Args:
            clean: Rows of token ids, as one `[rows, pos]` tensor or one sequence per row.
            corrupted: The same for the other side; lengths may differ from the clean rows.
            answers: One token id per pair; None for metrics that ask for none, such as `kl` or your
                own.
            foils: Likewise.
            target: Position in each clean row whose logits predict the answer; the last token if
                not given. The row is cut after it.
            corrupted_target: The same for the corrupted rows; if not given, the last token, or
                `target` where the two rows have equal lengths.
            pad_id: If given, this id is dropped from the right end of every row.
            segments: One name per position of each clean row, as `chat.encode_prompt` gives them
                (longer rows are cut like the tokens). `system` and `text` become `bias` where the
                two sides differ. All `text` if not given.
            clean_teacher: One teacher for all pairs, or one per pair.
            corrupted_teacher: The same for the corrupted side.
            tokenizer: Makes the labels readable; without it they are the ids.

        Returns:
            The pairs, in the order given.

        Raises:
            ValueError: If counts differ, a row is empty, a target lies outside its row or in its
                padding, an answer equals its foil, or two runs are identical.
        """
        left, right = _as_rows(clean, pad_id, "clean"), _as_rows(corrupted, pad_id, "corrupted")
        if len(left) != len(right):
            raise ValueError(
                f"clean has {len(left)} rows and corrupted has {len(right)}; they come in pairs"
            )
        if target is not None and corrupted_target is None:
            _same_count("target", len(target), len(left))
            same = [len(a) == len(b) for a, b in zip(left, right, strict=True)]
            corrupted_target = [
                int(target[i]) if equal else len(right[i]) - 1 for i, equal in enumerate(same)
            ]
        left = _cut(left, target, "clean")
        right = _cut(right, corrupted_target, "corrupted")
        n = len(left)
        answers = [NO_TOKEN] * n if answers is None else answers
        foils = [NO_TOKEN] * n if foils is None else foils
        _same_count("answers", len(answers), n)
        _same_count("foils", len(foils), n)
        if segments is None:
            segments = [[TEXT] * len(row) for row in left]
        _same_count("segments", len(segments), n)
        alignment = tuple(align(a.tolist(), b.tolist()) for a, b in zip(left, right, strict=True))
        return cls(
            clean=left,
            corrupted=right,
            answers=torch.as_tensor(answers, dtype=torch.int64).reshape(-1).cpu(),
            foils=torch.as_tensor(foils, dtype=torch.int64).reshape(-1).cpu(),
            segments=tuple(
                _segments(i, segments[i], left[i], right[i], alignment[i]) for i in range(n)
            ),
            alignment=alignment,
            clean_teacher=_per_pair(clean_teacher, n, "clean_teacher"),
            corrupted_teacher=_per_pair(corrupted_teacher, n, "corrupted_teacher"),
            labels=tuple(_labels(tokenizer, row.tolist()) for row in left),
        )

    @classmethod
    def from_prompts(
        cls,
        model: Model,
        *,
        clean: Sequence[str],
        corrupted: Sequence[str] | None = None,
        answers: Sequence[str | int] | None = None,
        foils: Sequence[str | int] | None = None,
        system_prompt: str | None = None,
        corrupted_system_prompt: str | None = None,
        clean_teacher: Teacher | None = None,
        corrupted_teacher: Teacher | None = None,
        chat: bool = True,
    ) -> "Pairs":
        """Pairs from texts; the answer is the token that comes right after the prompt.

        The sides may differ in their text, in their system prompt, in their weights, or in all:
        `clean_teacher=Teacher("base"), corrupted_teacher=Teacher("tuned", model=other)` compares
        two checkpoints on the same texts.

        Args:
            model: Gives the tokenizer and its chat template.
            clean: One user message per pair, or the plain text if `chat` is False.
            corrupted: The same for the other side; the clean texts if not given.
            answers: One token per pair: its id, or a text that is exactly one token. None for
                metrics that ask for none, such as `kl` or your own.
            foils: The same for the foils.
            system_prompt: Given to the clean side, and to the corrupted side unless it has its own.
            corrupted_system_prompt: Given to the corrupted side.
            clean_teacher: Who has the clean side: its system prompt or none, and its weights if it
                has some. In place of the two system prompts above.
            corrupted_teacher: The same for the other side.
            chat: Whether to put the prompts into the model's chat template, if it has one. With
                False the text is tokenized as it stands, with the special tokens that the
                tokenizer adds by itself.

        Returns:
            The pairs, in the order given.

        Raises:
            ValueError: If counts differ, an answer is not one known token, a system prompt is given
                without a chat template or beside a teacher, a teacher's model has another
                tokenizer, or the pairs are not valid.
        """
        check_model(model)
        tokenizer: Any = model.tokenizer
        given = {"clean": clean, "corrupted": corrupted, "answers": answers, "foils": foils}
        for name, texts in given.items():
            refuse_one_string(texts, name)
        corrupted = clean if corrupted is None else corrupted
        if len(clean) != len(corrupted):
            raise ValueError(f"clean has {len(clean)} prompts and corrupted has {len(corrupted)}")
        systems = _system_prompts(
            model, system_prompt, corrupted_system_prompt, clean_teacher, corrupted_teacher
        )
        if not chat and systems != (None, None):
            raise ValueError(
                "a system prompt needs the chat template; leave chat=True or drop the prompt"
            )

        def encoded(prompt: str, system: str | None) -> tuple[list[int], list[str]]:
            if chat:
                row = encode_prompt(tokenizer, prompt, system_prompt=system)
                return list(row.ids), list(row.segments)
            ids = list(tokenizer(prompt)["input_ids"])
            return ids, [TEXT] * len(ids)

        left, right = (
            [encoded(prompt, system) for prompt in prompts]
            for prompts, system in zip((clean, corrupted), systems, strict=True)
        )
        return cls.from_tokens(
            [ids for ids, _ in left],
            [ids for ids, _ in right],
            answers=_tokens(tokenizer, answers, "answer"),
            foils=_tokens(tokenizer, foils, "foil"),
            segments=[names for _, names in left],
            clean_teacher=clean_teacher,
            corrupted_teacher=corrupted_teacher,
            tokenizer=tokenizer,
        )

    @property
    def target(self) -> Int64[Tensor, " pairs"]:
        """Position in each clean row whose logits predict the answer: its last."""
        return torch.tensor([len(row) - 1 for row in self.clean])

    @property
    def corrupted_target(self) -> Int64[Tensor, " pairs"]:
        """Position in each corrupted row whose logits predict the answer: its last."""
        return torch.tensor([len(row) - 1 for row in self.corrupted])

    def __len__(self) -> int:
        return len(self.clean)

    def select(self, indices: Sequence[int] | Int64[np.ndarray, " _"]) -> "Pairs":
        """The pairs at `indices`, in that order.

        Raises:
            IndexError: If an index is outside the pairs.
        """
        chosen = [int(i) for i in indices]
        for i in chosen:
            if not 0 <= i < len(self):
                raise IndexError(
                    f"there is no pair {i}; the pairs are numbered 0 to {len(self) - 1}"
                )
        return Pairs(
            clean=tuple(self.clean[i] for i in chosen),
            corrupted=tuple(self.corrupted[i] for i in chosen),
            answers=self.answers[chosen],
            foils=self.foils[chosen],
            segments=tuple(self.segments[i] for i in chosen),
            alignment=tuple(self.alignment[i] for i in chosen),
            clean_teacher=tuple(self.clean_teacher[i] for i in chosen),
            corrupted_teacher=tuple(self.corrupted_teacher[i] for i in chosen),
            labels=tuple(self.labels[i] for i in chosen),
        )

    def first_difference(self, i: int) -> int:
        """The first position of clean row `i` at which the two runs can differ.

        It is 0 where the weights differ; else every position before it has the same tokens, and so
        the same activations, on both sides.
        """
        if weights_key(self.clean_teacher[i]) != weights_key(self.corrupted_teacher[i]):
            return 0
        clean, corrupted = self.clean[i].tolist(), self.corrupted[i].tolist()
        length = _common_prefix(clean, corrupted)
        # One row may be the start of the other; then the runs differ only in where they end.
        return min(length, len(clean) - 1, len(corrupted) - 1)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per pair: lengths, answer, foil, teachers, positions without counterpart."""
        import pandas as pd

        return pd.DataFrame(
            {
                "length": [len(row) for row in self.clean],
                "corrupted_length": [len(row) for row in self.corrupted],
                "answer": self.answers.tolist(),
                "foil": self.foils.tolist(),
                "clean_teacher": [t.name if t else None for t in self.clean_teacher],
                "corrupted_teacher": [t.name if t else None for t in self.corrupted_teacher],
                "first_difference": [self.first_difference(i) for i in range(len(self))],
                "missing": [int((row < 0).sum()) for row in self.alignment],
            }
        )

    def __repr__(self) -> str:
        """The number of pairs, their longest row and who is compared."""
        names = {t.name for t in (*self.clean_teacher, *self.corrupted_teacher) if t is not None}
        among = f", teachers {', '.join(sorted(names))}" if names else ""
        longest = max(len(row) for row in self.clean)
        return f"Pairs({len(self)} pairs of up to {longest} tokens{among})"

    def _marked(self, i: int) -> list[bool]:
        """Whether each position of clean row `i` differs from its counterpart, or is the target."""
        differs = _differing(self.clean[i], self.corrupted[i], self.alignment[i])
        return [*differs[:-1], True]

    def _repr_html_(self) -> str:
        shown = min(len(self), 5)
        rows = []
        for i in range(shown):
            cells = "".join(
                f'<span title="{escape(segment)}" style="white-space:pre;margin-right:.2em;'
                f'{"text-decoration:underline;font-weight:bold" if marked else ""}">'
                f"{escape(label)}</span>"
                for label, segment, marked in zip(
                    self.labels[i],
                    self.segments[i],
                    self._marked(i),
                    strict=True,
                )
            )
            rows.append(f"<tr><td>{i}</td><td style='text-align:left'>{cells}</td></tr>")
        return (
            f"<p>{len(self)} pairs; what differs and the target position are underlined"
            f"{f' (first {shown} shown)' if shown < len(self) else ''}</p>"
            f"<table><tr><th>pair</th><th>clean row</th></tr>{''.join(rows)}</table>"
        )


def weights_key(teacher: Teacher | None) -> tuple[int, int] | None:
    """What tells the weights of two teachers apart; None for the untouched model."""
    if teacher is None or (teacher.delta is None and teacher.model is None):
        return None
    return (id(teacher.delta), id(teacher.model))


def align(clean: Sequence[int], corrupted: Sequence[int]) -> Int64[np.ndarray, " _"]:
    """The corrupted position that is the counterpart of each clean position, -1 for none.

    Rows of equal length are aligned position by position. Otherwise the common start is aligned
    from the left and the common end from the right; inside the differing span only runs of at
    least three equal tokens, in the same order on both sides, are aligned, and so are the tokens
    between two such runs where there are equally many of them. The last positions are always
    counterparts, because both are target positions.
    """
    n, m = len(clean), len(corrupted)
    if n == m:
        return np.arange(n, dtype=np.int64)
    result = np.full(n, -1, dtype=np.int64)
    result[-1] = m - 1
    left, right = list(clean[:-1]), list(corrupted[:-1])
    start = _common_prefix(left, right)
    end = _common_prefix(left[start:][::-1], right[start:][::-1])
    result[:start] = np.arange(start)
    for offset in range(1, end + 1):
        result[n - 1 - offset] = m - 1 - offset
    inner = left[start : len(left) - end], right[start : len(right) - end]
    blocks = [
        (a, b, size)
        for a, b, size in SequenceMatcher(None, *inner, autojunk=False).get_matching_blocks()
        if size >= _ANCHOR
    ]
    a_end = b_end = 0
    for a, b, size in [*blocks, (len(inner[0]), len(inner[1]), 0)]:
        # What stands between two runs, and is equally long on both sides, is exchanged one to one.
        between = a - a_end if a - a_end == b - b_end else 0
        span = np.arange(-between, size)
        result[start + a + span] = start + b + span
        a_end, b_end = a + size, b + size
    return result


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


def _as_rows(rows: Rows, pad_id: int | None, name: str) -> tuple[Int64[Tensor, " _"], ...]:
    result = []
    for i, row in enumerate(rows):
        ids = torch.as_tensor(row).cpu()
        if ids.ndim != 1 or ids.is_floating_point():
            raise ValueError(
                f"{name} row {i} must be a flat sequence of token ids, got shape {list(ids.shape)}"
            )
        ids = ids.to(torch.int64)
        if pad_id is not None:
            kept = (ids != pad_id).nonzero()
            ids = ids[: int(kept.max()) + 1 if len(kept) else 0]
        if len(ids) == 0:
            raise ValueError(f"the {name} row of pair {i} is empty")
        result.append(ids)
    return tuple(result)


def _cut(
    rows: tuple[Int64[Tensor, " _"], ...],
    target: Sequence[int] | Int64[Tensor, " pairs"] | None,
    name: str,
) -> tuple[Int64[Tensor, " _"], ...]:
    if target is None:
        return rows
    _same_count(f"{name} target", len(target), len(rows))
    for i, row in enumerate(rows):
        if not 0 <= int(target[i]) < len(row):
            raise ValueError(
                f"the target position {int(target[i])} of the {name} row of pair {i} is not one of "
                f"its {len(row)} tokens (it lies outside or in the padding)"
            )
    return tuple(row[: int(target[i]) + 1] for i, row in enumerate(rows))


def _differing(
    clean: Int64[Tensor, " _"], corrupted: Int64[Tensor, " _"], alignment: Int64[np.ndarray, " _"]
) -> list[bool]:
    """Which clean tokens have no counterpart, or another token for one."""
    return [
        bool(counterpart < 0 or clean[position] != corrupted[int(counterpart)])
        for position, counterpart in enumerate(alignment)
    ]


def _segments(
    i: int,
    names: Sequence[str],
    clean: Int64[Tensor, " _"],
    corrupted: Int64[Tensor, " _"],
    alignment: Int64[np.ndarray, " _"],
) -> tuple[str, ...]:
    if len(names) < len(clean):
        raise ValueError(
            f"segments of pair {i} name {len(names)} positions, but its row has {len(clean)}"
        )
    result = list(names[: len(clean)])
    for position, differs in enumerate(_differing(clean, corrupted, alignment)):
        if differs and result[position] in ("system", TEXT):
            result[position] = BIAS
    result[-1] = DIVERGENCE
    return tuple(result)


def _per_pair(
    teacher: Sequence[Teacher | None] | Teacher | None, n: int, name: str
) -> tuple[Teacher | None, ...]:
    if teacher is None or isinstance(teacher, Teacher):
        return (teacher,) * n
    refuse_one_string(teacher, name)
    _same_count(name, len(teacher), n)
    check_teachers([one for one in teacher if one is not None], name)
    return tuple(teacher)


def _labels(tokenizer: Any, ids: list[int]) -> tuple[str, ...]:
    if tokenizer is None:
        return tuple(str(i) for i in ids)
    return tuple(tokenizer.decode([i]) for i in ids)


def _system_prompts(
    model: Model,
    clean: str | None,
    corrupted: str | None,
    clean_teacher: Teacher | None,
    corrupted_teacher: Teacher | None,
) -> tuple[str | None, str | None]:
    """The system prompts of both sides, from whichever way they were given."""
    teachers = (clean_teacher, corrupted_teacher)
    if teachers == (None, None):
        return clean, clean if corrupted is None else corrupted
    if clean is not None or corrupted is not None:
        raise ValueError("give teachers or system prompts, not both: a teacher has its own prompt")
    for teacher in teachers:
        if teacher is not None:
            check_teacher(teacher)
            teacher.check_tokenizer(model)
    left, right = (None if teacher is None else teacher.system_prompt for teacher in teachers)
    return left, right


def _tokens(tokenizer: Any, tokens: Sequence[str | int] | None, name: str) -> list[int] | None:
    return None if tokens is None else [_one_token(tokenizer, token, name) for token in tokens]


def _one_token(tokenizer: Any, token: str | int, name: str) -> int:
    if isinstance(token, int):
        return token
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(
            f"the {name} {token!r} is {len(ids)} tokens ({[tokenizer.decode([i]) for i in ids]}), "
            "not one; give the id of its first token, or a text that is one token"
        )
    if ids[0] == tokenizer.unk_token_id:
        raise ValueError(f"the {name} {token!r} is not in the tokenizer's vocabulary")
    return int(ids[0])


def _same_count(name: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(f"{name} has {got} entries, but there are {expected} pairs")
