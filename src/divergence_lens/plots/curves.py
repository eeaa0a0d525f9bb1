"""Curves of a measure over training, and of a preference over a share of the data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from divergence_lens._utils.tables import Table, checked_table
from divergence_lens._utils.wording import plural
from divergence_lens.deltas import Delta
from divergence_lens.plots import style

_MARKED = 40  # most points of a curve that have markers
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class _Curve:
    """One line: its points with hover texts and intervals, and single values drawn as dots."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    hover: Sequence[str]
    dots: Sequence[tuple[float, float, str]] = ()
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def training_curves(
    histories: Delta | pd.DataFrame | Mapping[str, Delta | pd.DataFrame],
    *,
    column: str = "preference",
    before: float | None = None,
) -> go.Figure:
    """Draw a measure of students over their training, one point per measured update.

    Every history has the `loss` and the learning rate `lr` of each update. It has other measures if
    they were taken: `finetune(..., every=5, on_step=lambda step, loss, model: {"preference":
    preference(model, target="owl").share})`. Values are in percent if all are between 0 and 1,
    except for `loss` and `lr`.

    Args:
        histories: A student, or its `history()`, or a mapping from names to either.
        column: The measure: `loss`, `lr`, or a name under which `on_step` returned one.
        before: The base model's value, drawn as a line if given.

    Raises:
        ValueError: There is no student, or a history lacks the column.
    """
    if isinstance(histories, Delta | pd.DataFrame):
        histories = {"student": histories}
    if not histories:
        raise ValueError("there is no student; give at least one to training_curves")
    measured: dict[str, tuple[list[float], list[float]]] = {}
    for name, student in histories.items():
        history = student.history() if isinstance(student, Delta) else student
        if column not in history.columns:
            raise ValueError(
                f"the history of {name!r} has no column {column!r}; train it with an on_step that "
                f"returns {{{column!r}: ...}} (it has {list(history.columns)})"
            )
        rows = history.dropna(subset=[column])
        measured[name] = rows["step"].astype(float).to_list(), rows[column].astype(float).to_list()
    everything = [value for _, values in measured.values() for value in values]
    share = column not in ("loss", "lr") and all(0 <= value <= 1 for value in everything)
    words = column.replace("_", " ")
    unit = {"loss": "loss (nats per token)", "lr": "learning rate"}.get(column, words)
    if column == "preference":
        unit = "preference for the target"
    curves = [
        _Curve(
            name,
            steps,
            values,
            [
                f"{name}, after {plural(int(step), 'update')}: "
                + (style.percent(value) if share else f"{value:.4g}")
                for step, value in zip(steps, values, strict=True)
            ],
        )
        for name, (steps, values) in measured.items()
    ]
    return _drawn(
        curves,
        headline=f"{words[:1].upper()}{words[1:]} over training",
        detail=f"{plural(len(curves), 'student')}, measured "
        f"{plural(len(everything), 'time')} in all",
        x_title="updates",
        ticks=style.thinned(sorted({int(x) for curve in curves for x in curve.x}), 6),
        lines={} if before is None else {"before training": before},
        y_title=unit,
        share=share,
    )


