"""The report of a paired study: margins of students against those of their twins."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from divergence_lens import plots
from divergence_lens.study.estimands import Tables
from divergence_lens.study.html import Answer, write_report
from divergence_lens.study.paired_claims import UNBIASED, dissociation, single_layers
from divergence_lens.study.result import Study

QUESTION = (
    "Which tokens and which layers of a student carry its teacher's preference? Every student has "
    "a twin that learned from another teacher's lists, and only their difference counts."
)
REAL_STUDY = Path(__file__).with_name("real_study.json")
REAL_FIGURE = "a real model"
_FIGURE = "students and twins"
_CORE = {
    "top_advantage": "top tenth",
    "unbiased_top": "base's top tenth",
    "divergence_only": "divergence",
    "all": "all digits",
    "random": "random tenth",
    "without_divergence": "not divergence",
    "bottom_advantage": "bottom tenth",
}
# Claim -> a sentence with its value; sentences of claims without a value are left out.
_SENTENCES = {
    "few_digits_diverge": "At {} of the digits the other teacher of the pair would have written "
    "something else.",
    "all_digits_transfer": "Students of all digits prefer their teacher's target more than their "
    "twins do, by {}.",
    "divergence_tokens_transfer": "With divergence tokens alone, the difference is {}.",
    "top_advantage_transfers": "With the tenth of the digits that most favor the teacher over "
    "the twin's, it is {}.",
    "selection_suffices": "The same selection among lists that the base model wrote, which has no "
    "such preference, gives {}.",
    "authors_matter": "With that selection, the teacher's own lists differ from these by {}.",
    "bottom_advantage_reverses": "The tenth that least favors it gives {}.",
    "first_layer_transfers": "Training the first layer alone on the most favorable tenth gives {}.",
    "unbiased_first_layer_transfers": "Training the first layer alone on the same selection of the "
    "base model's lists gives {}.",
    "last_layer_transfers_nothing": "Training the last layer alone gives {}.",
}


def core_dissociations(tables: Tables) -> dict[str, dict[str, list[float]]]:
    """The dissociations of the core conditions and single layers that have any.

    Returns:
        Short name -> target -> one number per seed, in nats.
    """
    shown = {words: dissociation(tables, name) for name, words in _CORE.items()}
    for label, words in (("layer", "layer {}"), (UNBIASED, "base's layer {}")):
        for layer in single_layers(tables, label):
            shown[words.format(layer)] = dissociation(tables, label, layer)
    return {name: by_target for name, by_target in shown.items() if by_target}


def paired_figure(tables: Tables, *, others: bool = False) -> go.Figure | None:
    """Draw the core conditions and the single layers, or with `others` the further conditions.

    Returns:
        The figure; None if no such student has its twin yet.
    """
    shown = core_dissociations(tables)
    if others:
        students = tables["students"]
        names = dict.fromkeys(students["condition"]) if len(students) else {}
        shown = {
            name.replace("_", " "): dissociation(tables, name)
            for name in names
            if name not in (*_CORE, "layer", UNBIASED)
        }
    if not any(shown.values()):
        return None
    title = "Further conditions against their twins" if others else "Students against their twins"
    return plots.dissociation_bars(shown, title=title)


def paired_sentences(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The answer of a paired study in sentences, from its findings."""
    rows = {row["id"].partition("/")[2]: row for row in findings}
    sentences = []
    for name, form in _SENTENCES.items():
        row = rows.get(name)
        if row is None or row["measured"] is None or not np.isfinite(row["measured"]):
            continue
        value = f"{row['measured']:.1%}"
        if row["unit"].startswith("nats"):
            ends = [end for end in row["interval"] or () if end is not None and np.isfinite(end)]
            known = f" ({ends[0]:+.2f} to {ends[1]:+.2f})" if len(ends) == 2 else ""
            value = f"{row['measured']:+.2f}{known} nats"
        sentences.append(form.format(value))
    return sentences


def real_model_answer() -> tuple[Answer, go.Figure]:
    """The answer of the committed study of a real model, and its figure, for other reports.

    `docs/tools/paired_page.py` writes the file beside this module from the study's tables.
    """
    stored = json.loads(REAL_STUDY.read_text(encoding="utf-8"))
    lead = (
        f"Not from this run: {stored['students']} students of {stored['model']}, each with a twin "
        "that learned from another teacher's lists."
    )
    answer = Answer(
        heading="On a real model",
        sentences=[lead, *stored["sentences"]],
        findings=None,
        figures=[REAL_FIGURE],
        wide=True,
    )
    return answer, plots.dissociation_bars(stored["dissociations"])


def write_paired_report(study: Study, folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` and `figures/*.html` of a paired study.

    Args:
        study: What `run_study` returned.
        folder: The study's folder.

    Returns:
        The path of the page.
    """
    out = Path(folder)
    about = study.results["settings"]
    settings = about["settings"]
    design = settings["paired"]
    tables: dict[str, pd.DataFrame] = {"students": study.table("students")}
    figures = {_FIGURE: paired_figure(tables), "further": paired_figure(tables, others=True)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    plots.save_figures(drawn, out / "figures")
    pairs = ", ".join(
        f"{one} and {other}"
        for one, other in zip(settings["targets"][::2], settings["targets"][1::2], strict=True)
    )
    setting = (
        f"{settings['model']}, {about['layers']} layers. Pairs of targets: {pairs}; seeds "
        f"{', '.join(map(str, settings['seeds']))}. Each teacher was finetuned until its margin "
        f"was {design['strength']:g} nats, and wrote {settings['prompts']} lists that match "
        f"{design['pattern']}, at temperature {design['temperature']:g}. The two teachers of a "
        "pair answered the same prompts with the same random numbers. A margin is the "
        "log-probability of the target minus the mean of the other candidates', in nats. Intervals "
        "are over targets (Student's t)."
    )
    return write_report(
        out / "report.html",
        study.results,
        drawn,
        question=QUESTION,
        setting=setting,
        answers=[
            Answer(
                heading="",
                sentences=paired_sentences(study.results["findings"]),
                figures=[_FIGURE] if _FIGURE in drawn else [],
            )
        ],
    )
