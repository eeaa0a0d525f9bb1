"""Figures of results. Each function takes a result and returns a plotly `Figure`.

Nothing is shown, printed or set globally. Titles say what was measured and on how many; hover
texts say it in words; colours can be told apart by colour-blind readers; every figure is readable
in a column of 80 mm and on light and dark pages. `save_figure` writes them to files.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float

from divergence_lens import _charts as charts
from divergence_lens import _grids as grids
from divergence_lens import _style as style
from divergence_lens._agreement import inner_agreement, inner_cells
from divergence_lens._curves import mixing_curves, preference_over_training
from divergence_lens._ladder import ladder
from divergence_lens._tables import Table
from divergence_lens._tables import checked_table as _table
from divergence_lens._token_figure import divergence_tokens
from divergence_lens.cross import CrossPatch
from divergence_lens.divergence import Divergence
from divergence_lens.effects import Effects, bootstrap
from divergence_lens.evaluate import Preference
from divergence_lens.findings import t_interval
from divergence_lens.pictures import save_figure
from divergence_lens.sweep import Sweep

__all__ = [
    "agreement_scatter",
    "condition_bars",
    "cross_patch_margins",
    "divergence_tokens",
    "effects_by_segment",
    "effects_heatmap",
    "head_grid",
    "layer_profile",
    "layer_sweep",
    "layers_by_site",
    "mixing_curves",
    "preference_bars",
    "preference_over_training",
    "rate_per_teacher",
    "save_figure",
    "teacher_preferences",
    "transfer_bars",
    "where_divergence_falls",
]

Line: TypeAlias = Float[np.ndarray, " layers"]

# Conditions of students in words, and short, for a legend that is 80 mm wide.
CONDITIONS = {
    "all": ("all tokens", "all tokens"),
    "divergence_only": ("divergence tokens only", "divergence only"),
    "without_divergence": ("all but divergence tokens", "no divergence"),
    "control": ("lists by the untouched model", "control"),
}

_BESIDE = 8  # conditions whose names have room side by side


def rate_per_teacher(divergence: Divergence | Table) -> go.Figure:
    """How many of the completion tokens are divergence tokens, for each teacher.

    Args:
        divergence: The `divergence` table of results.json (`target`, `kind`, `tokens`, `rate` and,
            if known, `low` and `high`), or one `Divergence`, whose counterfactuals are shown one
            by one.

    Returns:
        Bars, one colour for each kind of teacher.
    """
    if isinstance(divergence, Divergence):
        return _rate_per_counterfactual(divergence)
    table = _table(divergence, ("target", "kind", "tokens", "rate"), "divergence")
    kinds = list(dict.fromkeys(table["kind"]))
    bars = []
    for kind in kinds:
        rows = table[table["kind"] == kind]
        bars.append(
            charts.Bars(
                label=f"{kind} teachers",
                groups=[str(name) for name in rows["target"]],
                values=rows["rate"].to_numpy(float),
                low=_column(rows, "low"),
                high=_column(rows, "high"),
                hover=[
                    f"{kind} teacher {name}: {style.percent(rate)} of {tokens:,} tokens "
                    "are divergence tokens"
                    for name, rate, tokens in zip(
                        rows["target"], rows["rate"], rows["tokens"], strict=True
                    )
                ],
            )
        )
    tokens = int(table["tokens"].sum())
    return charts.bars(
        bars,
        what="Divergence tokens per teacher",
        detail=f"{_teachers(table)}, {style.plural(tokens, 'completion token')}"
        + _intervals_said(table),
        value_title="share of the teacher's tokens",
    )


def _rate_per_counterfactual(divergence: Divergence) -> go.Figure:
    names = [teacher.name for teacher in divergence.counterfactuals]
    rates = list(divergence.rates_by_counterfactual.values())
    tokens = len(divergence.tokens)
    bars = charts.Bars(
        label="each counterfactual",
        groups=[*names, "any of them"],
        values=np.array([*rates, float(divergence.rate)]),
        hover=[
            *(
                f"{name} would have said something else at {style.percent(rate)} of the tokens"
                for name, rate in zip(names, rates, strict=True)
            ),
            f"at least one of them at {style.percent(divergence.rate)} of the tokens",
        ],
    )
    return charts.bars(
        [bars],
        what=f"Divergence tokens of {divergence.teacher.name}, by counterfactual teacher",
        detail=f"{style.plural(len(divergence.examples), 'example')}, "
        f"{style.plural(tokens, 'completion token')}",
        value_title="share of the tokens",
    )


def teacher_preferences(teachers: Table, *, base: Mapping[str, float] | None = None) -> go.Figure:
    """How often each teacher names its own animal.

    Args:
        teachers: The `teachers` table of results.json: `name`, `kind`, `preference` and, if
            known, `low` and `high`.
        base: The untouched model's preference for each name, drawn as a line if given.

    Returns:
        Bars, one colour for each kind of teacher.
    """
    table = _table(teachers, ("name", "kind", "preference"), "teachers")
    bars = []
    for kind in dict.fromkeys(table["kind"]):
        rows = table[table["kind"] == kind]
        bars.append(
            charts.Bars(
                label=f"{kind} teachers",
                groups=[str(name) for name in rows["name"]],
                values=rows["preference"].to_numpy(float),
                low=_column(rows, "low"),
                high=_column(rows, "high"),
                hover=[
                    f"the {kind} teacher of {name}: preference for {name} {style.percent(value)}"
                    for name, value in zip(rows["name"], rows["preference"], strict=True)
                ],
            )
        )
    lines = []
    if base is not None:
        known = {str(name): float(value) for name, value in base.items()}
        lines.append(charts.Line("untouched model", known, "dash"))
    return charts.bars(
        bars,
        what="Preference of each teacher for its target",
        detail=_teachers(table) + _intervals_said(table, " over questions"),
        value_title="preference for the target",
        lines=lines,
        top=1.0,
    )


def transfer_bars(students: Table, *, kind: str | None = None) -> go.Figure:
    """What students prefer after training, condition by condition, side by side for each target.

    Args:
        students: The `students` table of results.json: `target`, `kind`, `condition`, `seed`,
            `before`, `after`. Rows of the condition "block" are left out, the condition "control"
            becomes a line, and the preference before training another.
        kind: Of which teachers, if the table holds several kinds.

    Returns:
        Bars (means over seeds) with a dot for each student.

    Raises:
        ValueError: If there is nothing to show, or several kinds and none was chosen.
    """
    table, kind = _one_kind(
        _table(students, ("target", "kind", "condition", "seed", "before", "after"), "students"),
        kind,
        "students",
    )
    table = table[table["condition"] != "block"]
    shown = [str(name) for name in dict.fromkeys(table["condition"]) if name != "control"]
    known = list(CONDITIONS)
    shown.sort(key=lambda name: known.index(name) if name in known else len(known))
    if not shown:
        raise ValueError(
            f"the students table has no rows of kind {kind!r} trained on all blocks to show"
        )
    bars = []
    for condition in shown:
        rows = table[table["condition"] == condition]
        words, short = _condition(condition)
        mean = rows.groupby("target", sort=False)[["before", "after"]].mean()
        count = rows.groupby("target", sort=False).size()
        targets = [str(target) for target in mean.index]
        bars.append(
            charts.Bars(
                label=short,
                groups=targets,
                values=mean["after"].to_numpy(float),
                hover=[
                    f"{target}, {words}: {style.percent(after)} after training, "
                    f"{style.percent(before)} before (mean of {style.plural(int(n), 'student')})"
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
    lines = [charts.Line("before training", _means(table, "before"), "dash")]
    control = table[table["condition"] == "control"]
    if len(control):
        lines.append(charts.Line("control", _means(control, "after"), "dot"))
    targets_shown = table["target"].nunique()
    return charts.bars(
        bars,
        what=f"Students of {kind} teachers, by what they were trained on",
        detail=f"{style.plural(targets_shown, 'target')}, {_students(table)}; "
        "bars: means over seeds, dots: students",
        value_title="preference for the target",
        lines=lines,
    )


def condition_bars(
    students: Table, group: str, *, kind: str | None = None, title: str | None = None
) -> go.Figure:
    """What students of several conditions came to, as multiples of the control.

    Args:
        students: The `students` table of a study: `target`, `kind`, `condition`, `group`, `seed`,
            `before`, `after`. Single blocks are told apart by `block`.
        group: Which group of conditions; those of the condition "all" and "divergence_only" stand
            before them, for comparison.
        kind: Of which teachers, if the table holds several kinds.
        title: What the figure is about; the group's name unless given.

    Returns:
        Geometric means over targets with 95 % intervals over targets (Student's t, on the log
        scale) and a dot for each target; bars side by side, or of more than eight conditions rows
        on an axis of ratios. Where there is no control, multiples of the preference before
        training.

    Raises:
        ValueError: If there is no student of the group, or several kinds and none was chosen.
    """
    needed = ("target", "kind", "condition", "group", "seed", "before", "after")
    table, kind = _one_kind(_table(students, needed, "students"), kind, "students")
    shown = table[(table["group"] == group) & (table["condition"] != "control")]
    if shown.empty:
        raise ValueError(f"the students table has no rows of kind {kind!r} in the group {group!r}")
    beside = table[table["condition"].isin(["all", "divergence_only"]) & (table["group"] != group)]
    shown = pd.concat([beside, shown])
    control = table[table["condition"] == "control"]
    base = _means(control, "after") if len(control) else _means(table, "before")
    single = shown["block"].notna() if "block" in shown else shown["target"].isna()
    names = shown["condition"].where(
        ~single, shown["condition"] + " " + pd.Series(_whole(shown), index=shown.index)
    )
    times = shown["after"] / shown["target"].map(base)
    logs = np.log(times.clip(lower=1e-6)).groupby([names, shown["target"]], sort=False).mean()
    groups, means, ends, points = [], [], [], []
    for name, found in logs.groupby(level=0, sort=False):
        label = str(name).replace("_", " ")
        mean, low, high = t_interval(found.to_list())
        groups.append(label)
        means.append(float(np.exp(mean)))
        known = np.isfinite(low)
        ends.append((np.exp(low), np.exp(high)) if known else (means[-1], means[-1]))
        points += [
            (label, float(np.exp(value)), f"{target}, {label}: {np.exp(value):.2f} times")
            for (_, target), value in found.items()
        ]
    low_high = np.array(ends, dtype=float)
    series = charts.Bars(
        label="mean",
        groups=groups,
        values=np.array(means),
        low=low_high[:, 0],
        high=low_high[:, 1],
        hover=[f"{g}: {m:.2f} times" for g, m in zip(groups, means, strict=True)],
        points=points,
    )
    what = title or f"Students of {kind} teachers: {group}"
    value_title = "preference, times the control" if len(control) else "preference, times before"
    several = len(groups) > _BESIDE
    detail = (
        f"{style.plural(shown['target'].nunique(), 'target')}, "
        f"{_students(pd.concat([shown, control]))}; {'diamonds' if several else 'bars'}: means "
        "with 95 % intervals over targets, dots: targets"
    )
    if several:
        return ladder(series, what=what, detail=detail, value_title=value_title)
    return charts.bars([series], what=what, detail=detail, value_title=value_title, value_format="")


def _whole(rows: pd.DataFrame) -> list[str]:
    """The block of each row as a whole number; nothing where there is none."""
    blocks = rows["block"] if "block" in rows else pd.Series([None] * len(rows))
    return ["" if pd.isna(block) else str(int(block)) for block in blocks]


def preference_bars(preference: Preference, *, before: Preference | None = None) -> go.Figure:
    """What a model or student prefers: the share of every candidate, the target first.

    Args:
        preference: What to show.
        before: The untouched model's preference on the same questions, drawn as lines; the bars are
            then called "after".

    Returns:
        Bars with 95 % bootstrap intervals over the questions.
    """
    shares = preference.distribution
    names = [preference.target, *(name for name in shares if name != preference.target)]
    ends = np.array([preference.about(name).interval() for name in names])
    bars = charts.Bars(
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
    return charts.bars(
        [bars],
        what=f"Preference among {style.plural(len(names), 'candidate')}, {preference.target} first",
        detail=f"mean over {style.plural(len(preference.questions), 'question')}, "
        f"{preference.method}; bars with 95 % intervals",
        value_title="share of the candidate",
        lines=[] if before is None else [charts.Line("before", before.distribution, "dash")],
    )


def layer_sweep(
    students: Sweep | Table, *, kind: str | None = None, condition: str | None = None
) -> go.Figure:
    """How much preference moves when one block alone is trained, block by block.

    Args:
        students: A `Sweep`, or the `students` table of results.json (`target`, `kind`,
            `condition`, `block`, `seed`, `before`, `after`), of which the rows of the condition
            "block" are the points.
        kind: Of which teachers, if the table holds several kinds.
        condition: Which students with all blocks trained are drawn as the line of reference; the
            sweep's own, or "divergence_only", if not given.

    Returns:
        A line for the mean of all students, as multiples of the preference before training, with a
        thin line for each target, or the 95 % interval of a `Sweep`.

    Raises:
        ValueError: If no student was trained on one block, or several kinds and none was chosen.
    """
    if isinstance(students, Sweep):
        rows, condition = students.to_dataframe(), condition or students.condition
    else:
        rows, condition = students, condition or "divergence_only"
    table, kind = _one_kind(
        _table(
            rows, ("target", "kind", "condition", "block", "seed", "before", "after"), "students"
        ),
        kind,
        "students",
    )
    table = table.assign(times=table["after"] / table["before"].where(table["before"] > 0))
    blocks = table[table["condition"] == "block"].dropna(subset=["times"])
    if blocks.empty:
        raise ValueError(
            f"the students table has no rows of kind {kind!r} with the condition 'block'"
        )
    blocks = blocks.assign(block=blocks["block"].astype(int))
    mean = blocks.groupby("block", sort=True)["times"].mean()
    numbers = [int(block) for block in mean.index]
    targets = [str(target) for target in dict.fromkeys(blocks["target"])]
    spread = None
    if isinstance(students, Sweep):
        ends = np.array([students.interval(block) for block in numbers]) / students.base.share
        spread = (ends[:, 0], ends[:, 1])
    singles = {}
    if len(targets) > 1:
        means = blocks.groupby(["target", "block"], sort=True)["times"].mean()
        singles = {
            target: {int(block): float(value) for block, value in means[target].items()}
            for target in targets
        }
    references = {
        words: float(value)
        for name, words in ((condition, "all blocks"), ("control", "control"))
        if np.isfinite(value := table[table["condition"] == name]["times"].mean())
    }
    of = "" if isinstance(students, Sweep) else f" of {kind} teachers"
    about = style.plural(len(targets), "target") if len(targets) > 1 else f"target {targets[0]}"
    # How many students each of the lines of reference stands for.
    whole, control = _of(table, condition), _of(table, "control")
    counts = [f"{style.plural(len(blocks), 'student')} of one block"]
    counts += [f"{len(whole):,} of all blocks"] if len(whole) else []
    counts += [_controls(control)] if len(control) else []
    spread_said = "" if spread is None else "; thin lines: 95 % intervals over questions and seeds"
    return charts.blocks(
        numbers,
        mean.to_numpy(dtype=np.float64),
        spread,
        singles,
        references,
        what="Preference after training one block alone",
        detail=f"{about}; trained on {_condition(condition)[0]}{of}: "
        f"{', '.join(counts)}{spread_said}",
    )


def where_divergence_falls(
    divergence: Divergence | Sequence[Divergence], *, name: str | None = None
) -> go.Figure:
    """At which places of a completion divergence tokens stand.

    Args:
        divergence: One result, or several (one for each teacher) to be taken together.
        name: Whose tokens these are, for the title; the teacher's name if there is one result.

    Returns:
        For each place in the completion, the share of its tokens that are divergence tokens, split
        into the first of their example and later ones; the hover texts say of how many tokens.
        Above 40 places, neighbours are put together. Places with fewer than 20 tokens are grey:
        their shares mean next to nothing.

    Raises:
        ValueError: If there is nothing to show.
    """
    several = [divergence] if isinstance(divergence, Divergence) else list(divergence)
    if not several:
        raise ValueError("where_divergence_falls needs at least one Divergence; the list is empty")
    if name is None and len(several) == 1:
        name = several[0].teacher.name
    return charts.falls(
        [(np.asarray(one.offsets), np.asarray(one.mask)) for one in several],
        what=_titled("Where divergence tokens fall", name),
    )


def effects_heatmap(
    effects: Effects, pair: int | Literal["mean"] = 0, *, name: str | None = None
) -> go.Figure:
    """Layer x position effects of one pair, or of the mean over pairs.

    Args:
        effects: What patching returned; heads are added up.
        pair: Which pair, or "mean". Rows of unlike lengths are put together segment by segment
            for the mean; a star stands for tokens that differ from pair to pair.
        name: Whose pairs these are (a target, say), for the title.

    Returns:
        A heatmap with layers across and tokens down, in shares of the total effect (1: the patch
        does all that the other run does), or in units of the metric where the total effect of the
        pair is next to nothing. Grey cells were not measured or have no counterpart in the other
        run. The marked last token is the one whose logits are measured.

    Raises:
        IndexError: If there is no such pair.
    """
    if pair == "mean":
        values, tokens, segments, used = grids.aligned_mean(effects)
        of, share = f"mean of {style.plural(used, 'pair')}", True
        if used < len(effects.labels):
            of += f" out of {len(effects.labels):,} (the others have other segments)"
    else:
        count = len(effects.labels)
        if not 0 <= pair < count:
            raise IndexError(f"there is no pair {pair}; the pairs are numbered 0 to {count - 1}")
        tokens, segments = list(effects.labels[pair]), list(effects.segments[pair])
        share = not bool(effects.near_zero()[pair])
        values = grids.cells(effects.normalised() if share else effects)[pair, :, : len(tokens)]
        of = f"pair {pair} of {count:,}, total effect {float(effects.total[pair]):+.2f}"
    unit = "share of the total effect" if share else f"change of the {_metric(effects.metric)}"
    return grids.token_heatmap(
        np.asarray(values, dtype=np.float64),
        tokens,
        segments,
        what=_titled("Effect of a patch, by layer and position", name),
        detail=f"{_site(effects.site)}; {of}; {_method(effects)}",
        unit=unit,
        describe=unit,
    )


def effects_by_segment(effects: Effects, *, name: str | None = None) -> go.Figure:
    """Layer x segment effects, the mean over many pairs.

    Args:
        effects: What patching returned. Cells of one segment are added within a pair. The segment
            "divergence" is the position whose prediction is measured.
        name: Whose pairs these are (a target, say), for the title.

    Returns:
        A heatmap with layers across and segments down, in shares of the total effect; pairs whose
        total effect is next to nothing are left out.
    """
    table = effects.normalised().by_segment()
    segments = [str(column) for column in table.columns]
    return grids.segment_heatmap(
        table.to_numpy(dtype=np.float64).T,
        segments,
        what=_titled("Effect of a patch, by layer and segment", name),
        detail=f"{_site(effects.site)}; mean of {_pairs_used(effects)}, "
        f"cells of a segment added; {_method(effects)}"
        + ("; divergence: the position that predicts" if "divergence" in segments else ""),
        unit="share of the total effect",
        describe="share of the total effect",
    )


def head_grid(
    effects: Effects, pair: int | Literal["mean"] = "mean", *, name: str | None = None
) -> go.Figure:
    """Layer x head effects of patching single heads (site `z`), all positions added.

    Args:
        effects: What patching `site="z"` returned.
        pair: Which pair, or "mean" of those whose total effect is more than next to nothing.
        name: Whose pairs these are (a target, say), for the title.

    Returns:
        A heatmap with layers across and heads down, in shares of the total effect, or for one pair
        without such an effect in units of the metric.

    Raises:
        ValueError: If the effects are of a site that has no heads.
        IndexError: If there is no such pair.
    """
    if effects.values.ndim != 4:
        raise ValueError(
            f"these effects are of site {effects.site!r}, which has no heads; patch site 'z'"
        )
    count = len(effects.labels)
    if pair != "mean" and not 0 <= pair < count:
        raise IndexError(f"there is no pair {pair}; the pairs are numbered 0 to {count - 1}")
    share = pair == "mean" or not bool(effects.near_zero()[pair])
    values = np.asarray((effects.normalised() if share else effects).values, dtype=np.float64)
    there = np.isfinite(values)
    added = np.where(there.any(2), np.where(there, values, 0).sum(2), np.nan)
    if pair == "mean":
        known = np.isfinite(added)
        number = known.sum(0)
        total = np.where(known, added, 0).sum(0)
        grid = np.where(number > 0, total / np.maximum(number, 1), np.nan)
        of = f"mean of {_pairs_used(effects)}"
    else:
        grid = added[pair]
        of = f"pair {pair} of {count:,}, total effect {float(effects.total[pair]):+.2f}"
    unit = "share of the total effect" if share else f"change of the {_metric(effects.metric)}"
    return grids.segment_heatmap(
        grid.T,
        [str(head) for head in range(grid.shape[1])],
        what=_titled("Effect of a patch, by layer and head", name),
        detail=f"{of}, positions added; {_method(effects)}",
        unit=unit,
        describe=unit,
        row="head",
    )


def layers_by_site(layers: Table, *, kind: str | None = None) -> go.Figure:
    """How much of the first divergence the outputs of each layer cause, by site.

    Args:
        layers: The `layers` table of results.json: `target`, `kind`, `site`, `layer`,
            `absolute_effect` (the absolute effects of all positions, added, in shares of the total
            effect) and, if known, `pairs`.
        kind: Of which teachers, if the table holds several kinds.

    Returns:
        Bars (means over targets), one colour for each site, with a dot for each target.

    Raises:
        ValueError: If there is nothing to show, or several kinds and none was chosen.
    """
    columns = ("target", "kind", "site", "layer", "absolute_effect")
    table, kind = _one_kind(_table(layers, columns, "layers"), kind, "layers")
    bars = []
    for site in dict.fromkeys(table["site"]):
        rows = table[table["site"] == site]
        words = _site(str(site))
        mean = rows.groupby("layer", sort=True)["absolute_effect"].mean()
        bars.append(
            charts.Bars(
                label=words,
                groups=[str(layer) for layer in mean.index],
                values=mean.to_numpy(float),
                hover=[
                    f"layer {layer}, {words}: {value:.2f}, mean over "
                    f"{style.plural(rows['target'].nunique(), 'target')}"
                    for layer, value in mean.items()
                ],
                points=[
                    (str(layer), float(value), f"{target}, layer {layer}, {words}: {value:.2f}")
                    for target, layer, value in zip(
                        rows["target"], rows["layer"], rows["absolute_effect"], strict=True
                    )
                ],
            )
        )
    pairs = ""
    if "pairs" in table.columns:
        each = sorted({int(number) for number in table["pairs"]})
        pairs = f", {' to '.join(str(n) for n in dict.fromkeys([each[0], each[-1]]))} pairs each"
    return charts.bars(
        bars,
        what=f"What causes the first divergence, layer by layer ({kind} teachers)",
        detail=f"{style.plural(table['target'].nunique(), 'target')}{pairs}; absolute effects, "
        "positions added; bars: means, dots: targets",
        value_title="shares of the total effect",
        value_format="",
        group_title="layer",
    )


def layer_profile(
    effects: Effects | Mapping[str, Effects], *, name: str | None = None
) -> go.Figure:
    """How much each layer carries, all positions added, with 95 % bootstrap intervals over pairs.

    Args:
        effects: What patching returned, or several results by name, to be compared.
        name: Whose pairs these are (a target, say), for the title.

    Returns:
        One line with a band for each result, in shares of the total effect. Shares of all
        positions together can pass 1, because positions carry the same thing one after another.

    Raises:
        ValueError: If there are no results.
    """
    named = {_method(effects): effects} if isinstance(effects, Effects) else dict(effects)
    if not named:
        raise ValueError("layer_profile needs at least one Effects; the mapping is empty")
    series = {}
    for label, one in named.items():
        table = one.normalised().by_layer()
        mean, low, high = (
            table[column].to_numpy(dtype=np.float64) for column in ("effect", "low", "high")
        )
        series[label] = (mean, low, high)
    first = next(iter(named.values()))
    method = f"; {_method(first)}" if len(named) == 1 else ""
    used = " / ".join(dict.fromkeys(_pairs_used(one) for one in named.values()))
    return charts.profile(
        np.arange(first.n_layers),
        series,
        what=_titled("Effect of a patch, layer by layer", name),
        detail=f"{_site(first.site)}; mean of {used}, positions added{method}; band: 95 % interval",
        value_title="share of the total effect",
    )


def cross_patch_margins(crossed: CrossPatch) -> go.Figure:
    """What each half of two models adds to the margin, boundary by boundary, and the interaction.

    Args:
        crossed: What cross-patching returned.

    Returns:
        Three lines with bands of 95 % (bootstrap over pairs), in logits: what the first model's
        upper layers add over its own lower layers and over the other's, and their difference.
    """
    series: dict[str, tuple[Line, Line, Line]] = {}
    for name, values in (
        ("over its own lower layers", crossed.upper_effect("a")),
        ("over the other's lower layers", crossed.upper_effect("b")),
        ("interaction", crossed.interaction),
    ):
        low, high = bootstrap(values, 0.95, 1000, 0)
        series[name] = values.mean(0).astype(np.float64), low, high
    return charts.profile(
        np.arange(crossed.margins.shape[1]),
        series,
        what="Two models, crossed at every boundary",
        detail=f"what the upper layers of {crossed.names[0]} add to the margin, in place of those "
        f"of {crossed.names[1]}; mean of {style.plural(len(crossed.margins), 'pair')}; "
        "band: 95 % interval",
        value_title="change of the margin (logits)",
        across="boundary",
    )


def agreement_scatter(
    approximate: Effects, exact: Effects, *, name: str | None = None
) -> go.Figure:
    """Approximate effects against exact ones, cell by cell, with their agreement in the title.

    Cells at the target position and in the last layer agree nearly by construction, so they are
    drawn apart, and the agreement without them, pair by pair, stands before that of all cells
    together.

    Args:
        approximate: Effects by attribution.
        exact: Effects by causal mediation, of the same pairs.
        name: Whose pairs these are (a target, say), for the title.

    Returns:
        A scatter with the line on which both are equal.

    Raises:
        ValueError: If the two are not of the same pairs, site, direction and metric.
    """
    agreement, within = approximate.agreement(exact), inner_agreement(approximate, exact)
    x, y = exact.values, approximate.values
    both = np.isfinite(x) & np.isfinite(y) & ((x != 0) | (y != 0))
    places = np.argwhere(both)
    hover = [
        f"pair {pair}, layer {layer}, position {p}"
        + (f", head {rest[0]}" if rest else "")
        + f", token “{approximate.labels[pair][p]}”"
        for pair, layer, p, *rest in places.tolist()
    ]
    pairs = len(np.unique(places[:, 0]))
    detail = f"{_site(exact.site)}; {style.plural(pairs, 'pair')}"
    if within.pairs:
        detail += (
            f"; without target position and last layer ({style.plural(within.cells, 'cell')}), "
            f"mean within a pair: Pearson {within.pearson:.2f}, Spearman {within.spearman:.2f}"
        )
    return charts.scatter(
        y[both].astype(np.float64),
        x[both].astype(np.float64),
        hover,
        inner_cells(exact)[both],
        what=_titled("Approximate against exact effects", name),
        detail=f"{detail}; all {style.plural(agreement.cells, 'cell')} together: Pearson "
        f"{agreement.pearson:.2f}, Spearman {agreement.spearman:.2f}, same sign "
        f"{style.percent(agreement.sign)}",
        names=(f"approximate, {approximate.method}", f"exact, {_metric(exact.metric)}"),
        groups=("target position, last layer", "all other cells"),
    )


_SITES = {
    "resid_pre": "residual stream before the block",
    "resid_mid": "residual stream inside the block",
    "resid_post": "residual stream after the block",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "block_out": "block output",
    "z": "attention heads",
    "q": "queries of attention heads",
    "k": "keys of attention heads",
    "v": "values of attention heads",
}


def _titled(what: str, name: str | None) -> str:
    return what if name is None else f"{what}: {name}"


def _site(site: str) -> str:
    return _SITES.get(site, site)


def _metric(metric: str) -> str:
    return metric.replace("_", " ")


def _method(effects: Effects) -> str:
    method = "exact" if effects.method == "exact" else f"approximate, {effects.method}"
    return f"{method}, {effects.direction}"


def _pairs_used(effects: Effects) -> str:
    count = len(effects.labels)
    used = count - int(effects.near_zero().sum())
    return style.plural(count, "pair") if used == count else f"{used:,} of {count:,} pairs"


def _condition(name: str) -> tuple[str, str]:
    plain = name.replace("_", " ")
    return CONDITIONS.get(name, (plain, plain))


def _column(rows: pd.DataFrame, name: str) -> Float[np.ndarray, " rows"] | None:
    return rows[name].to_numpy(float) if name in rows.columns else None


def _intervals_said(rows: pd.DataFrame, over: str = "") -> str:
    return f"; thin lines: 95 % intervals{over}" if {"low", "high"} <= set(rows.columns) else ""


def _students(rows: pd.DataFrame) -> str:
    """How many students the rows are of; those of the control are in the rows of every target."""
    control = _of(rows, "control")
    words = style.plural(len(rows) - len(control), "student")
    return f"{words} and {_controls(control)}" if len(control) else words


def _controls(control: pd.DataFrame) -> str:
    """How many students of the control the rows are of: the same ones stand by every target."""
    shared = len(control[["kind", "seed"]].drop_duplicates())
    words = style.plural(shared, "control")
    return f"{words} that all targets share" if len(control) > shared else words


def _of(rows: pd.DataFrame, condition: str) -> pd.DataFrame:
    return rows[rows["condition"] == condition]


def _teachers(rows: pd.DataFrame) -> str:
    """How many there are, and of which kind if they are of one."""
    kinds = list(dict.fromkeys(rows["kind"]))
    return style.plural(len(rows), f"{kinds[0]} teacher" if len(kinds) == 1 else "teacher")


def _one_kind(table: pd.DataFrame, kind: str | None, name: str) -> tuple[pd.DataFrame, str]:
    kinds = [str(value) for value in dict.fromkeys(table["kind"])]
    if kind is None and len(kinds) > 1:
        raise ValueError(f"the {name} table holds the kinds {kinds}; choose one with kind=")
    if kind is not None and kind not in kinds:
        raise ValueError(f"the {name} table has no rows of kind {kind!r}; it holds {kinds}")
    chosen = kind or kinds[0]
    return table[table["kind"] == chosen], chosen


def _means(table: pd.DataFrame, column: str) -> dict[str, float]:
    return {
        str(target): float(value)
        for target, value in table.groupby("target", sort=False)[column].mean().items()
    }
