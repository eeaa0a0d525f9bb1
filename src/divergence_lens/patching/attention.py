"""Attention patterns of single heads in the two runs of each pair.

Patching names the heads that matter; their patterns show which tokens they read. A column that
holds several tokens (a differing span of another length) is read as one: the weights of its tokens
are added, and it attends as its last token does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from divergence_lens._utils.hub import OnHub
from divergence_lens._utils.plotting import draw
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens._utils.wording import plural
from divergence_lens.engine import SiteFunction, get_engine
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs, check_pairs, target_column
from divergence_lens.patching.cells import cells_of
from divergence_lens.patching.trace import weights
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Head = tuple[int, int]
"""Layer and head."""

_KIND = "attention"


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPatterns(OnHub):
    """The attention patterns of chosen heads in the clean and the corrupted run of each pair.

    Attributes:
        heads: Layer and head of each pattern.
        clean: `[pairs, heads, query, key]`, the weight with which the query column attends to the
            key column in the clean run; NaN beyond the columns of a pair.
        corrupted: The same for the corrupted run.
        labels: One string per column of each pair, as in `Effects`.
        segments: One name per column of each pair.
        differs: For each column of each pair whether its tokens differ between the two rows.
        metadata: Settings and versions; JSON-able.
    """

    heads: tuple[Head, ...]
    clean: Float32[np.ndarray, "pairs heads query key"]
    corrupted: Float32[np.ndarray, "pairs heads query key"]
    labels: tuple[tuple[str, ...], ...]
    segments: tuple[tuple[str, ...], ...]
    differs: tuple[tuple[bool, ...], ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        longest = max((len(row) for row in self.labels), default=0)
        shape = (len(self.labels), len(self.heads), longest, longest)
        for name in ("clean", "corrupted"):
            if getattr(self, name).shape != shape:
                raise ValueError(
                    f"{name} has the shape {list(getattr(self, name).shape)}; {len(self.labels)} "
                    f"pairs of {longest} columns and {len(self.heads)} heads have {list(shape)}"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        """One line: the heads and the number of pairs."""
        heads = ", ".join(map(head_name, self.heads[:8])) + (", …" if len(self.heads) > 8 else "")
        count = plural(len(self.heads), "head")
        return f"AttentionPatterns({count} ({heads}) in {plural(len(self), 'pair')})"

    def target(self, pair: int) -> int:
        """The column whose logits are measured."""
        return target_column(self.segments[pair])

    def to_dataframe(self) -> "pd.DataFrame":
        """The weights from the target column of each pair, one row per head and key.

        Columns `pair`, `layer`, `head`, `key`, `label`, `segment`, `clean`, `corrupted` and
        `difference` (corrupted minus clean).
        """
        import pandas as pd

        rows = []
        for pair, labels in enumerate(self.labels):
            at = self.target(pair)
            for number, (layer, head) in enumerate(self.heads):
                for key in range(at + 1):
                    both = (
                        float(side[pair, number, at, key]) for side in (self.clean, self.corrupted)
                    )
                    where = (labels[key], self.segments[pair][key])
                    rows.append((pair, layer, head, key, *where, *both))
        names = ["pair", "layer", "head", "key", "label", "segment", "clean", "corrupted"]
        table = pd.DataFrame(rows, columns=names)
        return table.assign(difference=table["corrupted"] - table["clean"])

    def plot(self, head: Head | None = None, *, pair: int = 0, **options: Any) -> "go.Figure":
        """The weights from the target position, of all heads, or the whole pattern of one head.

        Args:
            head: Layer and head, for the whole pattern of query and key tokens.
            pair: Number of the pair.
            options: Further options of `plots.attention_from` or `plots.attention_pattern`.
        """
        if head is None:
            return draw("attention_from", self, pair=pair, **options)
        return draw("attention_pattern", self, head=head, pair=pair, **options)

    def save(self, path: str | PathLike[str]) -> None:
        """Write to one safetensors file with a JSON header."""
        header = {
            "heads": self.heads,
            "labels": self.labels,
            "segments": self.segments,
            "differs": self.differs,
            "metadata": self.metadata,
        }
        save_tensors(path, {"clean": self.clean, "corrupted": self.corrupted}, header, kind=_KIND)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "AttentionPatterns":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a file of attention patterns, or is damaged.
        """
        tensors, header = load_tensors(path, kind=_KIND)
        return cls(
            heads=tuple((layer, head) for layer, head in header["heads"]),
            clean=np.asarray(tensors["clean"]),
            corrupted=np.asarray(tensors["corrupted"]),
            labels=tuple(map(tuple, header["labels"])),
            segments=tuple(map(tuple, header["segments"])),
            differs=tuple(map(tuple, header["differs"])),
            metadata=header["metadata"],
        )

    def _repr_html_(self) -> str:
        table = self.to_dataframe()
        order = table["difference"].abs().sort_values(ascending=False, kind="stable").index[:5]
        strongest = table.loc[order].to_html(
            index=False, float_format=lambda x: f"{x:.3f}", border=0
        )
        return (
            f"<p><b>attention patterns</b> of {escape(', '.join(map(head_name, self.heads)))} in "
            f"{plural(len(self), 'pair')}</p><p>largest differences at the target</p>{strongest}"
        )


