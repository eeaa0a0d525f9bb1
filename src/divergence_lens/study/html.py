"""One self-contained HTML page with the findings of a study, their figures and their tables.

The page loads nothing from anywhere: plotly's script is in it, compressed, and a content security
policy forbids the rest. All text from results is escaped. It follows the reader's light or dark
setting, fits a telephone and prints.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import plotly.graph_objects as go

from divergence_lens._utils.storage import write_text
from divergence_lens.plots.export import FIGURE_CSS, figure_div, scripts

QUESTION = (
    "A teacher that prefers one thing writes data that say nothing about it. Which tokens of these "
    "data carry the preference all the same, which layers and positions of the model cause those "
    "tokens, and is training one block on them enough to move the preference into a student?"
)
VERDICTS = {
    "supported": ("yes", "✓"),
    "not supported": ("no", "✗"),
    "unclear": ("open", "?"),
}
_SETTING = ("model", "seeds", "seconds")
_LEVEL = "95\u00a0%"  # the number and its sign stay on one line
_NOT_TABLES = ("settings", "findings", "question", "setting")


@runtime_checkable
class HasHtml(Protocol):
    """Anything that a notebook can show, such as `divergence[0]`."""

    def _repr_html_(self) -> str: ...


def write_report(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    figures: Mapping[str, go.Figure] | None = None,
    html_blocks: Mapping[str, str | HasHtml] | None = None,
    *,
    title: str = "Where a hidden preference travels",
    question: str = QUESTION,
    setting: str | Sequence[str] = (),
) -> Path:
    """Write the page, whole or not at all.

    Args:
        path: The file, usually `report.html`.
        results: What results.json holds. `findings` is a list of rows with `id`, `claim`,
            `measured`, `interval`, `verdict` ("supported", "not supported" or "unclear") and, if
            known, `unit`, `n` (of targets), `values` (of each), `beside` (other figures), `rule`,
            `caveat`, `figure_of` (the id of the finding whose figure shows this one too), and for
            ratios `difference`, `difference_interval`, `resampled` (an interval)
            and `control`, as `Finding` has them; `settings` goes to the end as provenance;
            everything else is shown as tables.
        figures: Name -> figure. A figure whose name is a finding's id, or begins with it and a
            colon or hyphen ("early: prompted"), stands beside that finding; the rest come after
            the findings, in order.
        html_blocks: Heading -> an object that notebooks can show (`divergence[3]`), or HTML, which
            goes into the page as it is: only pass HTML that a library made.
        title: The page's heading.
        question: What was asked, in a sentence or two.
        setting: Paragraphs that say what was done and on what.

    Returns:
        The path.

    Raises:
        ValueError: If a finding lacks a claim or has another verdict than these three.
    """
    findings = [_checked(row, i) for i, row in enumerate(results.get("findings", ()))]
    drawn = dict(figures or {})
    placed = _placed(findings, drawn)
    rest = [name for name in drawn if not any(name in names for names in placed)]
    names = {name: f"figure-{i + 1}" for i, name in enumerate(drawn)}
    paragraphs = [setting] if isinstance(setting, str) else list(setting)
    settings = results.get("settings", {})

    sections: list[tuple[str, str, str]] = [
        ("question", "The question", f"<p>{escape(question)}</p>"),
        ("setting", "The setting", _setting(paragraphs, settings)),
    ]
    if findings:
        sections.append(("findings", "Findings", _findings_table(findings)))
        parts = [
            _finding(row, [(names[name], drawn[name]) for name in own])
            for row, own in zip(findings, placed, strict=True)
        ]
        sections.append(("one-by-one", "Finding by finding", "".join(parts)))
    if rest:
        parts = [_figure(names[name], drawn[name]) for name in rest]
        sections.append(("figures", "Further figures", "".join(parts)))
    if html_blocks:
        parts = [_block(heading, block) for heading, block in html_blocks.items()]
        sections.append(("examples", "Examples", "".join(parts)))
    tables = {name: value for name, value in results.items() if name not in _NOT_TABLES}
    if tables:
        parts = [
            f"<h3>{_heading(name)}</h3>{_value(value, _words(name))}"
            for name, value in tables.items()
        ]
        sections.append(("tables", "Tables", "".join(parts)))
    if settings:
        sections.append(
            ("metadata", "Provenance", _value(_flat(settings), "settings and versions"))
        )
    path = Path(path)
    write_text(path, _page(title, sections, with_figures=bool(drawn)))
    return path


def _checked(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    if not row.get("claim"):
        raise ValueError(f"finding {index} has no claim; give it a sentence that can be wrong")
    verdict = row.get("verdict")
    if verdict not in VERDICTS:
        raise ValueError(
            f"finding {index} ({row.get('id', 'no id')}) has the verdict {verdict!r}; "
            f"it is one of {', '.join(map(repr, VERDICTS))}"
        )
    return {"id": f"finding-{index + 1}", **row}


def _placed(
    findings: Sequence[Mapping[str, Any]], figures: Mapping[str, go.Figure]
) -> list[list[str]]:
    """For each finding the names of its figures; each figure goes to the longest id that fits."""
    ids = [str(row["id"]) for row in findings]
    placed: list[list[str]] = [[] for _ in ids]
    for name in figures:
        fits = [i for i in ids if name == i or name.startswith((f"{i}:", f"{i}-"))]
        if fits:
            placed[ids.index(max(fits, key=len))].append(name)
    return placed


def _setting(paragraphs: Iterable[str], settings: Mapping[str, Any]) -> str:
    text = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs)
    known = {name: settings[name] for name in _SETTING if name in settings}
    return text + (_value(known, "the run in short") if known else "") or "<p>Not described.</p>"


def _findings_table(findings: Sequence[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<tr><th scope="row" data-label="claim"><a href="#{_anchor(row["id"])}">'
        f"{escape(str(row['claim']))}</a></th>"
        f'<td data-label="measured">{_measured(row)}</td>'
        f'<td data-label="95 % interval">{_interval(row.get("interval"))}</td>'
        f'<td data-label="targets">{_text(row.get("n"))}</td>'
        f'<td data-label="verdict">{_verdict(row["verdict"])}</td>'
        f'<td data-label="rule">{_text(row.get("rule"))}</td></tr>'
        for row in findings
    )
    heads = "".join(
        f'<th scope="col">{head}</th>'
        for head in ("claim", "measured", "95 % interval", "targets", "verdict", "rule")
    )
    counts = ", ".join(
        f"{sum(row['verdict'] == verdict for row in findings)} {verdict}" for verdict in VERDICTS
    )
    return (
        f"<p>{len(findings)} claims: {counts}.</p>"
        '<table class="cards"><caption class="unseen">Findings with verdicts</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _finding(row: Mapping[str, Any], figures: Sequence[tuple[str, go.Figure]]) -> str:
    parts = [
        f'<article id="{_anchor(row["id"])}"><h3>{escape(str(row["claim"]))}</h3>',
        f'<p>{_verdict(row["verdict"])} <span class="quiet">measured</span> ',
        _measured(row),
    ]
    if row.get("interval") is not None:
        parts.append(
            f' <span class="quiet">with a {_LEVEL} interval of</span> {_interval(row["interval"])}'
        )
    if row.get("n") is not None:
        parts.append(f' <span class="quiet">over</span> {_targets(row["n"])}')
    parts.append("</p>")
    parts += [
        f'<p><span class="quiet">{heading}:</span> {words}</p>'
        for heading, words in (
            ("Each target", _text(row["values"]) if row.get("values") else ""),
            ("As a difference", _difference(row)),
            ("Beside it", _text(row["beside"]) if row.get("beside") else ""),
            ("Rule", _text(row["rule"]) if row.get("rule") else ""),
        )
        if words
    ]
    parts += [_figure(name, figure) for name, figure in figures]
    if row.get("figure_of"):
        parts.append(
            f'<p><a href="#{_anchor(row["figure_of"])}">The figure that shows it</a> '
            "stands beside another finding.</p>"
        )
    if row.get("caveat"):
        parts.append(f'<p class="caveat"><strong>Bear in mind:</strong> {_text(row["caveat"])}</p>')
    return "".join([*parts, "</article>"])


def _measured(row: Mapping[str, Any]) -> str:
    """The number with its unit."""
    unit = f' <span class="quiet">{_text(row["unit"])}</span>' if row.get("unit") else ""
    return _text(row.get("measured")) + unit


def _difference(row: Mapping[str, Any]) -> str:
    """What a ratio is in shares, and its interval by resampling; nothing for other findings."""
    if row.get("difference") is None:
        return ""
    parts = [f"{row['difference']:+.3f}"]
    if row.get("difference_interval") is not None:
        low, high = row["difference_interval"]
        parts[0] += f" ({low:+.3f} to {high:+.3f})"
    if row.get("control") is not None:
        parts.append(f"control students' mean preference {_text(row['control'])}")
    if row.get("resampled") is not None:
        parts.append(
            f"interval of the ratio by resampling targets and seeds: {_interval(row['resampled'])}"
        )
    return "; ".join(parts)


def _targets(n: int) -> str:
    return f"{n} target" + ("" if n == 1 else "s")


def _figure(name: str, figure: go.Figure) -> str:
    return f"<figure>{figure_div(figure, name)}</figure>"


def _block(heading: str, block: str | HasHtml) -> str:
    content = block if isinstance(block, str) else block._repr_html_()
    return f'<h3>{escape(heading)}</h3><div class="block">{content}</div>'


def _anchor(finding: Any) -> str:
    plain = "".join(letter if letter.isalnum() else "-" for letter in str(finding))
    return f"finding-{escape(plain)}"


def _verdict(verdict: str) -> str:
    kind, sign = VERDICTS[verdict]
    return (
        f'<span class="verdict {kind}"><span aria-hidden="true">{sign}</span> '
        f"{escape(verdict)}</span>"
    )


def _interval(interval: Any) -> str:
    if isinstance(interval, Sequence) and not isinstance(interval, str) and len(interval) == 2:
        ends = f"{_text(interval[0])} to {_text(interval[1])}"
        return f'<span class="whole">{ends}</span>'
    return _text(interval)


def _text(value: Any) -> str:
    """A value in words and short figures, escaped."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return '<span class="quiet">–</span>'
    if isinstance(value, Mapping):
        return "; ".join(f"{escape(str(name))}: {_text(item)}" for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_text(item) for item in value)
    return escape(_short(value))


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _value(value: Any, caption: str) -> str:
    """A table for what is one, tables in tables for nested mappings, words for the rest."""
    if _is_nested(value) and not isinstance(value, Mapping):
        return _rows_table(value, caption)
    if isinstance(value, Mapping) and value:
        nested = {k: v for k, v in value.items() if _is_nested(v)}
        plain = {k: v for k, v in value.items() if k not in nested}
        table = _pairs_table(plain, caption) if plain else ""
        return table + "".join(
            f"<h4>{_heading(str(name))}</h4>{_value(part, _words(str(name)))}"
            for name, part in nested.items()
        )
    return f"<p>{_text(value) or 'none'}</p>"


