"""Figures of students: their preference after training, by data and by layer."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from divergence_lens._utils.statistics import t_interval
from divergence_lens._utils.tables import Table, checked_table
from divergence_lens._utils.wording import plural
from divergence_lens.evaluation import Preference
from divergence_lens.plots import bars as bar_charts
from divergence_lens.plots import profiles, style
from divergence_lens.plots.labels import (
    CONDITIONS,
    condition_words,
    controls_of,
    means_by_target,
    of_condition,
    one_kind,
    students_of,
)
from divergence_lens.training import Sweep

_MOST_BARS = 8  # conditions whose names fit side by side


def transfer_bars(students: Table, *, kind: str | None = None) -> go.Figure:
    """Draw students' preference after training, by target and condition.

    Bars are means over seeds, with a dot per student. The control and the preference before
    training are lines.

    Args:
        students: The `students` table of results.json: `target`, `kind`, `condition`, `seed`,
            `before`, `after`. Rows of the condition "layer" are left out.
        kind: The kind of teachers, required if the table holds more than one.

    Raises:
        ValueError: The table has no such rows, or more than one kind and `kind` is None.
    """
    table, kind = _students(students, kind)
    table = table[table["condition"] != "layer"]
    shown = [str(name) for name in dict.fromkeys(table["condition"]) if name != "control"]
    known = list(CONDITIONS)
    shown.sort(key=lambda name: known.index(name) if name in known else len(known))
    if not shown:
        raise ValueError(
            f"the students table has no rows of kind {kind!r} trained on all layers to show"
        )
    bars = []
    for condition in shown:
        rows = table[table["condition"] == condition]
        words, short = condition_words(condition)
        mean = rows.groupby("target", sort=False)[["before", "after"]].mean()
        count = rows.groupby("target", sort=False).size()
        targets = [str(target) for target in mean.index]
        bars.append(
            bar_charts.Bars(
                label=short,
                groups=targets,
                values=mean["after"].to_numpy(float),
                hover=[
                    f"{target}, {words}: {style.percent(after)} after training, "
                    f"{style.percent(before)} before (mean of {plural(int(n), 'student')})"
                    for target, before, after, n in zip(
                        targets, mean["before"], mean["after"], count, strict=True
                    )
                ],
                points=[
                    (
                        str(target),
                        float(after),
                        f"{target}, {words}, seed {seed}: {style.percent(after)}",
                    )
                    for target, after, seed in zip(
                        rows["target"], rows["after"], rows["seed"], strict=True
                    )
                ],
            )
        )
    lines = [bar_charts.Line("before training", means_by_target(table, "before"), "dash")]
    control = table[table["condition"] == "control"]
    if len(control):
        lines.append(bar_charts.Line("control", means_by_target(control, "after"), "dot"))
    targets_shown = table["target"].nunique()
    return bar_charts.bars(
        bars,
        headline=f"Students of {kind} teachers, by training data",
        detail=f"{plural(targets_shown, 'target')}, {students_of(table)}; "
        "bars: means over seeds, dots: students",
        value_title="preference for the target",
        lines=lines,
    )


def condition_bars(
    students: Table, group: str, *, kind: str | None = None, title: str | None = None
) -> go.Figure:
    """Draw the preference of a group of conditions as multiples of the control.

    Values are geometric means over targets with 95 % intervals (Student's t on the log scale) and a
    dot per target: bars side by side, or rows on an axis of ratios for more than eight conditions.
    Without a control, they are multiples of the preference before training.

    Args:
        students: The `students` table of a study: `target`, `kind`, `condition`, `group`, `seed`,
            `before`, `after`, and `layer` for students of single layers.
        group: The group of conditions. The conditions "all" and "divergence_only" precede it for
            comparison.
        kind: The kind of teachers, required if the table holds more than one.
        title: Title of the figure; by default the group's name.

    Raises:
        ValueError: There is no student of the group, or more than one kind and `kind` is None.
    """
    table, kind = _students(students, kind, "group")
    shown = table[(table["group"] == group) & (table["condition"] != "control")]
    if shown.empty:
        raise ValueError(f"the students table has no rows of kind {kind!r} in the group {group!r}")
    beside = table[table["condition"].isin(["all", "divergence_only"]) & (table["group"] != group)]
    shown = pd.concat([beside, shown])
    control = table[table["condition"] == "control"]
    base = means_by_target(control, "after") if len(control) else means_by_target(table, "before")
    single = shown["layer"].notna() if "layer" in shown else shown["target"].isna()
    names = shown["condition"].where(
        ~single, shown["condition"] + " " + pd.Series(_whole(shown), index=shown.index)
    )
    times = shown["after"] / shown["target"].map(base)
    logs = np.log(times.clip(lower=1e-6)).groupby([names, shown["target"]], sort=False).mean()
    groups, means, ends, points = [], [], [], []
    for name, by_target in logs.groupby(level=0, sort=False):
        label = str(name).replace("_", " ")
        mean, low, high = t_interval(by_target.to_list())
        groups.append(label)
        means.append(float(np.exp(mean)))
        known = np.isfinite(low)
        ends.append((np.exp(low), np.exp(high)) if known else (means[-1], means[-1]))
        points += [
            (label, float(np.exp(value)), f"{target}, {label}: {np.exp(value):.2f} times")
            for (_, target), value in by_target.items()
        ]
    low_high = np.array(ends, dtype=float)
    series = bar_charts.Bars(
        label="mean",
        groups=groups,
        values=np.array(means),
        low=low_high[:, 0],
        high=low_high[:, 1],
        hover=[f"{g}: {m:.2f} times" for g, m in zip(groups, means, strict=True)],
        points=points,
    )
    headline = title or f"Students of {kind} teachers: {group}"
    value_title = "preference, times the control" if len(control) else "preference, times before"
    in_rows = len(groups) > _MOST_BARS
    detail = (
        f"{plural(shown['target'].nunique(), 'target')}, "
        f"{students_of(pd.concat([shown, control]))}; {'diamonds' if in_rows else 'bars'}: means "
        "with 95 % intervals over targets, dots: targets"
    )
    if in_rows:
        return bar_charts.dot_plot(
            series, headline=headline, detail=detail, value_title=value_title
        )
    return bar_charts.bars(
        [series], headline=headline, detail=detail, value_title=value_title, value_format=""
    )


def dissociation_bars(
    dissociations: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    title: str = "Students against their twins",
) -> go.Figure:
    """Draw how far students prefer their own teacher's target over their twins, by condition.

    Bars are means over targets with 95 % intervals (Student's t), dots are targets.

    Args:
        dissociations: Name of a condition -> target -> a value per seed in nats; see
            `study.paired_claims.dissociation`.
        title: Title of the figure.

    Raises:
        ValueError: There is no value.
    """
    means = {
        condition: {target: float(np.mean(seeds)) for target, seeds in targets.items()}
        for condition, targets in dissociations.items()
        if targets
    }
    if not means:
        raise ValueError("no condition has a student and its twin; compute some of them first")
    intervals = np.array([t_interval(list(by_target.values())) for by_target in means.values()])
    # With one target there is no interval, and the bar is drawn without one.
    intervals = np.where(np.isfinite(intervals), intervals, intervals[:, :1])
    series = bar_charts.Bars(
        label="mean",
        groups=list(means),
        values=intervals[:, 0],
        low=intervals[:, 1],
        high=intervals[:, 2],
        hover=[
            f"{name}: {mean:+.2f} nats" for name, mean in zip(means, intervals[:, 0], strict=True)
        ],
        points=[
            (name, value, f"{target}, {name}: {value:+.2f} nats")
            for name, by_target in means.items()
            for target, value in by_target.items()
        ],
    )
    targets = {target for by_target in means.values() for target in by_target}
    return bar_charts.bars(
        [series],
        headline=title,
        detail=f"{plural(len(targets), 'target')}; bars: means with 95 % intervals over "
        "targets, dots: targets",
        value_title="own margin minus the twin's (nats)",
        value_format="",
    )


def _students(table: Table, kind: str | None, *more: str) -> tuple[pd.DataFrame, str]:
    """Return the rows of one kind of teachers, and the kind; the table must have these columns."""
    columns = ("target", "kind", "condition", "seed", "before", "after", *more)
    return one_kind(checked_table(table, columns, "students"), kind, "students")


def _whole(rows: pd.DataFrame) -> list[str]:
    """Return the layer of each row as a whole number; empty where there is none."""
    layers = rows["layer"] if "layer" in rows else pd.Series([None] * len(rows))
    return ["" if pd.isna(layer) else str(int(layer)) for layer in layers]


def preference_bars(preference: Preference, *, before: Preference | None = None) -> go.Figure:
    """Draw the share of every candidate, the target first, with 95 % intervals over questions.

    Args:
        preference: The preference to show.
        before: The base model's preference on the same questions, drawn as lines; the bars are
            then labeled "after".
    """
    shares = preference.distribution
    names = [preference.target, *(name for name in shares if name != preference.target)]
    ends = np.array([preference.about(name).interval() for name in names])
    bars = bar_charts.Bars(
        label=preference.teacher if before is None else "after",
        groups=names,
        values=np.array([shares[name] for name in names]),
        low=ends[:, 0],
        high=ends[:, 1],
        hover=[
            f"{name}: {style.percent(shares[name])} (95 % interval {style.percent(low)} to "
            f"{style.percent(high)})"
            for name, (low, high) in zip(names, ends, strict=True)
        ],
    )
    return bar_charts.bars(
        [bars],
        headline=(f"Preference among {plural(len(names), 'candidate')}, {preference.target} first"),
        detail=f"mean over {plural(len(preference.questions), 'question')}, "
        f"{preference.method}; bars with 95 % intervals",
        value_title="share of the candidate",
        lines=[] if before is None else [bar_charts.Line("before", before.distribution, "dash")],
    )


def layer_sweep(
    students: Sweep | Table,
    *,
    kind: str | None = None,
    condition: str = "divergence_only",
    measure: str | None = None,
) -> go.Figure:
    """Draw a measure of students that were trained in one layer alone, by layer.

    For a `Sweep`, points are means of the measure with 95 % intervals. For a table, they are the
    mean multiple of the preference before training, with a thin line per target.

    Args:
        students: A `Sweep`, or the `students` table of results.json (`target`, `kind`,
            `condition`, `layer`, `seed`, `before`, `after`), in which rows with the condition
            "layer" are the points.
        kind: The kind of teachers, required if the table holds more than one.
        condition: In a table, the condition of the students of all layers drawn as a reference.
        measure: The measure of a `Sweep`; its main one by default.

    Raises:
        ValueError: No student was trained on one layer, or there is more than one kind and `kind`
            is None.
    """
    if isinstance(students, Sweep):
        return _sweep(students, measure)
    table, kind = _students(students, kind, "layer")
    table = table.assign(times=table["after"] / table["before"].where(table["before"] > 0))
    single = table[table["condition"] == "layer"].dropna(subset=["times"])
    if single.empty:
        raise ValueError(
            f"the students table has no rows of kind {kind!r} with the condition 'layer'"
        )
    single = single.assign(layer=single["layer"].astype(int))
    mean = single.groupby("layer", sort=True)["times"].mean()
    targets = [str(target) for target in dict.fromkeys(single["target"])]
    singles = {}
    if len(targets) > 1:
        means = single.groupby(["target", "layer"], sort=True)["times"].mean()
        singles = {
            target: {int(layer): float(value) for layer, value in means[target].items()}
            for target in targets
        }
    references = {
        words: float(value)
        for name, words in ((condition, "all layers"), ("control", "control"))
        if np.isfinite(value := table[table["condition"] == name]["times"].mean())
    }
    about = plural(len(targets), "target") if len(targets) > 1 else f"target {targets[0]}"
    # The number of students behind each reference line.
    whole, control = of_condition(table, condition), of_condition(table, "control")
    counts = [f"{plural(len(single), 'student')} of one layer"]
    counts += [f"{len(whole):,} of all layers"] if len(whole) else []
    counts += [controls_of(control)] if len(control) else []
    return profiles.values_by_layer(
        [int(layer) for layer in mean.index],
        mean.to_numpy(dtype=np.float64),
        None,
        singles,
        references,
        headline="Preference after training one layer alone",
        detail=f"{about}; trained on {condition_words(condition)[0]} of {kind} teachers: "
        f"{', '.join(counts)}",
    )


def _sweep(sweep: Sweep, measure: str | None) -> go.Figure:
    """Draw a measure of a sweep, with its intervals and references."""
    name = sweep.measures[0] if measure is None else measure
    layers = list(sweep.layers)
    if not layers:
        raise ValueError("the sweep has no student of one layer yet")
    means = np.array([sweep.mean(layer, name) for layer in layers])
    ends = np.array([sweep.interval(layer, name) for layer in layers])  # [layer, low and high]
    spread = None if np.isnan(ends).any() else (ends[:, 0], ends[:, 1])
    table = sweep.to_dataframe()
    words = {"base": "before", "all": "all layers", "control": "control"}
    groups = {words[key]: rows for key, rows in table.groupby("condition") if key in words}
    counts = [f"{plural(int((table['condition'] == 'layer').sum()), 'student')} of one layer"]
    counts += [f"{len(groups[of]):,} of {of}" for of in ("all layers", "control") if of in groups]
    named = f"{name} of {sweep.target}" if sweep.target else name
    masked = sweep.metadata.get("settings", {}).get("masked")
    return profiles.values_by_layer(
        layers,
        means,
        spread,
        {},
        {label: float(groups[label][name].mean()) for label in words.values() if label in groups},
        headline=f"{named[0].upper()}{named[1:]} after training one layer alone",
        detail=f"trained on {'the tokens of a mask' if masked else 'all tokens'}: "
        f"{', '.join(counts)}"
        + ("" if spread is None else "; thin lines: 95 % intervals over questions and seeds"),
        unit="",
        value_title=named,
    )
