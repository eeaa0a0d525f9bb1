"""Figures of effects: by layer, position, segment and head; approximate against exact; crossed."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from divergence_lens._utils.statistics import bootstrap_interval, resampled_means
from divergence_lens._utils.tables import Table, checked_table
from divergence_lens.patching import CrossPatch, Effects, inner_agreement, inner_cells
from divergence_lens.plots import bars as bar_charts
from divergence_lens.plots import grids, heatmaps, profiles, scatters, style
from divergence_lens.plots.heatmaps import Orientation
from divergence_lens.plots.labels import metric_words, one_kind, site_words, titled


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
    panels = {site_words(effects.site): effects} if isinstance(effects, Effects) else dict(effects)
    if not panels:
        raise ValueError("effects_heatmap needs at least one Effects; the mapping is empty")
    first = next(iter(panels.values()))
    for label, other in panels.items():
        if other.labels != first.labels or other.n_layers != first.n_layers:
            raise ValueError(f"the effects {label!r} are not of the same pairs as the others")
    count = len(first.labels)
    if pair == "mean":
        means = {label: grids.aligned_mean(result) for label, result in panels.items()}
        values = {label: mean[0] for label, mean in means.items()}
        _, tokens, segments, differs, used = next(iter(means.values()))
        positions: tuple[int, ...] = ()
        share = not bool(first.near_zero().all())
        of = f"mean of {style.plural(used, 'pair')}"
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
        of = f"pair {pair} of {count:,}, total effect {float(first.total[pair]):+.2f}"
    summed = [label for label, result in panels.items() if result.values.ndim == 4]
    sites = f"{next(iter(panels))}; " if len(panels) == 1 else ""
    notes = [f"{sites}{of}; {_method(first)}{_missing(first, pair)}", *_subject(first, pair)]
    if summed:
        notes.append("summed over heads" + (f" ({', '.join(summed)})" if len(panels) > 1 else ""))
    if any(differs):
        notes.append("bold: tokens that differ")
    notes.append("framed: the position whose prediction is measured")
    return heatmaps.heatmap(
        values,
        grids.token_items(tokens, segments, differs, positions),
        headline=titled("Effect of a patch, by layer and position", name),
        detail="; ".join(notes) + _caution(first, None if pair == "mean" else pair),
        unit=_unit(first, share=share),
        orientation=orientation,
        stacked=stacked,
        limit=limit,
        floor=1.0 if share else 0.0,
    )


def effects_by_segment(
    effects: Effects,
    *,
    name: str | None = None,
    orientation: Orientation = "layers_down",
    limit: float | None = None,
) -> go.Figure:
    """Draw a heatmap of layer x segment effects, the mean over pairs in shares of the total effect.

    Pairs whose total effect is near zero are left out. If all are, values are in units of the
    metric.

    Args:
        effects: A result of patching. Cells of one segment are summed within a pair. The segment
            "divergence" is the position whose prediction is measured.
        name: Added to the title, such as the target of the pairs.
        orientation: "layers_down" (segments across), or "layers_across".
        limit: End of the color scale, see `effects_heatmap`.
    """
    scaled, share = grids.in_shares(effects)
    table = scaled.by_segment()
    segments = [str(column) for column in table.columns]
    differs = grids.differing_segments(effects)
    notes = [f"{site_words(effects.site)}; mean of {_pairs_used(effects)}", _summed(effects)]
    notes += [f"{_method(effects)}{_missing(effects)}", *_subject(effects, "mean")]
    if "divergence" in segments:
        notes.append("divergence: the position that predicts")
    if differs:
        notes.append("bold: segments with tokens that differ")
    return heatmaps.heatmap(
        {effects.site: table.to_numpy(dtype=np.float64)},
        grids.segment_items(segments, differs),
        headline=titled("Effect of a patch, by layer and segment", name),
        detail="; ".join(notes) + _caution(effects),
        unit=_unit(effects, share=share),
        orientation=orientation,
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
    of = f"mean of {_pairs_used(effects)}"
    if pair != "mean":
        of = f"pair {pair} of {count:,}, total effect {float(effects.total[pair]):+.2f}"
    notes = [f"{site_words(effects.site)}; {of}", "summed over positions"]
    notes += [f"{_method(effects)}{_missing(effects, pair)}", *_subject(effects, pair)]
    return heatmaps.heatmap(
        {effects.site: grid},
        grids.head_items(grid.shape[1]),
        headline=titled("Effect of a patch, by layer and head", name),
        detail="; ".join(notes) + _caution(effects, None if pair == "mean" else pair),
        unit=_unit(effects, share=share),
        orientation=orientation,
        limit=limit,
        floor=1.0 if share else 0.0,
    )


def layers_by_site(layers: Table, *, kind: str | None = None) -> go.Figure:
    """Draw the effect of each layer's outputs on the first divergence, by site.

    Bars are means over targets, with one color per site and one dot per target.

    Args:
        layers: The `layers` table of results.json: `target`, `kind`, `site`, `layer`,
            `absolute_effect` (absolute effects summed over positions, in shares of the total
            effect) and, if known, `pairs`.
        kind: The kind of teachers, required if the table holds more than one.

    Raises:
        ValueError: The table is empty, or holds more than one kind and `kind` is None.
    """
    columns = ("target", "kind", "site", "layer", "absolute_effect")
    table, kind = one_kind(checked_table(layers, columns, "layers"), kind, "layers")
    bars = []
    for site in dict.fromkeys(table["site"]):
        rows = table[table["site"] == site]
        words = site_words(str(site))
        mean = rows.groupby("layer", sort=True)["absolute_effect"].mean()
        bars.append(
            bar_charts.Bars(
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
    return bar_charts.bars(
        bars,
        headline=f"Effect of each layer on the first divergence ({kind} teachers)",
        detail=f"{style.plural(table['target'].nunique(), 'target')}{pairs}; absolute effects "
        "summed over positions; bars: means, dots: targets",
        value_title="shares of the total effect",
        value_format="",
        group_title="layer",
    )


def layer_profile(
    effects: Effects | Mapping[str, Effects], *, name: str | None = None
) -> go.Figure:
    """Draw effects by layer, summed over positions, with 95 % bootstrap intervals over pairs.

    Values are shares of the total effect, or in units of the metric if the total effect of all
    pairs is near zero. Shares can exceed 1, because successive positions can carry the same
    information. A single pair has no interval.

    Args:
        effects: A result of patching, or a mapping from names to results to compare.
        name: Added to the title, such as the target of the pairs.

    Raises:
        ValueError: There are no results.
    """
    named = {_method(effects): effects} if isinstance(effects, Effects) else dict(effects)
    if not named:
        raise ValueError("layer_profile needs at least one Effects; the mapping is empty")
    series: dict[str, tuple[profiles.Line, profiles.Line | None, profiles.Line | None]] = {}
    # One unit for all lines.
    share = not any(bool(result.near_zero().all()) for result in named.values())
    for label, result in named.items():
        table = (result.normalized() if share else result).by_layer()
        mean, low, high = (
            table[column].to_numpy(dtype=np.float64) for column in ("effect", "low", "high")
        )
        # The bootstrap over one pair has no width, which is no interval.
        several = int(table["pairs"].max()) > 1
        series[label] = (mean, low, high) if several else (mean, None, None)
    first = next(iter(named.values()))
    sites = " / ".join(dict.fromkeys(site_words(result.site) for result in named.values()))
    used = " / ".join(dict.fromkeys(_pairs_used(result) for result in named.values()))
    notes = [f"{sites}; mean of {used}", _summed(*named.values())]
    notes += [_method(first)] if len(named) == 1 else []
    notes += _subject(first, 0 if len(first) == 1 else "mean")
    if any(low is not None for _, low, _ in series.values()):
        notes.append("band: 95 % interval")
    return profiles.profile(
        np.arange(first.n_layers),
        series,
        headline=titled("Effect of a patch, layer by layer", name),
        detail="; ".join(notes),
        value_title=_unit(first, share=share),
    )


def cross_patch_margins(crossed: CrossPatch) -> go.Figure:
    """Draw the contribution of the upper layers of one of two models to the margin, by boundary.

    Three lines in logits with bands of 95 % (bootstrap over pairs): the difference that the first
    model's upper layers make over its own lower layers, over the other's, and the interaction.
    """
    series: dict[str, tuple[profiles.Line, profiles.Line | None, profiles.Line | None]] = {}
    several = len(crossed.margins) > 1
    for name, values in (
        ("over its own lower layers", crossed.upper_effect("a")),
        ("over the other's lower layers", crossed.upper_effect("b")),
        ("interaction", crossed.interaction),
    ):
        low, high = bootstrap_interval(resampled_means(values, 1000), level=0.95, seed=0)
        mean = values.mean(0).astype(np.float64)
        series[name] = (mean, low, high) if several else (mean, None, None)
    return profiles.profile(
        np.arange(crossed.margins.shape[1]),
        series,
        headline="Two models, crossed at every boundary",
        detail=f"upper layers of {crossed.names[0]} instead of those of {crossed.names[1]}; mean "
        f"of {style.plural(len(crossed.margins), 'pair')}"
        + ("; band: 95 % interval" if several else ""),
        value_title="change of the margin (logits)",
        across="boundary",
    )


def agreement_scatter(
    approximate: Effects, exact: Effects, *, name: str | None = None
) -> go.Figure:
    """Draw approximate against exact effects, one point per cell, with their agreement.

    Cells at the target position and in the last layer agree almost by construction. They have their
    own color, and the caption first states the agreement without them.

    Args:
        approximate: Effects by attribution.
        exact: Effects of the same pairs by causal mediation.
        name: Added to the title, such as the target of the pairs.

    Raises:
        ValueError: The two differ in pairs, site, direction or metric.
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
    detail = f"{site_words(exact.site)}; {style.plural(pairs, 'pair')}"
    if within.pairs:
        detail += (
            f"; without target position and last layer ({style.plural(within.cells, 'cell')}), "
            f"mean within a pair: Pearson {within.pearson:.2f}, Spearman {within.spearman:.2f}"
        )
    return scatters.scatter(
        y[both].astype(np.float64),
        x[both].astype(np.float64),
        hover,
        inner_cells(exact)[both],
        headline=titled("Approximate against exact effects", name),
        detail=f"{detail}; all {style.plural(agreement.cells, 'cell')} together: Pearson "
        f"{agreement.pearson:.2f}, Spearman {agreement.spearman:.2f}, same sign "
        f"{style.percent(agreement.sign)}",
        names=(f"approximate, {approximate.method}", f"exact, {metric_words(exact.metric)}"),
        groups=("target position, last layer", "all other cells"),
    )


