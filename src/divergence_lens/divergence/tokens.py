"""Kinds of single tokens, and the check that a tokenizer reads them as recorded."""

from collections.abc import Mapping
from typing import Any

from divergence_lens.chat import token_texts

KINDS = ("number", "word", "punctuation", "space", "special", "other")
"""Kinds of tokens by their characters; "special" are the tokenizer's own, such as end of turn."""


def check_tokenizer(tokenizer: Any, texts: Mapping[int, str]) -> None:
    """Refuse a tokenizer that reads token ids as other texts than those recorded.

    Only plain words and numbers are compared; the readable form of other tokens is a convention.

    Raises:
        ValueError: Names the first id that it reads otherwise.
    """
    words = {i: text for i, text in texts.items() if text.isascii() and text.strip().isalnum()}
    own = token_texts(tokenizer, words)
    for token_id, text in words.items():
        if own.get(token_id) != text:
            raise ValueError(
                f"the divergence was computed with another tokenizer: token {token_id} was "
                f"{text!r}, and is {own.get(token_id, 'unknown')!r} here; use the model that it "
                "was computed with"
            )


def token_kind(text: str, *, special: bool) -> str:
    """Return the kind of a token, one of `KINDS`; "other" for a part of a character."""
    bare = text.strip()
    if special:
        return "special"
    if not bare:
        return "space"
    if bare.isdigit():
        return "number"
    if bare.isalpha():
        return "word"
    partial = any(c.isalnum() for c in bare) or "⟨" in bare
    return "other" if partial else "punctuation"
