"""Figures of attention: which tokens the heads read, in both runs and in their difference."""

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from divergence_lens.patching import AttentionPatterns, head_name
from divergence_lens.plots import grids, heatmaps, style
from divergence_lens.plots.labels import titled

_Panels = dict[str, Float[np.ndarray, "rows keys"]]


def attention_from(
    patterns: AttentionPatterns,
    pair: int = 0,
    *,
    position: int | None = None,
    name: str | None = None,
    limit: float | None = None,
) -> go.Figure:
    """Draw the weights with which one position attends to all others, one row per head.

    Three panels share one color scale: the clean run, the corrupted run, and their difference.

    Args:
        patterns: What `attention_patterns` returned.
        pair: Number of the pair.
        position: The column that attends; the one whose logits are measured by default.
        name: Added to the title.
        limit: End of the color scale.

    Raises:
        IndexError: There is no such pair or position.
    """
    count = _columns(patterns, pair)
    at = patterns.target(pair) if position is None else position
    if not 0 <= at < count:
        raise IndexError(f"there is no position {at}; pair {pair} has 0 to {count - 1}")
    heads = [head_name(head) for head in patterns.heads]
    return heatmaps.heatmap(
        _panels(patterns.clean[pair, :, at, :count], patterns.corrupted[pair, :, at, :count]),
        grids.token_items(
            patterns.labels[pair], patterns.segments[pair], patterns.differs[pair], framed=at
        ),
        headline=titled("Tokens that the heads read", name),
        detail=_detail(patterns, pair, "framed: the position that attends"),
        unit="attention",
        floor=1.0,
        orientation="layers_down",
        stacked=True,
        limit=limit,
        rows=heatmaps.Rows(heads, max(map(len, heads)), "head", [f"head {head}" for head in heads]),
    )


def attention_pattern(
    patterns: AttentionPatterns,
    head: tuple[int, int],
    pair: int = 0,
    *,
    name: str | None = None,
    limit: float | None = None,
) -> go.Figure:
    """Draw the whole pattern of one head: each token down attends to the tokens across.

    Three panels share one color scale: the clean run, the corrupted run, and their difference.

    Args:
        patterns: What `attention_patterns` returned.
        head: Layer and head.
        pair: Number of the pair.
        name: Added to the title.
        limit: End of the color scale.

    Raises:
        IndexError: There is no such pair.
        ValueError: The patterns are not of this head.
    """
    count = _columns(patterns, pair)
    if tuple(head) not in patterns.heads:
        raise ValueError(
            f"the patterns are of {', '.join(map(head_name, patterns.heads))}, not of "
            f"{head_name(head)}"
        )
    number = patterns.heads.index(tuple(head))
    items = grids.token_items(
        patterns.labels[pair], patterns.segments[pair], patterns.differs[pair], grouped=False
    )
    return heatmaps.heatmap(
        _panels(
            patterns.clean[pair, number, :count, :count],
            patterns.corrupted[pair, number, :count, :count],
        ),
        items,
        headline=titled(f"Attention of head {head_name(head)}", name),
        detail=_detail(patterns, pair, "down: the position that attends; framed: the one measured"),
        unit="attention",
        floor=1.0,
        orientation="layers_down",
        limit=limit,
        rows=heatmaps.Rows(
            [items.shown(i) for i in range(count)],
            items.letters,
            "",
            [f"from {text}" for text in items.hover],
        ),
    )


def _columns(patterns: AttentionPatterns, pair: int) -> int:
    if not 0 <= pair < len(patterns):
        raise IndexError(
            f"there is no pair {pair}; the pairs are numbered 0 to {len(patterns) - 1}"
        )
    return len(patterns.labels[pair])


def _panels(
    clean: Float[np.ndarray, "rows keys"], corrupted: Float[np.ndarray, "rows keys"]
) -> _Panels:
    return {
        "clean run": clean.astype(np.float64),
        "corrupted run": corrupted.astype(np.float64),
        "difference": (corrupted - clean).astype(np.float64),
    }


def _detail(patterns: AttentionPatterns, pair: int, note: str) -> str:
    model = style.model_label(patterns.metadata)
    bold = "; bold: tokens that differ" if any(patterns.differs[pair]) else ""
    name = f"; {model}" if model else ""
    what = "difference: corrupted minus clean"
    return f"pair {pair} of {len(patterns):,}{name}{bold}; {note}; {what}"
