"""Results of patching: one number per pair, layer and position (and head).

A value is *the metric of the patched run minus the metric of the unpatched run*. Noising patches
the corrupted state of one site into the clean run; denoising patches the clean state into the
corrupted run. The last axis counts *columns*: the positions of the clean row, where a differing
span with different numbers of tokens on its two sides is one column (or the row's segments, if one
patch covers several positions). Missing cells are NaN: the right end of shorter rows, and cells
that were not requested. Sums and means leave them out, and tables and figures state their number.

In the terms of mediation analysis (Pearl 2001; Vig et al. 2020, arXiv 2004.12265), with the clean
run as the baseline and the corruption as the treatment: the *total effect* is the corrupted minus
the clean metric; a noising value is the *natural indirect effect* of its site; the *natural direct
effect* is the effect of the corruption while the site is held at its clean state, and follows from
a denoising value.
"""

from dataclasses import dataclass, field, replace
from html import escape
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float32

from divergence_lens._utils.hub import OnHub
from divergence_lens._utils.indexing import Index, row_numbers
from divergence_lens._utils.plotting import draw
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens._utils.wording import plural
from divergence_lens.pairs import token_boxes
from divergence_lens.patching.agreement import (
    Agreement,
    agreement_from_json,
    agreement_of_cells,
    agreement_to_json,
)
from divergence_lens.patching.effect_tables import EffectTables
from divergence_lens.patching.missing import missing_cells, missing_note

if TYPE_CHECKING:
    import plotly.graph_objects as go

Direction = Literal["noising", "denoising"]
_KIND = "effects"
# Settings with one entry per pair. The second holds the answer of each pair that names the bias.
_SETTINGS_BY_PAIR = ("finished_pairs", "answers_naming_bias")


