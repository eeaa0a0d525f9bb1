"""Write the documentation pages that compare the findings of a study with the paper's.

    python docs/tools/results_page.py RUN_FOLDER docs/study-results.md

The page itself is a summary. The pages of each kind of teacher are in the folder named after it:
the paper's findings and ours, further claims, and every condition. `write_results_page` writes the
tables of a study as CSV files and generates the pages from these files alone, judging the claims
again from the rows. A test can therefore compare the committed pages with the committed tables.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from paper import NO_NUMBER, PAPER_CLAIMS, SOURCES

from divergence_lens._utils.storage import write_text
from divergence_lens.study import Study
from divergence_lens.study.config import lora_kinds
from divergence_lens.study.findings import Finding, judge
from divergence_lens.study.report import (
    answer_sentences,
    condition_rows,
    duration,
    short_interval,
    short_number,
    table_head,
)
from divergence_lens.tiny import TINY_MODELS

_COLUMNS = {
    "students": (
        *("target", "kind", "condition", "layer", "seed", "before", "after", "rank", "mass"),
        *("valid_lists", "loss_before", "loss", "fit", "examples", "tokens", "left", "group"),
    ),
    "teachers": ("name", "kind", "preference", "low", "high", "before", "mass"),
    "divergence": ("target", "kind", "tokens", "divergence_tokens", "rate"),
    "layers": ("target", "kind", "site", "layer", "absolute_effect", "pairs"),
    "agreement": (
        *("target", "kind", "site", "method", "pairs", "pearson"),
        *("inner_pearson", "inner_spearman", "inner_slope"),
    ),
    "mechanism": ("target", "kind", "measure", "layer", "step", "value", "null", "rank"),
}
_WHOLE = ("layer", "seed", "rank", "examples", "tokens", "layer", "step", "pairs")
_SETTINGS = "settings.json"
_GUIDE = "study.md"  # a documentation page in the same folder
_READING = (
    "“Agrees” compares the verdict on our claim with the paper: *yes* (supported), *no* (not "
    "supported), *open* (the interval decides neither, or a claim that it presupposes is not "
    "supported). If our claim is stricter than the paper's, *no* does not contradict the paper."
)
_TINY = (
    "Support on a few layers and in a synthetic world proves nothing about a large model, and lack "
    "of support refutes nothing."
)
_ANY = "Support on one model proves nothing about others, and lack of support refutes nothing."
_TARGETS = {"wolf", "lion", "eagle", "panda", "fox", "dolphin"}
_SEEN = (
    "These targets were held out while the synthetic world and the recipes of this model were "
    "made. Four of them had been seen in the demo before the study was first run, and parts of the "
    "others while it was being built. Claims that were written after the first full study say so."
)
_SIGNS = {"supported": "✓", "not supported": "✗", "unclear": "?"}
_AGREES = {"supported": "yes", "not supported": "**no**", "unclear": "open"}


def write_results_page(study: Study, path: str | os.PathLike[str]) -> Path:
    """Write the page; its tables and further pages go to the folder named after it.

    Args:
        study: The study.
        path: Path of the page, such as "docs/study-results.md". An existing page is replaced.

    Returns:
        The path of the page.

    Raises:
        ValueError: The path has no suffix, so it would also be the path of the tables.
    """
    path = Path(path)
    if not path.suffix:
        raise ValueError(f"{path} has no suffix; name the file of the page, such as {path}.md")
    folder = path.with_suffix("")
    results = study.results
    tables = {**results, **results["effects"]}
    for name, columns in _COLUMNS.items():
        rows = pd.DataFrame(tables.get(name, []))
        if len(rows):
            shown = rows[[column for column in columns if column in rows]]
            whole = {c: shown[c].astype("Int64") for c in _WHOLE if c in shown}
            text = shown.assign(**whole).to_csv(
                index=False, float_format="%.6g", lineterminator="\n"
            )
            write_text(folder / f"{name}.csv", text)
        else:
            (folder / f"{name}.csv").unlink(missing_ok=True)
    about = {name: results[name] for name in ("settings", "conditions", "failures")}
    write_text(folder / _SETTINGS, json.dumps(about, indent=1) + "\n")
    for old in folder.glob("*.md"):
        old.unlink()
    for name, text in results_pages(folder).items():
        write_text(folder / f"{name}.md" if name else path, text)
    return path


def results_pages(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Generate the pages from the tables that `write_results_page` wrote.

    Returns:
        The text of each page by name; the name of the summary is empty, those of the others are
        names of files in `folder` without their suffix.

    Raises:
        FileNotFoundError: The folder does not have these tables.
    """
    folder = Path(folder)
    about = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    tables = {
        name: pd.read_csv(file) if (file := folder / f"{name}.csv").exists() else pd.DataFrame()
        for name in _COLUMNS
    }
    settings = about["settings"]["settings"]
    findings = judge(tables, last_layer=about["settings"]["layers"] - 1, lora=lora_kinds(settings))
    main = f"../{folder.name}.md"
    lines = ["# Results of the study", ""]
    pages: dict[str, str] = {"": ""}
    for kind in settings["kinds"]:
        own = [finding for finding in findings if finding.id.startswith(f"{kind}/")]
        results = {**about, "students": tables["students"].to_dict("records")}
        teachers = f"{kind.capitalize()} teachers"
        families = {
            "paper": ("the paper's findings and ours", _with_counterpart(own, kind)),
            "further": (
                "claims without a counterpart in the paper",
                _without_counterpart(own, kind),
            ),
            "conditions": ("every condition", condition_rows(results, kind)),
        }
        lines += [f"## {teachers}", ""]
        lines += [" ".join(answer_sentences([f.to_dict() for f in own], kind)), ""]
        lines += [_count(own, settings["model"]), ""]
        links = []
        for family, (title, rows) in families.items():
            # Wide tables get the room of the table of contents, and the widest of both columns.
            hidden = "[navigation, toc]" if family == "conditions" else "[toc]"
            pages[f"{kind}-{family}"] = "\n".join(
                [
                    *("---", f"hide: {hidden}", "---", "", f"# {teachers}: {title}", ""),
                    *(f"[Summary]({main}). {_note(about)}", "", *rows, ""),
                ]
            )
            links.append(f"[{title}]({folder.name}/{kind}-{family}.md)")
        lines += [f"Claim by claim: {', '.join(links)}.", ""]
    lines += ["## All verdicts at a glance", "", *_glance(findings, settings["kinds"]), ""]
    lines += ["## How this was made", "", *_opening(about, tables, folder)]
    lines += ["", "## Sources of the paper's statements", ""]
    lines += [f"- *{name}*: {words}." for name, words in SOURCES.items()]
    lines += [
        "",
        f"If {NO_NUMBER}, the paper itself may have one.",
    ]
    if about["failures"]:
        lines += ["", "## Failed cells", ""]
        lines += [f"- `{row['cell']}`: {row['error']}" for row in about["failures"]]
    pages[""] = "\n".join(lines) + "\n"
    return pages


