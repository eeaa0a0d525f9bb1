"""The result of a sweep over layers: measured values of the base and of each student."""

import html
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from divergence_lens._utils.hub import OnHub
from divergence_lens._utils.plotting import draw
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens.evaluation import Preference

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

_KIND = "sweep"

Condition = Literal["layer", "all", "control"]


class Values(dict[str, np.ndarray]):
    """Measured values of one model by name: one number, or one per question, as float64."""

    @classmethod
    def of(cls, measured: object) -> "Values":
        """Convert the return value of a `measure`.

        A number is called "value". A `Preference` becomes the target's "share" and "probability",
        and the "mass" on all candidates, each per question.

        Raises:
            TypeError: It is none of these.
        """
        if isinstance(measured, Preference):
            target = measured.candidates.index(measured.target)
            return cls(
                share=measured.shares[:, target].astype(np.float64),
                probability=measured.probabilities[:, target].astype(np.float64),
                mass=measured.probabilities.sum(1).astype(np.float64),
            )
        named: Mapping[str, Any]
        named = measured if isinstance(measured, Mapping) else {"value": measured}
        values = cls()
        for name, value in named.items():
            # NumPy and torch scalars become Python's.
            scalar = isinstance(value, Tensor | np.generic | np.ndarray) and value.ndim == 0
            number = value.item() if scalar else value
            if isinstance(number, bool) or not isinstance(number, Real):
                raise TypeError(
                    f"measure returned {name!r} as a {type(value).__name__}; return a number, a "
                    "mapping from name to number, or a Preference"
                )
            values[str(name)] = np.array([float(number)])
        if not values:
            raise TypeError("measure returned an empty mapping; return at least one number")
        return values

    def mean(self, name: str) -> float:
        """Mean over the questions, NaN left out."""
        present = self[name][~np.isnan(self[name])]
        return float(present.mean()) if len(present) else math.nan


