"""Readable texts of single tokens, also where a token is part of a character.

Byte-level tokenizers split rare characters: "猫" may be two tokens of one and two bytes.

1. `token_texts` gives each id a text of its own. Bytes that are no whole character are written in
   hexadecimal between ⟨ and ⟩: "⟨E7 8C⟩".
2. `row_texts` joins the bytes of neighboring tokens of a row. Where they make a character, each of
   its tokens shows the character and its part: "猫⟨1/2⟩", "猫⟨2/2⟩".
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any, SupportsIndex

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_HEXADECIMAL = re.compile("⟨([0-9A-F]{2}(?: [0-9A-F]{2})*)⟩")


def token_texts(tokenizer: Any, ids: Iterable[SupportsIndex]) -> dict[int, str]:
    """Return a readable text for each id that the tokenizer has.

    A leading space is preserved. A model may have more logits than its tokenizer has tokens; such
    ids are left out.
    """
    known = [i for i in map(int, ids) if 0 <= i < len(tokenizer)]
    texts = {}
    for token_id, piece in zip(known, tokenizer.convert_ids_to_tokens(known), strict=True):
        text = tokenizer.decode([token_id])
        # A single token loses SentencePiece's leading space when decoded.
        if piece.startswith("▁") and not text.startswith(" "):
            text = " " + text
        if "\ufffd" in text:
            data = piece_bytes(piece)
            text = piece if data is None else _readable_bytes(data)
        texts[token_id] = text or piece
    return texts


def row_texts(texts: Mapping[int, str], ids: Iterable[SupportsIndex]) -> list[str]:
    """Return a text for each token of a row, `<id>` where it is unknown.

    Args:
        texts: Text of each id, from `token_texts`.
        ids: The row's token ids.
    """
    row = [texts.get(int(i), f"<{int(i)}>") for i in ids]
    start = 0
    while start < len(row):
        if "⟨" not in row[start]:
            start += 1
            continue
        stop = start + 1
        while stop < len(row) and "⟨" in row[stop]:
            stop += 1
        row[start:stop] = _joined(row[start:stop])
        start = stop
    return row


def choice_texts(
    texts: Mapping[int, str], choices: Iterable[SupportsIndex], ids: Iterable[SupportsIndex]
) -> list[str]:
    """Return a text for a model's choice at each position of a row.

    A choice is no neighbor of the next one, so parts of characters are not joined, except where it
    is the row's own token.

    Args:
        texts: Text of each id, from `token_texts`.
        choices: The chosen ids.
        ids: The row's token ids.
    """
    ids = [int(i) for i in ids]
    return [
        own if choice == i else texts.get(int(choice), f"<{int(choice)}>")
        for choice, i, own in zip(choices, ids, row_texts(texts, ids), strict=True)
    ]


def token_labels(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return a text for each token of a row; without a tokenizer, the ids."""
    if tokenizer is None:
        return tuple(str(i) for i in ids)
    return tuple(row_texts(token_texts(tokenizer, set(ids)), ids))


@cache
def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level tokenizer stands for, as in GPT-2.

    Printable characters stand for themselves; the other bytes, in order, for those from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def piece_bytes(piece: str) -> bytes | None:
    """Return the bytes of a token, from a byte-level or a byte-fallback vocabulary."""
    match = _BYTE_PIECE.fullmatch(piece)
    if match:
        return bytes.fromhex(match[1])
    letters = _byte_letters()
    return bytes(letters[c] for c in piece) if all(c in letters for c in piece) else None


def _readable_bytes(data: bytes) -> str:
    """Decode bytes, with those of incomplete characters in hexadecimal."""
    parts = []
    # Each invalid byte becomes one surrogate, from U+DC80.
    for part in re.split("([\udc80-\udcff]+)", data.decode(errors="surrogateescape")):
        invalid = part.encode(errors="surrogateescape") if "\udc80" <= part[:1] <= "\udcff" else b""
        parts.append(f"⟨{invalid.hex(' ').upper()}⟩" if invalid else part)
    return "".join(parts)


def _bytes_of(text: str) -> bytes:
    """Reverse `_readable_bytes`."""
    parts = _HEXADECIMAL.split(text)
    return b"".join(
        bytes.fromhex(part) if i % 2 else part.encode(errors="surrogatepass")
        for i, part in enumerate(parts)
    )


def _joined(texts: Sequence[str]) -> list[str]:
    """Show parts of characters in neighboring tokens by the characters that they make."""
    data = [_bytes_of(text) for text in texts]
    owners = [token for token, own in enumerate(data) for _ in own]  # of each byte
    shown: list[list[str | bytes]] = [[] for _ in texts]
    at = 0
    for character in b"".join(data).decode(errors="surrogateescape"):
        size = len(character.encode(errors="surrogateescape"))
        tokens = sorted(set(owners[at : at + size]))
        for number, token in enumerate(tokens, 1):
            if "\udc80" <= character <= "\udcff":
                shown[token].append(character.encode(errors="surrogateescape"))
            else:
                part = f"⟨{number}/{len(tokens)}⟩" if len(tokens) > 1 else ""
                shown[token].append(character + part)
        at += size
    return ["".join(_merged(parts)) for parts in shown]


def _merged(parts: Sequence[str | bytes]) -> list[str]:
    """Write runs of invalid bytes in hexadecimal."""
    merged: list[str | bytes] = []
    for part in parts:
        if isinstance(part, bytes) and merged and isinstance(merged[-1], bytes):
            merged[-1] += part
        else:
            merged.append(part)
    return [p if isinstance(p, str) else f"⟨{p.hex(' ').upper()}⟩" for p in merged]
