"""Examples (one prompt and one completion), and reading and writing them.

Data comes as `Example`s, as dictionaries, as a `datasets.Dataset` or as a file. The completion may
be text, or token ids where this library generated it: generated ids are never tokenized again,
because decoding and tokenizing does not always give the same ids back.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from divergence_lens._utils.storage import write_text
from divergence_lens.chat import encode_completions

_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True, repr=False)
class Example:
    """One prompt and one completion.

    Attributes:
        prompt: The user's text, without a system prompt: that belongs to the teacher.
        completion: The assistant's text.
        completion_ids: The completion's token ids, with the end-of-turn token if it was written.
        teacher: The name of the teacher that wrote it.
    """

    prompt: str
    completion: str | None = None
    completion_ids: tuple[int, ...] | None = None
    teacher: str | None = None

    def __repr__(self) -> str:
        """The beginnings of its texts, how many ids there are, and who wrote it."""
        texts = (self.prompt, self.completion)
        shown = [text if text is None or len(text) <= 60 else text[:59] + "…" for text in texts]
        ids = "" if self.completion_ids is None else f", {len(self.completion_ids)} ids"
        by = "" if self.teacher is None else f", teacher={self.teacher!r}"
        return f"Example({shown[0]!r}, {shown[1]!r}{ids}{by})"


def as_examples(data: Any) -> list[Example]:
    """Examples from whatever holds prompts and completions.

    A row is an `Example` or a mapping. Its keys are ``prompt`` and ``completion``, or ``question``
    and ``response``; the values are text, or lists of one chat turn as TRL has them
    (``[{"role": "user", "content": ...}]``). ``completion_ids`` and ``teacher`` are kept, other
    keys are not. The completion may be absent.

    Args:
        data: A list or another iterable of rows, a `datasets.Dataset`, or the path of a ``.jsonl``
            or ``.parquet`` file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A row without a prompt, or with turns that are not one prompt and one answer; a
            line that is not JSON. Rows count from 0, lines from 1.
        TypeError: Data, a row, or a value of another kind.
    """
    if isinstance(data, str | os.PathLike):
        return list(_read(Path(data)))
    if isinstance(data, Example):
        raise TypeError("one Example was given where a list of them is expected: [example]")
    if isinstance(data, Mapping):
        hint = f"pick one of its splits: {', '.join(map(str, data))}" if data else "it is empty"
        raise TypeError(
            f"the data is a {type(data).__name__}, not a list of rows; pass [row] for a single "
            f"row, and of a DatasetDict one split ({hint})."
        )
    if not isinstance(data, Iterable):
        raise TypeError(
            f"cannot read examples from {type(data).__name__}; pass a list of rows, a "
            "datasets.Dataset or the path of a .jsonl or .parquet file."
        )
    return list(_rows(data))


def iter_examples(data: Any) -> Iterator[Example]:
    """Examples one by one, for data that are too many to hold at once.

    Files are read line by line or batch by batch, and a `datasets.IterableDataset` as it comes.
    Take a few thousand at a time: `part = list(itertools.islice(rows, 10_000))`.

    Args:
        data: What `as_examples` takes.

    Yields:
        The examples, in order.

    Raises:
        ValueError: As `as_examples` says, when the row is reached; so do its other errors.
    """
    if isinstance(data, str | os.PathLike):
        yield from _read(Path(data))
    elif isinstance(data, Example | Mapping) or not isinstance(data, Iterable):
        as_examples(data)  # which says what is wrong
    else:
        yield from _rows(data)


def _rows(data: Iterable[Any]) -> Iterator[Example]:
    return (as_example(row, f"row {number}") for number, row in enumerate(data))


def with_ids(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Example]:
    """The examples, each with `completion_ids`.

    Text is tokenized as the chat template has it, and closed by the end-of-turn token; ids that
    an example has are kept as they are.

    Raises:
        ValueError: An example with neither completion nor ids (named by its number), or a text
            that cannot be tokenized (see `encode_completion`).
    """
    filled = list(examples)
    missing = [i for i, example in enumerate(filled) if example.completion_ids is None]
    texts: list[str] = []
    for i in missing:
        completion = filled[i].completion
        if completion is None:
            raise ValueError(
                f"row {i} has no completion: {filled[i].prompt[:60]!r}; give it one, or write it "
                "with generate()."
            )
        _check_text(completion, f"row {i}", "completion")
        texts.append(completion)
    for i, ids in zip(missing, encode_completions(tokenizer, texts), strict=True):
        filled[i] = replace(filled[i], completion_ids=ids)
    return filled


def save_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write examples to a JSONL file, one row each and absent values left out.

    The file appears under its name only once it is complete.
    """
    rows = []
    for number, example in enumerate(examples):
        row = {key: value for key, value in vars(example).items() if value is not None}
        # What could not be read again is not written either.
        checked = as_example(row, f"row {number}")
        if checked.completion_ids is not None:
            row["completion_ids"] = checked.completion_ids
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(rows))


