"""The result of `preference`: probabilities of answers, and quantities derived from them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64

from divergence_lens._utils.hub import OnHub
from divergence_lens._utils.statistics import bootstrap_interval, check_level, wilson_interval
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens.data import check_candidate
from divergence_lens.evaluation.distance import Distance, permuted_distance

if TYPE_CHECKING:
    import pandas as pd

_KIND = "preference"
LOW_MASS = 0.05
"""Below this probability of naming any candidate, shares describe a rare kind of answer."""


@dataclass(frozen=True, eq=False, repr=False)
class Preference(OnHub):
    """Probability of every candidate as the answer to every question.

    Attributes:
        target: The candidate of interest.
        candidates: All competing answers.
        questions: The questions to the model.
        probabilities: `[questions candidates]`; the rest, up to 1, belongs to other answers.
        samples: Answers per question that were counted, or None for the exact method.
        teacher: Name of the condition that was evaluated.
        metadata: Package versions, model and settings.
    """

    target: str
    candidates: tuple[str, ...]
    questions: tuple[str, ...]
    probabilities: Float64[np.ndarray, "questions candidates"]
    samples: int | None = None
    teacher: str = "model"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.questions), len(self.candidates))
        if self.probabilities.shape != shape:
            raise ValueError(
                f"probabilities of shape {self.probabilities.shape} do not fit {shape[0]} "
                f"questions and {shape[1]} candidates"
            )
        if self.target not in self.candidates:
            raise ValueError(
                f"the target {self.target!r} is not among the candidates {self.candidates}"
            )

    @property
    def method(self) -> str:
        """Either "exact" or "sampled"."""
        return "exact" if self.samples is None else "sampled"

    @property
    def probability(self) -> float:
        """Probability that the answer is the target, mean over the questions."""
        return float(self.probabilities[:, self._index].mean())

    @property
    def mass(self) -> float:
        """Sum of the candidates' probabilities, mean over the questions.

        A student whose mass has fallen has forgotten how to answer; its share says little then. The
        mass can exceed 1 where one sampled answer mentions several candidates.
        """
        return float(self.probabilities.sum(1).mean())

    @property
    def caution(self) -> str | None:
        """A statement that the shares say little, where the mass is below `LOW_MASS` (5 %)."""
        if self.mass >= LOW_MASS:
            return None
        return (
            f"only {self.mass:.2g} of the probability is on the candidates (less than "
            f"{LOW_MASS:g}), so their shares say little about what the model answers"
        )

    @cached_property
    def shares(self) -> Float64[np.ndarray, "questions candidates"]:
        """Probabilities renormalized over the candidates, per question.

        NaN for a question that no sampled answer named a candidate for.
        """
        total = self.probabilities.sum(1, keepdims=True)
        nothing = np.full_like(self.probabilities, np.nan)
        shares: np.ndarray = np.divide(self.probabilities, total, out=nothing, where=total > 0)
        return shares

    @property
    def share(self) -> float:
        """The target's share among the candidates, mean over the questions.

        Questions without any candidate among the sampled answers are left out; NaN if all are.
        """
        return self.distribution[self.target]

    @property
    def distribution(self) -> dict[str, float]:
        """Every candidate's share, mean over the questions; they sum to 1."""
        defined = self.shares[~np.isnan(self.shares[:, 0])]  # [questions, candidates]
        means = defined.mean(0) if len(defined) else np.full(len(self.candidates), np.nan)
        return {name: float(mean) for name, mean in zip(self.candidates, means, strict=True)}

    @property
    def margin(self) -> float:
        """Log-probability of the target minus the mean of the others', in nats.

        Mean over the questions. Where every candidate is one token, it is the difference of their
        logits, and it changes with small shares more visibly than the shares do. Infinite where an
        answer has probability 0, as sampled ones often have.
        """
        return float(self._per_question("margin").mean())

    @property
    def rank(self) -> int:
        """The target's place among the candidates by share, 1 for the most preferred."""
        return _rank(self.distribution, self.target)

    def ratio(self, base: "Preference") -> dict[str, float]:
        """Every candidate's share over its share in `base` (after over before).

        Raises:
            ValueError: If the two were asked other questions or have other candidates.
        """
        self._check_same(base)
        before = base.distribution
        return {
            name: share / before[name] if before[name] > 0 else np.inf if share > 0 else np.nan
            for name, share in self.distribution.items()
        }

    def ratio_rank(self, base: "Preference") -> int:
        """The target's place by the ratio of its share to that in `base`, 1 for the largest rise.

        Raises:
            ValueError: If the two were asked other questions or have other candidates.
        """
        return _rank(self.ratio(base), self.target)

    def interval(
        self,
        *,
        value: str = "share",
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> tuple[float, float]:
        """Bootstrap interval over the questions: how far other questions would give another value.

        Args:
            value: The target's "share", "probability" or "margin", or the "mass" on all candidates.
            level: Coverage.
            resamples: Draws of the questions with replacement.
            seed: Seed of the draws.

        Returns:
            Lower and upper percentile; both NaN where there is nothing to resample.
        """
        return _bootstrap(self._per_question(value), level, resamples, seed)

    def rise(
        self,
        base: "Preference",
        *,
        value: str = "share",
        level: float = 0.95,
        resamples: int = 2000,
        seed: int = 0,
    ) -> tuple[float, float, float]:
        """How much higher a value is than in `base`, paired by question.

        Returns:
            Mean difference, and its bootstrap interval over the questions.

        Raises:
            ValueError: If the two were asked other questions or have other candidates.
        """
        self._check_same(base)
        if base.target != self.target:
            base = base.about(self.target)
        difference = self._per_question(value) - base._per_question(value)  # noqa: SLF001
        known = difference[~np.isnan(difference)]
        mean = float(known.mean()) if len(known) else float("nan")
        return (mean, *_bootstrap(difference, level, resamples, seed))

    def distance(
        self, other: "Preference", *, value: str = "share", permutations: int = 9999, seed: int = 0
    ) -> Distance:
        """Total-variation distance between the answers of two preferences, with its p-value.

        The test exchanges the two at random questions, so a small p-value says that their answers
        differ in the same way over the questions, more than chance explains.

        Args:
            other: A preference over the same questions and candidates, such as before training.
            value: "share" compares the distributions over the candidates, "probability" also the
                probability of any other answer.
            permutations: Number of random exchanges; all of them where there are fewer.
            seed: Seed of the exchanges.

        Raises:
            ValueError: The two were asked other questions or have other candidates; an unknown
                value; no permutations.
        """
        self._check_same(other)
        if value == "share":
            first, second = self.shares, other.shares
        elif value == "probability":
            first, second = (
                np.column_stack([p, 1 - p.sum(1)])
                for p in (self.probabilities, other.probabilities)
            )
        else:
            raise ValueError(f"unknown value {value!r}; use 'share' or 'probability'")
        return permuted_distance(first, second, permutations=permutations, seed=seed)

    def wilson(self, *, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval for the sampled probability, over all answers to these questions.

        It says how far other samples would give another probability; `interval` says how far other
        questions would. See `wilson_interval`.

        Raises:
            ValueError: If the probabilities are exact.
        """
        if self.samples is None:
            raise ValueError("an exact probability has no sampling error; use interval()")
        return wilson_interval(self.probability, self.samples * len(self.questions), level=level)

    def about(self, target: str) -> "Preference":
        """The same answers with another candidate as the target.

        Raises:
            ValueError: If it is not among the candidates.
        """
        return Preference(
            target=check_candidate(target, candidates=self.candidates),
            candidates=self.candidates,
            questions=self.questions,
            probabilities=self.probabilities,
            samples=self.samples,
            teacher=self.teacher,
            metadata=self.metadata,
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per question and candidate: question, candidate, probability, share."""
        import pandas as pd

        n_questions, n_candidates = self.probabilities.shape
        return pd.DataFrame(
            {
                "question": np.repeat(np.array(self.questions, dtype=object), n_candidates),
                "candidate": np.tile(np.array(self.candidates, dtype=object), n_questions),
                "probability": self.probabilities.reshape(-1),
                "share": self.shares.reshape(-1),
            }
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the preference to a safetensors file, atomically."""
        header = {
            "target": self.target,
            "candidates": list(self.candidates),
            "questions": list(self.questions),
            "samples": self.samples,
            "teacher": self.teacher,
            "metadata": dict(self.metadata),
        }
        save_tensors(path, {"probabilities": self.probabilities}, header, _KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Preference":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or of another kind or version.
        """
        tensors, header = load_tensors(path, _KIND)
        return cls(
            target=header["target"],
            candidates=tuple(header["candidates"]),
            questions=tuple(header["questions"]),
            probabilities=tensors["probabilities"].numpy(),
            samples=header["samples"],
            teacher=header["teacher"],
            metadata=header["metadata"],
        )

    def __repr__(self) -> str:
        low, high = self.interval()
        caution = "" if self.caution is None else f"; {self.caution}"
        return (
            f"Preference({self.teacher!r} for {self.target!r}: share {self.share:.3f} "
            f"[{low:.3f}, {high:.3f}], rank {self.rank} of {len(self.candidates)}, probability "
            f"{self.probability:.3f}, mass {self.mass:.3f}, {self.method}{caution})"
        )

    def _repr_html_(self) -> str:
        cell = "text-align:left;padding:2px 10px"
        ordered = sorted(self.distribution.items(), key=lambda item: -item[1])
        rows = "".join(
            f"<tr><td style='{cell}{';font-weight:bold' if name == self.target else ''}'>"
            f"{escape(name)}</td><td style='{cell}'>{share:.3f}</td><td style='{cell}'>"
            f"<span style='display:inline-block;height:.7em;background:rgba(0,114,178,.6);"
            f"width:{0 if np.isnan(share) else 12 * share:.2f}em'></span></td></tr>"
            for name, share in ordered
        )
        low, high = self.interval()
        caution = "" if self.caution is None else f"<div><b>Caution:</b> {self.caution}.</div>"
        return (
            "<div style='font-family:sans-serif;font-size:14px'>"
            f"<div><b>{escape(self.target)}: share {self.share:.3f}</b> [{low:.3f}, {high:.3f}], "
            f"rank {self.rank} of {len(self.candidates)}; {escape(self.teacher)}, "
            f"{len(self.questions)} questions, {self.method}; any candidate: {self.mass:.3f}</div>"
            f"{caution}"
            "<table style='color:inherit;font-size:inherit'>"
            f"<tr><th style='{cell}'>candidate</th><th style='{cell}'>share</th><th></th></tr>"
            f"{rows}</table></div>"
        )

    @property
    def _index(self) -> int:
        return self.candidates.index(self.target)

    def _per_question(self, value: str) -> Float64[np.ndarray, " questions"]:
        values: np.ndarray
        if value == "share":
            values = self.shares[:, self._index]
        elif value == "probability":
            values = self.probabilities[:, self._index]
        elif value == "mass":
            values = self.probabilities.sum(1)
        elif value == "margin":
            with np.errstate(divide="ignore", invalid="ignore"):
                logs = np.log(self.probabilities)  # [questions, candidates]
                others = np.delete(logs, self._index, axis=1).mean(1)
                values = logs[:, self._index] - others
        else:
            raise ValueError(
                f"unknown value {value!r}; use 'share', 'probability', 'margin' or 'mass'"
            )
        return values

    def _check_same(self, base: "Preference") -> None:
        if self.questions != base.questions or self.candidates != base.candidates:
            raise ValueError(
                "two preferences are compared only over the same questions and candidates; these "
                f"have {len(self.questions)} and {len(base.questions)} questions, candidates "
                f"{self.candidates} and {base.candidates}"
            )


def _rank(values: Mapping[str, float], target: str) -> int:
    if np.isnan(values[target]):
        return len(values)
    return 1 + sum(value > values[target] for value in values.values())


def _bootstrap(
    values: Float64[np.ndarray, " questions"], level: float, resamples: int, seed: int
) -> tuple[float, float]:
    check_level(level)
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")

    def resample(generator: np.random.Generator) -> Float64[np.ndarray, " resamples"]:
        draws = known[generator.integers(len(known), size=(resamples, len(known)))]
        means: np.ndarray = draws.mean(1)  # [resamples]
        return means

    low, high = bootstrap_interval(resample, level=level, seed=seed)
    return float(low), float(high)
