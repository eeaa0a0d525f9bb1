"""Completions as token ids, as the chat template writes them after the prompt.

1. Render the conversation with its answer. The rendering must begin with that of the prompt, which
   ends with the generation prompt, so that prompt and completion together are the template's own
   conversation. Otherwise the completion is refused.
2. The rest is the answer, and what the template writes after it up to the end of the turn.
3. Tokenize it after the end of the prompt, and cut the ids where the answer begins.

A template that can think may open an answer in two ways. A completion with a think block follows
the prompt with `enable_thinking=True`, any other the prompt with `enable_thinking=False`; where
only one of them fits the template's conversation, it follows that one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from divergence_lens.chat.conversations import Conversation, Prompt, Turn, as_prompt
from divergence_lens.chat.locating import locate
from divergence_lens.chat.prompts import STAND_IN, PromptTemplate, PromptTemplates
from divergence_lens.chat.rendering import (
    check_fast,
    check_texts,
    chunks,
    render,
    tokenize,
    tokenizer_name,
)

# An answer while the template is examined; never tokenized.
_ANSWER = "Hi"
_DIALOG = (Turn("user", STAND_IN),)


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, completion: str, *, thinking: bool = False
) -> tuple[int, ...]:
    """Encode an assistant's answer as the template writes it, with the end of turn.

    The text is tokenized after the template's generation prompt and as the template writes it
    (trimmed, or with a space before it, if the template does that), so that the ids follow those
    of `encode_prompt`. The last id is `end_of_turn`; a line break that the template writes after
    it is no part of the completion. Without a template the text is tokenized as the continuation
    of a line, and the end-of-sequence token follows if the tokenizer has one.

    Where the tokenizer would merge the last token of the generation prompt with the first of the
    answer, the answer is tokenized by itself, because no model writes half a token.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        completion: The assistant's text.
        thinking: Whether the ids follow a prompt with `thinking=True`.

    Raises:
        ValueError: The template rewrites the text, or its conversation does not continue its
            generation prompt; the text cannot be tokenized.
        TypeError: A tokenizer without offsets (not a fast one).
    """
    return encode_completions(tokenizer, [completion], thinking=thinking)[0]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[str], *, thinking: bool = False
) -> list[tuple[int, ...]]:
    """Encode many completions, faster than one by one; errors name their number.

    See `encode_completion`.
    """
    check_fast(tokenizer)
    check_texts(completions, "completion")
    template = _CompletionTemplate(tokenizer, thinking=thinking)

    def rendered_or_refused(number: int, completion: str) -> tuple[str, int, int]:
        try:
            return template.render(completion)
        except ValueError as error:
            raise ValueError(f"completion {number}: {error}") from error

    rendered = [rendered_or_refused(number, text) for number, text in enumerate(completions)]
    return _completion_ids(tokenizer, rendered, template.end)


def encode_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    *,
    rows: Sequence[int],
) -> list[tuple[str | Conversation, tuple[int, ...]]]:
    """Encode completions after their own prompts, with or without a think block.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        prompts: The prompt of each completion.
        completions: The assistant's texts.
        rows: The number of each row in the data, for messages.

    Returns:
        For each completion its prompt and its ids. The prompt is a `Conversation` with
        `thinking=True` where the ids follow the template's prompt with thinking; otherwise it is
        the one that was given.

    Raises:
        ValueError: See `encode_completion`; the message names the row.
        TypeError: A tokenizer without offsets (not a fast one).
    """
    check_fast(tokenizer)
    check_texts(completions, "completion")
    template = _AnswerTemplate(tokenizer)
    encoded: list[str | Conversation] = []
    rendered = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        checked = as_prompt(prompt, f"row {row}: the prompt")
        try:
            fitting, parts = template.render(checked, completion)
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error
        encoded.append(fitting)
        rendered.append(parts)
    ids = _completion_ids(tokenizer, rendered, template.end)
    return list(zip(encoded, ids, strict=True))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that ends an assistant's turn.

    It is the first special or added token that the template writes after an assistant's text;
    where there is none, or no template, the tokenizer's end-of-sequence token.

    Raises:
        ValueError: There is neither.
    """
    check_fast(tokenizer)
    end = _CompletionTemplate(tokenizer).end
    if end is None:
        raise ValueError(
            f"{tokenizer_name(tokenizer)} has no token that ends a turn: neither its chat template "
            "nor an end-of-sequence token gives one; set tokenizer.eos_token."
        )
    return end


