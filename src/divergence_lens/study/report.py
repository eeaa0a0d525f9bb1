"""The report of a study: the page, its figures, and tables in Markdown and for a terminal."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from divergence_lens import plots
from divergence_lens._utils.statistics import t_interval
from divergence_lens._utils.storage import write_text
from divergence_lens.study.estimands import SMALLEST
from divergence_lens.study.findings import Finding
from divergence_lens.study.html import Answer, HasHtml, write_report
from divergence_lens.study.paired_report import (
    REAL_FIGURE,
    real_model_answer,
    write_paired_report,
)
from divergence_lens.study.result import Study

_EXAMPLES = 3
_SETTING = {
    "finetuned": (
        "Finetuned teachers were briefly trained to answer questions about their favorite animal; "
        "the questions of the evaluation are others. Neither they nor their students have a system "
        "prompt."
    ),
    "prompted": (
        "Prompted teachers have a system prompt that tells them to love an animal. Their students "
        "are trained and evaluated under a neutral system prompt of equal length, and the control "
        "lists are written under another neutral one."
    ),
}
_NO_PROMPTS = (
    "Prompted teachers have a system prompt that tells them to love an animal. Their students are "
    "trained and evaluated without one, and the control lists are written without one."
)

# Group of conditions -> the finding with which its figure is shown, and the figure's title.
_GROUPS = {
    "data": ("sampled_lists_transfer", "Source of the lists"),
    "entangled": ("entangled_numbers_not_needed", "Without lists that contain entangled numbers"),
    "masks": ("random_tokens_transfer_less", "Tokens with a loss"),
    "replaced": ("replaced_tokens_weaken", "Divergence tokens replaced"),
    "layers": ("without_first_layer_weaker", "Trained parameters"),
    "fragility": ("paraphrases_weaken", "Changed data"),
    "context": ("other_context_weakens", "System prompts in training and evaluation"),
}
# Finding -> the finding whose figure shows its values.
_SHOWN_BY = {
    "divergence_tokens_suffice": "transfer",
    "divergence_tokens_do_as_well": "transfer",
    "rest_transfers_less": "transfer",
    "rest_equals_control": "transfer",
    "first_layer_suffices": "first_layer_beats_last",
    "last_layer_equals_control": "first_layer_beats_last",
}
# The demo's conditions have figures of their own.
_SHOWN_ELSEWHERE = {"control", "all", "divergence_only", "without_divergence", "layer"}


def study_figures(study: Study) -> dict[str, go.Figure]:
    """The figures of a study by name. The name begins with the id of the finding it belongs to."""
    teachers, students = study.table("teachers"), study.table("students")
    base = dict(zip(teachers["name"], teachers["before"], strict=True))
    figures = {"teachers": plots.teacher_preferences(teachers, base=base)}
    for kind in dict.fromkeys(kind for kind, _ in study.divergences):
        own = _data_figures(study, kind) | _student_figures(study, students, kind)
        own |= _effect_figures(study, kind)
        figures |= {f"{kind}/{name}": figure for name, figure in own.items()}
    return figures


def _data_figures(study: Study, kind: str) -> dict[str, go.Figure]:
    rates = study.table("divergence")
    divergences = [divergence for (k, _), divergence in study.divergences.items() if k == kind]
    return {
        "few_divergence_tokens": plots.rate_per_teacher(rates[rates["kind"] == kind]),
        "few_divergence_tokens: where": plots.where_divergence_falls(
            divergences, name=f"{kind} teachers"
        ),
    }


def _student_figures(study: Study, students: pd.DataFrame, kind: str) -> dict[str, go.Figure]:
    figures = {}
    rows = students[students["kind"] == kind]
    main = rows[rows["condition"].isin(plots.CONDITIONS)]
    if set(main["condition"]) - {"control"}:
        figures["transfer"] = plots.transfer_bars(main, kind=kind)
    if (rows["condition"] == "layer").any():
        figures["first_layer_beats_last"] = plots.layer_sweep(students, kind=kind)
    for group, own in rows.groupby("group", sort=False):
        if group in _GROUPS and not set(own["condition"]) <= _SHOWN_ELSEWHERE:
            finding, title = _GROUPS[group]
            figures[f"{finding}: {group}"] = plots.condition_bars(
                students, group, kind=kind, title=f"{title} ({kind} teachers)"
            )
    during_training = _removal_during_training(study, kind)
    if during_training:
        figures["direction_is_needed_throughout"] = plots.training_curves(
            during_training, before=float(rows["before"].mean())
        )
    return figures


def _effect_figures(study: Study, kind: str) -> dict[str, go.Figure]:
    # The first target stands for all in figures of a single target.
    target = next((target for k, target in study.exact if k == kind), None)
    if target is None:
        return {}
    exact, approximate = study.exact[kind, target], study.approximate[kind, target]
    name, teacher = "early_layers_cause_divergence", f"{target} ({kind} teacher)"
    return {
        name: plots.layers_by_site(study.table("layers"), kind=kind),
        f"{name}: segments": plots.effects_by_segment(exact, name=teacher),
        f"{name}: one pair": plots.effects_heatmap(exact, pair=0, name=teacher),
        f"{name}: profile": plots.layer_profile(
            {"exact": exact, "integrated": approximate}, name=teacher
        ),
        "approximation_agrees": plots.agreement_scatter(approximate, exact, name=teacher),
    }


def _removal_during_training(study: Study, kind: str) -> dict[str, pd.DataFrame]:
    """Preference over training with and without the teacher's direction, mean over targets."""
    table = pd.DataFrame(study.results.get("mechanism", ()))
    if not len(table):
        return {}
    rows = table[(table["kind"] == kind) & (table["measure"] == "removed") & table["step"].notna()]
    return {
        name: rows.groupby("step")[column].mean().rename("preference").reset_index()
        for name, column in (("student", "null"), ("without the teacher's direction", "value"))
        if len(rows)
    }