def _is_nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value)
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(item, Mapping) for item in value)
    )


def _rows_table(rows: Sequence[Mapping[str, Any]], caption: str) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    classes = {
        name: ' class="number"'
        if all(isinstance(row.get(name), int | float | None) for row in rows)
        and not all(isinstance(row.get(name), bool | None) for row in rows)
        else ""
        for name in columns
    }
    heads = "".join(
        f'<th scope="col"{classes[name]}>{escape(_words(name))}</th>' for name in columns
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{classes[name]}>{_text(row.get(name))}</td>" for name in columns)
        + "</tr>"
        for row in rows
    )
    table = _scrolling(
        f'<table><caption class="unseen">{escape(caption)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>",
        caption,
    )
    if len(rows) <= 12:
        return table
    return f"<details><summary>{escape(caption)}: {len(rows):,} rows</summary>{table}</details>"


def _pairs_table(values: Mapping[str, Any], caption: str) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(_words(str(name)))}</th><td>{_text(value)}</td></tr>'
        for name, value in values.items()
    )
    return _scrolling(
        f'<table class="pairs"><caption class="unseen">{escape(caption)}</caption>'
        f"<tbody>{body}</tbody></table>",
        caption,
    )


def _scrolling(table: str, caption: str) -> str:
    """A table that scrolls by itself, with the keyboard too, where the page is too narrow."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"{table}</div>"
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _heading(name: str) -> str:
    words = _words(name)
    return escape(words[:1].upper() + words[1:])


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names, so that provenance is one table."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _page(title: str, sections: Sequence[tuple[str, str, str]], *, with_figures: bool) -> str:
    links = "".join(
        f'<li><a href="#{anchor}">{escape(heading)}</a></li>' for anchor, heading, _ in sections
    )
    body = "".join(
        f'<section id="{anchor}" aria-labelledby="{anchor}-heading">'
        f'<h2 id="{anchor}-heading">{escape(heading)}</h2>{content}</section>'
        for anchor, heading, content in sections
    )
    # Only scripts with this mark run; it changes with the content, so text cannot bring its own.
    nonce = hashlib.sha256((title + body).encode()).hexdigest()[:32]
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )
    ending = scripts(nonce) if with_figures else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{_CSS}{FIGURE_CSS}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the text</a>
<header><h1>{escape(title)}</h1>
<nav aria-label="Contents"><ul>{links}</ul></nav></header>
<main id="main">{body}</main>
<footer><p>Written by divergence-lens. This page is complete in itself and loads nothing.
Figures are drawn by plotly.js (MIT licence).</p></footer>
<script nonce="{nonce}">{_OPEN_FOR_PRINT}</script>
{ending}
</body>
</html>
"""


