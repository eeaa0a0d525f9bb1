"""Regular expressions as automata over a tokenizer's tokens, for constrained generation.

1. Each token is the bytes that it adds to a text.
2. `outlines_core` compiles the expression to an automaton over bytes and runs every token through
   it: which tokens keep a match possible from each state, and which state they lead to.
3. The allowed tokens of a state become one row of a boolean mask the first time that the state is
   reached. A step of generation then masks the logits: one operation per logit, where the
   unembedding that computed them took `d_model` multiplications.

`outlines_core` was chosen because it exposes the states, so a mask is computed once per state
instead of once per row and step, and because it needs only a list of bytes per token. `llguidance`
allows only one tokenization of text that the pattern forces, and `xgrammar` depends on triton.
"""

from collections.abc import Collection, Sequence
from typing import Any

import outlines_core
import torch
from jaxtyping import Bool
from torch import Tensor

from divergence_lens.chat import decode, piece_bytes

_ASCII_CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": r" \t\n\r\f\v"}

# `outlines_core` 0.2.14 drops a token that continues a text which already matches, unless the
# longer text matches too: "1(, 1){2,4}" would always end after three. A final byte that no text
# contains postpones the match to the end, so no such token exists.
_END = b"\x00"


class TokenPattern:
    r"""A regular expression as an automaton over token ids.

    A completion matches if its whole text matches. The classes `\d`, `\w` and `\s` and their
    complements mean ASCII characters; look-around and back-references are not available.

    Attributes:
        pattern: The regular expression.
        start: The state before the first token.
    """

    def __init__(
        self, pattern: str, tokenizer: Any, *, d_vocab: int, end_tokens: Collection[int]
    ) -> None:
        """Compile a pattern.

        Args:
            pattern: The regular expression, in the syntax of Rust's `regex` package.
            tokenizer: The tokenizer of the model.
            d_vocab: Number of logits; it may exceed the tokenizer's vocabulary.
            end_tokens: The tokens that end a completion, allowed once the pattern matches.

        Raises:
            ValueError: The pattern is not a regular expression, or the tokens cannot write a text
                that it allows.
        """
        self.pattern = pattern
        self._d_vocab = d_vocab
        self._ends = sorted(end_tokens)
        texts = token_bytes(tokenizer)
        vocabulary: dict[bytes, list[int]] = {_END: [d_vocab]}
        for token, text in texts.items():
            if token < d_vocab and token not in self._ends and _END not in text:
                vocabulary.setdefault(text, []).append(token)
        # A tokenizer that marks the start of a word writes the first word with a space that its
        # decoder then removes.
        prefix = " ?" if _drops_first_space(tokenizer, texts) else ""
        # `outlines_core` refuses a state without tokens. Where a token ends in such a state ("1" on
        # the way to "12", of which the vocabulary has no second half), that token must not be
        # chosen. So every byte is a token while compiling, and dead ends are removed afterwards.
        for byte in range(1, 256):
            vocabulary.setdefault(bytes([byte]), []).append(d_vocab + 1)
        tokens = outlines_core.Vocabulary(d_vocab + 2, vocabulary)
        try:
            index = outlines_core.Index(rf"{prefix}(?:{ascii_classes(pattern)})\x00", tokens)
        except ValueError as error:
            raise ValueError(
                f"pattern {pattern!r} cannot be compiled ({error}); look-around and "
                "back-references are not available"
            ) from error
        self.start: int = index.get_initial_state()
        self._transitions = _live(index.get_transitions(), d_vocab)
        if not self._transitions.get(self.start):
            raise ValueError(
                f"the model has no tokens to write a text that pattern {pattern!r} allows; compare "
                "its first characters with the vocabulary"
            )
        self._masks: dict[tuple[int, torch.device], Tensor] = {}

    def next_state(self, state: int, token: int) -> int:
        """Return the state after a token.

        Raises:
            ValueError: The token is not allowed in this state.
        """
        followers = self._transitions.get(state, {})
        if token in self._ends and self._d_vocab in followers:
            return followers[self._d_vocab]
        if token not in followers or token >= self._d_vocab:
            raise ValueError(f"token {token} cannot continue a match of pattern {self.pattern!r}")
        return followers[token]

    def states(self, tokens: Sequence[int]) -> list[int]:
        """Return the state before each token of a completion.

        Raises:
            ValueError: The completion does not follow the pattern.
        """
        result = [self.start]
        for token in tokens:
            result.append(self.next_state(result[-1], token))
        return result[: len(tokens)]

    def allowed(
        self, states: Sequence[int], device: torch.device | str = "cpu"
    ) -> Bool[Tensor, "states d_vocab"]:
        """Return the tokens that can come next in each of some states."""
        rows = [self._mask(state, torch.device(device)) for state in states]
        return torch.stack(rows)  # [states, d_vocab]

    def _mask(self, state: int, device: torch.device) -> Bool[Tensor, " d_vocab"]:
        if (state, device) not in self._masks:
            followers = self._transitions[state]
            tokens = [token for token in followers if token < self._d_vocab]
            mask = torch.zeros(self._d_vocab, dtype=torch.bool)
            mask[tokens + (self._ends if self._d_vocab in followers else [])] = True
            self._masks[state, device] = mask.to(device)
        return self._masks[state, device]