def load_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Read a file of examples: JSONL, as `save_examples` writes it, or Parquet.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A damaged file or row; the message names the line (JSONL, from 1) or the row.
        TypeError: A row, or a value in it, of another kind.
    """
    return list(_read(Path(path)))


def _read(path: Path) -> Iterator[Example]:
    suffix = path.suffix.lower()
    if suffix not in (*_LINES, ".parquet"):
        raise ValueError(f"cannot read {path}: a file of examples ends in .jsonl or .parquet.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    rows = json_lines(path) if suffix in _LINES else _parquet(path)
    return (as_example(row, where) for row, where in rows)


def json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    """The rows of a JSONL file, each with the words for where it stands.

    Raises:
        ValueError: A line that is not JSON, or not text.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                # Bytes that are not text are a UnicodeDecodeError, which is a ValueError, too.
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: not JSON ({error}).") from error
            yield row, where


def _parquet(path: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            known = ("prompt", "completion", "question", "response", "completion_ids", "teacher")
            columns = [name for name in known if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    yield row, f"{path}, row {number}"
                    number += 1
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not a whole Parquet file: {error}") from error


def as_example(row: Any, where: str) -> Example:
    """The example of one row; errors begin with `where`."""
    if isinstance(row, Example):
        return row
    if not isinstance(row, Mapping):
        raise TypeError(
            f"{where} is a {type(row).__name__}; a row is an Example or a mapping with the keys "
            "prompt and completion (or question and response)."
        )
    asked, answered = ("prompt", "completion") if "prompt" in row else ("question", "response")
    if asked not in row:
        keys = ", ".join(map(repr, list(row)[:10])) or "none"
        raise ValueError(
            f"{where} has neither a prompt nor a question; its keys are {keys}. Rename them to "
            "prompt and completion (or question and response)."
        )
    completion = row.get(answered)
    teacher = row.get("teacher")
    if teacher is not None:
        _check_text(teacher, where, "teacher")
    return Example(
        prompt=_content(row[asked], "user", where, asked),
        completion=(
            None if completion is None else _content(completion, "assistant", where, answered)
        ),
        completion_ids=_ids(row.get("completion_ids"), where),
        teacher=teacher,
    )


def _content(value: Any, role: str, where: str, key: str) -> str:
    """The text of a value that is text or a list of one turn."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        if not all(isinstance(turn, Mapping) and "content" in turn for turn in value):
            raise ValueError(
                f'{where}: {key!r} is a list, but not of turns {{"role": ..., "content": ...}}.'
            )
        roles = [turn.get("role") for turn in value]
        if roles != [role]:
            system = "; a system prompt belongs to the Teacher" if "system" in roles else ""
            raise ValueError(
                f"{where}: {key!r} has the turns {', '.join(map(repr, roles)) or 'none'}, where "
                f"one turn of {role!r} is expected{system}."
            )
        value = value[0]["content"]
    _check_text(value, where, key)
    return str(value)


def _check_text(value: Any, where: str, key: str) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{where}: {key!r} is {value!r:.60}, not text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {key!r} holds half a character (a lone surrogate) at place {error.start}."
        ) from error


def _ids(value: Any, where: str) -> tuple[int, ...] | None:
    if value is None:
        return None
    # NumPy's and Arrow's integers are no int, but can stand for one.
    whole = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    ids = list(value) if whole else []
    if not whole or not all(hasattr(i, "__index__") and not isinstance(i, bool) for i in ids):
        raise TypeError(f"{where}: 'completion_ids' is {value!r:.60}, not a list of token ids.")
    if any(i < 0 for i in ids):
        raise ValueError(f"{where}: 'completion_ids' holds the negative id {min(ids)}.")
    return tuple(int(i) for i in ids)
