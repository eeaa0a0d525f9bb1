"""Prompts as token ids through the chat template, with a segment label for every id.

The tokenizer's own template renders a prompt, and the result is tokenized once, so its ids are
those of `tokenizer.apply_chat_template(..., add_generation_prompt=True)`. `locating` finds the
system prompt and the other texts in the rendering.

The template is asked not to think (`enable_thinking=False`) unless the prompt is a `Conversation`
with `thinking=True`. A template that writes today's date (Llama 3 does) gives other ids tomorrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from divergence_lens.chat.conversations import (
    Conversation,
    Prompt,
    Turn,
    as_prompt,
    check_text,
    raw_ids,
)
from divergence_lens.chat.locating import (
    Span,
    locate,
    locate_rewritten,
    segment_labels,
    unused_characters,
)
from divergence_lens.chat.rendering import (
    apply_template,
    check_fast,
    chunks,
    render,
    tokenize,
    tokenizer_name,
)

SEGMENTS = ("system", "user", "assistant", "template", "completion")
"""Labels of token positions; `encode_prompt` gives all but the last.

"assistant" is an earlier answer of a conversation. Tools and other roles are labeled "user".
"""

STAND_IN = "Hello"
"""A user's text while the template is examined; never tokenized."""

_FOLD = "\n\n"  # between system prompt and user text in one turn, as in Gemma's own templates


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids.

    Attributes:
        ids: Token ids.
        segments: One label of `SEGMENTS` per id. A token that holds text of both the template and
            a content has the content's label, so the ids labeled "template" never depend on the
            contents.
    """

    ids: tuple[int, ...]
    segments: tuple[str, ...]

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.ids)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt, *, system_prompt: str | None = None
) -> Encoded:
    """Encode a prompt up to where the assistant's answer begins.

    With a chat template the ids are the template's, generation prompt included. Where the template
    has no system role (it raises, or leaves the text out), the system prompt is put before the
    first user's text in its turn, with an empty line between. Without a template the ids are those
    of the plain text, after the tokenizer's beginning-of-sequence token if it adds one.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        prompt: The user's text, or a conversation: a `Conversation` or a list of messages. Token
            ids are returned as they are.
        system_prompt: The system prompt, which replaces the system turn of a conversation. None
            leaves that turn as it is, or gives no system message, where a template may write a
            default of its own (Qwen2.5 does; it is labeled "system"); "" gives an empty one.

    Raises:
        ValueError: A system prompt or a conversation for a tokenizer without a chat template; a
            template that refuses the conversation or leaves a turn out; a prompt without a token.
        TypeError: A tokenizer without offsets (not a fast one); a prompt of another type.
    """
    return encode_prompts(tokenizer, [prompt], system_prompt=system_prompt)[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    *,
    system_prompt: str | None = None,
) -> list[Encoded]:
    """Encode many prompts under one system prompt, faster than one by one (0.3 ms each).

    Errors name the number of the prompt, from 0. See `encode_prompt`.
    """
    if not isinstance(prompts, str) and any(map(raw_ids, prompts)):
        return _with_raw_ids(tokenizer, prompts, system_prompt)
    tokenizer = check_fast(tokenizer)
    if isinstance(prompts, str):
        raise TypeError(f"one prompt was given where a list is expected: {prompts[:60]!r}")
    checked = [as_prompt(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]
    if not tokenizer.chat_template:
        return _encode_plain(tokenizer, checked, system_prompt)
    templates = PromptTemplates(tokenizer, system_prompt)
    encoded: list[Encoded] = []
    for chunk in chunks(checked):
        rendered = [
            templates.render(prompt, number) for number, prompt in enumerate(chunk, len(encoded))
        ]
        for (_, spans), (ids, offsets) in zip(
            rendered, tokenize(tokenizer, [text for text, _ in rendered]), strict=True
        ):
            encoded.append(Encoded(ids, segment_labels(offsets, spans)))
    return encoded


def _with_raw_ids(
    tokenizer: Any, prompts: Sequence[Prompt], system_prompt: str | None
) -> list[Encoded]:
    """Encode prompts of which some are token ids, which are taken as they are."""
    given = [raw_ids(prompt) for prompt in prompts]
    if system_prompt is not None:
        number = next(i for i, ids in enumerate(given) if ids is not None)
        raise ValueError(
            f"prompt {number} is a row of token ids, to which no system prompt can be added; give "
            "the ids of the whole prompt, and teachers that differ in their weights"
        )
    texts = [prompt for prompt, ids in zip(prompts, given, strict=True) if ids is None]
    encoded = iter(encode_prompts(tokenizer, texts) if texts else ())
    return [next(encoded) if ids is None else Encoded(ids, ("user",) * len(ids)) for ids in given]


def check_length(
    encoded: Encoded | Sequence[int], n_ctx: int, *, new_tokens: int = 0, row: int | None = None
) -> None:
    """Refuse a prompt that does not fit into a model's context.

    Args:
        encoded: The prompt's tokens.
        n_ctx: The longest input of the model, in tokens.
        new_tokens: How many tokens must fit after it.
        row: The number of the prompt, for the message.

    Raises:
        ValueError: The prompt and the new tokens are longer than `n_ctx`.
    """
    if len(encoded) + new_tokens <= n_ctx:
        return
    which = "the prompt" if row is None else f"prompt {row}"
    new = f" and {new_tokens} more must follow" if new_tokens else ""
    raise ValueError(
        f"{which} has {len(encoded)} tokens{new}, but the model's context holds {n_ctx}; "
        "shorten it or use a model with a longer context."
    )


class PromptTemplates:
    """One `PromptTemplate` for each system prompt and thinking mode that the prompts need."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> None:
        if system_prompt is not None:
            check_text(system_prompt, "the system prompt")
        self._tokenizer, self._system_prompt = tokenizer, system_prompt
        self._templates: dict[tuple[str | None, bool], PromptTemplate] = {}

    @property
    def start(self) -> int:
        """The character at which the user's text begins in prompts without a system turn."""
        return self._template(self._system_prompt, thinking=False).start

    def render(self, prompt: str | Conversation, number: int) -> tuple[str, list[Span]]:
        """Render a prompt as `PromptTemplate.render` does; errors name its number."""
        dialog = (Turn("user", prompt),) if isinstance(prompt, str) else prompt.dialog
        try:
            return self.of(prompt).render(dialog)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error

    def of(self, prompt: str | Conversation) -> "PromptTemplate":
        """Return the template for a prompt, whose own system turn this system prompt replaces."""
        system = self._system_prompt
        if isinstance(prompt, str):
            return self._template(system, thinking=False)
        return self._template(prompt.system if system is None else system, thinking=prompt.thinking)

    def _template(self, system_prompt: str | None, *, thinking: bool) -> "PromptTemplate":
        key = (system_prompt, thinking)
        if key not in self._templates:
            self._templates[key] = PromptTemplate(self._tokenizer, system_prompt, thinking=thinking)
        return self._templates[key]