@dataclass(frozen=True, eq=False)
class SweepStudent:
    """One student of a sweep.

    Attributes:
        condition: "layer" for a student of one layer, "all" for one of all layers, "control" for
            one of all layers that learned control data.
        layer: The trained layer; None for all layers.
        seed: Seed of the training.
        values: Measured values by name.
    """

    condition: Condition
    layer: int | None
    seed: int
    values: Values


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(OnHub):
    """The result of `layer_sweep`.

    Attributes:
        base: Measured values of the base.
        students: One per layer and seed, and the references that learned in all layers.
        metadata: Package versions, model and settings.
    """

    base: Values
    students: tuple[SweepStudent, ...]
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for student in self.students:
            if {n: v.shape for n, v in student.values.items()} != self._shapes:
                raise ValueError(
                    f"the student of layer {student.layer}, seed {student.seed}, has other values "
                    f"than the base ({', '.join(self.base)}); measure all in the same way"
                )

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: values.shape for name, values in self.base.items()}

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measured values; the first is the main one."""
        return tuple(self.base)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that were trained alone, in order."""
        return tuple(sorted({s.layer for s in self.students if s.layer is not None}))

    @property
    def target(self) -> str | None:
        """The candidate whose preference was measured; None for other measures."""
        target: str | None = self.metadata.get("settings", {}).get("target")
        return target

    def __getitem__(self, layer: int | None) -> list[SweepStudent]:
        """Return the students of one layer; for None those of all layers, without the control."""
        students = [s for s in self.students if s.layer == layer and s.condition != "control"]
        if not students:
            raise KeyError(f"no student of layer {layer}; the sweep has {self.layers}")
        return students

    def mean(self, layer: int | None, measure: str | None = None) -> float:
        """Mean of a measure over the students of one layer, or of all layers for None.

        Args:
            layer: The trained layer, or None.
            measure: Which measure; the main one by default.
        """
        name = self._measure(measure)
        return float(np.mean([s.values.mean(name) for s in self[layer]]))

    def interval(
        self,
        layer: int | None,
        measure: str | None = None,
        *,
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> tuple[float, float]:
        """Bootstrap interval of a measure after training, over seeds and questions.

        Both are drawn with replacement. With a single seed the interval covers the questions alone;
        with one number of one student there is nothing to draw, and both ends are NaN.

        Args:
            layer: The trained layer, or None for the students of all layers.
            measure: Which measure; the main one by default.
            level: Coverage.
            resamples: Number of draws.
            seed: Seed of the draws.
        """
        values = [s.values for s in self[layer]]
        return _interval(values, self._measure(measure), level, resamples, seed)

    def _measure(self, name: str | None) -> str:
        if name is None:
            return self.measures[0]
        if name not in self.base:
            raise KeyError(f"no measure {name!r}; the sweep has {', '.join(self.measures)}")
        return name

    def to_dataframe(self) -> "pd.DataFrame":
        """One row for the base, and one per student.

        Columns: condition ("base", "layer", "all" or "control"), layer, seed, and one per measure
        (its mean over the questions).
        """
        import pandas as pd

        rows: list[dict[str, Any]] = [{"condition": "base", "layer": None, "seed": None}]
        rows += [
            {"condition": s.condition, "layer": s.layer, "seed": s.seed} for s in self.students
        ]
        models = [self.base, *(s.values for s in self.students)]
        for row, values in zip(rows, models, strict=True):
            row.update({name: values.mean(name) for name in values})
        return pd.DataFrame(rows)

    def summary(self) -> "pd.DataFrame":
        """One row for the base, the references and each layer.

        Columns: trained, the main measure (mean over the students), low and high (its 95 % interval
        over seeds and questions), n (students), and the means of the other measures.
        """
        import pandas as pd

        main, *others = self.measures
        rows = []
        for trained, models, n in [("nothing", [self.base], 0), *self._groups()]:
            low, high = _interval(models, main, 0.95, 2000, 0)
            means = {name: float(np.mean([m.mean(name) for m in models])) for name in self.measures}
            row = {"trained": trained, main: means[main], "low": low, "high": high, "n": n}
            rows.append(row | {name: means[name] for name in others})
        return pd.DataFrame(rows)

    def _groups(self) -> Iterator[tuple[str, list[Values], int]]:
        groups: dict[tuple[str, int | None], list[Values]] = {}
        for s in self.students:
            groups.setdefault((s.condition, s.layer), []).append(s.values)
        for (condition, layer), models in groups.items():
            data = " on control data" if condition == "control" else ""
            trained = "all layers" + data if layer is None else f"layer {layer}"
            yield trained, models, len(models)

    def plot(self, measure: str | None = None) -> "Figure":
        """Draw a measure by trained layer, with the references as lines (`plots.layer_sweep`)."""
        return draw("layer_sweep", self, measure=self._measure(measure))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sweep to a safetensors file, atomically."""
        header = {
            "measures": list(self.measures),
            "students": [[s.condition, s.layer, s.seed] for s in self.students],
            "metadata": self.metadata,
        }
        models = [self.base, *(s.values for s in self.students)]
        tensors = {n: np.stack([values[n] for values in models]) for n in self.measures}
        save_tensors(path, tensors, header, _KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Sweep":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or of another kind or version.
        """
        tensors, header = load_tensors(path, _KIND)
        measures, n_models = header["measures"], 1 + len(header["students"])
        base, *values = (
            Values({name: tensors[name][i].numpy() for name in measures}) for i in range(n_models)
        )
        students = (
            SweepStudent(condition, layer, seed, own)
            for (condition, layer, seed), own in zip(header["students"], values, strict=True)
        )
        return cls(base, tuple(students), header["metadata"])

    def __repr__(self) -> str:
        name = self.measures[0]
        of = f" of {self.target!r}" if self.target else ""
        return (
            f"Sweep({name}{of}: {len(self.students)} students, layers {list(self.layers)}, "
            f"{self.base.mean(name):.3f} before)"
        )

    def _repr_html_(self) -> str:
        main = self.measures[0]
        rows = "".join(
            f"<tr><td>{html.escape(row['trained'])}</td><td>{row[main]:.3f}</td>"
            f"<td>{row['low']:.3f} to {row['high']:.3f}</td><td>{row['n']}</td></tr>"
            for row in self.summary().to_dict("records")
        )
        return (
            f"<p>{html.escape(repr(self))}</p><table><thead><tr><th>trained</th>"
            f"<th>{html.escape(main)}</th><th>95 % interval</th><th>students</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )


def _interval(
    models: Sequence[Values], name: str, level: float, resamples: int, seed: int
) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; it lies between 0 and 1")
    values = np.stack([m[name] for m in models])  # [seed, question]
    values = values[:, ~np.isnan(values).any(0)]
    if values.size < 2:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    n_seeds, n_questions = values.shape
    # Seeds and questions are drawn independently; each drawn seed answers each drawn question.
    seeds = random.integers(n_seeds, size=(resamples, n_seeds, 1))
    questions = random.integers(n_questions, size=(resamples, 1, n_questions))
    means = values[seeds, questions].mean((1, 2))  # [resample]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
