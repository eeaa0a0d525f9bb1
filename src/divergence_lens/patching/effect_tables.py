"""Tables of effects, and their means over pairs, positions and segments."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from einops import rearrange
from jaxtyping import Float, Float32, Int64

from divergence_lens._utils.statistics import bootstrap_interval, resampled_means
from divergence_lens.pairs import PAIR_SEGMENTS

if TYPE_CHECKING:
    import pandas as pd

Reduce = Literal["sum", "mean"]


class EffectTables(ABC):
    """The tables of `Effects`, which documents the attributes."""

    values: Float32[np.ndarray, "pairs layers pos"] | Float32[np.ndarray, "pairs layers pos heads"]
    segments: tuple[tuple[str, ...], ...]
    labels: tuple[tuple[str, ...], ...]
    metadata: dict[str, Any]

    @abstractmethod
    def missing_note(self) -> str:
        """State the missing cells, their number and why; empty if there is none."""

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return int(self.values.shape[1])

    def setting(self, name: str, default: Any = None) -> Any:
        """An option that these effects were computed with, from the metadata; else `default`."""
        return self.metadata.get("settings", {}).get(name, default)

    def mean(self) -> Float32[np.ndarray, "layers pos *heads"]:
        """Mean over pairs without NaN cells, position by position from the start of the rows.

        Use it if rows have the same layout; for rows of different lengths, use `by_segment`.
        """
        return _nan_mean(self.values, axis=0)

    def by_segment(self, reduce: Reduce = "sum") -> "pd.DataFrame":
        """A table of layers by segments, for examples of different lengths.

        Args:
            reduce: Whether the cells of one segment of one pair are summed or averaged.

        Returns:
            One row per layer and one column per segment present, each the mean over the pairs that
            have the segment. Heads are summed and missing cells excluded; NaN if none remains. The
            name of the column axis states the number of missing cells, as in all tables here.
        """
        import pandas as pd

        table = self._segment_array(reduce)
        return self._noted(
            pd.DataFrame(
                _nan_mean(table, axis=0),
                index=pd.RangeIndex(self.n_layers, name="layer"),
                columns=pd.Index(self.segment_names, name="segment"),
            )
        )

    def by_layer(
        self, reduce: Reduce = "sum", *, level: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> "pd.DataFrame":
        """Mean over pairs of each layer's effect, with a bootstrap interval.

        Args:
            reduce: Whether the positions of one pair are summed or averaged (heads are summed).
            level: Coverage of the interval.
            resamples: Bootstrap resamples over pairs.
            seed: Seed of the resampling.

        Returns:
            One row per layer with columns `effect`, `low`, `high` and `pairs`.
        """
        import pandas as pd

        per_position = rearrange(self._heads_summed(), "pair layer pos -> pos pair layer")
        per_pair = _reduce(per_position, reduce)  # [pair, layer]
        low, high = bootstrap_interval(resampled_means(per_pair, resamples), level=level, seed=seed)
        return self._noted(
            pd.DataFrame(
                {
                    "effect": _nan_mean(per_pair, axis=0),
                    "low": low,
                    "high": high,
                    "pairs": np.isfinite(per_pair).sum(0),
                },
                index=pd.RangeIndex(self.n_layers, name="layer"),
            )
        )

    def interval(
        self,
        of: Literal["cells", "segments"] = "cells",
        *,
        level: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
        """Bootstrap interval over pairs (percentiles) of `mean` or of `by_segment`.

        Args:
            of: `cells` for `[layers, positions]` (and heads), `segments` for `[layers, segments]`.
            level: Coverage.
            resamples: Bootstrap resamples over pairs.
            seed: Seed of the resampling.

        Returns:
            Lower and upper bounds. With one pair, both equal its value.
        """
        data = self.values if of == "cells" else self._segment_array("sum")
        return bootstrap_interval(resampled_means(data, resamples), level=level, seed=seed)

    def top(self, k: int) -> "pd.DataFrame":
        """The `k` cells with the largest magnitude, over all pairs, strongest first.

        Returns:
            Columns `pair`, `layer`, `position`, (`head`,) `effect`, `label`, `segment`. Pass it to
            `causal_mediation(..., cells=...)` to compute these cells exactly.

        Raises:
            ValueError: `k` is negative.
        """
        import pandas as pd

        if k < 0:
            raise ValueError(f"k is {k}; it is a number of cells")
        magnitude = np.abs(np.nan_to_num(self.values, nan=-1.0)).ravel()
        magnitude[~np.isfinite(self.values).ravel()] = -1.0
        order = np.argsort(-magnitude, kind="stable")[:k]
        order = order[magnitude[order] >= 0]
        table = pd.DataFrame(self._columns(order))
        table.attrs["span"] = self.setting("span", "position")
        return self._noted(table)

    def to_dataframe(self) -> "pd.DataFrame":
        """All present cells, one per row, with the columns of `top`, ordered by pair and layer."""
        import pandas as pd

        return self._noted(pd.DataFrame(self._columns(np.flatnonzero(np.isfinite(self.values)))))

    @property
    def segment_names(self) -> tuple[str, ...]:
        """The segments that occur, in the order of tables and figures."""
        present = {name for row in self.segments for name in row}
        known = [name for name in PAIR_SEGMENTS if name in present]
        return (*known, *sorted(present - set(known)))

    def _noted(self, table: "pd.DataFrame") -> "pd.DataFrame":
        """The table, with a statement of the missing cells where pandas shows it."""
        note = self.missing_note()
        if note:
            table.attrs["missing"] = note
            name = table.columns.name
            table.columns.name = note if name is None else f"{name} ({note})"
        return table

    def _heads_summed(self) -> Float[np.ndarray, "pairs layers pos"]:
        return (
            self.values
            if self.values.ndim == 3
            else _reduce(rearrange(self.values, "pair layer pos head -> head pair layer pos"))
        )

    def _segment_array(self, reduce: Reduce) -> Float[np.ndarray, "pairs layers segments"]:
        values, names = self._heads_summed(), self.segment_names
        table = np.full((len(values), self.n_layers, len(names)), np.nan, dtype=np.float32)
        for i, row in enumerate(self.segments):
            names_here = np.array(row)
            for j, name in enumerate(names):
                here = np.flatnonzero(names_here == name)
                if len(here):
                    table[i, :, j] = _reduce(values[i][:, here].T, reduce)
        return table

    def _columns(self, flat: Int64[np.ndarray, " cells"]) -> dict[str, Any]:
        index = np.unravel_index(flat, self.values.shape)
        columns: dict[str, Any] = {"pair": index[0], "layer": index[1], "position": index[2]}
        if self.values.ndim == 4:
            columns["head"] = index[3]
        where = list(zip(index[0].tolist(), index[2].tolist(), strict=True))
        return {
            **columns,
            "effect": self.values.ravel()[flat],
            "label": [self.labels[i][p] for i, p in where],
            "segment": [self.segments[i][p] for i, p in where],
        }


def _nan_mean(values: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """Mean without NaN; NaN, without a warning, where there is no value."""
    present = np.isfinite(values)
    total = np.where(present, values, 0).sum(axis)
    count = present.sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(values.dtype)


def _reduce(
    values: Float[np.ndarray, " across *rest"], reduce: Reduce = "sum"
) -> Float[np.ndarray, "*rest"]:
    """Sum or average over the first axis without NaN; NaN where there is no value."""
    if reduce == "mean":
        return _nan_mean(values, axis=0)
    present = np.isfinite(values)
    total = np.where(present, values, 0).sum(0)
    return np.where(present.any(0), total, np.nan).astype(values.dtype)