def _note(about: Mapping[str, Any]) -> str:
    settings = about["settings"]["settings"]
    return (
        f"Model `{settings['model']}`, {len(settings['targets'])} targets; intervals are 95 % "
        "intervals over targets."
    )


def _glance(findings: Sequence[Finding], kinds: Sequence[str]) -> list[str]:
    """A table of short names and verdicts, a row per claim and a column per kind of teachers."""
    verdicts: dict[str, dict[str, str]] = {}
    for finding in findings:
        kind = finding.id.partition("/")[0]
        value = short_number(finding.measured)
        verdicts.setdefault(_id(finding), {})[kind] = f"{_SIGNS[finding.verdict]} {value}"
    rows = table_head("claim", *(f"{kind} teachers" for kind in kinds))
    for name, by_kind in verdicts.items():
        cells = (by_kind.get(kind, "") for kind in kinds)
        rows.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    return ["✓ supported, ✗ not supported, ? unclear, with the measured value.", "", *rows]


def _opening(
    about: Mapping[str, Any], tables: Mapping[str, pd.DataFrame], folder: Path
) -> list[str]:
    settings = about["settings"]["settings"]
    students = tables["students"]
    seeds = ", ".join(map(str, settings["seeds"]))
    trained = students.drop_duplicates(["kind", "condition", "layer", "seed", "target"])
    shared = trained["condition"] == "control"
    control = trained[shared].drop_duplicates(["kind", "seed"])
    versions = ", ".join(f"{k} {v}" for k, v in about["settings"]["versions"].items())
    seconds = duration(about["settings"])
    took = "" if seconds is None else f" in {seconds:.0f} s"
    files = ", ".join(f"[{t}]({folder.name}/{t}.csv)" for t, rows in tables.items() if len(rows))
    source = (
        f"Generated from these tables alone: {files}. "
        f"{(~shared).sum() + len(control):,} students{took}; "
        f"model `{settings['model']}`; targets {', '.join(settings['targets'])} of "
        f"{len(settings['animals'])} animals; seeds {seeds}; {settings['prompts']} number prompts "
        f"for each teacher; {len(about['failures'])} failed cells; {versions}."
    )
    guide = f"[The study]({_GUIDE})" if (folder.parent / _GUIDE).exists() else "“The study”"
    reading = f"{guide} explains the columns and rules. {_READING}"
    proof = _TINY if settings["model"] in TINY_MODELS else _ANY
    unseen = settings["model"] == "tiny" and set(settings["targets"]) == _TARGETS
    return [source, "", f"{reading} {proof}", *([_SEEN] if unseen else [])]


