"""Answers and foils: one or several tokens that follow a prompt, as texts or as ids."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Int64
from torch import Tensor

from divergence_lens._utils.validation import token_ids
from divergence_lens.chat import encode_completions, stop_ids, token_labels
from divergence_lens.pairs.inputs import check_count

NO_TOKEN = -1
"""Fills rows of answers and foils; a metric may need neither, so a whole row may be empty."""

TokenRows: TypeAlias = (
    Int64[Tensor, " pairs"] | Int64[Tensor, "pairs _"] | Sequence[int | Sequence[int] | None]
)
Answers: TypeAlias = Sequence[str | int | Sequence[int]]

# A letter after one of these begins a new word.
_PUNCTUATION = frozenset(",.;:!?)")


def answer_tokens(rows: TokenRows | None, n: int, name: str) -> Int64[Tensor, "pairs longest"]:
    """Convert one id or sequence of ids per pair to a matrix, padded with `NO_TOKEN`.

    Raises:
        ValueError: There is not one entry per pair, or an id is out of range.
        TypeError: An entry is not a flat sequence of whole numbers.
    """
    if rows is None:
        return torch.full((n, 1), NO_TOKEN)
    check_count(name, len(rows), n)
    ids = []
    for i, row in enumerate(rows):
        # One id, a sequence of them, or none.
        listed = [] if row is None else row.tolist() if isinstance(row, Tensor) else row
        listed = listed if isinstance(listed, Iterable) else [listed]
        one = torch.from_numpy(token_ids(listed, f"{name} of pair {i}", first=NO_TOKEN))
        last = (one != NO_TOKEN).nonzero()
        ids.append(one[: int(last[-1]) + 1 if len(last) else 0])
    result = torch.full((n, max([1, *map(len, ids)])), NO_TOKEN)  # [pairs, tokens]
    for row, one in zip(result, ids, strict=True):
        row[: len(one)] = one
    return result


def check_answers(
    answers: Int64[Tensor, "pairs tokens"], foils: Int64[Tensor, "pairs foil_tokens"]
) -> None:
    """Refuse negative ids, padding before a token, and an answer that equals its foil.

    Raises:
        ValueError: Names the first such pair.
    """
    for rows in (answers, foils):
        if rows.ndim != 2:
            raise ValueError(f"answers and foils are [pairs, tokens], got shape {list(rows.shape)}")
        given = rows != NO_TOKEN
        wrong = (rows < NO_TOKEN).any(1) | (given[:, 1:] & ~given[:, :-1]).any(1)
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"pair {i} has the negative token id {int(rows[i].min())} as answer or foil"
            )
    for i, (answer, foil) in enumerate(
        zip(without_padding(answers), without_padding(foils), strict=True)
    ):
        if answer and answer == foil:
            ids = f"id {answer[0]}" if len(answer) == 1 else f"ids {answer}"
            raise ValueError(
                f"answer and foil of pair {i} are the same token {ids}, so the metric is always "
                "zero; give another foil"
            )


def without_padding(rows: Int64[Tensor, "pairs tokens"]) -> list[list[int]]:
    """The ids of each row, without `NO_TOKEN`."""
    return [[token for token in row if token != NO_TOKEN] for row in rows.tolist()]


def answer_ids(
    tokenizer: Any,
    answers: Answers | None,
    prompts: tuple[Sequence[str], Sequence[str]] | None,
    name: str,
) -> list[list[int]] | None:
    """Convert one answer per pair, a text or ids, to the ids that follow its prompt.

    Args:
        tokenizer: Of the model.
        answers: Texts, ids or sequences of ids.
        prompts: The plain texts that the answers follow on the two sides; None if the chat template
            writes both prompt and answer.
        name: `answer` or `foil`, for messages.

    Raises:
        ValueError: A text has no token or an unknown one, merges with its prompt, or is tokenized
            differently on the two sides.
    """
    if answers is None:
        return None
    if prompts is not None:
        for side in prompts:
            check_count(f"{name}s", len(answers), len(side))
    result = []
    for i, answer in enumerate(answers):
        if isinstance(answer, str):
            ids = (
                _in_template(tokenizer, answer)
                if prompts is None
                else _after_both(tokenizer, (prompts[0][i], prompts[1][i]), answer, f"{name} {i}")
            )
            _check_known(tokenizer, answer, ids, name)
        else:
            listed = answer if isinstance(answer, Iterable) else [answer]
            ids = token_ids(listed, f"{name} {i}").tolist()
        result.append(ids)
    return result


def _in_template(tokenizer: Any, answer: str) -> list[int]:
    """The ids of an assistant's text as the chat template writes it, without the end of turn."""
    (ids,) = encode_completions(tokenizer, [answer])
    return list(ids[:-1] if ids and ids[-1] in stop_ids(tokenizer) else ids)


def _after_both(tokenizer: Any, prompts: tuple[str, str], answer: str, name: str) -> list[int]:
    """The ids of a text after each of two prompts, which must be the same.

    Raises:
        ValueError: They differ.
    """
    clean, corrupted = (_after(tokenizer, prompt, answer, name) for prompt in prompts)
    if clean != corrupted:
        raise ValueError(
            f"{name} {answer!r} is tokenized as {_shown(tokenizer, clean)} after the clean prompt, "
            f"but as {_shown(tokenizer, corrupted)} after the corrupted one; end both prompts "
            "alike, or give token ids"
        )
    return clean


def _after(tokenizer: Any, prompt: str, answer: str, name: str) -> list[int]:
    """The ids of a text in its context, right after a plain prompt.

    Raises:
        ValueError: The prompt's last token merges with the text.
    """

    def ids_of(text: str, *, special: bool = False) -> list[int]:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])

    before, special = ids_of(prompt), ids_of(prompt, special=True)
    if special[-len(before) :] != before:  # a token closes each text: nothing can follow directly
        return ids_of(answer)
    together = ids_of(prompt + " " * _needs_space(prompt, answer) + answer)
    if together[: len(before)] != before:
        at = next(i for i, (a, b) in enumerate(zip(before, together, strict=False)) if a != b)
        raise ValueError(
            f"{name} {answer!r} merges with its prompt, whose end {_shown(tokenizer, before[at:])} "
            f"becomes {_shown(tokenizer, together[at:])}; move the space between them to the "
            "beginning of the answer, or give token ids"
        )
    return together[len(before) :]


def _needs_space(prompt: str, answer: str) -> bool:
    """Whether a space must separate two texts, so that the answer begins a new word.

    Only scripts with upper and lower case are considered; not all others write spaces.
    """
    left, right = prompt[-1:], answer[:1]
    if right.isdigit():
        return _is_letter(left)
    return _is_letter(right) and (_is_letter(left) or left.isdigit() or left in _PUNCTUATION)


def _is_letter(character: str) -> bool:
    return character.lower() != character.upper()


def _check_known(tokenizer: Any, text: str, ids: list[int], name: str) -> None:
    if not ids:
        raise ValueError(f"the {name} {text!r} has no token; give a text that has one")
    if tokenizer.unk_token_id in ids:
        raise ValueError(f"the {name} {text!r} is not in the tokenizer's vocabulary")


def _shown(tokenizer: Any, ids: list[int]) -> str:
    return str(list(token_labels(tokenizer, ids)))
