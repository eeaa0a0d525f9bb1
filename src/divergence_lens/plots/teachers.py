"""Figures of teachers: their preferences, and the rate and positions of their divergence tokens."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from divergence_lens._utils.tables import Table, checked_table
from divergence_lens._utils.wording import plural
from divergence_lens.divergence import Divergence
from divergence_lens.plots import bars as bar_charts
from divergence_lens.plots import style
from divergence_lens.plots.labels import column_of, interval_note, teachers_of, titled


def rate_per_teacher(divergence: Divergence | Table) -> go.Figure:
    """Draw the share of completion tokens that are divergence tokens, by teacher.

    Args:
        divergence: The `divergence` table of results.json (`target`, `kind`, `tokens`, `rate` and,
            if known, `low` and `high`), or one `Divergence`, of which each counterfactual is shown.
    """
    if isinstance(divergence, Divergence):
        return _rate_per_counterfactual(divergence)
    table = checked_table(divergence, ("target", "kind", "tokens", "rate"), "divergence")
    hover = [
        f"{row.kind} teacher {row.target}: {style.percent(row.rate)} of {row.tokens:,} tokens are "
        "divergence tokens"
        for row in table.itertuples()
    ]
    tokens = int(table["tokens"].sum())
    return bar_charts.bars(
        _bars_by_kind(table, "target", "rate", hover),
        headline="Divergence tokens per teacher",
        detail=f"{teachers_of(table)}, {plural(tokens, 'completion token')}" + interval_note(table),
        value_title="share of the teacher's tokens",
    )


def _bars_by_kind(
    table: pd.DataFrame, names: str, values: str, hover: Sequence[str]
) -> list[bar_charts.Bars]:
    """Build one series of bars per kind of teacher, from two columns of a table."""
    return [
        bar_charts.Bars(
            label=f"{kind} teachers",
            groups=[str(name) for name in rows[names]],
            values=rows[values].to_numpy(float),
            low=column_of(rows, "low"),
            high=column_of(rows, "high"),
            hover=rows["hover"].to_list(),
        )
        for kind, rows in table.assign(hover=hover).groupby("kind", sort=False)
    ]


def _rate_per_counterfactual(divergence: Divergence) -> go.Figure:
    names = [teacher.name for teacher in divergence.counterfactuals]
    rates = divergence.summary("counterfactual")["rate"].tolist()
    tokens = len(divergence.tokens)
    bars = bar_charts.Bars(
        label="each counterfactual",
        groups=[*names, "any of them"],
        values=np.array([*rates, float(divergence.rate)]),
        hover=[
            *(
                f"{name} differs at {style.percent(rate)} of the tokens"
                for name, rate in zip(names, rates, strict=True)
            ),
            f"at least one differs at {style.percent(divergence.rate)} of the tokens",
        ],
    )
    return bar_charts.bars(
        [bars],
        headline=f"Divergence tokens of {divergence.teacher.name}, by counterfactual teacher",
        detail=f"{plural(len(divergence.examples), 'example')}, "
        f"{plural(tokens, 'completion token')}",
        value_title="share of the tokens",
    )


def teacher_preferences(teachers: Table, *, base: Mapping[str, float] | None = None) -> go.Figure:
    """Draw the preference of each teacher for its own target.

    Args:
        teachers: The `teachers` table of results.json: `name`, `kind`, `preference` and, if known,
            `low` and `high`.
        base: The base model's preference for each name, drawn as a line if given.
    """
    table = checked_table(teachers, ("name", "kind", "preference"), "teachers")
    hover = [
        f"the {kind} teacher of {name}: preference for {name} {style.percent(value)}"
        for kind, name, value in zip(table["kind"], table["name"], table["preference"], strict=True)
    ]
    lines = []
    if base is not None:
        known = {str(name): float(value) for name, value in base.items()}
        lines.append(bar_charts.Line("base model", known, "dash"))
    return bar_charts.bars(
        _bars_by_kind(table, "name", "preference", hover),
        headline="Preference of each teacher for its target",
        detail=teachers_of(table) + interval_note(table, " over questions"),
        value_title="preference for the target",
        lines=lines,
        top=1.0,
    )


def where_divergence_falls(
    divergence: Divergence | Sequence[Divergence], *, name: str | None = None
) -> go.Figure:
    """Draw the share of divergence tokens at each position of the completion.

    The first divergence token of an example and later ones have their own colors. Above 40
    positions, neighbors are binned. Positions with fewer than 20 tokens are pale, because their
    shares are noisy.

    Args:
        divergence: One result, or a list with one per teacher, which are pooled.
        name: Added to the title; by default the teacher's name if there is one result.

    Raises:
        ValueError: The list is empty, or the completions hold no tokens.
    """
    results = [divergence] if isinstance(divergence, Divergence) else list(divergence)
    if not results:
        raise ValueError("where_divergence_falls needs at least one Divergence; the list is empty")
    if name is None and len(results) == 1:
        name = results[0].teacher.name
    return bar_charts.positions(
        [(np.asarray(result.offsets), np.asarray(result.mask)) for result in results],
        headline=titled("Positions of divergence tokens", name),
    )
