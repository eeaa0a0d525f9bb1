"""Files of divergences: safetensors for all readings, JSONL in the layout of the paper's code."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from divergence_lens._utils.storage import load_tensors, save_tensors, write_text
from divergence_lens.chat import after_turn, stop_ids
from divergence_lens.examples import Example, as_example, example_row, json_lines, with_ids
from divergence_lens.teachers import Teacher

_KIND = "divergence"
_ARRAYS = ("offsets", "tokens", "predicted", "margin", "logprob")
_OPTIONAL = ("kl", "selected")


def save_divergence(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write the fields of a `Divergence`, without the teachers' weights and the tokenizer."""
    examples: Sequence[Example] = fields["examples"]
    # Prompts of a large data set would exceed a safetensors header, so they are stored as bytes.
    rows = [
        example_row(replace(example, completion_ids=None))  # the ids are in `tokens`
        for example in examples
    ]
    text = np.frombuffer(json.dumps(rows).encode(), dtype=np.uint8)
    teachers = (fields["teacher"], *fields["counterfactuals"])
    header = {
        "teachers": [_teacher_header(teacher) for teacher in teachers],
        "rule": fields["rule"],
        "require_agreement": fields["require_agreement"],
        "min_margin": fields["min_margin"],
        "texts": {str(token_id): text for token_id, text in fields["texts"].items()},
        "special": sorted(fields["special"]),
        "metadata": dict(fields["metadata"]),
    }
    arrays = {name: fields[name] for name in _ARRAYS}
    arrays |= {name: fields[name] for name in _OPTIONAL if fields[name] is not None}
    save_tensors(path, {**arrays, "examples": text}, header, _KIND)


def load_divergence(path: str | os.PathLike[str], teachers: Sequence[Teacher]) -> dict[str, Any]:
    """Read the fields that `save_divergence` wrote; the given teachers replace saved ones by name.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, of another kind or version, or a teacher does not fit.
    """
    tensors, header = load_tensors(path, _KIND)
    arrays = {name: tensors[name].numpy() for name in (*_ARRAYS, *_OPTIONAL) if name in tensors}
    restored, detached = _restore_teachers(path, header["teachers"], teachers)
    offsets, tokens = arrays["offsets"], arrays["tokens"]
    rows = json.loads(tensors["examples"].numpy().tobytes())
    examples = [as_example(row, f"{path}, example {i}") for i, row in enumerate(rows)]
    return {
        **arrays,
        "examples": tuple(
            replace(example, completion_ids=tuple(tokens[offsets[i] : offsets[i + 1]].tolist()))
            for i, example in enumerate(examples)
        ),
        "teacher": restored[0],
        "counterfactuals": tuple(restored[1:]),
        "rule": header["rule"],
        "require_agreement": header["require_agreement"],
        "min_margin": header["min_margin"],
        "texts": {int(token_id): text for token_id, text in header["texts"].items()},
        "special": frozenset(header["special"]),
        "metadata": header["metadata"],
        "detached": frozenset(detached),
    }


def write_decision_points(
    path: str | os.PathLike[str],
    examples: Sequence[Example],
    offsets: Int64[np.ndarray, " boundaries"],
    mask: Bool[np.ndarray, " tokens"],
) -> None:
    """Write one JSON object per example, with the positions of the mask as decision points."""
    lines = []
    for index, example in enumerate(examples):
        marked = mask[offsets[index] : offsets[index + 1]]
        row = example_row(replace(example, completion_ids=None, teacher=None))
        row.setdefault("completion", None)
        row["decision_points"] = np.flatnonzero(marked).tolist()
        row["completion_ids"] = list(example.completion_ids or ())
        lines.append(json.dumps(row, ensure_ascii=False))
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_decision_points(
    path: str | os.PathLike[str], tokenizer: Any
) -> tuple[list[Example], Bool[np.ndarray, " tokens"]]:
    """Read examples with token ids, and the mask given by their decision points.

    The paper's code also counts the tokens that the template writes after the end of the turn. A
    decision point there is dropped, because it is not a token of the completion.

    Args:
        path: A file with `prompt`, `completion` and `decision_points` on each line, and
            `completion_ids` where known; `Divergence.to_jsonl` writes it.
        tokenizer: Tokenizes completions without ids.

    Returns:
        The examples with their ids, and the mask over all their completion tokens.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line is not JSON, lacks a key, or has a position outside its completion; the
            message names the line.
    """
    rows = [(where, *_read_row(row, where)) for row, where in json_lines(Path(path))]
    if not rows:
        raise ValueError(f"{path} holds no examples")
    examples = with_ids(tokenizer, [example for _, example, _ in rows])
    masks = []
    end, n_after = stop_ids(tokenizer), len(after_turn(tokenizer))
    for example, (where, _, points) in zip(examples, rows, strict=True):
        length = len(example.completion_ids or ())
        # Ids of a completion that was cut off have no end of turn, but the paper's code tokenizes
        # its text with one.
        cut_off = 0 if (example.completion_ids or (None,))[-1] in end else 1
        outside = [point for point in points if not 0 <= point < length + cut_off + n_after]
        if outside:
            raise ValueError(
                f"{where}: decision point {outside[0]} lies outside the completion of {length} "
                "tokens; check that this is the tokenizer that the file was written with"
            )
        mask = np.zeros(length, dtype=bool)
        mask[[point for point in points if point < length]] = True
        masks.append(mask)
    return examples, np.concatenate(masks)


def _read_row(row: Any, where: str) -> tuple[Example, list[int]]:
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object, got {type(row).__name__}")  # noqa: TRY004
    missing = [key for key in ("prompt", "completion", "decision_points") if key not in row]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    points = row["decision_points"]
    if not isinstance(points, list) or not all(type(item) is int for item in points):
        raise ValueError(
            f"{where}: decision_points must be a list of whole numbers, got {points!r}"
        )
    return as_example(row, where), points


def _teacher_header(teacher: Teacher) -> dict[str, Any]:
    weights = [
        name
        for name, value in (("delta", teacher.delta), ("model", teacher.model))
        if value is not None
    ]
    return {"name": teacher.name, "system_prompt": teacher.system_prompt, "weights": weights}


def _restore_teachers(
    path: str | os.PathLike[str], saved: list[dict[str, Any]], teachers: Sequence[Teacher]
) -> tuple[list[Teacher], set[str]]:
    """Return the saved teachers, replaced by given ones, and the names of those without weights."""
    given = {teacher.name: teacher for teacher in teachers}
    restored, detached = [], set()
    for header in saved:
        name = header["name"]
        teacher = given.pop(name, None)
        if teacher is None:
            teacher = Teacher(name, system_prompt=header["system_prompt"])
            if header["weights"]:
                detached.add(name)
        elif _teacher_header(teacher) != header:
            raise ValueError(
                f"the given teacher {name!r} ({_teacher_header(teacher)}) is not the one that "
                f"{path} was written with ({header})"
            )
        restored.append(teacher)
    if given:
        raise ValueError(
            f"{path} has no teacher named {', '.join(map(repr, given))}; it has "
            f"{', '.join(repr(header['name']) for header in saved)}"
        )
    return restored, detached
