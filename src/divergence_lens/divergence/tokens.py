"""Readable texts and kinds of single tokens."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

KINDS = ("number", "word", "punctuation", "space", "special", "other")
"""Kinds of tokens by their characters; "special" are the tokenizer's own, such as end of turn."""


def token_texts(
    tokenizer: Any, ids: Int64[np.ndarray, " ids"]
) -> tuple[dict[int, str], frozenset[int]]:
    """Return a readable text for each id, and the ids that are special tokens."""
    # Models may have more logits than their tokenizer has tokens.
    known = [int(i) for i in ids if i < len(tokenizer)]
    texts = {}
    for token_id, piece in zip(known, tokenizer.convert_ids_to_tokens(known), strict=True):
        text = tokenizer.decode([token_id])
        # A single token loses SentencePiece's leading space when decoded.
        if piece.startswith("▁") and not text.startswith(" "):
            text = " " + text
        # Part of a multi-byte character decodes to U+FFFD; the piece itself is more readable.
        texts[token_id] = piece if "\ufffd" in text or not text else text
    return texts, frozenset(known) & frozenset(tokenizer.all_special_ids)


def check_tokenizer(tokenizer: Any, texts: Mapping[int, str]) -> None:
    """Refuse a tokenizer that reads token ids as other texts than those recorded.

    Only plain words and numbers are compared; the readable form of other tokens is a convention.

    Raises:
        ValueError: Names the first id that it reads otherwise.
    """
    words = {i: text for i, text in texts.items() if text.isascii() and text.strip().isalnum()}
    own, _ = token_texts(tokenizer, np.array(list(words), dtype=np.int64))
    for token_id, text in words.items():
        if own.get(token_id) != text:
            raise ValueError(
                f"the divergence was computed with another tokenizer: token {token_id} was "
                f"{text!r}, and is {own.get(token_id, 'unknown')!r} here; use the model that it "
                "was computed with"
            )


def token_kind(text: str, *, special: bool) -> str:
    """Return the kind of a token, one of `KINDS`."""
    bare = text.strip()
    if special:
        return "special"
    if not bare:
        return "space"
    if bare.isdigit():
        return "number"
    if bare.isalpha():
        return "word"
    return "other" if any(c.isalnum() for c in bare) else "punctuation"


def readable(texts: Mapping[int, str], ids: np.ndarray) -> list[str]:
    """Return the text of each token, or `<id>` where it is unknown."""
    return [texts.get(int(i), f"<{i}>") for i in ids]