_OPEN_FOR_PRINT = """
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
"""

_CSS = """
:root {
  --ink: #1f2328; --quiet: #59636e; --paper: #ffffff; --raised: #f6f8fa; --line: #d1d9e0;
  --link: #0a5ca8; --yes: #0b6b3a; --no: #a33a00; --open: #59636e;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8eb; --quiet: #a3adb8; --paper: #15181c; --raised: #1e2329; --line: #39424c;
    --link: #7cbcf2; --yes: #5fd39a; --no: #ff9d66; --open: #b4bec8;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem clamp(0.8rem, 3vw, 2.5rem); max-width: 68rem;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
p, li { max-width: 44rem; }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.2rem); line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 {
  font-size: 1.35rem; line-height: 1.3; margin: 2.8rem 0 0.8rem;
  border-top: 1px solid var(--line); padding-top: 1.2rem;
}
h3 { font-size: 1.1rem; line-height: 1.4; margin: 2rem 0 0.5rem; }
h4 { font-size: 1rem; margin: 1.2rem 0 0.4rem; }
a { color: var(--link); text-underline-offset: 0.15em; }
a:focus-visible, .scroll:focus-visible, summary:focus-visible
{ outline: 2px solid var(--link); outline-offset: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; list-style: none; padding: 0; }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: 0.5rem; }
.quiet, footer { color: var(--quiet); }
footer { margin-top: 3rem; border-top: 1px solid var(--line); font-size: 0.9rem; }
article { border-bottom: 1px solid var(--line); padding-bottom: 1.2rem; }
article:last-child { border-bottom: 0; }
figure { margin: 1rem 0; }
.caveat { border-left: 3px solid var(--line); padding-left: 0.9rem; }
.block { border: 1px solid var(--line); border-radius: 6px; padding: 0.8rem 1rem;
  overflow-x: auto; }
.verdict, .whole { white-space: nowrap; }
.verdict { font-weight: 600; }
.verdict.yes { color: var(--yes); }
.verdict.no { color: var(--no); }
.verdict.open { color: var(--open); }
.scroll { overflow-x: auto; margin: 0.6rem 0 1.2rem; }
table { border-collapse: collapse; font-size: 0.92rem; line-height: 1.45; }
caption { text-align: left; }
th, td { text-align: left; vertical-align: top; padding: 0.4rem 0.8rem 0.4rem 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--quiet); font-weight: 600; border-bottom-width: 2px;
  vertical-align: bottom; }
tbody th { font-weight: 500; }
.scroll td, .scroll th { overflow-wrap: normal; }
.pairs td { overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.cards { width: 100%; }
.cards thead th { overflow-wrap: normal; }
.cards tbody th { width: 26%; }
.cards td[data-label="measured"] { width: 19%; }
.cards td:last-child { width: 24%; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
summary { cursor: pointer; color: var(--link); }
@media (max-width: 60rem) {
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%); }
  .cards, .cards tbody, .cards tr, .cards th, .cards td { display: block; width: auto; }
  .cards tr { border: 1px solid var(--line); border-radius: 6px; padding: 0.5rem 0.8rem;
    margin-bottom: 0.8rem; background: var(--raised); }
  .cards tbody th, .cards td[data-label="measured"], .cards td:last-child { width: auto; }
  .cards th, .cards td { border: 0; padding: 0.2rem 0; }
  .cards td::before { content: attr(data-label) ": "; color: var(--quiet); }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav, .skip { display: none; }
  .scroll, .block { overflow: visible; }
  table { font-size: 8.5pt; }
  tr, figure { break-inside: avoid; }
  h2, h3, h4, thead, summary { break-after: avoid; }
  .modebar { display: none; }
  a { color: inherit; text-decoration: none; }
}
"""
