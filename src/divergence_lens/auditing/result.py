"""The result of `audit`: which candidate bias a data set carries, and in which rows and tokens."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from divergence_lens._utils.hub import OnHub
from divergence_lens._utils.indexing import row_numbers
from divergence_lens._utils.plotting import draw
from divergence_lens.auditing.baseline import Baseline
from divergence_lens.auditing.candidates import Auditors
from divergence_lens.auditing.files import load_audit, save_audit
from divergence_lens.auditing.remedies import Remedy, drop_rows, mask_tokens, replace_choices
from divergence_lens.auditing.scoring import (
    Null,
    Power,
    Scores,
    Verdict,
    fit_null,
    independent_rows,
    least_power,
    row_spread,
    score_rows,
)
from divergence_lens.auditing.tables import (
    as_json,
    candidate_table,
    explain,
    row_table,
    token_table,
)
from divergence_lens.auditing.view import RowAudit, audit_html, write_page
from divergence_lens.chat import row_texts
from divergence_lens.data import check_candidate
from divergence_lens.examples import Example

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


@dataclass(frozen=True, eq=False, repr=False)
class Audit(OnHub):
    """What each row and token of a data set contributes to each candidate bias.

    Flat arrays run over all completion tokens of all examples in order; the tokens of example i
    are `offsets[i]:offsets[i + 1]`. Contributions are in nats: how much more likely a token is
    under the candidate's teacher than under the other candidates' teachers, above what the
    baseline would have written.

    Attributes:
        candidates: Names of the candidates.
        kinds: Kinds of auditors: "prompted", "finetuned" or "given".
        examples: The data, with the ids of every completion.
        offsets: `[examples + 1]`, where each completion starts.
        token_ids: `[tokens]`, the completions' ids.
        choice: `[tokens]`, the baseline's argmax before each token.
        by_row: `[kinds candidates rows]`, contribution of each row.
        by_token: `[kinds candidates tokens]`; None if the data are too large to store it.
        neutral: `[kinds candidates styles lists]`, contributions of lists by the base model, under
            each of some unbiased prompts.
        own: `[kinds candidates own_rows]`, contributions of lists by each candidate's own teacher
            to that candidate.
        baseline: The unbiased condition that the data are compared with.
        alpha: Level of the family of tests.
        share: The share of biased rows that "nothing found" rules out, with a power of 0.8.
        texts: Token id -> text, for all ids that occur.
        metadata: Package versions, model and settings of the run.
        auditors: The teachers; empty after loading, unless given to `load`.
        tokenizer: The model's tokenizer; None after loading, unless given to `load`.
    """

    candidates: tuple[str, ...]
    kinds: tuple[str, ...]
    examples: tuple[Example, ...]
    offsets: Int64[np.ndarray, " boundaries"]
    token_ids: Int64[np.ndarray, " tokens"]
    choice: Int32[np.ndarray, " tokens"]
    by_row: Float64[np.ndarray, "kinds candidates rows"]
    by_token: Float32[np.ndarray, "kinds candidates tokens"] | None
    neutral: Float64[np.ndarray, "kinds candidates styles lists"]
    own: Float64[np.ndarray, "kinds candidates own_rows"]
    baseline: Baseline
    alpha: float = 0.05
    share: float = 0.25
    texts: Mapping[int, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    auditors: tuple[Auditors, ...] = ()
    tokenizer: Any = None

    def __post_init__(self) -> None:
        shape = (len(self.kinds), len(self.candidates))
        if self.by_row.shape != (*shape, len(self.examples)):
            raise ValueError(
                f"contributions of shape {self.by_row.shape} do not fit {shape[0]} kinds of "
                f"auditors, {shape[1]} candidates and {len(self.examples)} examples"
            )
        if self.by_token is not None and self.by_token.shape != (*shape, len(self.token_ids)):
            raise ValueError(
                f"contributions of shape {self.by_token.shape} do not fit {shape[0]} kinds of "
                f"auditors, {shape[1]} candidates and {len(self.token_ids)} tokens"
            )

    # -- verdict ----------------------------------------------------------------------------------

    @cached_property
    def scores(self) -> Scores:
        """Scores, z and p-values of all candidates, in their order."""
        return score_rows(
            self.by_row,
            self.null,
            independent=self.independent_rows,
        )

    @cached_property
    def independent_rows(self) -> float:
        """Number of rows, less for rows that occur more than once; see `scoring`."""
        copies = Counter((str(e.prompt), e.completion_ids) for e in self.examples)
        return independent_rows(np.array(list(copies.values()), dtype=np.int64))

    @property
    def verdict(self) -> Verdict:
        """The outcome.

        - "biased": at least one candidate's p-value, by Holm's correction, is below `alpha`.
        - "nothing found": none is, and there are enough rows to detect data of which `share` of
          the rows are by a biased teacher.
        - "inconclusive": none is, but there are too few rows; or the base model could not have
          written the data, with or without a small bias.
        """
        if not self.baseline.fits:
            return "inconclusive"
        if self.biased:
            return "biased"
        rows = self.independent_rows
        enough = rows >= 2 and self.power.rows_needed(self.share) <= rows
        return "nothing found" if enough else "inconclusive"

    @property
    def biased(self) -> tuple[str, ...]:
        """The candidates with a corrected p-value below `alpha`, the highest z first.

        None if the base model could not have written the data, because the null is its own.
        """
        if not self.baseline.fits:
            return ()
        places = np.argsort(-self.scores.z, kind="stable")
        return tuple(self.candidates[c] for c in places if self.scores.holm[c] < self.alpha)

    @property
    def best(self) -> str:
        """The candidate with the highest z."""
        return self.candidates[int(self.scores.z.argmax())]

    @property
    def power(self) -> Power:
        """How strong a bias this audit can detect.

        With several kinds of auditors, that of the kind with the least power, because the bias may
        be of any kind.
        """
        return least_power(self.own, row_spread(self.by_row), self.null, self.alpha, len(self))

    @cached_property
    def null(self) -> Null:
        """What unbiased data score, from the lists of the base model."""
        return fit_null(
            self.neutral,
            row_spread(self.by_row),
            same_style=self.baseline.is_condition_of_data,
        )

    @property
    def explanation(self) -> str:
        """The verdict in one or two sentences, with its numbers."""
        return explain(self)

    # -- tables -----------------------------------------------------------------------------------

    @cached_property
    def _table(self) -> "pd.DataFrame":
        return candidate_table(self)

    def to_dataframe(self) -> "pd.DataFrame":
        """Return one row per candidate, the highest z first.

        Returns:
            Columns: candidate; kind (of the auditor with the smallest p-value); score, the mean
            contribution of a row in nats minus `null.shift`, with `low` and `high`, its bootstrap
            interval over rows; z; p, one-sided; p_holm and p_fdr, corrected for the number of
            candidates.
        """
        return self._table.copy()

    def rows(self, candidate: str | None = None, *, most: int | None = None) -> "pd.DataFrame":
        """Return the rows by their contribution to a candidate, the largest first.

        Args:
            candidate: A candidate; None for the one with the highest z.
            most: Most rows to return, which saves decoding the others; None for all.

        Returns:
            Columns: row, score, prompt, completion.

        Raises:
            ValueError: It is not a candidate.
        """
        return row_table(self, self.by_row[self.place(candidate)], most)

    def tokens(self, candidate: str | None = None) -> "pd.DataFrame":
        """Return the tokens by their contribution to a candidate, the largest first.

        Returns:
            Columns: row, position, token, score, baseline (the baseline's choice).

        Raises:
            ValueError: It is not a candidate, or tokens were not stored.
        """
        return token_table(self, self.token_scores(candidate))

    def token_scores(self, candidate: str | None = None) -> Float32[np.ndarray, " tokens"]:
        """Contribution of each token to a candidate, in the order of the data.

        Raises:
            ValueError: It is not a candidate, or tokens were not stored.
        """
        if self.by_token is None:
            raise ValueError(
                f"the contributions of single tokens of {len(self):,} rows are not stored; audit "
                "the rows of interest again, such as those of `audit.rows(most=10_000)`"
            )
        scores: np.ndarray = self.by_token[self.place(candidate)]
        return scores

    def show(self, row: int, candidate: str | None = None) -> RowAudit:
        """Return one row, which shows its tokens colored by contribution in a notebook.

        Raises:
            IndexError: There is no such row.
            ValueError: It is not a candidate, or tokens were not stored.
        """
        (row,) = row_numbers(row, len(self), "row")
        span = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return RowAudit(
            row=row,
            candidate=self._name(candidate),
            prompt=str(self.examples[row].prompt),
            tokens=tuple(row_texts(self.texts, self.token_ids[span])),
            scores=self.token_scores(candidate)[span],
            choices=tuple(row_texts(self.texts, self.choice[span])),
        )

    # -- remedies ---------------------------------------------------------------------------------

    def mask(self, candidate: str | None = None, share: float = 0.1) -> Remedy:
        """Leave the tokens that contribute most out of the loss.

        Args:
            candidate: A candidate; None for the one with the highest z.
            share: Share of all completion tokens to leave out.

        Raises:
            ValueError: An unknown candidate, a share outside 0 to 1, or tokens were not stored.
        """
        return mask_tokens(self, self._name(candidate), share)

    def replace(self, candidate: str | None = None, share: float = 0.1) -> Remedy:
        """Overwrite the tokens that contribute most with the baseline's choice, as label and input.

        Tokens that are the baseline's choice already are not counted.

        Args:
            candidate: See `mask`.
            share: Largest share of all completion tokens to overwrite.

        Raises:
            ValueError: See `mask`; or a loaded audit without a tokenizer.
        """
        return replace_choices(self, self._name(candidate), share)

    def drop_rows(self, candidate: str | None = None, share: float = 0.1) -> Remedy:
        """Drop the rows that contribute most.

        Args:
            candidate: See `mask`.
            share: Share of the rows to drop.

        Raises:
            ValueError: An unknown candidate, or a share outside 0 to 1.
        """
        return drop_rows(self, self._name(candidate), share)

    # -- files and views --------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict and the table as JSON values, for machines; NaN becomes None."""
        return as_json(self)

    def plot(self) -> "Figure":
        """Draw the candidates as a dot plot with the band of the null."""
        from scipy import stats

        tests = len(self.candidates) * len(self.kinds)
        level = float(stats.t.isf(self.alpha / tests, max(self.independent_rows - 1, 1)))
        return draw(
            "candidate_dots",
            self.to_dataframe(),
            level=level,
            alpha=self.alpha if self.baseline.fits else 0.0,
            headline=f"Audit: {self.verdict}",
            detail=f"{len(self):,} rows; {len(self.candidates)} candidates; gray band: what chance "
            f"alone seldom exceeds (one-sided, {self.alpha:.0%} over all candidates); lines: "
            "intervals over rows",
        )

    def write_page(self, path: str | os.PathLike[str]) -> None:
        """Write a page with the verdict, the figure, and the rows that contribute most."""
        write_page(self, path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the teachers' weights to one safetensors file, atomically."""
        save_audit(path, self)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        auditors: Sequence[Auditors] = (),
        tokenizer: Any = None,
    ) -> "Audit":
        """Read a file that `save` wrote.

        Args:
            path: The file.
            auditors: The teachers, needed to audit a remedy again.
            tokenizer: The model's tokenizer, needed for `replace`.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is damaged, or of another kind or version.
        """
        return cls(**load_audit(path), auditors=tuple(auditors), tokenizer=tokenizer)

    def select(self, rows: Sequence[int] | np.ndarray) -> "Audit":
        """Return the audit of some rows, by numbers or a mask; no pass is needed.

        The baseline and the calibration lists remain those of all rows. Audit the rows themselves
        if their author, system prompt or temperature may differ from that of the others.
        """
        numbers = row_numbers(np.asarray(rows), len(self), "row")
        places = np.concatenate(
            [np.zeros(0, np.int64), *(np.arange(*self.offsets[[r, r + 1]]) for r in numbers)]
        )
        return replace(
            self,
            examples=tuple(self.examples[row] for row in numbers),
            offsets=np.cumsum([0, *np.diff(self.offsets)[numbers]], dtype=np.int64),
            token_ids=self.token_ids[places],
            choice=self.choice[places],
            by_row=self.by_row[..., numbers],
            by_token=None if self.by_token is None else self.by_token[..., places],
        )

    def with_kinds(self, *kinds: str) -> "Audit":
        """Return the audit with some kinds of auditors only.

        Raises:
            ValueError: There are no auditors of this kind.
        """
        unknown = set(kinds) - set(self.kinds)
        if unknown or not kinds:
            raise ValueError(f"there are auditors of the kinds {self.kinds}, not {kinds}")
        places = [self.kinds.index(kind) for kind in kinds]
        return replace(
            self,
            kinds=kinds,
            by_row=self.by_row[places],
            by_token=None if self.by_token is None else self.by_token[places],
            neutral=self.neutral[places],
            own=self.own[places],
            auditors=tuple(self.auditors[place] for place in places) if self.auditors else (),
        )

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        c = self.candidates.index(self.best)
        return (
            f"Audit({self.verdict}; {len(self):,} rows, {len(self.candidates)} candidates; highest "
            f"{self.best!r}, z {self.scores.z[c]:.1f}, corrected p {self.scores.holm[c]:.2g})"
        )

    def _repr_html_(self) -> str:
        return audit_html(self)

    def _name(self, candidate: str | None) -> str:
        if candidate is None:
            return self.best
        return check_candidate(candidate, candidates=self.candidates, category="candidate")

    def place(self, candidate: str | None = None) -> tuple[int, int]:
        """Return the indices of a candidate's best kind of auditor, and of the candidate.

        Raises:
            ValueError: It is not a candidate.
        """
        c = self.candidates.index(self._name(candidate))
        return int(self.scores.kind[c]), c
