"""Examples (one prompt and one completion), and reading and writing them.

1. `load_examples` reads files, lists of rows, data frames and data sets; `iter_examples` does the
   same row by row.
2. A row is an `Example` or a mapping in one of the formats in `_LAYOUTS`.
3. `with_ids` tokenizes completions. Ids that this library generated are never computed again,
   because decoding and tokenizing does not always give the same ids back.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from divergence_lens._utils.storage import write_text
from divergence_lens._utils.validation import token_ids
from divergence_lens.chat import (
    Conversation,
    Prompt,
    as_list,
    as_prompt,
    check_text,
    encode_answers,
    raw_ids,
    read_turns,
    split_conversation,
)

_LINES = (".jsonl", ".ndjson")
# The first layout whose keys all have a value is read: texts before whole conversations, rows with
# a completion before rows without.
_LAYOUTS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "completion"),
    ("question", "response"),
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("prompt",),
    ("question",),
    ("instruction",),
)
# Read beside those of a layout.
_FURTHER = ("completion_ids", "teacher", "removed_mass", "thinking", "input", "system", "history")


@dataclass(frozen=True, repr=False)
class Example:
    """One prompt and one completion.

    Attributes:
        prompt: The user's text, without a system prompt, which belongs to the teacher. For a
            conversation of more turns, a `Conversation` or a list of messages
            (`{"role": ..., "content": ...}`), everything before the answer. For a model without a
            tokenizer, the token ids of the whole prompt.
        completion: The assistant's text.
        completion_ids: The completion's token ids. The last one is the token that ended the turn,
            unless the completion was cut off: a model may have more than one such token.
        teacher: The name of the teacher that wrote it.
        removed_mass: If it was generated with a pattern, the mean probability, over its tokens,
            of the tokens that the pattern did not allow.

    Raises:
        ValueError: The prompt is an invalid conversation, or an id is out of range.
        TypeError: The prompt is neither text nor messages, or an id is not a whole number.
    """

    prompt: Prompt
    completion: str | None = None
    completion_ids: tuple[int, ...] | None = None
    teacher: str | None = None
    removed_mass: float | None = None

    def __post_init__(self) -> None:
        encoded = raw_ids(self.prompt)
        if encoded is not None:
            object.__setattr__(self, "prompt", encoded)
        elif not isinstance(self.prompt, str):
            object.__setattr__(self, "prompt", as_prompt(self.prompt, "the example's prompt"))
        if self.completion_ids is not None:
            ids = token_ids(self.completion_ids, "the example's completion_ids")
            object.__setattr__(self, "completion_ids", tuple(ids.tolist()))

    def __repr__(self) -> str:
        """The beginnings of its texts, how many ids there are, and who wrote it."""
        texts = (str(self.prompt), self.completion)
        shown = [text if text is None or len(text) <= 60 else text[:59] + "…" for text in texts]
        ids = "" if self.completion_ids is None else f", {len(self.completion_ids)} ids"
        by = "" if self.teacher is None else f", teacher={self.teacher!r}"
        return f"Example({shown[0]!r}, {shown[1]!r}{ids}{by})"


def load_examples(source: Any) -> list[Example]:
    """Read prompts and completions from a file or from data in memory.

    A row is an `Example` or a mapping with the keys of one of these formats:

    - `prompt` (or `question`) and `completion` (or `response`): text, or lists of messages as in
      TRL. The completion may be absent.
    - `messages` (OpenAI, TRL) or `conversations` (ShareGPT): a whole conversation. The last turn
      is the completion if the assistant wrote it, and the turns before it are the prompt.
    - `instruction`, `output` and optionally `input` (Alpaca): an input follows the instruction
      after an empty line.

    With each of them, a text under `system` is the system turn.

    A row may also be a list, array or tensor of token ids: its first id is the prompt, and the
    others are the completion. So a tensor `[rows, pos]` is data as well.

    The content of a message is text or a list of text parts. `completion_ids` and `teacher` are
    read, too; other keys are ignored.

    Args:
        source: The path of a `.jsonl` or `.parquet` file; or a list or another iterable of rows, a
            pandas `DataFrame`, or a `datasets.Dataset`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A damaged file; a row in none of the formats, or with a turn that is not text.
            The message names the line (JSONL, from 1) or the row (from 0).
        TypeError: Data, a row, or a value of another kind.
    """
    return list(iter_examples(source))


def iter_examples(source: Any) -> Iterator[Example]:
    """Read examples one by one, for data too large to hold in memory.

    Files are read line by line or batch by batch, and a `datasets.IterableDataset` as it comes.
    Take a few thousand at a time: `part = list(itertools.islice(rows, 10_000))`.

    Args:
        source: See `load_examples`.

    Returns:
        The examples, in order.

    Raises:
        ValueError: See `load_examples`; errors in a row are raised when it is reached.
    """
    if isinstance(source, str | os.PathLike):
        return _read(Path(source))
    if isinstance(source, Example):
        raise TypeError("one Example was given where a list of them is expected: [example]")
    if isinstance(source, Mapping):
        hint = f"pick one of its splits: {', '.join(map(str, source))}" if source else "it is empty"
        raise TypeError(
            f"the data is a {type(source).__name__}, not a list of rows; pass [row] for a single "
            f"row, and of a DatasetDict one split ({hint})."
        )
    if hasattr(source, "itertuples"):  # a pandas DataFrame, which iterates over its columns
        names = list(source.columns)
        values = source.itertuples(index=False, name=None)
        source = (dict(zip(names, row, strict=True)) for row in values)
    if not isinstance(source, Iterable):
        raise TypeError(
            f"cannot read examples from {type(source).__name__}; pass a list of rows, a pandas "
            "DataFrame, a datasets.Dataset or the path of a .jsonl or .parquet file."
        )
    return (as_example(row, f"row {number}") for number, row in enumerate(source))


def with_ids(
    tokenizer: PreTrainedTokenizerBase | None, examples: Sequence[Example]
) -> list[Example]:
    """Add `completion_ids` where they are missing.

    Text is tokenized as the chat template writes it after the prompt, and closed by the
    end-of-turn token. If the completion has a think block that the template writes only where it
    asks for one, the prompt becomes a `Conversation` with `thinking=True`. Ids that an example
    has are not computed again.

    Raises:
        ValueError: An example with neither completion nor ids (named by its row), or a text that
            cannot be tokenized (see `encode_completion`).
    """
    filled = list(examples)
    missing = [i for i, example in enumerate(filled) if example.completion_ids is None]
    if not missing:
        return filled
    texts: list[str] = []
    for i in missing:
        completion = filled[i].completion
        if completion is None:
            raise ValueError(
                f"row {i} has no completion: {str(filled[i].prompt)[:60]!r}; give it one, or write "
                "it with generate()."
            )
        check_text(completion, f"row {i}: 'completion'")
        texts.append(completion)
    encoded = encode_answers(tokenizer, [filled[i].prompt for i in missing], texts, rows=missing)
    for i, (prompt, ids) in zip(missing, encoded, strict=True):
        filled[i] = replace(filled[i], prompt=prompt, completion_ids=ids)
    return filled


def save_examples(path: str | os.PathLike[str], examples: Iterable[Example]) -> None:
    """Write examples to a JSONL file, one row each and absent values left out.

    A conversation is written as its list of messages. The file appears under its name only once
    it is complete.
    """
    rows = []
    for number, example in enumerate(examples):
        row = example_row(example)
        as_example(row, f"row {number}")  # refuse to write a row that could not be read again
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(rows))


def example_row(example: Example) -> dict[str, Any]:
    """Convert an example to values that `json.dumps` takes, absent ones left out.

    `as_example` reads the result.
    """
    row: dict[str, Any] = {}
    for key, value in vars(example).items():
        if isinstance(value, Conversation):
            row[key] = value.messages()
            if value.thinking:
                row["thinking"] = True
        elif value is not None:
            row[key] = list(value) if isinstance(value, tuple) else value
    return row


def _read(path: Path) -> Iterator[Example]:
    suffix = path.suffix.lower()
    if suffix not in (*_LINES, ".parquet"):
        raise ValueError(f"cannot read {path}: a file of examples ends in .jsonl or .parquet.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    rows = json_lines(path) if suffix in _LINES else _parquet(path)
    return (as_example(row, where) for row, where in rows)


def json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield the rows of a JSONL file, each with its path and line number for messages.

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
    known = {*_FURTHER, *(key for layout in _LAYOUTS for key in layout)}
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in known]
            for batch in file.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    yield row, f"{path}, row {number}"
                    number += 1
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not a whole Parquet file: {error}") from error


def as_example(row: Any, where: str) -> Example:
    """Convert one row to an example; errors begin with `where`."""
    if isinstance(row, Example):
        return row
    if not isinstance(row, Mapping):
        listed = as_list(row)
        if isinstance(listed, Sequence) and not isinstance(listed, str | bytes) and len(listed) > 1:
            whole = tuple(token_ids(listed, where).tolist())
            return Example(whole[:1], completion_ids=whole[1:])
        raise TypeError(
            f"{where} is a {type(row).__name__}; a row is an Example or a mapping with the keys "
            "prompt and completion (or messages), or a list of at least two token ids."
        )
    given = {key: value for key, value in row.items() if not _missing(value)}
    prompt: str | Conversation | tuple[int, ...]
    encoded = raw_ids(given.get("prompt"))
    if encoded is not None:
        prompt, completion = encoded, given.get("completion")
    else:
        prompt, completion = _texts(row, given, where)
    # Data sets may have texts under this name.
    if given.get("thinking") is True and not isinstance(prompt, tuple):
        turns = prompt if isinstance(prompt, str) else prompt.turns
        prompt = as_prompt(turns, where, thinking=True)
    teacher = given.get("teacher")
    if teacher is not None:
        check_text(teacher, f"{where}: 'teacher'")
    completion_ids = given.get("completion_ids")
    if completion_ids is not None:
        completion_ids = tuple(token_ids(completion_ids, f"{where}: 'completion_ids'").tolist())
    removed = given.get("removed_mass")
    return Example(
        prompt, completion, completion_ids, teacher, None if removed is None else float(removed)
    )


def _texts(
    row: Mapping[Any, Any], given: Mapping[Any, Any], where: str
) -> tuple[str | Conversation, str | None]:
    """Return the prompt and the completion of a row, which has the values `given`."""
    layout = next((keys for keys in _LAYOUTS if all(key in given for key in keys)), None)
    if layout is None:
        for key in ("prompt", "question"):
            if key in row:
                raise TypeError(f"{where}: {key!r} is {row[key]!r}, not text")
        keys = ", ".join(map(repr, list(row)[:10])) or "none"
        raise ValueError(
            f"{where} has no prompt; its keys are {keys}. Rename them to prompt and completion "
            "(question and response, instruction and output), or give messages."
        )
    prompt_key, completion_key = layout[0], layout[-1]
    prompt: str | Conversation
    completion: str | None = None
    if prompt_key in ("messages", "conversations"):
        prompt, completion = split_conversation(given[prompt_key], f"{where}: {prompt_key!r}")
    elif prompt_key == "instruction":
        prompt = _instruction(given, where)
    else:
        prompt = as_prompt(given[prompt_key], f"{where}: {prompt_key!r}")
    if given.get("system"):
        prompt = _with_system(prompt, given["system"], where)
    if completion_key != prompt_key:
        completion = _completion(given[completion_key], f"{where}: {completion_key!r}")
    return prompt, completion


def _with_system(prompt: str | Conversation, system: Any, where: str) -> Conversation:
    """Put the system prompt of a row, which has a key of its own, before its prompt."""
    check_text(system, f"{where}: 'system'")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt.messages()
    if turns[0]["role"] == "system":
        raise ValueError(f"{where} has a 'system' and a system turn; leave one of them out")
    whole = as_prompt([{"role": "system", "content": system}, *turns], where)
    assert isinstance(whole, Conversation)
    return whole


def _instruction(given: Mapping[Any, Any], where: str) -> str:
    """Build the text of the prompt of a row in Alpaca's format."""
    if len(as_list(given.get("history", ()))):
        raise ValueError(
            f"{where} has a 'history' of earlier turns; write the whole conversation as messages"
        )
    texts = {key: given.get(key) or "" for key in ("instruction", "input")}
    for key, value in texts.items():
        check_text(value, f"{where}: {key!r}")
    return "\n\n".join(text for text in texts.values() if text)


def _completion(value: Any, where: str) -> str:
    """Return the text of a completion: text, or a list of one message of the assistant."""
    if not isinstance(value, str):
        turns = read_turns(value, where)
        roles = [turn.role for turn in turns]
        if roles != ["assistant"]:
            raise ValueError(
                f"{where} has the turns {', '.join(roles)}; a completion is one turn of "
                "'assistant': put earlier turns into the prompt, or give all of them as messages"
            )
        return turns[0].content
    check_text(value, where)
    return value


def _missing(value: Any) -> bool:
    """Whether a value stands for none: None, NaN of a data frame, or pandas' own NA."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or type(value).__name__ == "NAType"
    )
