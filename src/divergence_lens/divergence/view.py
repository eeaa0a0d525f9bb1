"""Notebook views of a divergence: one example with colored tokens, and a table of rates.

The HTML is plain with inline styles, so that it survives sanitizing and GitHub's viewer. Colors are
translucent, which is readable on light and dark pages, and come from Okabe and Ito's
colorblind-safe palette. Underlining repeats the information in the colors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Bool, Float32

# Orange for divergence tokens, blue for tokens other than the factual teacher's argmax.
_DIVERGENCE = "230,159,0"
_DISAGREEMENT = "86,180,233"
_CELL = "text-align:left;padding:2px 10px"
_MARKS = {"\n": "↵", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True, eq=False, repr=False)
class ExampleDivergence:
    """One example of a `Divergence`: its tokens and what each teacher predicts there.

    In a notebook, divergence tokens are orange (more opaque if more counterfactuals differ) and
    underlined, tokens other than the factual teacher's argmax are blue and dotted, and hovering
    over a token shows each teacher's prediction. As text, divergence tokens are in brackets.

    Attributes:
        index: The example's row number.
        prompt: The user's text.
        names: The teachers, the factual one first.
        tokens: Texts of the completion's tokens.
        predicted: For each teacher, the texts of its argmaxes.
        margin: `[teachers tokens]`, logit of the argmax minus the second highest.
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
        """Describe each teacher's prediction at one token, with margin and probability.

        Args:
            position: Position in the completion, from 0.

        Raises:
            IndexError: There is no such token.
        """
        if not 0 <= position < len(self.tokens):
            raise IndexError(f"there is no token {position}; there are {len(self.tokens)}")
        token = self.tokens[position]
        kind = "divergence token" if self.divergence[position] else "token"
        lines = [f"{kind} {position}: {_quoted(token)}"]
        groups: dict[str, list[int]] = {}
        for row in range(1, len(self.names)):
            groups.setdefault(self.predicted[row][position], []).append(row)
        lines.append(self._prediction([0], position, self.predicted[0][position]))
        # The most common other prediction first; teachers that predict the token itself last.
        order = sorted(groups, key=lambda text: (text == token, -len(groups[text]), text))
        lines += [self._prediction(groups[text], position, text) for text in order]
        return "\n".join(lines)

    def _prediction(self, rows: list[int], position: int, text: str) -> str:
        shown = [
            f"{self.names[row]} (margin {self.margin[row, position]:.2f}, "
            f"p of the token {np.exp(self.logprob[row, position]):.2g})"
            for row in rows
        ]
        verb = "also predict" if rows != [0] and text == self.tokens[position] else "predict"
        return f"{verb} {_quoted(text)}: {', '.join(shown)}"

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
            f"diverge; {self._legend()}. Hover over a token to see each teacher's prediction."
            "</div></div>"
        )

    def _legend(self) -> str:
        orange = _swatch(f"background:rgba({_DIVERGENCE},.5);border-bottom:2px solid", "divergence")
        blue = _swatch(
            f"background:rgba({_DISAGREEMENT},.3);border-bottom:2px dotted",
            f"not the prediction of {escape(self.names[0])}",
        )
        return f"{orange}, {blue}"

    def _span(self, position: int) -> str:
        # Inline blocks let lines break between tokens but not within one.
        style = "display:inline-block;line-height:1.3;padding:1px 2px;margin:0 1px"
        style += ";border-radius:3px;white-space:pre-wrap"
        if self.divergence[position]:
            share = self.differs[:, position].mean()
            style += f";background:rgba({_DIVERGENCE},{0.25 + 0.45 * share:.2f})"
            style += ";border-bottom:2px solid"
        elif not self.agrees[position]:
            style += f";background:rgba({_DISAGREEMENT},.3);border-bottom:2px dotted"
        # An attribute needs line breaks as character references.
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
    """Render a small table of divergence rates, overall and per counterfactual."""
    rows = "".join(
        f"<tr><td style='{_CELL}'>{escape(name)}</td><td style='{_CELL}'>{rate:.2%}</td></tr>"
        for name, rate in rates.items()
    )
    return (
        "<div style='font-family:sans-serif;font-size:14px'>"
        f"<div><b>{divergence_tokens:,} of {tokens:,} tokens diverge "
        f"({divergence_tokens / tokens:.2%})</b> in {examples:,} examples of "
        f"{escape(teacher)}, whose argmax is another token at {disagreements:,} of them.</div>"
        "<table style='color:inherit;font-size:inherit'>"
        f"<tr><th style='{_CELL}'>counterfactual</th>"
        f"<th style='{_CELL}'>diverges at</th></tr>{rows}</table></div>"
    )


def _swatch(style: str, words: str) -> str:
    return f"<span style='{style};padding:0 3px;border-radius:3px'>{words}</span>"


def _visible(token: str) -> str:
    """Make line breaks visible, and show a sign for an empty token."""
    shown = "".join(_MARKS.get(c, c) + ("\n" if c == "\n" else "") for c in token)
    return shown or "∅"


def _quoted(token: str) -> str:
    return f"“{''.join(_MARKS.get(c, c) for c in token)}”"


def _spaced(tokens: tuple[str, ...]) -> list[str]:
    """Separate words for display where the tokenizer's tokens carry no spaces."""
    unspaced = not any(" " in token for token in tokens)
    return [
        f" {token}" if unspaced and place and token[:1].isalnum() else token
        for place, token in enumerate(tokens)
    ]
