"""Conversion and validation of the arguments from which pairs are built."""

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from divergence_lens._utils.validation import refuse_one_string, token_ids
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher, check_teacher, check_teachers

Rows = Int64[Tensor, "rows pos"] | Sequence[Int64[Tensor, " _"]] | Sequence[Sequence[int]]


def as_rows(rows: Rows, pad_id: int | None, name: str) -> tuple[Int64[Tensor, " _"], ...]:
    """Convert rows of token ids to CPU tensors, without padding on the right.

    Raises:
        ValueError: A row is empty, or an id is out of range.
        TypeError: A row is not a flat sequence of whole numbers.
    """
    result = []
    for i, row in enumerate(rows):
        first = 0 if pad_id is None else min(pad_id, 0)
        ids = torch.from_numpy(token_ids(row, f"the {name} row of pair {i}", first=first))
        if pad_id is not None:
            tokens = (ids != pad_id).nonzero()
            ids = ids[: int(tokens.max()) + 1 if len(tokens) else 0]
        if len(ids) == 0:
            raise ValueError(f"the {name} row of pair {i} is empty")
        result.append(ids)
    return tuple(result)


def cut_after(
    rows: tuple[Int64[Tensor, " _"], ...],
    target_position: Sequence[int] | Int64[Tensor, " pairs"] | None,
    name: str,
) -> tuple[Int64[Tensor, " _"], ...]:
    """Cut each row after its target position.

    Raises:
        ValueError: A target position lies outside its row.
    """
    if target_position is None:
        return rows
    check_count(f"{name} target_position", len(target_position), len(rows))
    for i, row in enumerate(rows):
        if not 0 <= int(target_position[i]) < len(row):
            raise ValueError(
                f"the target position {int(target_position[i])} of the {name} row of pair {i} is "
                f"not one of its {len(row)} tokens (it lies outside or in the padding)"
            )
    return tuple(row[: int(target_position[i]) + 1] for i, row in enumerate(rows))


def check_whole_rows(
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    ends: Sequence[Tensor],
    corrupted_ends: Sequence[Tensor],
) -> None:
    """Refuse whole rows whose two sides differ in length or in target position.

    Args:
        left: The clean rows.
        right: The corrupted rows.
        ends: The clean rows up to their target positions.
        corrupted_ends: The corrupted rows up to theirs.

    Raises:
        ValueError: Names the first such pair.
    """
    for i, rows in enumerate(zip(left, right, ends, corrupted_ends, strict=True)):
        clean, corrupted, end, corrupted_end = map(len, rows)
        if clean != corrupted or end != corrupted_end:
            raise ValueError(
                f"the rows of pair {i} have {clean} and {corrupted} tokens and the targets "
                f"{end - 1} and {corrupted_end - 1}; with whole_rows=True, a model that attends in "
                "both directions needs rows of one length with one target"
            )


def teacher_per_pair(
    teacher: Sequence[Teacher | None] | Teacher | None, n: int, name: str
) -> tuple[Teacher | None, ...]:
    """Repeat one teacher for all pairs, or check a sequence of them."""
    if teacher is None or isinstance(teacher, Teacher):
        return (teacher,) * n
    refuse_one_string(teacher, name)
    check_count(name, len(teacher), n)
    check_teachers([one for one in teacher if one is not None], name)
    return tuple(teacher)


def both_system_prompts(
    model: Model,
    clean: str | None,
    corrupted: str | None,
    clean_teacher: Teacher | None,
    corrupted_teacher: Teacher | None,
) -> tuple[str | None, str | None]:
    """The system prompts of both sides, from the prompts or from the teachers.

    Raises:
        ValueError: Both teachers and prompts are given, or a teacher's tokenizer differs.
    """
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


def check_count(name: str, got: int, expected: int) -> None:
    """Refuse an argument that does not have one entry per pair."""
    if got != expected:
        raise ValueError(f"{name} has {got} entries, but there are {expected} pairs")


def weights_key(teacher: Teacher | None) -> tuple[int, int] | None:
    """Identify a teacher's weights by object identity; None for the base model's own weights."""
    if teacher is None or (teacher.delta is None and teacher.model is None):
        return None
    return (id(teacher.delta), id(teacher.model))