def after_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the template writes after the end of a turn, often a line break.

    They are no part of a completion: no model is asked to write them.
    """
    check_fast(tokenizer)
    return _CompletionTemplate(tokenizer).behind


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of end of turn and end of sequence, as far as they exist.

    A model may have more: `models.end_token_ids` reads them from its generation configuration.
    """
    check_fast(tokenizer)
    ends = (_CompletionTemplate(tokenizer).end, tokenizer.eos_token_id)
    return frozenset(end for end in ends if isinstance(end, int))


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """Decode a completion's ids, without special tokens.

    Without a chat template the text is meant to be joined to the prompt. A space at the beginning
    of its first token is therefore preserved also where the tokenizer drops it from a text.
    """
    ids = list(ids)
    if not tokenizer.chat_template:
        anchor = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
        if _text(tokenizer, anchor) == "\n":
            joined = _text(tokenizer, anchor + ids)
            if joined.startswith("\n"):
                return joined[1:]
    return _text(tokenizer, ids)


class _CompletionTemplate:
    """How a tokenizer's template renders an answer after the generation prompt.

    Attributes:
        end: The id that ends a turn, if there is one.
        behind: The ids after it.
        context: The text between the user's text and the answer, enough to tokenize after.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, thinking: bool = False) -> None:
        self._tokenizer, self._thinking = tokenizer, thinking
        eos = tokenizer.eos_token_id
        self.end = eos if isinstance(eos, int) else None
        self.behind: tuple[int, ...] = ()
        self.context = ""
        if not tokenizer.chat_template:
            return
        self._prompts = PromptTemplate(tokenizer, None, thinking=thinking)
        self._prompt = self._prompts.render(_DIALOG)[0]
        self.context = self._prompts.tail
        text = self._write(_DIALOG, _ANSWER)
        spans = locate(lambda marked: self._write(_DIALOG, marked), _ANSWER, text, "the completion")
        if not spans:
            raise ValueError(
                f"the chat template of {tokenizer_name(tokenizer)} leaves the assistant's text out."
            )
        start, stop = spans[-1]
        self._tail = text[stop:]
        marked = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        tail = tokenize(tokenizer, [self._tail])[0][0]
        closing = next((place for place, i in enumerate(tail) if i in marked), None)
        self._closed = closing is not None
        if closing is not None:
            self.end = tail[closing]
            self.behind = tail[closing + 1 :]
        # Text before the answer that is not in the generation prompt, so the model must write it:
        # Llama 2 has a space, other templates an empty think block or the name of a channel.
        fits = text[:start].startswith(self._prompt)
        self._lead = text[len(self._prompt) : start] if fits else ""

    def render(self, completion: str, dialog: Sequence[Turn] = _DIALOG) -> tuple[str, int, int]:
        """Render an answer.

        Args:
            completion: The answer.
            dialog: The turns before it.

        Returns:
            A text that ends with the turn, where the answer begins in it, and where it ends.

        Raises:
            ValueError: The template's conversation does not continue its generation prompt, or
                the template rewrites the answer.
        """
        if not self._tokenizer.chat_template:
            # After a line break, a tokenizer of the SentencePiece kind puts no space first.
            return "\n" + completion, 1, 1 + len(completion)
        context, body = self._body(completion, dialog)
        whole = context + body
        return whole + (self._tail if self._closed else ""), len(context), len(whole)

    def _body(self, completion: str, dialog: Sequence[Turn]) -> tuple[str, str]:
        """Return the text to tokenize after, and the answer as the template writes it."""
        text = self._write(dialog, completion)
        # Nearly every prompt and answer is rendered as the stand-ins, with nothing else changed.
        if len(dialog) == 1 and dialog[0].role == "user":
            expected = self._prompts.head + dialog[0].content + self._prompts.tail
            if text == expected + self._lead + completion + self._tail:
                return self.context, self._lead + completion
        prompt = render(self._tokenizer, dialog, generation=True, thinking=self._thinking)
        context = self.context if prompt.endswith(self.context) else prompt
        if not completion.strip() and len(text) < len(prompt + self._lead + self._tail):
            return context, self._lead  # the template trims the prompt's end with a blank answer
        if not (text.startswith(prompt) and text.endswith(self._tail)):
            raise ValueError(self._mismatch(prompt, text))
        body = text[len(prompt) : len(text) - len(self._tail)]
        for written in (body.removeprefix(self._lead), body):
            if _without_space(written) == _without_space(completion):
                return context, body
        raise ValueError(
            f"the chat template of {tokenizer_name(self._tokenizer)} rewrites the completion "
            f"{completion[:60]!r} as {body[:60]!r}; give the text that it writes, or completion_ids"
        )

    def _mismatch(self, prompt: str, text: str) -> str:
        """Say how a rendered conversation differs from its prompt."""
        start = len(prompt) - len(self.context) if prompt.endswith(self.context) else 0
        advice = "" if self._thinking else "for a completion with a think block, thinking=True; "
        return (
            f"the chat template of {tokenizer_name(self._tokenizer)} lets the model continue "
            f"{prompt[start:][-60:]!r}, but renders the finished conversation as "
            f"{text[start:][:60]!r}, so prompt and completion cannot equal the conversation "
            "(templates of thinking models add or drop think blocks); give completion_ids, as "
            f"generate() does; {advice}or set another chat template"
        )

    def _write(self, dialog: Sequence[Turn], completion: str) -> str:
        turns = [*dialog, Turn("assistant", completion)]
        return render(self._tokenizer, turns, generation=False, thinking=self._thinking)


class _AnswerTemplate:
    """How a template renders answers after their own prompts, in the mode that fits each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._prompts = PromptTemplates(tokenizer, None)
        self._modes = {False: _CompletionTemplate(tokenizer)}
        self.end = self._modes[False].end
        self._opening: str | None = None
        if not tokenizer.chat_template:
            return
        thinking = _CompletionTemplate(tokenizer, thinking=True)
        plain, open_ended = self._modes[False].context, thinking.context
        if plain != open_ended:
            self._modes[True] = thinking
            # A template that adds an empty think block to suppress thinking shows its first tag.
            words = plain.removeprefix(open_ended).split()
            self._opening = words[0] if plain.startswith(open_ended) and words else None

    def render(
        self, prompt: str | Conversation, completion: str
    ) -> tuple[str | Conversation, tuple[str, int, int]]:
        """Render an answer in the first mode that fits; see `_CompletionTemplate.render`."""
        conversation = Conversation((Turn("user", prompt),)) if isinstance(prompt, str) else prompt
        dialog = conversation.turns
        if conversation.system is not None and len(self._modes[False].context):
            dialog = self._prompts.of(conversation).turns(conversation.dialog)
        thinks = self._opening is not None and completion.lstrip().startswith(self._opening)
        modes = [thinks, not thinks]
        if conversation.thinking:
            modes = [True] if True in self._modes else [False]
        errors: list[ValueError] = []
        for mode in modes:
            if mode not in self._modes:
                continue
            try:
                parts = self._modes[mode].render(completion, dialog)
            except ValueError as error:
                errors.append(error)
                continue
            return (replace(conversation, thinking=True) if mode else prompt), parts
        raise errors[0]


