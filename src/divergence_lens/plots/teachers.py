"""Figures of teachers: what they prefer, and where their divergence tokens are."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from divergence_lens._utils.tables import Table, checked_table
from divergence_lens.divergence import Divergence
from divergence_lens.plots import bars as bar_charts
from divergence_lens.plots import style
from divergence_lens.plots.labels import column_of, intervals_said, teachers_of, titled


def rate_per_teacher(divergence: Divergence | Table) -> go.Figure:
    """How many of the completion tokens are divergence tokens, for each teacher.

    Args:
        divergence: The `divergence` table of results.json (`target`, `kind`, `tokens`, `rate` and,
            if known, `low` and `high`), or one `Divergence`, whose counterfactuals are shown one
            by one.

    Returns:
        Bars, one color for each kind of teacher.
    """
    if isinstance(divergence, Divergence):
        return _rate_per_counterfactual(divergence)
    table = checked_table(divergence, ("target", "kind", "tokens", "rate"), "divergence")
    kinds = list(dict.fromkeys(table["kind"]))
    bars = []
    for kind in kinds:
        rows = table[table["kind"] == kind]
        bars.append(
            bar_charts.Bars(
                label=f"{kind} teachers",
                groups=[str(name) for name in rows["target"]],
                values=rows["rate"].to_numpy(float),
                low=column_of(rows, "low"),
                high=column_of(rows, "high"),
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
    return bar_charts.bars(
        bars,
        what="Divergence tokens per teacher",
        detail=f"{teachers_of(table)}, {style.plural(tokens, 'completion token')}"
        + intervals_said(table),
        value_title="share of the teacher's tokens",
    )


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
                f"{name} would have said something else at {style.percent(rate)} of the tokens"
                for name, rate in zip(names, rates, strict=True)
            ),
            f"at least one of them at {style.percent(divergence.rate)} of the tokens",
        ],
    )
    return bar_charts.bars(
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
        Bars, one color for each kind of teacher.
    """
    table = checked_table(teachers, ("name", "kind", "preference"), "teachers")
    bars = []
    for kind in dict.fromkeys(table["kind"]):
        rows = table[table["kind"] == kind]
        bars.append(
            bar_charts.Bars(
                label=f"{kind} teachers",
                groups=[str(name) for name in rows["name"]],
                values=rows["preference"].to_numpy(float),
                low=column_of(rows, "low"),
                high=column_of(rows, "high"),
                hover=[
                    f"the {kind} teacher of {name}: preference for {name} {style.percent(value)}"
                    for name, value in zip(rows["name"], rows["preference"], strict=True)
                ],
            )
        )
    lines = []
    if base is not None:
        known = {str(name): float(value) for name, value in base.items()}
        lines.append(bar_charts.Line("untouched model", known, "dash"))
    return bar_charts.bars(
        bars,
        what="Preference of each teacher for its target",
        detail=teachers_of(table) + intervals_said(table, " over questions"),
        value_title="preference for the target",
        lines=lines,
        top=1.0,
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
        Above 40 places, neighbors are put together. Places with fewer than 20 tokens are pale:
        their shares mean next to nothing.

    Raises:
        ValueError: If there is nothing to show.
    """
    several = [divergence] if isinstance(divergence, Divergence) else list(divergence)
    if not several:
        raise ValueError("where_divergence_falls needs at least one Divergence; the list is empty")
    if name is None and len(several) == 1:
        name = several[0].teacher.name
    return bar_charts.positions(
        [(np.asarray(one.offsets), np.asarray(one.mask)) for one in several],
        what=titled("Where divergence tokens fall", name),
    )
