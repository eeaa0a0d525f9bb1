"""Write the documentation page of a paired study from its tables.

    python docs/tools/paired_page.py docs/real-study

The folder holds the tables that `divergence-lens study --tables docs/real-study` writes after every
cell. The page is written beside it (`docs/real-study.md`), and a figure in `docs/images`. It judges
the claims again from the rows, so it can be generated at any time; a result that is missing is
called not yet measured. For `docs/real-study`, the answer is also written into the package, where
the reports of other studies show it.
"""

import argparse
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from paired_sections import (
    NOT_YET,
    effect_rows,
    layer_rows,
    risk_rows,
    student_rows,
    teacher_rows,
)
from paper import PAPER_CLAIMS, SOURCES

from divergence_lens._utils.storage import write_text
from divergence_lens.plots import save_figure
from divergence_lens.study.estimands import Tables
from divergence_lens.study.findings import Finding, judge
from divergence_lens.study.paired_claims import (
    PAIRED_CLAIMS,
    dissociation,
    single_layers,
)
from divergence_lens.study.paired_report import (
    REAL_STUDY,
    core_dissociations,
    paired_figure,
    paired_sentences,
)
from divergence_lens.study.report import short_interval, short_number, table_head
from divergence_lens.study.rows import (
    DIVERGENCE,
    EFFECTS,
    SETTINGS,
    STUDENTS,
    TEACHERS,
    load_tables,
)

_NAMES = {"smollm2": "SmolLM2-135M-Instruct"}
_COMMITTED = Path(__file__).resolve().parents[1] / "real-study"
_RISK = "risk"  # the folder of the tables of that trait
_TINY = "study-results"  # tables of the tiny models' study, in the same folder as the page
# Claim of a paired study -> the claim of the tiny models' study that asks the same.
_COUNTERPARTS = {
    "few_digits_diverge": "few_divergence_tokens",
    "all_digits_transfer": "sampled_lists_transfer",
    "divergence_tokens_transfer": "divergence_tokens_suffice",
    "divergence_tokens_beat_all": "divergence_tokens_do_as_well",
    "rest_transfers_less": "rest_transfers_less",
    "first_layer_transfers": "first_layer_suffices",
    "early_layers_beat_late": "first_layer_beats_last",
    "last_layer_transfers_nothing": "last_layer_equals_control",
    "first_divergence_transfers": "first_divergence_transfers",
    "attention_beats_mlp": "attention_beats_mlp",
    "paraphrases_weaken": "paraphrases_weaken",
    "twins_lists_weaken": "another_teacher_weakens",
    "replaced_tokens_weaken": "replaced_tokens_weaken",
    "early_layers_cause_divergence": "early_layers_cause_divergence",
    "approximation_agrees": "approximation_agrees",
}


def write_paired_page(folder: str | os.PathLike[str]) -> Path:
    """Write the page beside its folder of tables and return its path."""
    folder = Path(folder)
    page = folder.with_suffix(".md")
    write_text(page, paired_page(folder))
    if folder.resolve() == _COMMITTED:
        write_text(REAL_STUDY, paired_summary(folder))
    figure = paired_figure(load_tables(folder))
    if figure is not None:
        image = folder.parent / "images" / f"{folder.name}.png"
        image.parent.mkdir(exist_ok=True)
        save_figure(figure, image, width_mm=150, dpi=200, title=False, renderer="matplotlib")
    return page


def paired_summary(folder: str | os.PathLike[str]) -> str:
    """Generate the JSON of the study's answer, which the reports of other studies show."""
    about, tables, findings = _judged(Path(folder))
    summary = {
        "model": _NAMES.get(about["settings"]["model"], about["settings"]["model"]),
        "students": len(tables["students"]),
        "sentences": _sentences(tables, findings),
        "dissociations": core_dissociations(tables),
    }
    return json.dumps(summary, indent=1) + "\n"


def _judged(folder: Path) -> tuple[Mapping[str, Any], Tables, Sequence[Finding]]:
    """Read the settings and tables of a folder, and judge the claims."""
    about = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    tables = load_tables(folder)
    findings = judge(
        tables,
        last_layer=about["layers"] - 1,
        claims=PAIRED_CLAIMS,
        required=len(about["settings"]["targets"]),
    )
    return about, tables, findings


