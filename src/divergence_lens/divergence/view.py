"""How a divergence looks in a notebook: one example with coloured tokens, and a table of rates.

Everything is plain HTML with inline styles, so that it survives sanitising and GitHub's viewer.
Colours are see-through, which is readable on light and dark pages alike, and come from Okabe and
Ito's colour-blind-safe palette; what colour says is said by underlining too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

# Orange for divergence tokens, blue for tokens that the factual teacher would not have written.
_DIVERGENCE = "230,159,0"
_DISAGREEMENT = "86,180,233"
_CELL = "text-align:left;padding:2px 10px"
_MARKS = {"\n": "↵", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True, eq=False, repr=False)
class ExampleDivergence:
    """One example of a `Divergence`: its tokens, and who would have written what.

    In a notebook divergence tokens are orange (the stronger, the more counterfactuals differ) and
    underlined, tokens that the factual teacher would not have written are blue and dotted, and the
    mouse over a token says in words what every teacher would have written there. As text,
    divergence tokens stand in brackets.

    Attributes:
        index: Which example.
        prompt: The user's text.
        names: The teachers, the factual one first.
        tokens: Texts of the completion's tokens.
        predicted: For each teacher the texts that it would have written.
        margin: `[teachers tokens]`, by how many logits that was its first choice.
        logprob: `[teachers tokens]`, natural-log probability of the given token.
        divergence: Which tokens are divergence tokens under the divergence's rule.
        agrees: Where the factual teacher's argmax is the token.
        differs: Where each counterfactual's argmax is another token.
    """

    index: int
    prompt: str
    names: tuple[str, ...]
    tokens: tuple[str, ...]
    predicted: tuple[tuple[str, ...], ...]
    margin: Float32[np.ndarray, "teachers tokens"]
    logprob: Float32[np.ndarray, "teachers tokens"]
    divergence: Bool[np.ndarray, " tokens"]
    agrees: Bool[np.ndarray, " tokens"]
    differs: Bool[np.ndarray, "counterfactuals tokens"]

    def describe(self, position: int) -> str:
        """In words, what each teacher would have written at one token, and how surely.

        Args:
            position: Place in the completion, from 0.
        """
        if not 0 <= position < len(self.tokens):
            raise IndexError(f"there is no token {position}; there are {len(self.tokens)}")
        token = self.tokens[position]
        kind = "divergence token" if self.divergence[position] else "token"
        lines = [f"{kind} {position}: {_quoted(token)}"]
        groups: dict[str, list[int]] = {}
        for row in range(1, len(self.names)):
            groups.setdefault(self.predicted[row][position], []).append(row)
        lines.append(self._who([0], position, self.predicted[0][position]))
        # The most common other choice first; those who would write the token itself last.
        order = sorted(groups, key=lambda text: (text == token, -len(groups[text]), text))
        lines += [self._who(groups[text], position, text) for text in order]
        return "\n".join(lines)

    def _who(self, rows: list[int], position: int, text: str) -> str:
        shown = [
            f"{self.names[row]} (margin {self.margin[row, position]:.2f}, "
            f"p of the token {np.exp(self.logprob[row, position]):.2g})"
            for row in rows
        ]
        same = "also write" if rows != [0] and text == self.tokens[position] else "write"
        return f"would {same} {_quoted(text)}: {', '.join(shown)}"

    def __len__(self) -> int:
        return len(self.tokens)

    def __str__(self) -> str:
        return "".join(
            f"[{token}]" if marked else token
            for token, marked in zip(_spaced(self.tokens), self.divergence, strict=True)
        )

    def __repr__(self) -> str:
        return (
            f"ExampleDivergence({self.index}: {int(self.divergence.sum())} of {len(self)} tokens "
            f"diverge: {self})"
        )

    def _repr_html_(self) -> str:
        spans = "".join(self._span(position) for position in range(len(self)))
        n = int(self.divergence.sum())
        return (
            "<div style='font-family:sans-serif;font-size:14px;line-height:1.9'>"
            f"<div style='opacity:.75;white-space:pre-wrap'>example {self.index}, "
            f"{escape(self.names[0])}: {escape(self.prompt)}</div>"
            f"<div style='font-family:monospace;overflow-wrap:anywhere'>{spans}</div>"
            f"<div style='font-size:12px;line-height:1.5;opacity:.75'>{n} of {len(self)} tokens "
            f"diverge; {self._legend()}. Point at a token to see who would write what.</div></div>"
        )

    def _legend(self) -> str:
        orange = _swatch(f"background:rgba({_DIVERGENCE},.5);border-bottom:2px solid", "divergence")
        blue = _swatch(
            f"background:rgba({_DISAGREEMENT},.3);border-bottom:2px dotted",
            f"not what {escape(self.names[0])} would write",
        )
        return f"{orange}, {blue}"

    def _span(self, position: int) -> str:
        # Lines break between such boxes, and not within a token.
        style = "display:inline-block;line-height:1.3;padding:1px 2px;margin:0 1px"
        style += ";border-radius:3px;white-space:pre-wrap"
        if self.divergence[position]:
            share = self.differs[:, position].mean()
            style += f";background:rgba({_DIVERGENCE},{0.25 + 0.45 * share:.2f})"
            style += ";border-bottom:2px solid"
        elif not self.agrees[position]:
            style += f";background:rgba({_DISAGREEMENT},.3);border-bottom:2px dotted"
        # Line breaks of a title are lost as such in an attribute.
        title = escape(self.describe(position)).replace("\n", "&#10;")
        token = escape(_visible(self.tokens[position]))
        return f'<span style="{style}" title="{title}">{token}</span>'


def summary_html(
    *,
    examples: int,
    tokens: int,
    divergence_tokens: int,
    disagreements: int,
    teacher: str,
    rates: Mapping[str, float],
) -> str:
    """A small table of divergence rates, per counterfactual and overall."""
    rows = "".join(
        f"<tr><td style='{_CELL}'>{escape(name)}</td><td style='{_CELL}'>{rate:.2%}</td></tr>"
        for name, rate in rates.items()
    )
    return (
        "<div style='font-family:sans-serif;font-size:14px'>"
        f"<div><b>{divergence_tokens:,} of {tokens:,} tokens diverge "
        f"({divergence_tokens / tokens:.2%})</b> in {examples:,} examples of "
        f"{escape(teacher)}, whose own choice now is another at {disagreements:,} tokens.</div>"
        "<table style='color:inherit;font-size:inherit'>"
        f"<tr><th style='{_CELL}'>counterfactual</th>"
        f"<th style='{_CELL}'>diverges at</th></tr>{rows}</table></div>"
    )


def token_texts(
    tokenizer: Any, ids: Int64[np.ndarray, " ids"]
) -> tuple[dict[int, str], frozenset[int]]:
    """A readable text for each id, and which of them are special tokens."""
    # Models may have more logits than their tokenizer has tokens.
    known = [int(i) for i in ids if i < len(tokenizer)]
    texts = {}
    for token_id, piece in zip(known, tokenizer.convert_ids_to_tokens(known), strict=True):
        text = tokenizer.decode([token_id])
        # One token alone loses SentencePiece's leading space; half a character is not readable.
        if piece.startswith("▁") and not text.startswith(" "):
            text = " " + text
        texts[token_id] = piece if "\ufffd" in text or not text else text
    return texts, frozenset(known) & frozenset(tokenizer.all_special_ids)


def _swatch(style: str, words: str) -> str:
    return f"<span style='{style};padding:0 3px;border-radius:3px'>{words}</span>"


def _visible(token: str) -> str:
    """The token with its line breaks shown, and a sign for one that is empty."""
    shown = "".join(_MARKS.get(c, c) + ("\n" if c == "\n" else "") for c in token)
    return shown or "∅"


def _quoted(token: str) -> str:
    return f"“{''.join(_MARKS.get(c, c) for c in token)}”"


def _spaced(tokens: tuple[str, ...]) -> list[str]:
    """Tokens to be joined as text; words of a tokenizer without spaces are set apart."""
    glued = not any(" " in token for token in tokens)
    return [
        f" {token}" if glued and place and token[:1].isalnum() else token
        for place, token in enumerate(tokens)
    ]
