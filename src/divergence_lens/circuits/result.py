"""The result of `faithfulness` and `faithfulness_curve`: metrics of circuits, and what they give.

`cpr` and `cmd` are the areas of MIB (Mueller et al. 2025, arXiv 2504.13151): below the curve of
faithfulness over the share of edges, and between the curve and 1, by trapezoids from .1 to 100 %.
"""

from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from divergence_lens._utils.hub import OnHub
from divergence_lens._utils.plotting import draw
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens._utils.wording import plural

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_KIND = "faithfulness"

NO_EFFECT = 1e-6
"""Total effects below this, in units of the metric, are rounding: nothing is divided by them."""


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness(OnHub):
    """The metric of circuits, and of the whole and the fully ablated model.

    Attributes:
        metric: `[circuits, pairs]`, the metric with everything outside each circuit ablated.
        full: `[pairs]`, the metric of the model.
        empty: `[pairs]`, the metric with all edges ablated.
        edges: `[circuits]`, the number of edges of each circuit.
        shares: `[circuits]`, the share of edges (or of nodes) that each circuit keeps.
        complement: `[circuits, pairs]`, the metric of the complements, if requested (completeness).
        dropped: For each circuit the change of faithfulness when one of its edges is removed,
            if requested (minimality); one row per edge.
        metadata: Settings and versions; JSON-able.
    """

    metric: Float[np.ndarray, "circuits pairs"]
    full: Float[np.ndarray, " pairs"]
    empty: Float[np.ndarray, " pairs"]
    edges: tuple[int, ...]
    shares: tuple[float, ...]
    complement: Float[np.ndarray, "circuits pairs"] | None = None
    dropped: "tuple[pd.DataFrame, ...]" = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def normalized(
        self, metric: Float[np.ndarray, "circuits pairs"]
    ) -> Float[np.ndarray, " circuits"]:
        """The faithfulness that follows from metrics; NaN if it is `undefined`."""
        if self.undefined:
            return np.full(len(metric), np.nan)
        return np.asarray((metric.mean(1) - self.empty.mean()) / self.gap)

    @property
    def gap(self) -> float:
        """The mean metric of the model minus that with all edges ablated: faithfulness's unit."""
        return float(self.full.mean() - self.empty.mean())

    @property
    def undefined(self) -> str:
        """The reason why there is no faithfulness, or an empty text."""
        if abs(self.gap) >= NO_EFFECT:
            return ""
        return (
            f"undefined: the mean metric of the model, {self.full.mean():.4g}, is that of the run "
            "with all edges ablated"
        )

    @property
    def values(self) -> Float[np.ndarray, " circuits"]:
        """The faithfulness of each circuit: 1 for the model, 0 for no edge; NaN if `undefined`."""
        return self.normalized(self.metric)

    @property
    def completeness(self) -> Float[np.ndarray, " circuits"]:
        """The faithfulness of each complement: near 0 if the circuit leaves nothing out.

        Raises:
            ValueError: Completeness was not requested.
        """
        if self.complement is None:
            raise ValueError("completeness was not computed; call faithfulness(completeness=True)")
        return self.normalized(self.complement)

    @property
    def cpr(self) -> float:
        """MIB's circuit performance ratio: the area under the curve of faithfulness."""
        return self._area(self.values)

    @property
    def cmd(self) -> float:
        """MIB's circuit-model distance: the area between the curve and 1; 0 is best."""
        return self._area(np.abs(1 - self.values))

    def _area(self, heights: Float[np.ndarray, " circuits"]) -> float:
        if len(self.shares) < 2:
            raise ValueError("an area needs circuits of two sizes or more; see faithfulness_curve")
        return float(np.trapezoid(heights, self.shares))

    def table(self) -> "pd.DataFrame":
        """One row per circuit: its edges, their share, its mean metric and its faithfulness."""
        import pandas as pd

        table = pd.DataFrame(
            {
                "edges": self.edges,
                "share": self.shares,
                "metric": self.metric.mean(1),
                "faithfulness": self.values,
            }
        )
        if self.complement is not None:
            table["completeness"] = self.completeness
        return table

    def plot(self) -> "go.Figure":
        """Faithfulness over the share of edges, on a logarithmic axis."""
        return draw("faithfulness_curves", {self.metadata["settings"]["level"]: self})

    def save(self, path: str | PathLike[str]) -> None:
        """Write to one safetensors file with a JSON header."""
        tensors = {name: getattr(self, name) for name in ("metric", "full", "empty")}
        if self.complement is not None:
            tensors["complement"] = self.complement
        tensors |= {
            f"dropped {i}": table["change"].to_numpy() for i, table in enumerate(self.dropped)
        }
        header = {
            "edges": self.edges,
            "shares": self.shares,
            "dropped": [
                table[["sender", "receiver"]].to_numpy().tolist() for table in self.dropped
            ],
            "metadata": self.metadata,
        }
        save_tensors(path, tensors, header, kind=_KIND)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Faithfulness":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is not a file of faithfulness, or is damaged.
        """
        import pandas as pd

        tensors, header = load_tensors(path, kind=_KIND)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        tables = [
            pd.DataFrame(edges, columns=["sender", "receiver"]).assign(
                change=arrays[f"dropped {i}"]
            )
            for i, edges in enumerate(header["dropped"])
        ]
        return cls(
            metric=arrays["metric"],
            full=arrays["full"],
            empty=arrays["empty"],
            edges=tuple(header["edges"]),
            shares=tuple(header["shares"]),
            complement=arrays.get("complement"),
            dropped=tuple(tables),
            metadata=header["metadata"],
        )

    def __repr__(self) -> str:
        settings = self.metadata.get("settings", {})
        areas = f"; CPR {self.cpr:.3f}, CMD {self.cmd:.3f}" if len(self.shares) > 1 else ""
        values = ", ".join(f"{value:.1%}" for value in self.values[:5])
        values += ", ..." if len(self.shares) > 5 else ""
        pairs = plural(len(self.full), "pair")
        return (
            f"Faithfulness({self.undefined or values} of {pairs}, {settings.get('ablation')} "
            f"ablation{'' if self.undefined else areas})"
        )

    def _repr_html_(self) -> str:
        html = self.table().to_html(index=False, float_format=lambda x: f"{x:.4f}")
        return f"<p><b>{self!r}</b></p>{html}"