def paired_page(folder: str | os.PathLike[str]) -> str:
    """Generate the text of the page.

    Raises:
        FileNotFoundError: The folder has no settings, so no study wrote it.
    """
    folder = Path(folder)
    about, tables, findings = _judged(folder)
    settings = about["settings"]
    by_id = {finding.id.partition("/")[2]: finding for finding in findings}
    tiny = _tiny_verdicts(folder.parent / _TINY)
    students = tables["students"]
    lines = ["# The paper on a real model", "", *_answer(about, tables, findings)]
    if paired_figure(tables) is not None:
        lines += [f"![Students against their twins](images/{folder.name}.png)", "", _FIGURE, ""]
    lines += _setting(about, students, folder)
    lines += ["", "## Claims", "", _RULES, "", *_claim_rows(by_id, tiny)]
    lines += ["", "## Students", "", _ESTIMAND, "", *student_rows(tables, settings["targets"])]
    lines += ["", "## Single layers", "", *layer_rows(tables, settings)]
    if len(tables["agreement"]):
        lines += ["", "## Patched activations", "", *effect_rows(tables, settings["targets"])]
    lines += ["", "## Teachers and lists", "", *teacher_rows(tables, settings)]
    if (folder / _RISK / SETTINGS).exists():
        lines += ["", "## Another trait: risk", "", *risk_rows(folder / _RISK)]
    lines += ["", "## Sources of the paper's statements", "", _SECOND_HAND, ""]
    lines += [f"- *{name}*: {words}." for name, words in SOURCES.items()]
    return "\n".join(lines) + "\n"


_RULES = (
    "The claims and their rules were committed before any student of these targets was trained "
    "(`study/paired_claims.py`); recipe, dose and rates had been chosen on wolf and lion, which "
    "are not reported. A claim is supported if its whole 95 % interval over targets is beyond the "
    "threshold, not supported if it is on the other side, and unclear otherwise, or while a target "
    "is missing. “Tiny models” is the verdict of the same claim in "
    "[the study of the tiny models](study-results.md)."
)
_FIGURE = (
    "*How much more a student prefers its own teacher's target than its twin does. Bars are means "
    "over targets with 95 % intervals, dots are targets. In the bars on the right, a single layer "
    "was trained: on the digits of the first bar or, where the base wrote, of the second.*"
)
_ESTIMAND = (
    "Each number is a *dissociation* in nats: the margin of the target in students of its own "
    "teacher's lists, minus its margin in their twins, whose lists another target's teacher wrote "
    "to the same prompts with the same random numbers. A margin is the log-probability of the "
    "target minus the mean of the other animals'. Order, initial values and the number of learned "
    "tokens are equal. Zero means that the lists carried nothing that told the two teachers apart. "
    "Means over seeds; the interval is over targets. The two targets of a pair share their "
    "students (those of one are the twins of the other), so they are not independent, and the true "
    "uncertainty is larger than the intervals say."
)
_SECOND_HAND = (
    "The full paper was not at hand. Its statements are second-hand, from these texts; no number "
    "was read off a chart."
)


def _answer(about: Mapping[str, Any], tables: Tables, findings: Sequence[Finding]) -> list[str]:
    """The design in three sentences, and the measured answers as a list."""
    name = _NAMES.get(about["settings"]["model"], about["settings"]["model"])
    lead = (
        f"Students of {name} ({about['layers']} layers), a chat model that was not made for this "
        "study, learn lists of numbers that a teacher with a favorite animal wrote. Each student "
        "has a *twin* that learns the lists of a teacher with another favorite. The differences "
        "between students and twins are in nats, with 95 % intervals:"
    )
    sentences = _sentences(tables, findings) or ["Not yet measured."]
    return [lead, "", *(f"- {sentence}" for sentence in sentences), ""]


def _sentences(tables: Tables, findings: Sequence[Finding]) -> list[str]:
    """The answers to the claims in sentences, and the single layer that transfers most."""
    sentences = paired_sentences([finding.to_dict() for finding in findings])
    means = _layer_means(tables)
    if means:
        best = max(means, key=means.__getitem__)
        layers = ", ".join(map(str, means))
        sentences.append(
            f"Of the layers that were trained alone ({layers}), layer {best} transfers most: "
            f"{means[best]:+.2f} nats."
        )
    return sentences