def mixing_curves(
    table: Table,
    *,
    of: str = "the data that was changed",
    before: float | None = None,
    control: float | None = None,
) -> go.Figure:
    """Draw students' preference by the share of their data that was mixed or paraphrased.

    Each condition has a line through the means at each share, with a dot per row, or with the rows'
    intervals if each share has one row.

    Args:
        table: One row per student or mean: `condition`, `share` (of the data, from 0 to 1),
            `preference` and, if known, `low` and `high` (an interval), `target` and `seed` (for the
            hover texts).
        of: The data of which `share` is a share, for the title.
        before: Preference before training, drawn as a line if given.
        control: Preference of the control students, drawn as a line if given.

    Raises:
        ValueError: The table is empty, lacks a column, or has shares outside 0 to 1.
    """
    rows = checked_table(table, ("condition", "share", "preference"), "mixing")
    outside = rows["share"][(rows["share"] < 0) | (rows["share"] > 1)]
    if len(outside):
        raise ValueError(f"a share is {outside.iloc[0]:g}; shares go from 0 to 1")
    curves = []
    for condition, own in rows.groupby("condition", sort=False):
        name = str(condition).replace("_", " ")
        groups = own.groupby("share", sort=True)["preference"]
        mean, count = groups.mean(), groups.size()
        single = {"low", "high"} <= set(own.columns) and int(count.max()) == 1
        ordered = own.sort_values("share")
        curves.append(
            _Curve(
                name,
                [float(share) for share in mean.index],
                mean.astype(float).to_list(),
                [
                    f"{name}, {style.percent(float(share))} of {of}: {style.percent(value)}"
                    f" ({plural(int(n), 'student')})"
                    for share, value, n in zip(mean.index, mean, count, strict=True)
                ],
                dots=[]
                if int(count.max()) == 1
                else [_dot(name, row) for _, row in own.iterrows()],
                low=ordered["low"].astype(float).to_list() if single else None,
                high=ordered["high"].astype(float).to_list() if single else None,
            )
        )
    lines = {"before training": before, "control": control}
    marks = ""
    if any(curve.dots for curve in curves):
        marks = "; lines: means, dots: students"
    elif any(curve.low for curve in curves):
        marks = "; bars: 95 % intervals"
    return _drawn(
        curves,
        headline=f"Preference by the share of {of}",
        detail=f"{plural(len(curves), 'condition')}, {plural(len(rows), 'student')}" + marks,
        x_title="share of the data",
        lines={name: value for name, value in lines.items() if value is not None},
        x_format=".0%",
    )


def _dot(name: str, row: "pd.Series[Any]") -> tuple[float, float, str]:
    who = ", ".join(
        f"{part} {row[part]}" if part == "seed" else str(row[part])
        for part in ("target", "seed")
        if part in row.index
    )
    words = f"{name}{', ' if who else ''}{who}: {style.percent(float(row['preference']))}"
    return float(row["share"]), float(row["preference"]), words


def _drawn(
    curves: Sequence[_Curve],
    *,
    headline: str,
    detail: str,
    x_title: str,
    lines: Mapping[str, float],
    x_format: str = "",
    ticks: Sequence[int] | None = None,
    y_title: str = "preference for the target",
    share: bool = True,
) -> go.Figure:
    """Draw the curves, with horizontal lines for reference; `share` is for values in percent."""
    traces: list[Any] = []
    for i, curve in enumerate(curves):
        color = style.CYCLE[i % len(style.CYCLE)]
        if curve.dots:
            traces.append(
                go.Scatter(
                    x=[x for x, _, _ in curve.dots],
                    y=[y for _, y, _ in curve.dots],
                    mode="markers",
                    marker={"size": 5, "color": color, "opacity": 0.6},
                    text=[style.escape(words) for _, _, words in curve.dots],
                    hoverinfo="text",
                    legendgroup=curve.name,
                    showlegend=False,
                )
            )
        traces.append(
            go.Scatter(
                x=curve.x,
                y=curve.y,
                mode="lines+markers" if len(curve.x) <= _MARKED else "lines",
                name=style.escape(curve.name),
                legendgroup=curve.name,
                line={"color": color, "width": 2.4, "dash": _DASHES[i % len(_DASHES)]},
                marker={"size": 7, "symbol": style.SYMBOLS[i % len(style.SYMBOLS)]},
                error_y=style.error_bars(curve.y, curve.low, curve.high, thickness=1.2),
                text=[style.escape(words) for words in curve.hover],
                hoverinfo="text",
            )
        )
    places = [x for curve in curves for x in curve.x] or [0.0, 1.0]
    pad = 0.04 * ((max(places) - min(places)) or 1.0)
    ends = [min(places) - pad, max(places) + pad]
    traces += [
        style.level(
            label, ends, value, f"{label}: {style.percent(value) if share else f'{value:.4g}'}"
        )
        for label, value in lines.items()
    ]
    shown = len(curves) + len(lines)
    return style.figure(
        traces,
        headline=headline,
        detail=detail,
        plot_height=210,
        left=60,
        right=16,
        legend_rows=0 if shown == 1 else shown,
        xaxis=style.axis(
            x_title,
            grid=False,
            range=ends,
            tickformat=x_format,
            nticks=6,
            tickvals=ticks,
            tickangle=0,
        ),
        yaxis=style.percent_axis(y_title) if share else style.axis(y_title),
    )
