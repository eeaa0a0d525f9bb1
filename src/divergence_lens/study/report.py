"""The page, the figures and the table of a study."""

import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from divergence_lens import plots
from divergence_lens._utils.storage import write_text
from divergence_lens.study.findings import Finding, t_interval
from divergence_lens.study.html import HasHtml, write_report
from divergence_lens.study.result import Study

_EXAMPLES = 3
_SETTING = {
    "finetuned": (
        "Finetuned teachers answer questions about their favourite animal after a short training "
        "on other such questions; they have no system prompt, and neither have their students."
    ),
    "prompted": (
        "Prompted teachers are told in their system prompt to love an animal. Their students are "
        "trained and asked under a neutral system prompt of equal length, and the control lists "
        "are written under another neutral one."
    ),
}
_NO_PROMPTS = (
    "Prompted teachers are told in their system prompt to love an animal. Their students are "
    "trained and asked without one, and the control lists are written without one."
)


# The finding that a group's figure stands beside, and its title.
_GROUPS = {
    "data": "sampled_lists_transfer",
    "entangled": "entangled_numbers_not_needed",
    "masks": "random_tokens_transfer_less",
    "replaced": "replaced_tokens_weaken",
    "layers": "without_first_layer_weaker",
    "fragility": "paraphrases_weaken",
    "context": "other_context_weakens",
}
_TITLES = {
    "data": "Where the lists come from",
    "entangled": "Without the lists that hold entangled numbers",
    "masks": "Which tokens have a loss",
    "replaced": "Divergence tokens overwritten",
    "layers": "What learns",
    "fragility": "Changed data",
    "context": "System prompts of training and asking",
}
# Findings whose numbers stand in the figure of another.
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


def _has_more(students: pd.DataFrame, kind: str, group: str) -> bool:
    rows = students[(students["kind"] == kind) & (students["group"] == group)]
    return not set(rows["condition"]) <= _SHOWN_ELSEWHERE


def study_figures(study: Study) -> dict[str, go.Figure]:
    """The figures of a study by name; one that shows a finding has the finding's id as its name."""
    teachers, divergence = study.table("teachers"), study.table("divergence")
    students = study.table("students")
    layers = study.table("layers")
    figures: dict[str, go.Figure] = {
        "teachers": plots.teacher_preferences(
            teachers, base=dict(zip(teachers["name"], teachers["before"], strict=True))
        )
    }
    for kind in dict.fromkeys(kind for kind, _ in study.divergences):
        own = [found for (k, _), found in study.divergences.items() if k == kind]
        figures[f"{kind}/few_divergence_tokens"] = plots.rate_per_teacher(
            divergence[divergence["kind"] == kind]
        )
        figures[f"{kind}/few_divergence_tokens: where"] = plots.where_divergence_falls(
            own, name=f"{kind} teachers"
        )
        of_kind = students[students["kind"] == kind]
        main = of_kind[of_kind["condition"].isin(plots.CONDITIONS)]
        if set(main["condition"]) - {"control"}:
            figures[f"{kind}/transfer"] = plots.transfer_bars(main, kind=kind)
        if (of_kind["condition"] == "layer").any():
            figures[f"{kind}/first_layer_beats_last"] = plots.layer_sweep(students, kind=kind)
        for group in dict.fromkeys(of_kind["group"]):
            if group in _GROUPS and _has_more(students, kind, group):
                figures[f"{kind}/{_GROUPS[group]}: {group}"] = plots.condition_bars(
                    students, group, kind=kind, title=f"{_TITLES[group]} ({kind} teachers)"
                )
        followed = _followed(study, kind)
        if followed:
            figures[f"{kind}/direction_is_needed_throughout"] = plots.preference_over_training(
                followed, before=float(of_kind["before"].mean())
            )
        exact = {target: found for (k, target), found in study.exact.items() if k == kind}
        if not exact:
            continue
        name = f"{kind}/early_layers_cause_divergence"
        figures[name] = plots.layers_by_site(layers, kind=kind)
        # Figures of one target: the first, whichever it is.
        target = next(iter(exact))
        whose = f"{target} ({kind} teacher)"
        approximate = study.approximate[kind, target]
        figures[f"{name}: segments"] = plots.effects_by_segment(exact[target], name=whose)
        figures[f"{name}: one pair"] = plots.effects_heatmap(exact[target], pair=0, name=whose)
        figures[f"{name}: profile"] = plots.layer_profile(
            {"exact": exact[target], "integrated": approximate}, name=whose
        )
        figures[f"{kind}/approximation_agrees"] = plots.agreement_scatter(
            approximate, exact[target], name=whose
        )
    return figures


