"""Completions as token ids, as the chat template writes them after the prompt.

1. `answer_templates` renders the answer, and refuses it if prompt and completion together are not
   the template's own conversation.
2. Tokenize the end of the prompt and the answer in one text, and cut the ids where the answer
   begins and where the turn ends.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from divergence_lens.chat.answer_templates import AnswerTemplate, CompletionTemplate
from divergence_lens.chat.conversations import Conversation, Prompt, as_prompt
from divergence_lens.chat.prompts import encode_prompt
from divergence_lens.chat.rendering import (
    check_fast,
    check_texts,
    chunks,
    tokenize,
    tokenizer_name,
)


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
    template = CompletionTemplate(tokenizer, thinking=thinking)

    def rendered_or_refused(number: int, completion: str) -> tuple[str, int, int]:
        try:
            return template.render(completion)
        except ValueError as error:
            raise ValueError(f"completion {number}: {error}") from error

    rendered = [rendered_or_refused(number, text) for number, text in enumerate(completions)]
    return _completion_ids(tokenizer, rendered, template.end)


def encode_answers(
    tokenizer: PreTrainedTokenizerBase | None,
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
    tokenizer = check_fast(tokenizer)
    check_texts(completions, "completion")
    template = AnswerTemplate(tokenizer)
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
    end = CompletionTemplate(tokenizer).end
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
    return CompletionTemplate(tokenizer).behind


def answer_header(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ids that the template writes before an answer, such as `<|im_start|>assistant`.

    They are the last ids of every prompt; the end of the turn before is none of them.
    """
    encoded = encode_prompt(tokenizer, "a")
    template = CompletionTemplate(tokenizer)
    last = max(i for i, segment in enumerate(encoded.segments) if segment != "template")
    header = encoded.ids[last + 1 :]
    turn = (template.end, *template.behind)
    return header[len(turn) :] if header[: len(turn)] == turn else header


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of end of turn and end of sequence, as far as they exist.

    A model may have more: `models.end_token_ids` reads them from its generation configuration.
    """
    check_fast(tokenizer)
    ends = (CompletionTemplate(tokenizer).end, tokenizer.eos_token_id)
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


def _completion_ids(
    tokenizer: PreTrainedTokenizerBase,
    rendered: Sequence[tuple[str, int, int]],
    end: int | None,
) -> list[tuple[int, ...]]:
    """Tokenize rendered answers; see `CompletionTemplate.render` for their form."""
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


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text: Any = tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)
