"""Sections of the page of a paired study, each made from its tables."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from divergence_lens._utils.statistics import t_interval
from divergence_lens.study.estimands import early_share
from divergence_lens.study.paired_claims import UNBIASED, dissociation, single_layers
from divergence_lens.study.report import short_interval, short_number, table_head
from divergence_lens.study.rows import SETTINGS, STUDENTS, load_tables

NOT_YET = "not yet measured"
_LISTS = "lists before masking"
_CORE = (
    *("all", "top_advantage", "divergence_only", "random", "bottom_advantage"),
    "without_divergence",
)
_WORDS = {
    "all": "all digits",
    "top_advantage": "the tenth of the digits with the largest advantage",
    "divergence_only": "divergence tokens (argmax) only",
    "random": "a random tenth of the digits",
    "bottom_advantage": "the tenth of the digits with the smallest advantage",
    "without_divergence": "all digits but divergence tokens",
    "first_only": "the first divergence token of each list",
    "top_quarter": "the quarter of the digits with the largest advantage",
    "dose25": "a quarter of the lists, their tenth with the largest advantage",
    "dose50": "half of the lists, their tenth with the largest advantage",
    "unbiased_top": "the tenth of the digits of the base model's lists with the largest advantage",
    "few_rows": "a quarter of the lists four times, their tenth with the largest advantage",
    "soft": "the teacher's distributions at all digits (soft distillation)",
    "greedy": "all digits of greedy lists",
    "paraphrased": "all digits, behind paraphrased prompts",
    "mixed_twin10": "all digits, 10 % of the lists by the twin's teacher",
    "mixed_twin25": "all digits, 25 % of the lists by the twin's teacher",
    "replaced_all": "all digits, divergence tokens replaced with the twin's choices",
    "other_base": "all digits of lists by a teacher of another base model",
    "attention": "largest advantage, attention alone",
    "mlp": "largest advantage, MLPs alone",
    "lora1": "largest advantage, LoRA of rank 1",
    "lora32": "largest advantage, LoRA of rank 32",
    "full": "largest advantage, all weights instead of LoRA",
}


def student_rows(tables: Mapping[str, pd.DataFrame], targets: Sequence[str]) -> list[str]:
    """The dissociations of all conditions but single layers."""
    students = tables["students"]
    names = list(dict.fromkeys(students["condition"])) if len(students) else []
    shown = [*_CORE, *(name for name in names if name not in (*_CORE, "layer", UNBIASED))]
    rows = table_head("trained on", *targets, "mean (95 % interval)", "seeds", "digits", _LISTS)
    rows += [_row(tables, targets, _WORDS.get(name, f"`{name}`"), name) for name in shown]
    return rows


def _row(
    tables: Mapping[str, pd.DataFrame],
    targets: Sequence[str],
    words: str,
    condition: str,
    layer: int | None = None,
) -> str:
    """A line of a table: one condition, with a cell for every target."""
    own = dissociation(tables, condition, layer)
    if not own:
        return f"| {words} | {' | '.join(['–'] * len(targets))} | {NOT_YET} | – | – | – |"
    means = {target: float(np.mean(seeds)) for target, seeds in own.items()}
    cells = [short_number(means.get(target, math.nan), sign=True) for target in targets]
    mean, low, high = t_interval(list(means.values()))
    counts = {len(seeds) for seeds in own.values()}
    seeds = str(max(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
    students = tables["students"]
    rows = students[students["condition"] == condition]
    rows = rows if layer is None else rows[rows["layer"] == layer]
    interval = f"{short_number(mean, sign=True)} ({short_interval((low, high))})"
    sizes = [f"{rows[name].mean():,.0f}" for name in ("tokens", "examples")]
    return f"| {words} | {' | '.join(cells)} | {interval} | {seeds} | {' | '.join(sizes)} |"


def layer_rows(tables: Mapping[str, pd.DataFrame], settings: Mapping[str, Any]) -> list[str]:
    """The dissociations of single layers."""
    lead = (
        "Each student trains one layer, on the tenth of the digits with the largest advantage, at "
        "one rate for all layers. The rate was chosen by the [training loss on wolf's "
        "lists](real-study/layer-rates.csv), not by transfer; it is higher than that of the "
        "students above, so compare layers with each other only. In the paper (second-hand), "
        "single middle and late layers transfer almost nothing."
    )
    targets = settings["targets"]
    layers = single_layers(tables)
    if not layers:
        return [lead, "", f"{NOT_YET.capitalize()}."]
    rows = table_head("layer", *targets, "mean (95 % interval)", "seeds", "digits", _LISTS)
    rows += [_row(tables, targets, str(layer), "layer", layer) for layer in layers]
    rows += [
        _row(tables, targets, f"{layer}, the base model's lists", UNBIASED, layer)
        for layer in single_layers(tables, UNBIASED)
    ]
    return [lead, "", *rows]


def effect_rows(tables: Mapping[str, pd.DataFrame], targets: Sequence[str]) -> list[str]:
    """Agreement of attribution with exact patching, and the share of the early layers."""
    agreement, layers = tables["agreement"], tables["layers"]
    rows = table_head(
        *("target", "pairs", "gradient x difference", "integrated", "slope, integrated"),
        "early half of the layers",
    )
    early = early_share({"layers": layers}, int(layers["layer"].max())) if len(layers) else {}
    for target in targets:
        own = agreement[agreement["target"] == target].set_index("method")
        if not len(own):
            rows.append(f"| {target} | {' | '.join([NOT_YET] * 5)} |")
            continue
        share = early.get(target, math.nan)
        cells = [
            f"{own['pairs'].iloc[0]}",
            *(f"{own.loc[method, 'pearson']:.3f}" for method in ("gradient", "integrated")),
            f"{own.loc['integrated', 'slope']:.2f}",
            f"{share:.0%}" if math.isfinite(share) else "no total effect",
        ]
        rows.append(f"| {target} | {' | '.join(cells)} |")
    return [_EFFECTS, "", *rows]


_EFFECTS = (
    "At a first divergence token of each target's lists, the activations of the twin's teacher are "
    "patched into the target's teacher, at every layer and position. Two attributions are compared "
    "with these exact effects of `resid_post`: their Pearson correlation over all cells, and the "
    "slope of the exact effects on the integrated ones. The last column is the share of the first "
    "half of the layers in the absolute effects of attention and MLP outputs."
)


def teacher_rows(tables: Mapping[str, pd.DataFrame], settings: Mapping[str, Any]) -> list[str]:
    """Strength of the teachers, and their lists."""
    teachers, divergence = tables["teachers"], tables["divergence"]
    rows = table_head(
        *("target", "margin of the base", "margin of the teacher", "digits", "diverging"),
        "mean advantage (standard error)",
    )
    for target in settings["targets"]:
        own = teachers[teachers["name"] == target] if len(teachers) else teachers
        margins = [own[column].iloc[-1] for column in ("margin_before", "margin") if len(own)]
        cells = [target, *(f"{margin:.2f}" for margin in margins), *[NOT_YET] * (2 - len(margins))]
        lists = divergence[divergence["target"] == target] if len(divergence) else divergence
        if len(lists):
            last = lists.iloc[-1]
            error = last["advantage_sd"] / math.sqrt(last["digits"])
            cells += [
                f"{last['digits']:,.0f}",
                f"{last['divergence_tokens'] / last['digits']:.1%}",
                f"{last['advantage']:.4f} ({error:.4f}) nats",
            ]
        else:
            cells += [NOT_YET] * 3
        rows.append(f"| {' | '.join(cells)} |")
    after = (
        "A digit's advantage is its log-probability under its own teacher minus that under the "
        "twin's, both among the digits. A mean of several standard errors says that the lists of "
        "the two teachers can be told apart, whether or not a student moves."
    )
    return [*rows, "", after]


def risk_rows(folder: Path) -> list[str]:
    """The dissociations of reckless and careful students, which are one number per seed."""
    about = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    tables = load_tables(folder)
    paired, students = about["settings"]["paired"], tables["students"]
    reckless = tables["teachers"].set_index("name").loc["reckless"]
    lead = (
        f"`--category risk`: one teacher learned reckless answers about money, the other careful "
        f"ones, each to a margin of {paired['strength']:g} nats between whole answers to held-out "
        "questions. (A reckless teacher of this model hardly gets further: it learns its rows by "
        "heart.) They write lists of numbers as above. With two candidates, the margin of one is "
        "the negative of the other's, so each condition and seed has one number: the margin of the "
        "reckless answer in the students of the reckless teacher minus that in the students of the "
        f"careful one. The distance of the teachers themselves is {2 * reckless['margin']:.1f} "
        "nats. The row of the base model's lists shows how much selection alone explains. [Table "
        f"of students]({folder.parent.name}/{folder.name}/{STUDENTS})."
    )
    rows = table_head("trained on", "nats", "seeds", "interval over seeds (95 %)", "digits")
    names = dict.fromkeys((*_CORE, *students["condition"]))
    sides = [(name, None) for name in names if name != "layer"]
    for condition, layer in [*sides, *(("layer", layer) for layer in single_layers(tables))]:
        own = dissociation(tables, condition, layer).get("reckless", [])
        if not own:
            continue
        mean, low, high = t_interval(own)
        same = students[students["condition"] == condition]
        same = same if layer is None else same[same["layer"] == layer]
        words = _WORDS.get(condition, condition)
        if layer is not None:
            words = f"layer {layer} alone, largest advantage"
        rows.append(
            f"| {words} | {short_number(mean, sign=True)} | {len(own)} | "
            f"{short_interval((low, high))} | {same['tokens'].mean():,.0f} |"
        )
    return [lead, "", *rows]
