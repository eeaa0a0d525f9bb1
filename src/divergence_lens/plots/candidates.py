"""Candidate biases of an audit as a dot plot."""

import numpy as np
import plotly.graph_objects as go

from divergence_lens._utils.tables import Table, checked_table
from divergence_lens.plots import style

_ROW = 22  # pixels from one candidate to the next
_MOST = 40


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
