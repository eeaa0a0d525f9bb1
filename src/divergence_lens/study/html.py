"""One self-contained HTML page with the findings of a study, their figures and their tables.

The page loads nothing: it contains plotly's script, compressed, and a content security policy
forbids everything else. All text from results is escaped. The page follows the reader's light or
dark setting, fits a phone, and prints.
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

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
_TEMPLATES = Path(__file__).parent / "templates"
_SETTING = ("model", "seeds", "seconds")
_LEVEL = "95\u00a0%"  # a non-breaking space keeps the number and its sign on one line
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
    rows = [{"interval": None, "n": None, "rule": None, **row} for row in findings]
    counts = ", ".join(
        f"{sum(row['verdict'] == verdict for row in findings)} {verdict}" for verdict in VERDICTS
    )
    return _environment().get_template("findings.html").render(findings=rows, counts=counts)


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
    body = "".join(f"{anchor}{heading}{content}" for anchor, heading, content in sections)
    # Only scripts with this nonce run. It changes with the content, so text cannot contain it.
    nonce = hashlib.sha256((title + body).encode()).hexdigest()[:32]
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
    )
    css = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=title,
            sections=[(anchor, heading, Markup(content)) for anchor, heading, content in sections],  # noqa: S704
            policy=Markup(policy),  # noqa: S704
            nonce=nonce,
            css=Markup(css + FIGURE_CSS),  # noqa: S704
            ending=Markup(scripts(nonce) if with_figures else ""),  # noqa: S704
        )
    )


@cache
def _environment() -> Environment:
    """The templates of the report. Values are escaped unless they are `Markup`."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, keep_trailing_newline=True
    )
    # These return HTML in which the values are escaped already.
    formatters: dict[str, Callable[[Any], str]] = {
        "anchor": _anchor,
        "interval": _interval,
        "measured": _measured,
        "text": _text,
        "verdict": _verdict,
    }
    for name, function in formatters.items():
        environment.filters[name] = _as_markup(function)
    return environment


def _as_markup(function: Callable[[Any], str]) -> Callable[[Any], Markup]:
    return lambda value: Markup(function(value))  # noqa: S704