def _caution(effects: Effects, pair: int | None = None) -> str:
    """Return a clause for the caption if answers name the bias itself; warn if half of them do.

    Args:
        effects: Their settings list such answers.
        pair: The pair drawn; None for all.
    """
    named: Sequence[str | None] = effects.setting("answers_naming_bias") or ()
    words = [word for word in (named if pair is None else named[pair : pair + 1]) if word]
    if not words:
        return ""
    shown = ", ".join(f"“{word}”" for word in list(dict.fromkeys(words))[:3])
    of = f" of {len(words):,} of {len(named):,} pairs" if pair is None else ""
    text = f"the answer or foil{of} names the bias itself ({shown})"
    if pair is not None or 2 * len(words) >= len(named):
        warnings.warn(
            f"{text}; these effects do not measure a hidden bias: use data that does not mention "
            "it",
            stacklevel=3,
        )
    return f"; not a hidden bias: {text}"


def _unit(effects: Effects, *, share: bool) -> str:
    if share:
        return "share of the total effect"
    return f"change of the {metric_words(effects.metric)}"


def _summed(*results: Effects) -> str:
    heads = any(effects.values.ndim == 4 for effects in results)
    return "summed over positions and heads" if heads else "summed over positions"


def _subject(effects: Effects, pair: int | Literal["mean"]) -> list[str]:
    """The model, and the answer and foil of one pair (or of all, if they are the same)."""
    model = style.model_label(effects.metadata)
    notes = [model] if model else []
    for word, labels in (("answer", effects.answer_labels), ("foil", effects.foil_labels)):
        rows = set(labels) if pair == "mean" else {labels[pair]} if labels else set()
        if len(rows) == 1 and any(row := next(iter(rows))):
            notes.append(f"{word} “{style.clipped(''.join(row), 20)}”")
    return notes


def _pairs_used(effects: Effects) -> str:
    count = len(effects.labels)
    near_zero = int(effects.near_zero().sum())
    used = count if near_zero == count else count - near_zero
    return style.plural(count, "pair") if used == count else f"{used:,} of {count:,} pairs"


def _missing(effects: Effects, pair: int | Literal["mean"] = "mean") -> str:
    """State the missing cells of one pair or of all."""
    note = (effects if pair == "mean" else effects[pair]).missing_note()
    return f"; {note}" if note else ""


def _method(effects: Effects) -> str:
    method = "exact" if effects.method == "exact" else f"approximate, {effects.method}"
    return f"{method}, {effects.direction}"
