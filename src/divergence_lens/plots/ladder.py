"""Many conditions below one another: their means with intervals, and single values as dots."""

from typing import Any

import numpy as np
import plotly.graph_objects as go

from divergence_lens.plots import style
from divergence_lens.plots.charts import Bars

_ROW = 17
_LONGEST = 26  # letters of a name, so that the plot has room in a column of 80 mm


def ladder(series: Bars, *, what: str, detail: str, value_title: str) -> go.Figure:
    """One row for each group, on an axis of ratios with a line at 1.

    For more groups than have room for their names side by side.
    """
    place = {name: i for i, name in enumerate(series.groups)}
    rows = list(place.values())
    names = [n if len(n) <= _LONGEST else n[: _LONGEST - 1] + "…" for n in series.groups]
    values = np.asarray(series.values, dtype=float)
    low = values if series.low is None else np.asarray(series.low, dtype=float)
    high = values if series.high is None else np.asarray(series.high, dtype=float)
    traces: list[Any] = [
        go.Scatter(
            x=[1, 1],
            y=[-0.6, len(rows) - 0.4],
            mode="lines",
            line={"color": style.INK, "width": 1.2, "dash": "dash"},
            hoverinfo="skip",
        ),
        go.Scatter(
            x=[value for _, value, _ in series.points],
            y=[place[name] for name, _, _ in series.points],
            mode="markers",
            marker={"size": 4.5, "color": style.GREY, "opacity": 0.6},
            text=[style.escape(words) for _, _, words in series.points],
            hoverinfo="text",
        ),
        go.Scatter(
            x=values,
            y=rows,
            mode="markers",
            marker={"size": 8, "color": style.BLUE, "symbol": "diamond"},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": high - values,
                "arrayminus": values - low,
                "color": style.BLUE,
                "thickness": 1.5,
                "width": 3,
            },
            text=[style.escape(words) for words in series.hover],
            hoverinfo="text",
        ),
    ]
    # An interval over two targets can be of any width: the axis is that of what was measured.
    measured = np.log10([*values, *(value for _, value, _ in series.points), 1.0])
    return style.figure(
        traces,
        what=what,
        detail=detail,
        plot_height=_ROW * len(rows),
        bottom=44,
        left=14 + 6 * max(map(len, names)),
        xaxis=style.axis(
            value_title,
            type="log",
            range=[float(measured.min()) - 0.12, float(measured.max()) + 0.12],
            tickvals=[0.25, 0.5, 1, 2, 3, 4, 6, 8, 16],
            tickformat="~g",
        ),
        yaxis=style.axis(
            "",
            grid=False,
            tickvals=rows,
            ticktext=[style.escape(name) for name in names],
            range=[len(rows) - 0.4, -0.6],
        ),
    )