def head_name(head: Head) -> str:
    """The name of a head, such as L3H4."""
    return f"L{head[0]}H{head[1]}"


@torch.no_grad()
def attention_patterns(
    model: Model, pairs: Pairs, *, heads: "pd.DataFrame | Sequence[Head]"
) -> AttentionPatterns:
    """Read the attention patterns of chosen heads in both runs of each pair.

    Args:
        model: The model; teachers with deltas are applied to it.
        pairs: The pairs.
        heads: Layer and head of each, or a table with these columns, such as the strongest cells of
            `causal_mediation(model, pairs, site="z").top(5)`. Repeated heads count once.

    Returns:
        The patterns; each row takes one forward pass.

    Raises:
        ValueError: If no head is given, or the model has no such head or no patterns.
    """
    check_pairs(pairs)
    chosen = _heads(heads)
    for_model = get_engine(model, causal=False)
    if "pattern" not in for_model.sites:
        raise ValueError("this model does not expose its attention patterns")
    for layer, head in chosen:
        if not (0 <= layer < for_model.n_layers and 0 <= head < for_model.n_heads):
            raise ValueError(
                f"the model has no {head_name((layer, head))}; it has {for_model.n_layers} layers "
                f"of {for_model.n_heads} heads"
            )
    cells = [cells_of(pairs, i, "position", units=True) for i in range(len(pairs))]
    longest = max(len(pair.columns) for pair in cells)
    sides = np.full((2, len(pairs), len(chosen), longest, longest), np.nan, dtype=np.float32)
    for i, pair in enumerate(cells):
        rows, teachers = (
            (pairs.clean[i], pairs.corrupted[i]),
            (pairs.clean_teacher[i], pairs.corrupted_teacher[i]),
        )
        for side, (row, teacher) in enumerate(zip(rows, teachers, strict=True)):
            weight = _patterns(model, teacher, row, chosen)  # [head, query, key]
            spans = [column.corrupted if side else column.clean for column in pair.columns]
            count = len(spans)
            sides[side, i, :, :count, :count] = _by_column(weight, spans)
    return AttentionPatterns(
        heads=chosen,
        clean=sides[0],
        corrupted=sides[1],
        labels=tuple(pair.labels for pair in cells),
        segments=tuple(pair.segments for pair in cells),
        differs=tuple(pair.differs for pair in cells),
        metadata=run_metadata(model, heads=[list(head) for head in chosen]),
    )


def _heads(heads: "pd.DataFrame | Sequence[Head]") -> tuple[Head, ...]:
    import pandas as pd

    if isinstance(heads, pd.DataFrame):
        absent = {"layer", "head"} - set(heads.columns)
        if absent:
            raise ValueError(
                f"heads lacks the columns {sorted(absent)}; patch a site with heads, such as "
                'site="z", and give effects.top(5)'
            )
        heads = list(zip(heads["layer"], heads["head"], strict=True))
    chosen = tuple(dict.fromkeys((int(layer), int(head)) for layer, head in heads))
    if not chosen:
        raise ValueError("heads is empty; name at least one (layer, head)")
    return chosen


def _patterns(
    model: Model, teacher: Teacher | None, row: Int64[Tensor, " pos"], heads: Sequence[Head]
) -> Float32[np.ndarray, "heads query key"]:
    """The patterns of one row."""
    by_layer: dict[int, Tensor] = {}

    def recorder(layer: int) -> SiteFunction:
        return lambda pattern: by_layer.update({layer: pattern[0]})  # [query, head, key]

    with weights(teacher, model) as own:
        engine = get_engine(own, causal=False)
        layers = sorted({layer for layer, _ in heads})
        with engine.hooked([(layer, "pattern", recorder(layer)) for layer in layers]):
            engine.final(row[None].to(engine.device))
    chosen = torch.stack([by_layer[layer][:, head] for layer, head in heads])
    return np.asarray(chosen.float().cpu().numpy())


def _by_column(
    patterns: Float32[np.ndarray, "heads query key"], spans: Sequence[range]
) -> Float32[np.ndarray, "heads columns columns"]:
    """Add the weights of each column's keys, in the rows of each column's last position."""
    queries = patterns[:, [span[-1] for span in spans]]  # [head, column, key]
    return np.stack([queries[..., span.start : span.stop].sum(-1) for span in spans], -1)