def _followed(study: Study, kind: str) -> dict[str, pd.DataFrame]:
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

    Args:
        study: What `run_study` returned.
        folder: The study's folder.

    Returns:
        The path of the page.
    """
    out = Path(folder)
    figures = study_figures(study)
    for name, figure in figures.items():
        plots.save_figure(figure, out / "figures" / f"{_file_name(name)}.html")
    settings = study.results["settings"]["settings"]
    targets = ", ".join(settings["targets"])
    setting = [
        (
            f"{settings['model']}: {len(settings['animals'])} animals, "
            f"{len(settings['targets'])} of them targets ({targets}), {settings['prompts']} number "
            "prompts for each teacher, answered greedily; lists with anything but numbers are "
            f"dropped. Students are deltas over the untouched base, asked {_questions(study)} "
            "questions that no teacher was trained on."
        ),
        *(
            _NO_PROMPTS
            if kind == "prompted" and not settings.get("neutral", True)
            else _SETTING[kind]
            for kind in settings["kinds"]
        ),
    ]
    write_text(out / "study.md", study_page(study.results))
    findings = [_with_its_figure(row, figures) for row in study.results["findings"]]
    about = {k: v for k, v in study.results["settings"].items() if k != "seconds"}
    seconds = duration(study.results["settings"])
    about |= {} if seconds is None else {"seconds": seconds}
    results = {**study.results, "findings": findings, "settings": about}
    return write_report(out / "report.html", results, figures, _examples(study), setting=setting)


def duration(about: Mapping[str, Any]) -> float | None:
    """How many seconds a study took, if all of it was computed in the call that gave these results.

    Args:
        about: The settings of `results.json`. A call that found cells there tells its own seconds,
            which are not those of the study; older files do not say what was there.
    """
    return about.get("seconds") if about.get("cells_before") == 0 else None


def _with_its_figure(row: Mapping[str, Any], figures: Mapping[str, go.Figure]) -> Mapping[str, Any]:
    """The finding, with the id of the one whose figure shows it, if that figure is there."""
    kind, _, name = row["id"].partition("/")
    shown_by = f"{kind}/{_SHOWN_BY.get(name)}"
    return {**row, "figure_of": shown_by} if shown_by in figures else row


def study_page(results: Mapping[str, Any]) -> str:
    """A study in Markdown: its settings, every finding, and every condition with its numbers.

    Args:
        results: What `results.json` holds; a study that was committed will do.

    Returns:
        The text of a page. Preferences are means over targets and seeds, intervals are over targets
        (Student's t).
    """
    settings = results["settings"]["settings"]
    students = pd.DataFrame(results["students"])
    seeds = ", ".join(map(str, settings["seeds"]))
    setting = (
        f"Model `{settings['model']}`; targets {', '.join(settings['targets'])} of "
        f"{len(settings['animals'])} animals; seeds {seeds}; {settings['prompts']} number prompts "
        f"for each teacher. {len(students)} rows of students, "
        f"{len(results['failures'])} failed cells."
    )
    lines = ["# What the study found", "", setting]
    for kind in settings["kinds"]:
        lines += ["", f"## Findings with {kind} teachers", "", *_finding_rows(results, kind)]
        lines += ["", f"## Conditions with {kind} teachers", "", *condition_rows(results, kind)]
    if results["failures"]:
        lines += ["", "## Cells that failed", ""]
        lines += [f"* `{row['cell']}`: {row['error']}" for row in results["failures"]]
    return "\n".join(lines) + "\n"


def _finding_rows(results: Mapping[str, Any], kind: str) -> list[str]:
    rows = [
        "| claim | measured | 95 % interval | as a difference | rule | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["findings"]:
        if row["id"].startswith(f"{kind}/"):
            claim = row["claim"].removesuffix(f" ({kind} teachers)")
            low, high = (short_number(end) for end in row["interval"])
            difference = short_number(row.get("difference"), sign=True)
            rows.append(
                f"| {claim} | {short_number(row['measured'])} | {low} to {high} | {difference} | "
                f"{row['rule'].removeprefix('supported if the ')} | **{row['verdict']}** |"
            )
    return rows


def condition_rows(results: Mapping[str, Any], kind: str) -> list[str]:
    """A Markdown table of all conditions of one kind of teacher, from `results.json`."""
    students = pd.DataFrame(results["students"])
    students = students[students["kind"] == kind]
    names = students["condition"].where(
        students["layer"].isna(),
        students["condition"] + [f"{b:.0f}" for b in students["layer"].fillna(-1)],
    )
    control = students[students["condition"] == "control"].groupby("target")["after"].mean()
    isolates = {row["name"]: row["isolates"] for row in results["conditions"]}
    heads = (
        *("condition", "what it isolates", "before", "after", "times control", "target first"),
        *("valid lists", "loss (before)", "fit", "lowest mass", "divergence tokens left"),
    )
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, own in students.groupby(names, sort=False):
        logs = np.log(own.groupby("target")["after"].mean().clip(lower=1e-6))
        times = "–"
        if len(control):
            mean, low, high = t_interval((logs - np.log(control)).dropna().tolist())
            ends = " to ".join(short_number(float(np.exp(min(end, 50.0)))) for end in (low, high))
            times = f"{np.exp(mean):.2f} ({ends})"
        left = own["left"].astype(float).mean()
        rows.append(
            f"| `{name}` | {isolates.get(str(name), '')} | {own['before'].mean():.3f} | "
            f"{own['after'].mean():.3f} | {times} | {(own['rank'] == 1).mean():.0%} | "
            f"{own['valid_lists'].mean():.0%} | {own['loss'].mean():.2f} "
            f"({own['loss_before'].mean():.2f}) | {own['fit'].mean():.2f} | "
            f"{own['mass'].min():.2f} | "
            f"{'' if np.isnan(left) else f'{left:.0%}'} |"
        )
    return rows


def short_number(value: float | None, *, sign: bool = False) -> str:
    """A number in three digits, a dash where there is none."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:+.3g}" if sign else f"{value:.3g}"


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
    """Examples with divergence tokens in them, from the first target of each kind."""
    shown: dict[str, str | HasHtml] = {}
    for kind in dict.fromkeys(kind for kind, _ in study.divergences):
        divergence = next(found for (k, _), found in study.divergences.items() if k == kind)
        places = [i for i in range(len(divergence)) if divergence[i].divergence.any()][:_EXAMPLES]
        for i in places:
            shown[f"{divergence.teacher.name} ({kind}), list {i}"] = divergence[i]
    return shown


def _questions(study: Study) -> int:
    return int(study.results["settings"].get("questions", 50))


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).replace("--", "-").strip("-")