def _live(transitions: dict[int, dict[int, int]], d_vocab: int) -> dict[int, dict[int, int]]:
    """The transitions by tokens of the model that lead to states from which a match is possible."""
    sources: dict[int, list[int]] = {}
    for state, followers in transitions.items():
        for token, follower in followers.items():
            if token <= d_vocab:
                sources.setdefault(follower, []).append(state)
    live = {state for state, followers in transitions.items() if d_vocab in followers}
    pending = list(live)
    while pending:
        for state in sources.get(pending.pop(), ()):
            if state not in live:
                live.add(state)
                pending.append(state)
    return {
        state: {
            token: follower
            for token, follower in transitions[state].items()
            if token == d_vocab or (token < d_vocab and follower in live)
        }
        for state in live
    }


def ascii_classes(pattern: str) -> str:
    r"""Replace `\d`, `\w`, `\s` and their complements by ASCII character classes.

    In Rust they are Unicode classes, of which most tokenizers can only write a part.
    """
    result, in_class, position = "", False, 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\" and position + 1 < len(pattern):
            name = pattern[position + 1]
            members = _ASCII_CLASSES.get(name.lower())
            if members is None:
                result += character + name
            elif name.isupper():
                result += f"[^{members}]"
            else:
                result += members if in_class else f"[{members}]"
            position += 2
            continue
        if character == "[":
            in_class = True
        elif character == "]":
            in_class = False
        result += character
        position += 1
    return result


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """Compute the bytes that each ordinary token adds to a text.

    Special tokens add none and are left out. A byte-level vocabulary spells bytes as characters. Of
    others, a token like `<0xE2>` is a byte, and the rest are decoded after another token, because
    the first word of a text often loses its space.
    """
    special = set(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    pieces = {token: piece for piece, token in tokenizer.get_vocab().items()}
    ordinary = [token for token in sorted(pieces) if token not in special]
    if "ByteLevel" in _decoder(tokenizer):
        texts = {token: piece_bytes(pieces[token]) for token in ordinary}
        return {token: text for token, text in texts.items() if text is not None}
    reference = _reference(tokenizer, ordinary)
    before = decode(tokenizer, [reference])
    result = {}
    for token in ordinary:
        piece = pieces[token]
        byte = piece_bytes(piece) if piece.startswith("<0x") else None
        if byte is not None:
            result[token] = byte
        else:
            text = decode(tokenizer, [reference, token])
            if text.startswith(before) and text != before:
                result[token] = text[len(before) :].encode()
    return result


def _decoder(tokenizer: Any) -> str:
    """The tokenizer's own description of its decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"{type(tokenizer).__name__} does not say how its tokens become bytes; load it as a "
            "fast tokenizer (use_fast=True)"
        )
    return repr(backend.decoder)


def _reference(tokenizer: Any, tokens: Sequence[int]) -> int:
    """Return a token after which others decode as in the middle of a text."""
    for token in tokens:
        if decode(tokenizer, [token]).isalnum():
            return token
    raise ValueError("the tokenizer has no token that is a word or a number")


def _drops_first_space(tokenizer: Any, texts: dict[int, bytes]) -> bool:
    """Whether a token with a leading space loses it at the start of a text."""
    spaced = next((t for t, text in texts.items() if text[:1] == b" " and text[1:].isalnum()), None)
    return spaced is not None and not decode(tokenizer, [spaced]).startswith(" ")