def _completion_ids(
    tokenizer: PreTrainedTokenizerBase,
    rendered: Sequence[tuple[str, int, int]],
    end: int | None,
) -> list[tuple[int, ...]]:
    """Tokenize rendered answers; see `_CompletionTemplate.render` for their form."""
    encoded = []
    for chunk in chunks(rendered):
        texts = [text for text, _, _ in chunk]
        for (text, start, stop), (ids, offsets) in zip(
            chunk, tokenize(tokenizer, texts), strict=True
        ):
            answer = _cut(ids, offsets, start, stop, end)
            if answer is None:
                # A token that spans the end of the generation prompt cannot follow its ids.
                alone_ids, alone_offsets = tokenize(tokenizer, [text[start:]])[0]
                answer = _cut(alone_ids, alone_offsets, 0, stop - start, end) or ()
            encoded.append(answer)
    return encoded


def _cut(
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    start: int,
    stop: int,
    end: int | None,
) -> tuple[int, ...] | None:
    """Return the ids from character `start` to the end of the turn; None if a token spans `start`.

    The end is searched from character `stop`, where the text ends, as the text itself may hold it.
    """
    first = next((i for i, (_, b) in enumerate(offsets) if b > start), len(ids))
    if first < len(ids) and offsets[first][0] < start:
        return None
    behind = next((i for i, (a, _) in enumerate(offsets) if i >= first and a >= stop), len(ids))
    if end is None:
        return tuple(ids[first:behind])
    close = next((i for i in range(behind, len(ids)) if ids[i] == end), None)
    return (*ids[first : behind if close is None else close], end)


def _without_space(text: str) -> str:
    return "".join(text.split())


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text: Any = tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)
