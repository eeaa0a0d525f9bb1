"""Heatmaps of effects: by layer and position, segment or head."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from divergence_lens._utils.wording import plural
from divergence_lens.patching import Effects
from divergence_lens.plots import effect_notes as notes
from divergence_lens.plots import grids, heatmaps
from divergence_lens.plots.heatmaps import Orientation
from divergence_lens.plots.labels import site_words, titled


def effects_heatmap(
    effects: Effects | Mapping[str, Effects],
    pair: int | Literal["mean"] = 0,
    *,
    name: str | None = None,
    orientation: Orientation = "layers_down",
    stacked: bool = False,
    limit: float | None = None,
) -> go.Figure:
    """Draw a heatmap of layer x position effects, of one pair or of the mean over pairs.

    Values are shares of the total effect (1: the patch has the whole effect of the other run), or
    in units of the metric if the total effect is near zero. Tokens that differ between the two rows
    are bold. Gray cells were not measured, and the title states their number. The framed position
    is the one whose logits are measured.

    Args:
        effects: A result of patching, or a mapping from names to results of the same pairs, such as
            of three sites, which are drawn as panels with one color scale. Heads are summed.
        pair: Number of the pair, or "mean", which aligns rows of different lengths segment by
            segment and shows tokens that differ between pairs as a star.
        name: Added to the title, such as the target of the pairs.
        orientation: "layers_down" (positions across), or "layers_across".
        stacked: Whether panels are below each other, for a narrow column.
        limit: End of the color scale. By default it is the largest absolute value, unless a few
            cells exceed all others by far; the color bar states the cells beyond it.

    Raises:
        IndexError: There is no such pair.
        ValueError: There are no results, or they are not of the same pairs.
    """
    panels = _panels(effects)
    first = next(iter(panels.values()))
    count = len(first.labels)
    if pair == "mean":
        means = {label: grids.aligned_mean(result) for label, result in panels.items()}
        values = {label: mean[0] for label, mean in means.items()}
        _, tokens, segments, differs, used = next(iter(means.values()))
        positions: tuple[int, ...] = ()
        share = not bool(first.near_zero().all())
        of = f"mean of {plural(used, 'pair')}"
        if used < count:
            of += f" out of {count:,} (the others have other segments)"
    else:
        if not 0 <= pair < count:
            raise IndexError(f"there is no pair {pair}; the pairs are numbered 0 to {count - 1}")
        tokens, segments = list(first.labels[pair]), list(first.segments[pair])
        differs = list(grids.differing(first, pair))
        positions = first.positions[pair] if first.positions else ()
        share = not bool(first.near_zero()[pair])
        values = {
            label: grids.cells(result.normalized() if share else result)[pair, :, : len(tokens)]
            for label, result in panels.items()
        }
        of = notes.one_pair(first, pair)
    parts = [f"{_site(panels)}{of}; {notes.method(first)}{notes.missing(first, pair)}"]
    parts += [*notes.subject(first, pair), *_heads_summed(panels)]
    if any(differs):
        parts.append("bold: tokens that differ")
    parts.append("framed: the position whose prediction is measured")
    return heatmaps.heatmap(
        values,
        grids.token_items(tokens, segments, differs, positions),
        headline=titled("Effect of a patch, by layer and position", name),
        detail="; ".join(parts) + notes.caution(first, None if pair == "mean" else pair),
        unit=notes.unit(first, share=share),
        orientation=orientation,
        stacked=stacked,
        limit=limit,
        floor=1.0 if share else 0.0,
    )


def effects_by_segment(
    effects: Effects | Mapping[str, Effects],
    *,
    name: str | None = None,
    orientation: Orientation = "layers_down",
    stacked: bool = False,
    limit: float | None = None,
) -> go.Figure:
    """Draw a heatmap of layer x segment effects, the mean over pairs in shares of the total effect.

    Pairs whose total effect is near zero are left out. If all are, values are in units of the
    metric.

    Args:
        effects: A result of patching, or a mapping from names to results of the same pairs, which
            are drawn as panels. Cells of one segment are summed within a pair. The segment
            "divergence" is the position whose prediction is measured.
        name: Added to the title, such as the target of the pairs.
        orientation: "layers_down" (segments across), or "layers_across".
        stacked: Whether panels are below each other, for a narrow column.
        limit: End of the color scale, see `effects_heatmap`.

    Raises:
        ValueError: There are no results, or they are not of the same pairs.
    """
    panels = _panels(effects)
    first = next(iter(panels.values()))
    share = not bool(first.near_zero().all())
    tables = {label: grids.in_shares(result)[0].by_segment() for label, result in panels.items()}
    segments = [str(column) for column in next(iter(tables.values())).columns]
    differs = grids.differing_segments(first)
    parts = [f"{_site(panels)}mean of {notes.pairs_used(first)}", notes.summed(*panels.values())]
    parts += [f"{notes.method(first)}{notes.missing(first)}", *notes.subject(first, "mean")]
    if "divergence" in segments:
        parts.append("divergence: the position that predicts")
    if differs:
        parts.append("bold: segments with tokens that differ")
    return heatmaps.heatmap(
        {label: table.to_numpy(dtype=np.float64) for label, table in tables.items()},
        grids.segment_items(segments, differs),
        headline=titled("Effect of a patch, by layer and segment", name),
        detail="; ".join(parts) + notes.caution(first),
        unit=notes.unit(first, share=share),
        orientation=orientation,
        stacked=stacked,
        limit=limit,
        floor=1.0 if share else 0.0,
    )


def head_grid(
    effects: Effects,
    pair: int | Literal["mean"] = "mean",
    *,
    name: str | None = None,
    orientation: Orientation = "layers_down",
    limit: float | None = None,
) -> go.Figure:
    """Draw a heatmap of layer x head effects, summed over positions.

    Values are shares of the total effect, or in units of the metric if the total effect of the pair
    (or of all pairs) is near zero.

    Args:
        effects: A result of patching single heads (`site="z"`).
        pair: Number of the pair, or "mean" over the pairs whose total effect is not near zero.
        name: Added to the title, such as the target of the pairs.
        orientation: "layers_down" (heads across), or "layers_across".
        limit: End of the color scale, see `effects_heatmap`.

    Raises:
        ValueError: The site has no heads.
        IndexError: There is no such pair.
    """
    if effects.values.ndim != 4:
        raise ValueError(
            f"these effects are of site {effects.site!r}, which has no heads; patch site 'z'"
        )
    count = len(effects.labels)
    if pair != "mean" and not 0 <= pair < count:
        raise IndexError(f"there is no pair {pair}; the pairs are numbered 0 to {count - 1}")
    chosen, share = grids.in_shares(effects if pair == "mean" else effects[pair])
    values = np.asarray(chosen.values, dtype=np.float64)  # [pair, layer, pos, head]
    there = np.isfinite(values)
    added = np.where(there.any(2), np.where(there, values, 0).sum(2), np.nan)
    known = np.isfinite(added)  # [pair, layer, head]
    total = np.where(known, added, 0).sum(0)
    grid = np.where(known.any(0), total / np.maximum(known.sum(0), 1), np.nan)  # [layer, head]
    of = f"mean of {notes.pairs_used(effects)}"
    if pair != "mean":
        of = notes.one_pair(effects, pair)
    parts = [f"{site_words(effects.site)}; {of}", "summed over positions"]
    parts += [
        f"{notes.method(effects)}{notes.missing(effects, pair)}",
        *notes.subject(effects, pair),
    ]
    return heatmaps.heatmap(
        {effects.site: grid},
        grids.head_items(grid.shape[1]),
        headline=titled("Effect of a patch, by layer and head", name),
        detail="; ".join(parts) + notes.caution(effects, None if pair == "mean" else pair),
        unit=notes.unit(effects, share=share),
        orientation=orientation,
        limit=limit,
        floor=1.0 if share else 0.0,
    )


def _panels(effects: Effects | Mapping[str, Effects]) -> dict[str, Effects]:
    """The results of a figure by the names of its panels.

    Raises:
        ValueError: There are none, or they are not of the same pairs.
    """
    if isinstance(effects, Effects):
        return {site_words(effects.site): effects}
    panels = dict(effects)
    if not panels:
        raise ValueError("a heatmap needs at least one Effects; the mapping is empty")
    first = next(iter(panels.values()))
    for label, other in panels.items():
        if other.labels != first.labels or other.n_layers != first.n_layers:
            raise ValueError(f"the effects {label!r} are not of the same pairs as the others")
    return panels


def _site(panels: Mapping[str, Effects]) -> str:
    """The site of the only panel; several panels have their names above them."""
    return f"{next(iter(panels))}; " if len(panels) == 1 else ""


def _heads_summed(panels: Mapping[str, Effects]) -> list[str]:
    """A note on the panels whose heads are summed."""
    summed = [label for label, result in panels.items() if result.values.ndim == 4]
    which = f" ({', '.join(summed)})" if len(panels) > 1 else ""
    return [f"summed over heads{which}"] if summed else []
