"""Rendering of turns by a tokenizer's chat template, and tokenization of the result."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from divergence_lens.chat.conversations import Turn, check_text

# Texts tokenized in one call: their offsets take much memory.
_CHUNK = 1024


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    *,
    generation: bool,
    thinking: bool = False,
) -> str:
    """Render turns by the chat template.

    Args:
        tokenizer: Has the template.
        turns: The turns in order.
        generation: Whether to add the generation prompt.
        thinking: The template's `enable_thinking`; templates of other models ignore it.

    Raises:
        ValueError: The template refuses the conversation.
    """
    from jinja2 import TemplateError

    try:
        return apply_template(tokenizer, turns, generation=generation, thinking=thinking)
    except TemplateError as error:
        roles = ", ".join(turn.role for turn in turns)
        raise ValueError(
            f"the chat template of {tokenizer_name(tokenizer)} does not take a conversation of "
            f"the turns {roles}: {error}"
        ) from error


def apply_template(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    *,
    generation: bool,
    thinking: bool = False,
) -> str:
    """Render turns as `render` does, but let the template's own errors pass."""
    text: Any = tokenizer.apply_chat_template(
        [turn._asdict() for turn in turns],
        tokenize=False,
        add_generation_prompt=generation,
        enable_thinking=thinking,
    )
    return str(text)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[tuple[tuple[int, ...], list[tuple[int, int]]]]:
    """Return ids and offsets of each text, without special tokens that are not written in it."""
    if not texts:
        return []
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        (tuple(ids), offsets)
        for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    ]


def chunks(texts: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Cut a sequence into parts that are tokenized in one call."""
    return (texts[i : i + _CHUNK] for i in range(0, len(texts), _CHUNK))


def check_fast(tokenizer: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer; refuse one without offsets.

    Raises:
        ValueError: There is no tokenizer.
        TypeError: It is not a fast one.
    """
    if tokenizer is None:
        raise ValueError("the model has no tokenizer; give load_model one with tokenizer=.")
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{tokenizer_name(tokenizer)} is a {type(tokenizer).__name__}, which gives no offsets; "
            "load the fast tokenizer (AutoTokenizer.from_pretrained(..., use_fast=True))."
        )
    fast: PreTrainedTokenizerBase = tokenizer
    return fast


def check_texts(texts: Sequence[str], name: str) -> None:
    """Refuse one string instead of a list, and entries that are not text.

    Raises:
        TypeError: One string, or an entry that is not a string.
        ValueError: An entry with a lone surrogate.
    """
    if isinstance(texts, str):
        raise TypeError(
            f"one {name} was given as a string where a list is expected: {texts[:60]!r}"
        )
    for number, text in enumerate(texts):
        check_text(text, f"{name} {number}")


def tokenizer_name(tokenizer: Any) -> str:
    """Name a tokenizer in an error message."""
    return f"the tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
