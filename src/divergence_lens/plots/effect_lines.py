"""Figures of effects by layer: bars by site, lines with intervals, two models crossed."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from divergence_lens._utils.statistics import bootstrap_interval, resampled_means
from divergence_lens._utils.tables import Table, checked_table
from divergence_lens._utils.wording import plural
from divergence_lens.patching import CrossPatch, Effects
from divergence_lens.plots import bars as bar_charts
from divergence_lens.plots import effect_notes as notes
from divergence_lens.plots import profiles
from divergence_lens.plots.labels import one_kind, site_words, titled


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
                    f"{plural(rows['target'].nunique(), 'target')}"
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
        detail=f"{plural(table['target'].nunique(), 'target')}{pairs}; absolute effects "
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
        ValueError: There are no results, or their models have different numbers of layers.
    """
    named = {notes.method(effects): effects} if isinstance(effects, Effects) else dict(effects)
    if not named:
        raise ValueError("layer_profile needs at least one Effects; the mapping is empty")
    layers = {label: result.n_layers for label, result in named.items()}
    if len(set(layers.values())) > 1:
        counts = ", ".join(f"{label!r} has {count}" for label, count in layers.items())
        raise ValueError(f"the numbers of layers differ ({counts}); draw models of one depth")
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
    used = " / ".join(dict.fromkeys(notes.pairs_used(result) for result in named.values()))
    lines = [f"{sites}; mean of {used}", notes.summed(*named.values())]
    lines += [notes.method(first)] if len(named) == 1 else []
    lines += notes.subject(first, 0 if len(first) == 1 else "mean")
    if any(low is not None for _, low, _ in series.values()):
        lines.append("band: 95 % interval")
    return profiles.profile(
        np.arange(first.n_layers),
        series,
        headline=titled("Effect of a patch, layer by layer", name),
        detail="; ".join(lines),
        value_title=notes.unit(first, share=share),
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
        f"of {plural(len(crossed.margins), 'pair')}" + ("; band: 95 % interval" if several else ""),
        value_title="change of the margin (logits)",
        across="boundary",
    )
