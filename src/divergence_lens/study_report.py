"""The page, the figures and the table of a study."""

import os
from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap

import plotly.graph_objects as go

from divergence_lens import plots
from divergence_lens.findings import Finding
from divergence_lens.report import HasHtml, write_report
from divergence_lens.study import Study

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
        figures[f"{kind}/few_divergence_tokens: where"] = plots.where_divergence_falls(own)
        figures[f"{kind}/transfer"] = plots.transfer_bars(students, kind=kind)
        if (students["condition"] == "block").any():
            figures[f"{kind}/first_block_beats_last"] = plots.layer_sweep(students, kind=kind)
        exact = {target: found for (k, target), found in study.exact.items() if k == kind}
        if not exact:
            continue
        name = f"{kind}/early_layers_cause_divergence"
        figures[name] = plots.layers_by_site(layers, kind=kind)
        # Figures of one target: the first, whichever it is.
        target = next(iter(exact))
        approximate = study.approximate[kind, target]
        figures[f"{name}: segments"] = plots.effects_by_segment(exact[target], name=target)
        figures[f"{name}: one pair"] = plots.effects_heatmap(exact[target], pair=0, name=target)
        figures[f"{name}: profile"] = plots.layer_profile(
            {"exact": exact[target], "integrated": approximate}, name=target
        )
        figures[f"{kind}/approximation_agrees"] = plots.agreement_scatter(
            approximate, exact[target], name=target
        )
    return figures


def write_study_report(study: Study, folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` and `figures/*.html` of a study.

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
        *(_SETTING[kind] for kind in settings["kinds"]),
    ]
    return write_report(
        out / "report.html", study.results, figures, _examples(study), setting=setting
    )


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
