"""Views of an audit: a notebook table, one row with colored tokens, and a page of one screen."""

import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float32

from divergence_lens._utils.storage import write_text

if TYPE_CHECKING:
    from divergence_lens.auditing.result import Audit

# Orange for tokens that speak for the candidate, blue for tokens against it (Okabe and Ito).
_FOR, _AGAINST = "230,159,0", "86,180,233"
_CELL = "text-align:left;padding:2px 10px"
_MOST = 12
_SHOWN_ROWS = 5
_COLUMNS = ("score", "low", "high", "z", "p_holm", "p_fdr")
_HEADINGS = ("score", "from", "to", "z", "p (Holm)", "FDR")


@dataclass(frozen=True, eq=False, repr=False)
class RowAudit:
    """One row of an audit, with its tokens colored by their contribution to a candidate.

    In a notebook, tokens for the candidate are orange and underlined, tokens against it are blue
    and dotted, stronger for larger contributions. Hovering over a token shows its contribution and
    the baseline's choice.

    Attributes:
        row: The row's number.
        candidate: The candidate.
        prompt: The user's text.
        tokens: Texts of the completion's tokens.
        scores: Contribution of each token, in nats.
        choices: The baseline's choice at each token.
    """

    row: int
    candidate: str
    prompt: str
    tokens: tuple[str, ...]
    scores: Float32[np.ndarray, " tokens"]
    choices: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return (
            f"RowAudit({self.row} for {self.candidate!r}: {float(self.scores.sum()):+.2f} nats in "
            f"{len(self)} tokens)"
        )

    def _repr_html_(self) -> str:
        return (
            "<div style='font-family:sans-serif;font-size:14px;line-height:1.9'>"
            f"<div style='opacity:.75;white-space:pre-wrap'>row {self.row}: "
            f"{escape(self.prompt)}</div>"
            f"<div style='font-family:monospace;overflow-wrap:anywhere'>{self.spans()}</div>"
            "<div style='font-size:12px;line-height:1.5;opacity:.75'>"
            f"{float(self.scores.sum()):+.2f} nats for {escape(self.candidate)}; orange and solid "
            "for it, blue and dotted against it. Hover over a token for its contribution.</div>"
            "</div>"
        )

    def spans(self) -> str:
        """Return the tokens as HTML."""
        largest = float(np.abs(self.scores).max(initial=0.0)) or 1.0
        parts = zip(self.tokens, self.scores.tolist(), self.choices, strict=True)
        return "".join(_span(*part, largest) for part in parts)


def _span(token: str, score: float, choice: str, largest: float) -> str:
    color, line = (_FOR, "solid") if score > 0 else (_AGAINST, "dotted")
    strength = abs(score) / largest
    style = "display:inline-block;line-height:1.3;padding:1px 2px;margin:0 1px"
    style += ";border-radius:3px;white-space:pre-wrap"
    if strength > 0.05:
        style += f";background:rgba({color},{0.15 + 0.55 * strength:.2f})"
        style += f";border-bottom:2px {line}"
    title = escape(f"{score:+.3f} nats; the baseline's choice: “{choice}”")
    return f'<span style="{style}" title="{title}">{escape(token) or "∅"}</span>'


def audit_html(audit: "Audit") -> str:
    """Render the verdict and the table of candidates for a notebook."""
    return (
        "<div style='font-family:sans-serif;font-size:14px'>"
        f"<div><b>{escape(audit.verdict)}.</b> {escape(audit.explanation)}</div>"
        f"{_table(audit)}</div>"
    )


def _table(audit: "Audit") -> str:
    table = audit.to_dataframe()
    heads = "".join(
        f"<th style='{_CELL}'>{name}</th>" for name in ("candidate", "auditor", *_HEADINGS)
    )
    rows = []
    for record in table.head(_MOST).to_dict("records"):
        bold = ";font-weight:bold" if record["candidate"] in audit.biased else ""
        cells = [record["candidate"], record["kind"]]
        cells += [_number(record[name], name) for name in _COLUMNS]
        rows.append(
            "<tr>"
            + "".join(f"<td style='{_CELL}{bold}'>{escape(str(cell))}</td>" for cell in cells)
            + "</tr>"
        )
    more = f"<div>{len(table) - _MOST} more candidates</div>" if len(table) > _MOST else ""
    return (
        "<table style='color:inherit;font-size:inherit;border-collapse:collapse'>"
        f"<tr>{heads}</tr>{''.join(rows)}</table>{more}"
    )


def _number(value: float, name: str) -> str:
    return f"{value:.2g}" if name.startswith("p_") else f"{value:.2f}"


def write_page(audit: "Audit", path: str | os.PathLike[str]) -> None:
    """Write a self-contained page of about one screen: verdict, figure, table and top rows."""
    # Plotly is imported when a page is written, and not before.
    from divergence_lens.plots import figure_page

    parts = [f"<p><strong>{escape(audit.verdict)}.</strong> {escape(audit.explanation)}</p>"]
    details = [_table(audit)]
    if audit.by_token is not None:
        top = audit.rows(most=_SHOWN_ROWS)["row"]
        details += [f"<h2>Rows that speak most for {escape(audit.best)}</h2>"]
        details += [audit.show(int(row))._repr_html_() for row in top]
    power = audit.power
    facts = (
        f"{len(audit):,} rows, {len(audit.token_ids):,} tokens; baseline: "
        f"{audit.baseline.teacher.name} at temperature {audit.baseline.temperature:.2f}; "
        f"{audit.neutral[0, 0].size} lists by the base model and {audit.own.shape[-1]} by each "
        f"auditor for calibration; smallest detectable share of biased rows: "
        f"{power.detectable(len(audit)):.0%}."
    )
    if np.isnan(power.strength):
        facts = facts[: facts.rindex("; ")] + "."
    details += [f"<p>{escape(facts)}</p>"]
    page = figure_page(
        audit.plot(), title="Audit of a data set", above="".join(parts), below="".join(details)
    )
    write_text(Path(path), page)