class PromptTemplate:
    """How a tokenizer's template renders prompts under one system prompt."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None,
        *,
        thinking: bool = False,
    ) -> None:
        self._tokenizer, self._thinking = tokenizer, thinking
        self._system = system_prompt
        self._fold = False
        self._default: tuple[str, str] | None = None
        if system_prompt is None:
            self._default = self._find_default()
        elif not self._takes_system():
            # An empty system message that the template cannot write is no message.
            self._fold = bool(system_prompt)
            self._system = system_prompt or None
        # Nearly every prompt is rendered as the stand-in, with nothing else changed. Then one
        # rendering shows where the prompt is, instead of the two or three of `_examine`.
        text, spans = self._examine((Turn("user", STAND_IN),))
        users = [span for span in spans if span.label == "user"]
        self._start, self._stop = users[0][:2]
        self.head, self.tail = text[: self._start], text[users[-1].stop :]
        self._spans = [span for span in spans if span.label != "user"]
        self._simple = len(users) == 1

    @property
    def start(self) -> int:
        """The character at which the user's text begins in nearly all prompts."""
        return self._start

    def render(self, dialog: Sequence[Turn]) -> tuple[str, list[Span]]:
        """Render turns after the system prompt, and return the text with its segments' spans.

        Raises:
            ValueError: The template refuses the turns, leaves one out or rewrites one.
        """
        if len(dialog) > 1 or dialog[0].role != "user" or not self._simple:
            return self._examine(dialog)
        text, prompt = self._write(dialog), dialog[0].content
        if text != self.head + prompt + self.tail:
            return self._examine(dialog)
        shift = len(prompt) - (self._stop - self._start)
        spans = [
            span
            if span.stop <= self._start
            else Span(span.start + shift, span.stop + shift, span.label)
            for span in self._spans
        ]
        return text, [*spans, Span(self._start, self._start + len(prompt), "user")]

    def _examine(self, dialog: Sequence[Turn]) -> tuple[str, list[Span]]:
        """Render turns, and again with marks around each of them."""
        text = self._write(dialog)
        spans = []
        for number in range(len(dialog)):
            spans += self._locate_turn(dialog, number, text)
        if self._system is not None:
            systems = locate(
                lambda marked: self._write(dialog, marked), self._system, text, "the system prompt"
            )
            spans += [Span(*span, "system") for span in systems]
        elif self._default is not None:
            head, default = self._default
            if text.startswith(head + default):
                spans.append(Span(len(head), len(head) + len(default), "system"))
        return text, spans

    def _locate_turn(self, dialog: Sequence[Turn], number: int, text: str) -> list[Span]:
        role, content = dialog[number]
        name = "the prompt" if len(dialog) == 1 else f"turn {number} ({role})"
        answer = role == "assistant"

        def write(content: str) -> str:
            return self._write([*dialog[:number], Turn(role, content), *dialog[number + 1 :]])

        try:
            places = locate(write, content, text, name)
        except ValueError:
            # Templates of thinking models drop the think blocks of earlier answers.
            places = locate_rewritten(write, text) if answer else []
            if not places:
                raise
        if content.strip() and not places:
            missing = "the user's text" if len(dialog) == 1 else f"the text of {name}"
            raise ValueError(
                f"the chat template of {tokenizer_name(self._tokenizer)} leaves {missing} out."
            )
        return [Span(*place, "assistant" if answer else "user") for place in places]

    def _write(self, dialog: Sequence[Turn], system: str | None = None) -> str:
        """Render turns with the generation prompt; `system` replaces the system prompt."""
        turns = self.turns(dialog, system)
        return render(self._tokenizer, turns, generation=True, thinking=self._thinking)

    def turns(self, dialog: Sequence[Turn], system: str | None = None) -> list[Turn]:
        """Put the system prompt before the turns, in a turn of its own or in the first one."""
        system = self._system if system is None else system
        if system is None:
            return list(dialog)
        if self._fold:
            first, *rest = dialog
            return [Turn(first.role, system + _FOLD + first.content), *rest]
        return [Turn("system", system), *dialog]

    def _takes_system(self) -> bool:
        """Whether the template writes a system message, instead of raising or leaving it out."""
        from jinja2 import TemplateError

        mark, _ = unused_characters(str(self._tokenizer.chat_template))
        try:
            text = apply_template(
                self._tokenizer,
                [Turn("system", mark), Turn("user", STAND_IN)],
                generation=True,
                thinking=self._thinking,
            )
        except TemplateError:
            return False
        return mark in text

    def _find_default(self) -> tuple[str, str] | None:
        """Return the template's own system prompt and the text before it, if it has one."""
        if not self._takes_system():
            return None
        mark, user = unused_characters(str(self._tokenizer.chat_template))
        dialog = [Turn("user", user)]
        given, absent = self._write(dialog, mark), self._write(dialog)
        if given.count(mark) != 1:
            return None
        head, tail = given.split(mark)
        default = absent[len(head) : len(absent) - len(tail)]
        fits = absent == head + default + tail and user in tail
        return (head, default) if fits and default else None


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Conversation],
    system_prompt: str | None,
) -> list[Encoded]:
    """Encode plain texts for a tokenizer without a chat template."""
    if system_prompt is not None:
        raise ValueError(
            f"{tokenizer_name(tokenizer)} has no chat template, so the system prompt "
            f"{system_prompt[:60]!r} has no place; put it into the prompts, or set "
            "tokenizer.chat_template."
        )
    texts: list[str] = []
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(  # noqa: TRY004 - the type is right for other tokenizers
                f"prompt {number} is a conversation, but {tokenizer_name(tokenizer)} has no chat "
                "template to write it; give plain text, or set tokenizer.chat_template."
            )
        texts.append(prompt)
    prefix = _opening(tokenizer)
    encoded: list[Encoded] = []
    for chunk in chunks(texts):
        for ids, _ in tokenize(tokenizer, chunk):
            text = ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids
            if not prefix and not text:
                raise ValueError(
                    f"prompt {len(encoded)} has no token, and {tokenizer_name(tokenizer)} adds "
                    "none at the beginning; give it some text."
                )
            labels = ("template",) * len(prefix) + ("user",) * len(text)
            encoded.append(Encoded(prefix + text, labels))
    return encoded


def _opening(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the special tokens that the tokenizer puts before a text."""
    encoding = tokenizer("a", return_special_tokens_mask=True)
    special = encoding["special_tokens_mask"]
    return tuple(encoding["input_ids"][: special.index(0)])