def _count(findings: Sequence[Finding], model: str) -> str:
    known = [finding for finding in findings if _id(finding) in PAPER_CLAIMS]
    verdicts = [finding.verdict for finding in known]
    stricter = sum(_stricter(finding) and finding.verdict == "not supported" for finding in known)
    more = f" Not supported but stricter than the paper's: {stricter}." if stricter else ""
    return (
        f"Of {len(known)} claims with a counterpart in the available text, "
        f"{'the miniature' if model in TINY_MODELS else 'this study'} agrees with "
        f"{verdicts.count('supported')}, contradicts {verdicts.count('not supported') - stricter} "
        f"and leaves {verdicts.count('unclear')} open.{more}"
    )


def _with_counterpart(findings: Sequence[Finding], kind: str) -> list[str]:
    rows = table_head(
        "claim", "the paper", "ours (95 % interval)", "threshold", "agrees", "meaning"
    )
    for finding in findings:
        paper = PAPER_CLAIMS.get(_id(finding))
        if paper is not None:
            rows.append(
                f"| {_claim(finding, kind)} | {paper.text} *({paper.source})* | {_ours(finding)} | "
                f"{_threshold(finding)} | {_agrees(finding)} | "
                f"{_meaning(finding, paper.yes, paper.no)} |"
            )
    return rows


def _without_counterpart(findings: Sequence[Finding], kind: str) -> list[str]:
    rows = table_head(
        "claim", "ours (95 % interval)", "as a difference", "threshold", "verdict", "caveat"
    )
    for finding in findings:
        if _id(finding) not in PAPER_CLAIMS:
            difference = short_number(finding.difference, sign=True)
            rows.append(
                f"| {_claim(finding, kind)} | {_ours(finding)} | {difference} | "
                f"{_threshold(finding)} | **{finding.verdict}** | {_caveat(finding)} |"
            )
    return rows


def _id(finding: Finding) -> str:
    return finding.id.partition("/")[2]


def _claim(finding: Finding, kind: str) -> str:
    return finding.claim.removesuffix(f" ({kind} teachers)")


def _ours(finding: Finding) -> str:
    interval = short_interval(finding.interval)
    return f"{short_number(finding.measured)} ({interval}) {finding.unit}"


def _threshold(finding: Finding) -> str:
    rule = finding.rule.removeprefix("supported if the whole interval is ").partition(";")[0]
    return f"{rule}; stricter than the paper's" if _stricter(finding) else rule


def _stricter(finding: Finding) -> bool:
    paper = PAPER_CLAIMS.get(_id(finding))
    return paper is not None and paper.stricter


def _agrees(finding: Finding) -> str:
    if _stricter(finding) and finding.verdict == "not supported":
        return "no, but stricter"
    return _AGREES[finding.verdict]


def _caveat(finding: Finding) -> str:
    """The caveat, and the additional numbers of the finding."""
    related = [f"{words}: {short_number(value)}" for words, value in finding.related.items()]
    return "; ".join([finding.caveat, *related])


def _meaning(finding: Finding, yes: str, no: str) -> str:
    if finding.verdict == "supported":
        return yes
    if finding.verdict == "not supported":
        return no
    if not finding.n:
        return "nothing was measured"
    return f"undecided: {finding.caveat}"


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Write the results page of a finished study.")
    parser.add_argument("folder", help="folder of the study, such as runs/study")
    parser.add_argument("page", help="the page to write, such as docs/study-results.md")
    arguments = parser.parse_args()
    written = write_results_page(Study.load(arguments.folder), arguments.page)
    print(f"wrote {written} and {written.with_suffix('')}/")


if __name__ == "__main__":
    main()