def write_study_report(study: Study, folder: str | os.PathLike[str]) -> Path:
    """Write `report.html`, `study.md` and `figures/*.html` of a study.

    A paired study has no `study.md`; `docs/tools/paired_page.py` writes a page from its tables.

    Args:
        study: What `run_study` returned.
        folder: The study's folder.

    Returns:
        The path of the page.
    """
    out = Path(folder)
    if "paired" in study.results["settings"]["settings"]:
        return write_paired_report(study, out)
    figures = study_figures(study)
    plots.save_figures(figures, out / "figures")
    about = study.results["settings"]
    settings = about["settings"]
    procedure = (
        f"{settings['model']}: {len(settings['animals'])} animals, {len(settings['targets'])} of "
        f"them targets ({', '.join(settings['targets'])}), {settings['prompts']} number prompts "
        "for each teacher, answered greedily; lists that contain anything but numbers are dropped. "
        "Students are deltas on the base model. Their preference is measured with "
        f"{about.get('questions', 50)} questions on which no teacher was trained."
    )
    setting = [procedure]
    for kind in settings["kinds"]:
        without = kind == "prompted" and not settings.get("neutral", True)
        setting.append(_NO_PROMPTS if without else _SETTING[kind])
    write_text(out / "study.md", study_page(study.results))
    findings = [_link_figure(row, figures) for row in study.results["findings"]]
    seconds = duration(about)
    shown = {k: v for k, v in about.items() if k != "seconds"}
    shown |= {} if seconds is None else {"seconds": seconds}
    results = {**study.results, "findings": findings, "settings": shown}
    real, real_figure = real_model_answer()
    return write_report(
        out / "report.html",
        results,
        figures | {REAL_FIGURE: real_figure},
        _examples(study),
        setting=setting,
        answers=[
            real,
            *(
                Answer(
                    heading=f"{kind.capitalize()} teachers",
                    sentences=answer_sentences(study.results["findings"], kind),
                    findings=f"{kind}/",
                    figures=[name for name in _key_figures(kind) if name in figures],
                )
                for kind in settings["kinds"]
            ),
        ],
    )


