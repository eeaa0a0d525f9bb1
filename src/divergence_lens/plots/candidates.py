"""Figures of audits: candidates as a dot plot, and the false alarms of many audits."""

import numpy as np
import plotly.graph_objects as go

from divergence_lens._utils.tables import Table, checked_table
from divergence_lens.plots import style

_ROW = 22  # pixels from one candidate to the next
_MOST = 40
_DASHES = ("solid", "dash", "dot")  # at most three kinds of auditors


def candidate_dots(
    table: Table, *, level: float, alpha: float, headline: str, detail: str
) -> go.Figure:
    """Draw the z of each candidate, with its interval, over the band of the null.

    Args:
        table: `Audit.to_dataframe()`, or its rows: `candidate`, `kind`, `score`, `low`, `high`,
            `z`, `p_holm`. The first 40 candidates are drawn.
        level: Half the width of the band: the z that chance alone seldom exceeds.
        alpha: Level of `p_holm` below which a candidate is colored.
        headline: The figure's title.
        detail: Lines below the title.

    Raises:
        ValueError: The table is empty or lacks a column.
    """
    columns = ("candidate", "kind", "score", "low", "high", "z", "p_holm")
    rows = checked_table(table, columns, "candidates").head(_MOST)
    names = [str(name) for name in rows["candidate"]]
    z = rows["z"].to_numpy(float)
    score = rows["score"].to_numpy(float)
    # The interval is in nats, the axis in standard errors: z / score is one over the error.
    scale = np.divide(z, score, out=np.zeros_like(z), where=score != 0)
    beyond = rows["p_holm"].to_numpy(float) < alpha
    colors = [style.VERMILION if above else style.GREY for above in beyond]
    hover = [
        f"{style.escape(row.candidate)}: z {row.z:+.1f}, {row.score:+.2f} nats for each row "
        f"({row.low:+.2f} to {row.high:+.2f}), corrected p {row.p_holm:.2g}, "
        f"{row.kind} auditor"
        for row in rows.itertuples()
    ]
    dots = go.Scatter(
        x=z,
        y=names,
        mode="markers",
        marker={
            "size": 9,
            "color": colors,
            "symbol": ["diamond" if above else "circle" for above in beyond],
        },
        error_x={
            "type": "data",
            "symmetric": False,
            "array": (rows["high"].to_numpy(float) - score) * scale,
            "arrayminus": (score - rows["low"].to_numpy(float)) * scale,
            "color": style.INK,
            "thickness": 1.2,
            "width": 0,
        },
        text=hover,
        hoverinfo="text",
        showlegend=False,
    )
    band = {
        "type": "rect",
        "xref": "x",
        "yref": "paper",
        "x0": -level,
        "x1": level,
        "y0": 0,
        "y1": 1,
        "fillcolor": style.FAINT,
        "line": {"width": 0},
        "layer": "below",
    }
    longest = max(len(name) for name in names)
    return style.figure(
        [dots],
        headline=headline,
        detail=detail,
        plot_height=max(_ROW * len(names), 90),
        left=min(20 + 7 * longest, 160),
        shapes=[band],
        xaxis=style.axis("z of the mean contribution of a row"),
        yaxis=style.axis("", grid=False, autorange="reversed", type="category"),
    )


def calibration_curve(table: Table, *, headline: str, detail: str) -> go.Figure:
    """Draw the share of unbiased sets with a p-value below each level.

    The curves of a calibrated test lie in the gray band, which holds 95 % of the shares that chance
    alone gives at a level; those of a cautious test lie below it.

    Args:
        table: One row per set and kind of auditors: `auditors`, `p`.
        headline: The figure's title.
        detail: Lines below the title.

    Raises:
        ValueError: The table is empty or lacks a column.
    """
    from scipy import stats

    rows = checked_table(table, ("auditors", "p"), "sets")
    levels = np.linspace(0, 1, 101)
    traces: list[go.Scatter] = []
    for i, (name, own) in enumerate(rows.groupby("auditors", sort=False)):
        p = own["p"].to_numpy(float)
        share = (p[:, None] < levels).mean(0)  # [levels]
        traces.append(
            go.Scatter(
                x=levels,
                y=share,
                mode="lines",
                name=style.escape(name),
                line={"color": style.CYCLE[i], "width": 2.2, "dash": _DASHES[i]},
                text=[
                    f"{style.escape(name)}: {style.percent(value)} of {len(p)} sets have a p-value "
                    f"below {level:.2f}"
                    for level, value in zip(levels, share, strict=True)
                ],
                hoverinfo="text",
            )
        )
    sets = int(rows.groupby("auditors", sort=False).size().max())
    low, high = (stats.binom.ppf(q, sets, levels) / sets for q in (0.025, 0.975))  # [levels]
    band = go.Scatter(
        x=[*levels, *levels[::-1]],
        y=[*np.clip(low, 0, 1), *np.clip(high, 0, 1)[::-1]],
        mode="lines",
        fill="toself",
        fillcolor=style.FAINT,
        line={"width": 0, "color": style.FAINT},
        name="chance",
        hoverinfo="skip",
    )
    return style.figure(
        [band, *traces],
        headline=headline,
        detail=detail,
        plot_height=260,
        legend_rows=1 + len(traces),
        xaxis=style.axis("level", range=[0, 1]),
        yaxis=style.axis("share of sets below the level", range=[0, 1]),
    )