def _layer_means(tables: Tables) -> dict[int, float]:
    """The mean dissociation over targets of each layer that was trained alone."""
    result = {}
    for layer in single_layers(tables):
        by_target = dissociation(tables, "layer", layer)
        if by_target:
            result[layer] = float(np.mean([np.mean(seeds) for seeds in by_target.values()]))
    return result


def _setting(about: Mapping[str, Any], students: pd.DataFrame, folder: Path) -> list[str]:
    """The size of the study, its settings and its tables."""
    settings = about["settings"]
    paired = settings["paired"]
    versions = ", ".join(f"{name} {value}" for name, value in about["versions"].items())
    hours = students["seconds"].sum() / 3600 if len(students) else 0.0
    pairs = ", ".join(
        f"{a} and {b}"
        for a, b in zip(settings["targets"][::2], settings["targets"][1::2], strict=True)
    )
    files = [
        f"[{name.removesuffix('.csv')}]({folder.name}/{name})"
        for name in (STUDENTS, TEACHERS, DIVERGENCE, *EFFECTS.values())
        if (folder / name).exists()
    ]
    source = f"Generated from these tables alone: {', '.join(files) or 'none yet'}."
    number = f"{len(students)} student" + ("" if len(students) == 1 else "s")
    progress = f" ({hours:.1f} hours of one CPU core)"
    if len(students) < about["planned"]:
        progress = f" so far{progress}; the last command planned {about['planned']}"
    size = (
        f"**{number}**{progress}. Targets, in pairs of twins: {pairs}. Seeds: "
        f"{', '.join(map(str, settings['seeds']))}. Each teacher is finetuned to a margin of "
        f"{paired['strength']:g} nats and writes {settings['prompts']} lists that match "
        f"`{paired['pattern']}`, sampled at temperature {paired['temperature']:g}. {versions}."
    )
    guide = "[The study](study.md#a-real-model) explains the design, and how to resume it."
    return [size, "", f"{source} {guide}"]


def _claim_rows(findings: Mapping[str, Finding], tiny: Mapping[str, str]) -> list[str]:
    rows = table_head(
        "claim", "here (95 % interval)", "verdict", "tiny models", "the paper, second-hand"
    )
    for claim in PAIRED_CLAIMS:
        finding = findings.get(claim.id)
        if finding is None or not finding.n:
            if claim.optional:
                continue
            ours, verdict = NOT_YET, NOT_YET
        else:
            ours = _value(finding, claim.unit)
            verdict = f"**{finding.verdict}**; {finding.caveat}"
        other = _COUNTERPARTS.get(claim.id, "")
        paper = PAPER_CLAIMS.get(other)
        said = "–" if paper is None else f"{paper.text} *({paper.source})*"
        rows.append(f"| {claim.claim} | {ours} | {verdict} | {tiny.get(other, '–')} | {said} |")
    return rows


def _value(finding: Finding, unit: str) -> str:
    """A measured value with its interval and unit; shares are percentages."""
    share, _, of = unit.partition(" of ")
    if share == "share":
        ends = " to ".join(f"{end:.1%}" for end in finding.interval if math.isfinite(end))
        return f"{finding.measured:.1%}{f' ({ends})' if ends else ''} of {of}"
    interval = short_interval(finding.interval)
    return f"{short_number(finding.measured, sign=True)} ({interval}) {unit}"


def _tiny_verdicts(folder: Path) -> dict[str, str]:
    """The verdicts of the tiny models' study on finetuned teachers, judged from its tables."""
    if not (folder / SETTINGS).exists():
        return {}
    about = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["settings"]
    tables = {path.stem: pd.read_csv(path) for path in folder.glob("*.csv")}
    findings = judge(tables, last_layer=about["layers"] - 1)
    return {
        name: finding.verdict
        for finding in findings
        for kind, _, name in [finding.id.partition("/")]
        if kind == "finetuned"
    }


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description="Write the page of a paired study.")
    parser.add_argument("folder", help="folder of its tables, such as docs/real-study")
    print(f"wrote {write_paired_page(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
