"""One self-contained HTML page with the findings of a study, their figures, and its tables.

The page loads nothing: it contains plotly's script, compressed, and a content security policy
forbids everything else. The templates escape all text from results. The page follows the reader's
light or dark setting, fits a phone, and prints.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from divergence_lens._utils.storage import write_text
from divergence_lens.plots.pages import FIGURE_CSS, figure_div, scripts

QUESTION = (
    "A teacher with a preference writes data that never mention it. Which tokens of these data "
    "carry the preference, which layers and positions of the model cause those tokens, and is "
    "training one layer on them enough to transfer the preference to a student?"
)
VERDICTS = {
    "supported": ("yes", "✓"),
    "not supported": ("no", "✗"),
    "unclear": ("open", "?"),
}
_TEMPLATES = Path(__file__).parent / "templates"
_SECTIONS = {
    "answer": "The answer",
    "examples": "Examples",
    "findings": "Claims",
    "one-by-one": "Claim by claim",
    "figures": "Further figures",
    "setting": "The setting",
    "tables": "Tables",
    "metadata": "Provenance",
}
_RUN = ("model", "seeds", "seconds")
_NOT_TABLES = ("settings", "findings", "question", "setting")
_FINDING_FIELDS = (
    *("measured", "unit", "interval", "n", "values", "related", "rule", "caveat", "figure_of"),
    *("difference", "difference_interval", "bootstrap_interval", "control"),
)


@runtime_checkable
class HasHtml(Protocol):
    """An object with a notebook view, such as `divergence[0]`."""

    def _repr_html_(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One column of a report's first screen.

    Attributes:
        heading: Such as the kind of teachers.
        sentences: The answer.
        findings: The findings whose ids begin with this are its verdicts; None for no verdicts.
        figures: Names of its figures, which are then not shown with their findings.
        wide: Whether it spans all columns, its figures beside the sentences.
    """

    heading: str
    sentences: Sequence[str]
    findings: str | None = ""
    figures: Sequence[str] = ()
    wide: bool = False


def write_report(
    path: str | os.PathLike[str],
    results: Mapping[str, Any],
    figures: Mapping[str, go.Figure] | None = None,
    examples: Mapping[str, str | HasHtml] | None = None,
    *,
    title: str = "Where a hidden preference travels",
    question: str = QUESTION,
    setting: str | Sequence[str] = (),
    answers: Sequence[Answer] = (),
) -> Path:
    """Write the page atomically.

    The first screen holds the answers with their verdicts and figures. Examples and one table of
    all claims follow; everything else is folded.

    Args:
        path: The file, usually `report.html`.
        results: The contents of `results.json`. `findings` is a list of rows as
            `Finding.to_dict` returns them; each needs `claim` and `verdict`, and `figure_of` (the
            id of another finding) links to that finding's figure. `settings` is shown as
            provenance at the end, everything else as tables. Ids of the form "kind/name" share a
            row of the table with the ids of other kinds and the same name.
        figures: Figures by name. A figure is shown with the finding whose id is its name or the
            part of its name before a colon or hyphen ("early: prompted"). All others follow the
            findings.
        examples: Heading -> an object with a notebook view (`divergence[3]`) or HTML. HTML is not
            escaped, so pass only HTML that a library generated.
        title: The page's heading.
        question: The research question in one or two sentences.
        setting: Paragraphs on the model, the data, and the procedure.
        answers: The columns of the first screen, side by side where there is room.

    Returns:
        The path.

    Raises:
        ValueError: A finding has no claim, or an unknown verdict.
    """
    findings = [_check_finding(row, i) for i, row in enumerate(results.get("findings", ()))]
    figures = figures or {}
    at_top = {name for answer in answers for name in answer.figures}
    owners = _assign_figures([str(row["id"]) for row in findings], figures)
    # Element ids of figures follow their order in `figures`.
    ids = {name: f"figure-{i + 1}" for i, name in enumerate(figures)}
    owned: dict[str, list[tuple[str, go.Figure]]] = {str(row["id"]): [] for row in findings}
    for name, owner in owners.items():
        if name not in at_top:
            owned[owner].append((ids[name], figures[name]))
    # A finding whose figure is at the top leads there, as do those that share its figure.
    moved = {owner for name, owner in owners.items() if name in at_top}
    for row in findings:
        row["at_top"] = row["id"] in moved
        if row["figure_of"] in moved:
            row |= {"figure_of": None, "at_top": True}
    claims: dict[str, dict[str, dict[str, Any]]] = {}
    for row in findings:
        claims.setdefault(_name_of(row["id"]), {})[_kind_of(row["id"])] = row
    settings = results.get("settings", {})
    tables = {name: value for name, value in results.items() if name not in _NOT_TABLES}
    columns = answers or [Answer(heading="", sentences=())]
    page: dict[str, Any] = {
        "title": title,
        "question": question,
        "setting": [setting] if isinstance(setting, str) else list(setting),
        "run": {name: settings[name] for name in _RUN if name in settings},
        "answers": [
            {
                "heading": answer.heading,
                "wide": answer.wide,
                "sentences": answer.sentences,
                "findings": [
                    row
                    for row in findings
                    if answer.findings is not None and row["id"].startswith(answer.findings)
                ],
                "figures": [(ids[name], figures[name]) for name in answer.figures],
            }
            for answer in columns
        ],
        "findings": findings,
        "kinds": list(dict.fromkeys(_kind_of(row["id"]) for row in findings)),
        "claims": claims,
        "finding_figures": owned,
        "other_figures": [
            (ids[name], figures[name])
            for name in figures
            if name not in owners and name not in at_top
        ],
        "examples": examples or {},
        "tables": tables,
        "data": Markup(_script_json(results)) if tables else "",  # noqa: S704 - "<" is escaped
        "settings": _flatten(settings),
    }
    present = {
        **dict.fromkeys(("answer", "setting"), True),
        **dict.fromkeys(("findings", "one-by-one"), findings),
        "figures": page["other_figures"],
        "examples": examples,
        "tables": tables,
        "metadata": settings,
    }
    page["sections"] = [(id_, words) for id_, words in _SECTIONS.items() if present[id_]]
    environment = _environment()
    content = environment.get_template("sections.html").render(page)
    # Only scripts with this nonce run. It is a hash of the text, so the text cannot contain it.
    nonce = hashlib.sha256((title + content).encode()).hexdigest()[:32]
    css = (_TEMPLATES / "report.css").read_text(encoding="utf-8") + FIGURE_CSS
    text = environment.get_template("page.html").render(
        page,
        nonce=nonce,
        css=Markup(css),  # noqa: S704 - our own style sheets
        content=Markup(content),  # noqa: S704 - rendered by the template above
        scripts=Markup(scripts(nonce) if figures else ""),  # noqa: S704 - our own scripts
    )
    path = Path(path)
    write_text(path, text)
    return path


