"""Conversations: turns of text, read from the message formats that data sets use.

OpenAI and TRL write `{"role": ..., "content": ...}`, where the content is text or a list of parts.
ShareGPT writes `{"from": ..., "value": ...}`. A prompt of one user turn is a plain string.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from divergence_lens._utils.validation import token_ids

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# Keys of a message that change what a template writes, beside role and content.
_UNSUPPORTED = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "reasoning_content",
    "thinking",
    "images",
    "audio",
)


class Turn(NamedTuple):
    """One message of a conversation: who speaks, and the text."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """A prompt of more than one user turn: everything before the answer.

    Attributes:
        turns: The turns in order, a system turn first if there is one.
        thinking: Whether the answer may begin with a think block. Templates of models that can
            think open the answer in another way then (`enable_thinking`).

    Raises:
        ValueError: There is no turn besides the system turn, or the last turn is the assistant's.
    """

    turns: tuple[Turn, ...]
    thinking: bool = False

    def __post_init__(self) -> None:
        if not self.dialog:
            raise ValueError("the conversation has no turn besides the system turn; add a prompt")
        if self.turns[-1].role == "assistant":
            raise ValueError(
                "the conversation ends with a turn of 'assistant', so no answer follows; leave "
                "that turn out of the prompt"
            )

    @property
    def system(self) -> str | None:
        """The text of the system turn at the beginning, if there is one."""
        return self.turns[0].content if self.turns and self.turns[0].role == "system" else None

    @property
    def dialog(self) -> tuple[Turn, ...]:
        """The turns without the system turn at the beginning."""
        return self.turns if self.system is None else self.turns[1:]

    def messages(self) -> list[dict[str, str]]:
        """The turns in the format of OpenAI, for JSON and for chat templates."""
        return [turn._asdict() for turn in self.turns]

    def __str__(self) -> str:
        """The turns with their roles, for people to read."""
        return "\n".join(f"{role}: {content}" for role, content in self.turns)


Prompt: TypeAlias = str | Conversation | Sequence[Mapping[str, Any]] | Sequence[int]
"""A user's text, the conversation before the answer (as such or as a list of messages), or the ids
of the whole prompt, for models without a tokenizer."""


def raw_ids(value: Any) -> tuple[int, ...] | None:
    """Return the ids of a prompt that begins with a token id, or None for any other prompt.

    Raises:
        TypeError: One of the others is not a whole number.
        ValueError: An id is out of range.
    """
    value = as_list(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return None
    if isinstance(value[0], bool) or not hasattr(value[0], "__index__"):
        return None
    return tuple(token_ids(value, "the prompt").tolist())


def as_prompt(value: Any, where: str, *, thinking: bool = False) -> str | Conversation:
    """Convert text or a list of messages to a prompt; errors begin with `where`.

    One user turn becomes plain text.

    Raises:
        ValueError: Half a character in the text, an invalid turn, or no user turn.
        TypeError: The value is neither text nor a list of messages.
    """
    if isinstance(value, Conversation):
        return value
    if isinstance(value, str) and not thinking:
        check_text(value, where)
        return value
    turns = (Turn("user", value),) if isinstance(value, str) else read_turns(value, where)
    if [turn.role for turn in turns] == ["user"] and not thinking:
        return turns[0].content
    try:
        return Conversation(turns, thinking)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def split_conversation(value: Any, where: str) -> tuple[str | Conversation, str | None]:
    """Split a whole conversation into its prompt and its completion.

    Returns:
        The turns before the last one, and the text of the last one if the assistant wrote it. A
        conversation that ends with another role has no completion yet.

    Raises:
        ValueError: An invalid turn, or no turn before the assistant's.
        TypeError: The value is no list of messages.
    """
    turns = read_turns(value, where)
    if turns[-1].role != "assistant":
        return as_prompt(turns, where), None
    if len(turns) == 1:
        raise ValueError(f"{where}: there is no turn before the assistant's; add a prompt")
    return as_prompt(turns[:-1], where), turns[-1].content


def read_turns(value: Any, where: str) -> tuple[Turn, ...]:
    """Convert a list of messages to turns; errors begin with `where` and number the turns from 0.

    Raises:
        ValueError: No turns; a message without role or content; content that is not text; a
            message with tool calls or other fields that the templates would need.
        TypeError: The value is no list of messages.
    """
    value = as_list(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{where} is {value!r:.60}, neither text nor a list of messages")
    if not value:
        raise ValueError(f"{where} has no turns; give at least one message")
    return tuple(_turn(message, f"{where}, turn {i}") for i, message in enumerate(value))


def as_list(value: Any) -> Any:
    """Convert an array, such as pandas reads from Parquet, to a list; leave other values."""
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, str) else value


def _turn(message: Any, where: str) -> Turn:
    if isinstance(message, Turn):
        check_text(message.role, where)
        check_text(message.content, where)
        return message
    if not isinstance(message, Mapping):
        raise ValueError(  # noqa: TRY004 - the list is of the right type, its entry is not
            f'{where} is {message!r:.60}, not a message {{"role": ..., "content": ...}}'
        )
    if "role" not in message and "from" in message:
        name, content = message["from"], message.get("value")
        role = _SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name
    else:
        role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        keys = ", ".join(map(repr, message)) or "none"
        raise ValueError(f"{where} has no role; its keys are {keys}")
    for key in _UNSUPPORTED:
        # An empty list or None is what a data set writes into the rows that have none.
        if _given(message.get(key)):
            raise ValueError(
                f"{where} ({role}) has {key!r}, which is not supported: only a turn's content is "
                "read (which may hold a think block); leave such rows out"
            )
    text = _text(content, f"{where} ({role})")
    check_text(text, f"{where} ({role})")
    return Turn(role, text)


def _given(value: Any) -> bool:
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def _text(content: Any, where: str) -> str:
    """Return the text of a message's content, joining the parts of a list."""
    content = as_list(content)
    if content is None:
        raise ValueError(f"{where} has no content; leave the turn out or give it text")
    if isinstance(content, str):
        return content
    if not isinstance(content, Iterable) or isinstance(content, Mapping):
        raise TypeError(f"{where}: the content is {content!r:.60}, not text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}: the content has a part of type {kind!r}; only text parts, "
                '{"type": "text", "text": ...}, are supported'
            )
        texts.append(part["text"])
    return "".join(texts)


def check_text(value: Any, where: str) -> None:
    """Refuse a value that is not text, or text that no tokenizer can encode.

    Raises:
        TypeError: The value is not a string.
        ValueError: The string holds a lone surrogate.
    """
    if not isinstance(value, str):
        raise TypeError(f"{where} is {value!r:.60}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds half a character (a lone surrogate) at position {error.start}: "
            f"{value[:60]!r}"
        ) from error