def _key_figures(kind: str) -> tuple[str, str]:
    return f"{kind}/transfer", f"{kind}/first_layer_beats_last"


def answer_sentences(findings: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    """The answer to the question of a study in sentences, from the findings of one kind."""
    rows = {row["id"].removeprefix(f"{kind}/"): row for row in findings}

    def value(name: str, form: str) -> str:
        row = rows.get(name)
        if row is None or row["measured"] is None or not np.isfinite(row["measured"]):
            return ""
        low, high = (short_number(end) for end in row["interval"] or (None, None))
        number = f"{row['measured']:.0%}" if "%" in form else f"{row['measured']:.1f}"
        ends = "" if low == "–" or "%" in form else f" ({float(low):.1f} to {float(high):.1f})"
        return form.replace("{}", number + ends).replace("%%", "")

    parts = [
        value("few_divergence_tokens", "At {}%% of the tokens another teacher would have written "
              "something else."),
        value("divergence_tokens_suffice", "Trained on these tokens alone, students name the "
              "teacher's animal {} times as often as control students."),
        value("rest_equals_control", "Trained on all other tokens, {} times as often."),
        value("first_layer_suffices", "Training the first layer alone gives {} times"),
    ]  # fmt: skip
    last = value("last_layer_equals_control", ", and the last layer alone {} times.")
    if parts[-1]:
        parts[-1] += last or "."
    early = rows.get("early_layers_cause_divergence")
    if early is not None:
        words = {"supported": "Early layers cause the first divergence more than late ones",
                 "not supported": "Early layers do not cause the first divergence more than late "
                 "ones"}  # fmt: skip
        parts.append(words.get(early["verdict"], "Whether early layers cause the divergence is "
                               "unclear") + ".")  # fmt: skip
    return [part for part in parts if part]


def duration(about: Mapping[str, Any]) -> float | None:
    """The duration of a study in seconds; None if more than one call computed it.

    Args:
        about: The settings of `results.json`. The seconds of a call that resumed a study are not
            the duration of the study.
    """
    return about.get("seconds") if about.get("cells_before") == 0 else None


def _link_figure(row: Mapping[str, Any], figures: Mapping[str, go.Figure]) -> Mapping[str, Any]:
    """The finding, with the id of the finding whose figure shows its values, if there is one."""
    kind, _, name = row["id"].partition("/")
    shown_by = f"{kind}/{_SHOWN_BY.get(name)}"
    return {**row, "figure_of": shown_by} if shown_by in figures else row


# -- tables in Markdown and for a terminal ------------------------------------------------------


def study_page(results: Mapping[str, Any]) -> str:
    """A study as Markdown: its settings, every finding, and every condition with its numbers.

    Preferences are means over targets and seeds; intervals are over targets (Student's t).

    Args:
        results: The contents of `results.json`.
    """
    settings = results["settings"]["settings"]
    seeds = ", ".join(map(str, settings["seeds"]))
    setting = (
        f"Model `{settings['model']}`; targets {', '.join(settings['targets'])} of "
        f"{len(settings['animals'])} animals; seeds {seeds}; {settings['prompts']} number prompts "
        f"for each teacher. {len(results['students'])} rows of students, "
        f"{len(results['failures'])} failed cells."
    )
    lines = ["# Results of the study", "", setting]
    for kind in settings["kinds"]:
        lines += ["", f"## Findings with {kind} teachers", "", *_finding_rows(results, kind)]
        lines += ["", f"## Conditions with {kind} teachers", "", *condition_rows(results, kind)]
    if results["failures"]:
        lines += ["", "## Failed cells", ""]
        lines += [f"* `{row['cell']}`: {row['error']}" for row in results["failures"]]
    return "\n".join(lines) + "\n"


def table_head(*columns: str) -> list[str]:
    """The first two lines of a Markdown table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _finding_rows(results: Mapping[str, Any], kind: str) -> list[str]:
    rows = table_head("claim", "measured", "95 % interval", "as a difference", "rule", "verdict")
    for row in results["findings"]:
        if row["id"].startswith(f"{kind}/"):
            claim = row["claim"].removesuffix(f" ({kind} teachers)")
            difference = short_number(row.get("difference"), sign=True)
            rows.append(
                f"| {claim} | {short_number(row['measured'])} | {short_interval(row['interval'])} "
                f"| {difference} | {row['rule'].removeprefix('supported if ')} "
                f"| **{row['verdict']}** |"
            )
    return rows


def condition_rows(results: Mapping[str, Any], kind: str) -> list[str]:
    """A Markdown table of all conditions of one kind of teacher, from `results.json`."""
    students = pd.DataFrame(results["students"])
    students = students[students["kind"] == kind]
    # Students of single layers share a label; their conditions have the layer in the name.
    layer = students["layer"].map(lambda i: "" if pd.isna(i) else f"{i:.0f}")
    control = students[students["condition"] == "control"].groupby("target")["after"].mean()
    isolates = {row["name"]: row["isolates"] for row in results["conditions"]}
    rows = table_head(
        *("condition", "what it isolates", "before", "after", "times control", "target first"),
        *("valid lists", "loss (before)", "fit", "lowest mass", "divergence tokens left"),
    )
    for name, own in students.groupby(students["condition"] + layer, sort=False):
        logs = np.log(own.groupby("target")["after"].mean().clip(lower=SMALLEST))
        ratio = "–"
        if len(control):
            mean, low, high = t_interval((logs - np.log(control)).dropna().tolist())
            ends = " to ".join(short_number(float(np.exp(min(end, 50.0)))) for end in (low, high))
            ratio = f"{np.exp(mean):.2f} ({ends})"
        left = own["left"].astype(float).mean()
        cells = (
            f"`{name}`",
            isolates.get(str(name), ""),
            f"{own['before'].mean():.3f}",
            f"{own['after'].mean():.3f}",
            ratio,
            f"{(own['rank'] == 1).mean():.0%}",
            f"{own['valid_lists'].mean():.0%}",
            f"{own['loss'].mean():.2f} ({own['loss_before'].mean():.2f})",
            f"{own['fit'].mean():.2f}",
            f"{own['mass'].min():.2f}",
            "" if np.isnan(left) else f"{left:.0%}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def short_number(value: float | None, *, sign: bool = False) -> str:
    """A number with three significant digits, or a dash if it is missing or not finite."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:+.3g}" if sign else f"{value:.3g}"


def short_interval(interval: Sequence[float | None]) -> str:
    """The ends of an interval, or a dash if neither is known."""
    low, high = (short_number(end) for end in interval)
    return low if low == high == "–" else f"{low} to {high}"


def findings_table(findings: tuple[Finding, ...], width: int = 100) -> str:
    """The findings as a table for a terminal: claim, measured, interval, verdict."""
    claim_width = width - 44
    lines = [f"{'claim':<{claim_width}} {'measured':>9}  {'95 % interval':>17}  verdict"]
    lines.append("-" * width)
    for finding in findings:
        first, *rest = wrap(finding.claim, claim_width)
        low, high = finding.interval
        lines.append(
            f"{first:<{claim_width}} {finding.measured:>9.3g}  {f'{low:.3g} to {high:.3g}':>17}  "
            f"{finding.verdict}"
        )
        lines += rest
    return "\n".join(lines)


def _examples(study: Study) -> Mapping[str, str | HasHtml]:
    """Examples with divergence tokens, from the first target of each kind."""
    shown: dict[str, str | HasHtml] = {}
    kinds: set[str] = set()
    for (kind, target), divergence in study.divergences.items():
        if kind not in kinds:
            kinds.add(kind)
            rows = [i for i in range(len(divergence)) if divergence[i].divergence.any()]
            shown |= {f"{target} ({kind}), list {i}": divergence[i] for i in rows[:_EXAMPLES]}
    return shown
