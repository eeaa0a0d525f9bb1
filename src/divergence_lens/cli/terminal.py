"""Heatmaps in the terminal: one line per token or segment, one colored cell per layer.

Tokens go down, because a terminal is narrow and scrolls; a figure (`--figure`) has them across.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from divergence_lens.patching import Effects

# The color scale of the figures, from the most negative value to the most positive.
SCALE: tuple[tuple[float, str], ...] = (
    (0.0, "#053061"),
    (0.15, "#1B62A5"),
    (0.32, "#6CA7D2"),
    (0.44, "#CFE3F0"),
    (0.5, "#F8F8F6"),
    (0.56, "#FBE0C6"),
    (0.68, "#EE9B4E"),
    (0.85, "#C05A0C"),
    (1.0, "#662C00"),
)
_NARROW, _WIDE = 2, 6
_LABEL = 24


@dataclass(frozen=True)
class Grid:
    """The numbers of a heatmap, and the names of its rows.

    Attributes:
        values: `[rows, layers]`; NaN where a cell is missing.
        rows: A token or a segment per row.
        marked: Rows whose tokens differ between the two runs.
        caption: Says what the numbers are.
    """

    values: np.ndarray
    rows: Sequence[str]
    marked: Sequence[bool]
    caption: str


def print_heatmaps(results: Sequence["Effects"], pair: int | None) -> None:
    """Print the effects of one pair by token, or of all pairs by segment, one site after another.

    Cells show numbers if the terminal is wide enough or shows no colors. All heatmaps have the same
    color scale.

    Args:
        results: Results of patching the same pairs; heads are summed.
        pair: Number of the pair; None for the mean over pairs by segment.
    """
    grids = [
        _by_segment(effects) if pair is None else _by_token(effects, pair) for effects in results
    ]
    console = Console(highlight=False, soft_wrap=True)
    shown = np.concatenate([grid.values[np.isfinite(grid.values)] for grid in grids])
    limit = float(np.abs(shown).max(initial=0)) or 1.0
    for grid in grids:
        _print_grid(console, grid, limit)
    if any(any(grid.marked) for grid in grids):
        console.print("* differs between the clean and the corrupted run")


def _print_grid(console: Console, grid: Grid, limit: float) -> None:
    """Print one heatmap, whose colors end at `limit`."""
    layers = grid.values.shape[1]
    label = min(_LABEL, max(map(len, grid.rows)) + 2)
    numbers = console.color_system is None or label + _WIDE * layers <= console.width
    width = _WIDE if numbers else _NARROW
    console.print(f"\n{grid.caption}")
    every = 1 if numbers else 5
    head = "".join(f"{i if i % every == 0 else '':>{width}}" for i in range(layers))
    console.print(f"{'layer':<{label}}{head}")
    for name, marked, row in zip(grid.rows, grid.marked, grid.values, strict=True):
        line = Text(f"{_cut(('*' if marked else ' ') + name, label - 1):<{label}}")
        for value in row.tolist():
            line.append(_cell(value, width, numbers=numbers), style=_style(value / limit))
        console.print(line)


def _by_token(effects: "Effects", pair: int) -> Grid:
    near_zero = bool(effects.near_zero()[pair])
    values = (effects if near_zero else effects.normalized()).values[pair]
    tokens = effects.labels[pair]
    if values.ndim == 3:  # [layers, pos, heads]
        known = np.isfinite(values)
        values = np.where(known.any(-1), np.where(known, values, 0).sum(-1), np.nan)
    unit = effects.metric.replace("_", " ") if near_zero else "shares of the total effect"
    heads = ", summed over heads" if effects.values.ndim == 4 else ""
    return Grid(
        values=values[:, : len(tokens)].T,
        rows=[repr(token)[1:-1] for token in tokens],
        marked=effects.differs[pair] if effects.differs else [False] * len(tokens),
        caption=f"{_answers(effects, pair)}{effects.site}, {effects.method}, {effects.direction}, "
        f"in {unit} ({effects.total[pair]:+.3f}){heads}",
    )


def _by_segment(effects: "Effects") -> Grid:
    table = effects.normalized().by_segment()
    used = int((~effects.near_zero()).sum())
    return Grid(
        values=table.to_numpy(dtype=np.float64).T,
        rows=[str(name) for name in table.columns],
        marked=[False] * table.shape[1],
        caption=f"{effects.site}, {effects.method}, {effects.direction}, in shares of the total "
        f"effect, mean of {used} of {len(effects)} pairs, summed within a segment",
    )


def _answers(effects: "Effects", pair: int) -> str:
    """The answer and the foil of a pair, as far as the metric has them."""
    texts = [
        repr("".join(labels[pair]))
        for labels in (effects.answer_labels, effects.foil_labels)
        if labels and labels[pair]
    ]
    return f"{' against '.join(texts)}: " if texts else ""


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _cell(value: float, width: int, *, numbers: bool) -> str:
    if not np.isfinite(value):
        return f"{'?':>{width}}"
    # Adding zero turns a rounded -0.0 into 0.0.
    return f"{round(value, 2) + 0.0:>{width}.2f}" if numbers else " " * width


def _style(share: float) -> str:
    """A background between the colors of the scale, with a readable text color."""
    if not np.isfinite(share):
        return ""
    place = (min(max(share, -1.0), 1.0) + 1) / 2
    stops = [stop for stop, _ in SCALE]
    red, green, blue = (
        round(float(np.interp(place, stops, [int(color[i : i + 2], 16) for _, color in SCALE])))
        for i in (1, 3, 5)
    )
    ink = "black" if abs(share) < 0.6 else "white"
    return f"{ink} on rgb({red},{green},{blue})"