def _check_finding(row: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The row with an id and with None for fields that it lacks."""
    if not row.get("claim"):
        raise ValueError(f"finding {index} has no claim; give it a sentence that can be wrong")
    verdict = row.get("verdict")
    if verdict not in VERDICTS:
        raise ValueError(
            f"finding {index} ({row.get('id', 'no id')}) has the verdict {verdict!r}; "
            f"it is one of {', '.join(map(repr, VERDICTS))}"
        )
    return {**dict.fromkeys(_FINDING_FIELDS), "id": f"finding-{index + 1}", **row}


def _assign_figures(ids: Sequence[str], figures: Mapping[str, go.Figure]) -> dict[str, str]:
    """The id of the finding that a figure belongs to, by the figure's name; the longest match."""
    owners = {}
    for name in figures:
        matches = [i for i in ids if name == i or name.startswith((f"{i}:", f"{i}-"))]
        if matches:
            owners[name] = max(matches, key=len)
    return owners


# -- tests and filters of the templates ---------------------------------------------------------


@cache
def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True)
    environment.globals["verdicts"] = VERDICTS
    environment.tests |= {"missing": _is_missing, "list_like": _is_list, "rows": _is_rows}
    environment.filters |= {
        "anchor": _anchor,
        "columns": _columns,
        "flat_items": lambda values: {k: v for k, v in values.items() if not _is_nested(v)},
        "heading": lambda name: _words(name)[:1].upper() + _words(name)[1:],
        "notebook_html": _notebook_html,
        "plot": lambda figure, name: Markup(figure_div(figure, name)),  # noqa: S704
        "short": _short,
        "kind_of": _kind_of,
        "signed": lambda value: f"{value:+.3f}",
        "three_digits": _three_digits,
        "words": _words,
    }
    return environment


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_rows(value: Any) -> bool:
    """Whether a value is a table: a non-empty sequence of mappings."""
    return _is_list(value) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _is_nested(value: Any) -> bool:
    return _is_rows(value) or (isinstance(value, Mapping) and bool(value))


def _short(value: Any) -> str:
    """A single value with a few significant digits."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """The columns of a table in order of appearance, and whether each holds only numbers."""
    names = dict.fromkeys(name for row in rows for name in row)
    cells = {name: [row.get(name) for row in rows] for name in names}
    return [
        (
            name,
            all(isinstance(cell, int | float | None) for cell in values)
            and not all(isinstance(cell, bool | None) for cell in values),
        )
        for name, values in cells.items()
    ]


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _kind_of(finding: str) -> str:
    """The kind in an id such as "prompted/transfer", or an empty text."""
    return finding.rpartition("/")[0]


def _name_of(finding: str) -> str:
    return finding.rpartition("/")[2]


def _three_digits(value: Any) -> str:
    """A number with three significant digits; integers as they are."""
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, float):
        return _short(value)
    shown = f"{value:#.3g}"
    return f"{value:,.0f}" if "e+" in shown else shown.removesuffix(".")


def _script_json(results: Mapping[str, Any]) -> str:
    """JSON that cannot end its script element; NaN becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): plain(item) for name, item in value.items()}
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return [plain(item) for item in value] if _is_list(value) else value

    return json.dumps(plain(results)).replace("<", "\\u003c")


def _anchor(finding: Any) -> str:
    letters = (letter if letter.isalnum() else "-" for letter in str(finding))
    return f"finding-{''.join(letters)}"


def _notebook_html(example: str | HasHtml) -> Markup:
    """HTML that a library made, or the notebook view of an object."""
    return Markup(example if isinstance(example, str) else example._repr_html_())  # noqa: S704


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names, so that provenance is one table."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
