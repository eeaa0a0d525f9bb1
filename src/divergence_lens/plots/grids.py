"""Values and axes of heatmaps of effects, and means of aligned rows."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from divergence_lens.pairs import BIAS, target_column
from divergence_lens.patching import Effects
from divergence_lens.plots import style
from divergence_lens.plots.heatmaps import Items

_TOKEN, _UNIT = 12, 18  # most letters of a token on an axis, and of a unit, which has two sides
_SIDES = " → "


def token_items(
    tokens: Sequence[str],
    segments: Sequence[str],
    differs: Sequence[bool],
    positions: Sequence[int] = (),
    *,
    framed: int | None = None,
    grouped: bool = True,
) -> Items:
    """The axis of positions, with a frame around the position whose logits are measured.

    Args:
        tokens: The token at each position, or the tokens of both sides of a unit.
        segments: The segment of each position.
        differs: Whether each position differs between the two rows.
        positions: The first clean position of each item, if that is not its number.
        framed: The framed position instead.
        grouped: Whether the segments are named.
    """
    places = positions or range(len(tokens))
    labels = [_shown(token) for token in tokens]
    return Items(
        labels=labels,
        letters=max((min(len(t), _UNIT if _SIDES in t else _TOKEN) for t in tokens), default=1),
        hover=[
            f"position {places[p]}, token “{style.show_token(token, 40)}” "
            f"({segment}{', differs' if differs[p] else ''})"
            for p, (token, segment) in enumerate(zip(tokens, segments, strict=True))
        ],
        bold=differs,
        groups=spans(segments) if grouped else (),
        framed=target_column(segments) if framed is None else framed,
    )


def segment_items(segments: Sequence[str], differs: Sequence[str]) -> Items:
    """The axis of segments; those that hold differing tokens are bold."""
    return Items(
        labels=[style.escape(name) for name in segments],
        letters=max(len(name) for name in segments),
        hover=[f"segment {style.escape(name)}" for name in segments],
        missing="not measured, or no position in this segment",
        bold=[name in differs for name in segments],
    )


def head_items(heads: int) -> Items:
    """The axis of heads."""
    return Items(
        labels=[str(head) for head in range(heads)],
        letters=len(str(heads - 1)),
        hover=[f"head {head}" for head in range(heads)],
        noun="head",
    )


def _shown(token: str) -> str:
    """A token on an axis, or both sides of a unit, of which the longer is cut first."""
    clean, both, corrupted = token.partition(_SIDES)
    if not both:
        return style.show_token(token, _TOKEN)
    room = _UNIT - len(_SIDES)
    first = style.show_token(clean, max(room // 2, room - len(corrupted)))
    return first + _SIDES + style.show_token(corrupted, max(room - room // 2, room - len(clean)))


def spans(segments: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return runs of equal names as (name, start, stop)."""
    runs: list[tuple[str, int, int]] = []
    for i, name in enumerate(segments):
        if runs and runs[-1][0] == name:
            runs[-1] = (name, runs[-1][1], i + 1)
        else:
            runs.append((name, i, i + 1))
    return runs


def in_shares(effects: Effects) -> tuple[Effects, bool]:
    """Effects in shares of the total effect, and whether they are.

    If the total effect of every pair is near zero, shares are undefined, and the effects stay in
    units of the metric.
    """
    if bool(effects.near_zero().all()):
        return effects, False
    return effects.normalized(), True


def cells(effects: Effects) -> Float[np.ndarray, "pairs layers pos"]:
    """Return the values summed over heads; NaN where no head has a value."""
    values = effects.values
    if values.ndim == 3:
        return values
    there = np.isfinite(values)
    return np.where(there.any(3), np.where(there, values, 0).sum(3), np.nan)


def aligned_mean(
    effects: Effects,
) -> tuple[Float[np.ndarray, "layers pos"], list[str], list[str], list[bool], int]:
    """Average the largest set of pairs that share one order of segments, aligned by segment.

    Returns:
        Values `[layers, positions]`; the token and segment of each position, and whether it differs
        between the rows of some pair; and the number of pairs.
    """
    scaled, share = in_shares(effects)
    values = cells(scaled)
    usable = np.flatnonzero(~effects.near_zero()) if share else range(len(effects))
    runs = {int(i): spans(effects.segments[i]) for i in usable}
    names = {i: tuple(name for name, _, _ in own) for i, own in runs.items()}
    fits = {
        shape: {i: order for i, own in names.items() if (order := _within(own, shape)) is not None}
        for shape in dict.fromkeys(names.values())
    }
    shape, chosen = max(fits.items(), key=lambda entry: len(entry[1]))
    widths = [0] * len(shape)
    for i, order in chosen.items():
        for j, (_, start, stop) in zip(order, runs[i], strict=True):
            widths[j] = max(widths[j], stop - start)
    starts = np.concatenate([[0], np.cumsum(widths)])
    stacked = np.full(
        (len(chosen), effects.n_layers, int(starts[-1])), np.nan
    )  # [pair, layer, pos]
    words: list[Counter[str]] = [Counter() for _ in range(int(starts[-1]))]
    differs = [False] * int(starts[-1])
    for row, (i, order) in enumerate(chosen.items()):
        for j, (_, start, stop) in zip(order, runs[i], strict=True):
            at = int(starts[j])
            stacked[row, :, at : at + stop - start] = values[i, :, start:stop]
            for k in range(stop - start):
                words[at + k][effects.labels[i][start + k]] += 1
                differs[at + k] |= differing(effects, i)[start + k]
    there = np.isfinite(stacked)
    count = there.sum(0)
    mean = np.where(count > 0, np.where(there, stacked, 0).sum(0) / np.maximum(count, 1), np.nan)
    tokens = []
    for counter in words:
        token, times = counter.most_common(1)[0]
        tokens.append(token if 2 * times > counter.total() else "*")
    segments = [name for name, width in zip(shape, widths, strict=True) for _ in range(width)]
    return mean, tokens, segments, differs, len(chosen)


def differing(effects: Effects, pair: int) -> tuple[bool, ...]:
    """Whether the tokens of each column of a pair differ between its two rows."""
    if effects.differs:
        return effects.differs[pair]
    return tuple(name == BIAS for name in effects.segments[pair])


def differing_segments(effects: Effects) -> tuple[str, ...]:
    """The segments in which tokens differ, in some pair."""
    return tuple(
        dict.fromkeys(
            name
            for i, row in enumerate(effects.segments)
            for name, differs in zip(row, differing(effects, i), strict=True)
            if differs
        )
    )


def _within(names: Sequence[str], shape: Sequence[str]) -> list[int] | None:
    """Return the index of each name in `shape`; None if `names` is no subsequence of it."""
    places: list[int] = []
    for name in names:
        start = places[-1] + 1 if places else 0
        if name not in shape[start:]:
            return None
        places.append(shape.index(name, start))
    return places