@dataclass(frozen=True, eq=False, repr=False)
class Effects(EffectTables, OnHub):
    """Effects of patching one site, for every pair, layer and position (and head).

    `effects[3]`, `effects[:4]`, `effects[mask]` and `effects[[0, 2]]` select pairs, and always
    return `Effects`.

    Attributes:
        values: `[pairs, layers, positions]`, or with heads as a fourth axis for sites per head, in
            units of the metric; NaN where a cell is missing. Positions are columns, from the start
            of the clean row; rows shorter than the longest are filled with NaN on the right.
        site: The patched site.
        method: `exact`, or the name of the approximation.
        direction: `noising` or `denoising`.
        metric: Name of the metric.
        clean_metric: `[pairs]`, the metric of the unpatched clean run.
        corrupted_metric: `[pairs]`, the metric of the unpatched corrupted run.
        segments: One name per column of each pair.
        labels: One string per column of each pair: its token, or the tokens of both sides where a
            span differs in length ("T|om → Lily").
        differs: For each column of each pair whether its tokens differ between the two rows; empty
            if that is not known.
        positions: For each column of each pair its first clean position, and the length of the
            clean row; empty for pairs whose column p is position p.
        answer_labels: One string per token of each pair's answer, which shows how it was tokenized.
        foil_labels: One string per token of each pair's foil.
        verified: Agreement with exactly computed cells, if requested.
        metadata: Settings and versions; JSON-able.
    """

    values: Float32[np.ndarray, "pairs layers pos"] | Float32[np.ndarray, "pairs layers pos heads"]
    site: str
    method: str
    direction: Direction
    metric: str
    clean_metric: Float32[np.ndarray, " pairs"]
    corrupted_metric: Float32[np.ndarray, " pairs"]
    segments: tuple[tuple[str, ...], ...]
    labels: tuple[tuple[str, ...], ...]
    differs: tuple[tuple[bool, ...], ...] = ()
    positions: tuple[tuple[int, ...], ...] = ()
    answer_labels: tuple[tuple[str, ...], ...] = ()
    foil_labels: tuple[tuple[str, ...], ...] = ()
    verified: Agreement | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.values)
        for name in ("clean_metric", "corrupted_metric", "segments", "labels"):
            if len(getattr(self, name)) != n:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries, but values has {n} pairs"
                )
        for name, more in (("differs", 0), ("positions", 1)):
            rows = getattr(self, name)
            if rows and [len(row) for row in rows if row] != [
                len(labels) + more for row, labels in zip(rows, self.labels, strict=True) if row
            ]:
                raise ValueError(f"labels and {name} differ in length")
        longest = max((len(row) for row in self.labels), default=0)
        if [len(row) for row in self.labels] != [len(row) for row in self.segments]:
            raise ValueError("labels and segments differ in length")
        if longest != self.values.shape[2]:
            raise ValueError(
                f"values has {self.values.shape[2]} positions, but the longest row has {longest}"
            )

    def __repr__(self) -> str:
        """One line: method, direction, site, metric, shape, mean total effect, missing cells."""
        axes = ("pair", "layer", "position", "head")
        sizes = ", ".join(map(plural, self.values.shape, axes))
        total = self.total[np.isfinite(self.total)]
        mean = f"{total.mean():.4g}" if len(total) else "undefined"
        corruption = self.setting("corruption", "counterfactual")
        by = "" if corruption == "counterfactual" else f" by {corruption}"
        return (
            f"Effects({self.method} {self.direction}{by} of {self.site} on {self.metric}: {sizes}; "
            f"mean total effect {mean}{f'; {self.missing_note()}' if self.missing() else ''})"
        )

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Index) -> "Effects":
        """Select pairs by number, slice, boolean mask or list of numbers, in that order.

        `verified` is dropped, because it was measured over all pairs.

        Raises:
            IndexError: If a number is out of range, or a mask has another length.
            ValueError: If nothing is selected.
        """
        chosen = row_numbers(index, len(self), "pair")
        if not chosen:
            raise ValueError(f"the index selects none of the {len(self)} pairs")
        labels = tuple(self.labels[i] for i in chosen)
        metadata = self.metadata
        by_pair = {name: self.setting(name) for name in _SETTINGS_BY_PAIR}
        changed = {name: [of[i] for i in chosen] for name, of in by_pair.items() if of is not None}
        if changed:
            metadata = metadata | {"settings": metadata["settings"] | changed}
        return replace(
            self,
            values=self.values[chosen][:, :, : max(map(len, labels))],
            clean_metric=self.clean_metric[chosen],
            corrupted_metric=self.corrupted_metric[chosen],
            segments=tuple(self.segments[i] for i in chosen),
            labels=labels,
            differs=tuple(self.differs[i] for i in chosen) if self.differs else (),
            positions=tuple(self.positions[i] for i in chosen) if self.positions else (),
            answer_labels=tuple(self.answer_labels[i] for i in chosen if self.answer_labels),
            foil_labels=tuple(self.foil_labels[i] for i in chosen if self.foil_labels),
            verified=None,
            metadata=metadata,
        )

    @property
    def total(self) -> Float32[np.ndarray, " pairs"]:
        """`[pairs]`: the effect of patching everything, with the sign of the direction.

        Corrupted minus clean metric for noising, clean minus corrupted for denoising. For an
        ablation (`mean`, `zero`) it is still the difference between the pair's own two runs.
        """
        difference = self.corrupted_metric - self.clean_metric
        return np.asarray(difference if self.direction == "noising" else -difference)

    def missing(self) -> dict[str, int]:
        """The number of missing cells by reason; empty if every cell has a value."""
        return missing_cells(
            self.values,
            [len(row) for row in self.labels],
            self.total,
            all_requested=self.setting("cells", "all") == "all",
        )

    def missing_note(self) -> str:
        """The missing cells in words, such as "12 of 840 cells missing: not requested"."""
        cells = sum(map(len, self.labels)) * int(
            np.prod(self.values.shape[1:2] + self.values.shape[3:])
        )
        return missing_note(self.missing(), cells)

    def column(self, pair: int, position: int) -> int:
        """The column of a pair that holds a position of its clean row.

        Raises:
            ValueError: If columns are segments, or the row has no such position.
        """
        if self.setting("span", "position") != "position":
            raise ValueError(f"columns are not positions with span={self.setting('span')!r}")
        starts = self.positions[pair] if self.positions else ()
        count = len(self.labels[pair])
        column = int(np.searchsorted(starts, position, side="right")) - 1 if starts else position
        if not position >= 0 or not 0 <= column < count:
            raise ValueError(f"pair {pair} has {count} columns and no position {position}")
        return column

    def near_zero(self, min_total: float = 0.01) -> Bool[np.ndarray, " pairs"]:
        """Pairs whose total effect is smaller than `min_total` (in units of the metric).

        Dividing by a total near zero amplifies noise, so `normalized` excludes these pairs.
        """
        return np.asarray(np.abs(self.total) < min_total)

    def normalized(self, min_total: float = 0.01) -> "Effects":
        """Effects as fractions of each pair's total effect.

        Pairs whose total effect is smaller than `min_total` become NaN, see `near_zero`. The two
        baseline metrics are scaled by the same factor, so that `total` is 1.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            scale = np.where(self.near_zero(min_total), np.nan, 1 / self.total).astype(np.float32)
        shape = (-1,) + (1,) * (self.values.ndim - 1)
        return replace(
            self,
            values=self.values * scale.reshape(shape),
            clean_metric=self.clean_metric * scale,
            corrupted_metric=self.corrupted_metric * scale,
            metric=f"share of the total effect on {self.metric}",
            verified=None,
        )

    def natural_indirect(self) -> Float32[np.ndarray, "pairs layers pos *heads"]:
        """The natural indirect effect of the corruption through each site, a noising value.

        Raises:
            ValueError: If these effects are of denoising, or of an ablation (which has no corrupted
                run).
        """
        self._check_mediation("noising", "natural indirect effects")
        return self.values

    def natural_direct(self) -> Float32[np.ndarray, "pairs layers pos *heads"]:
        """The natural direct effect of the corruption, bypassing each site; shaped like `values`.

        It is the metric of the corrupted run with the site at its clean state, minus the clean
        metric. It is 0 for a site that carries the whole effect.

        Raises:
            ValueError: If these effects are of noising, or of an ablation.
        """
        self._check_mediation("denoising", "natural direct effects")
        shape = (-1,) + (1,) * (self.values.ndim - 1)
        return np.asarray(self.values - self.total.reshape(shape))

    def agreement(self, other: "Effects", k: int = 20) -> Agreement:
        """Compare these effects (the approximation) with `other` (the exact ones).

        Args:
            other: Effects of the same pairs, site, direction, corruption, span and window.
            k: The number of strongest cells that `recall` compares.

        Raises:
            ValueError: If the two are not of the same pairs, site, direction, metric, corruption,
                span and window, or have fewer than two cells in common.
        """
        compared = [
            (name, getattr(self, name), getattr(other, name))
            for name in ("site", "direction", "metric")
        ]
        for name, default in (
            ("corruption", "counterfactual"),
            ("span", "position"),
            ("window", 1),
        ):
            compared.append((name, self.setting(name, default), other.setting(name, default)))
        for name, mine, theirs in compared:
            if mine != theirs:
                raise ValueError(
                    f"these effects are of {name} {mine!r}, the others of {theirs!r}; only effects "
                    "of the same site, direction, metric and options can be compared"
                )
        if self.values.shape != other.values.shape or self.labels != other.labels:
            raise ValueError(
                f"the effects are not of the same pairs: {list(self.values.shape)} and "
                f"{list(other.values.shape)} values, or other tokens"
            )
        # Functions can share a name, but not their values on the unpatched runs.
        mine, theirs = (np.stack([one.clean_metric, one.corrupted_metric]) for one in (self, other))
        if not np.allclose(mine, theirs, rtol=0.05, atol=0.05, equal_nan=True):
            pair = int(np.nanargmax(np.abs(mine - theirs).max(0)))
            raise ValueError(
                f"the two metrics named {self.metric!r} have other values on the unpatched runs of "
                f"pair {pair}: {mine[:, pair].tolist()} and {theirs[:, pair].tolist()}"
            )
        return agreement_of_cells(self.values.ravel(), other.values.ravel(), k)

    def save(self, path: str | PathLike[str]) -> None:
        """Write to one safetensors file with a JSON header."""
        save_tensors(
            path,
            {
                "values": self.values,
                "clean_metric": self.clean_metric,
                "corrupted_metric": self.corrupted_metric,
            },
            {
                "site": self.site,
                "method": self.method,
                "direction": self.direction,
                "metric": self.metric,
                "segments": self.segments,
                "labels": self.labels,
                "differs": self.differs,
                "positions": self.positions,
                "answer_labels": self.answer_labels,
                "foil_labels": self.foil_labels,
                "verified": None if self.verified is None else agreement_to_json(self.verified),
                "metadata": self.metadata,
            },
            kind=_KIND,
        )

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Effects":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a file of effects, or is damaged.
        """
        tensors, header = load_tensors(path, kind=_KIND)
        verified = header["verified"]
        return cls(
            values=np.asarray(tensors["values"]),
            clean_metric=np.asarray(tensors["clean_metric"]),
            corrupted_metric=np.asarray(tensors["corrupted_metric"]),
            site=header["site"],
            method=header["method"],
            direction=header["direction"],
            metric=header["metric"],
            segments=tuple(tuple(row) for row in header["segments"]),
            labels=tuple(tuple(row) for row in header["labels"]),
            differs=tuple(tuple(row) for row in header["differs"]),
            positions=tuple(tuple(row) for row in header["positions"]),
            answer_labels=tuple(tuple(row) for row in header["answer_labels"]),
            foil_labels=tuple(tuple(row) for row in header["foil_labels"]),
            verified=None if verified is None else agreement_from_json(verified),
            metadata=header["metadata"],
        )

    def plot(self, pair: int | Literal["mean"] = 0, **options: Any) -> "go.Figure":
        """A heatmap of layers by positions of one pair, or of the mean over pairs.

        Args:
            pair: Number of the pair, or "mean".
            options: Further options of `plots.effects_heatmap`, such as `orientation`.
        """
        return draw("effects_heatmap", self, pair=pair, **options)

    def _check_mediation(self, direction: Direction, quantity: str) -> None:
        if self.direction != direction:
            raise ValueError(
                f'{quantity} need {direction}; call causal_mediation(..., direction="{direction}")'
            )
        ablation = self.setting("corruption", "counterfactual")
        if ablation in ("mean", "zero"):
            raise ValueError(
                f"{quantity} need a corrupted run; these effects come from "
                f'corruption="{ablation}", which has none'
            )

    def _repr_html_(self) -> str:
        strongest = self.top(5).to_html(index=False, float_format=lambda x: f"{x:.3f}", border=0)
        shape = " x ".join(str(size) for size in self.values.shape)
        checked = self.verified._repr_html_() if self.verified is not None else ""
        sides = ((self.answer_labels, "answers"), (self.foil_labels, "foils"))
        answers = "".join(
            f"<p>{name}: {' '.join(map(token_boxes, labels[:5]))}"
            f"{' (first 5)' if len(labels) > 5 else ''}</p>"
            for labels, name in sides
            if any(labels)
        )
        return (
            f"<p><b>effects</b> of {escape(self.site)}, {self.direction}, {escape(self.method)}, "
            f"on {escape(self.metric)}: {shape} (pairs, layers, positions"
            f"{', heads' if self.values.ndim == 4 else ''}); "
            f"{escape(self.missing_note()) or 'no cells missing'}; "
            f"mean total effect {float(self.total.mean()):.3f}, "
            f"{int(self.near_zero().sum())} pairs with a total near zero</p>{checked}{answers}"
            f"<p>strongest cells</p>{strongest}"
        )
