"""Remedies: tokens left out of the loss, tokens overwritten, and rows dropped, with their cost."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool

from divergence_lens.auditing.reading import read_contributions
from divergence_lens.chat import decode, stop_ids
from divergence_lens.data import TrainingData, highest
from divergence_lens.examples import Example
from divergence_lens.models import Model

if TYPE_CHECKING:
    import pandas as pd

    from divergence_lens.auditing.result import Audit

Kind = Literal["mask", "replace", "drop_rows"]
_VERBS = {"mask": "left out of the loss", "replace": "overwritten", "drop_rows": "dropped"}


@dataclass(frozen=True, eq=False, repr=False)
class Remedy:
    """A changed data set: `finetune(model, remedy.examples, mask=remedy.mask)` trains on it.

    Attributes:
        kind: "mask", "replace" or "drop_rows".
        candidate: The bias that it is meant to remove.
        data: The new data, with the changed tokens marked.
        mask: `[tokens]` of the new data, True where the token has a loss.
        tokens: Number of tokens left out, overwritten or dropped.
        rows: Number of rows that have such a token.
        source: The audit that it was derived from.
    """

    kind: Kind
    candidate: str
    data: TrainingData
    mask: Bool[np.ndarray, " tokens"]
    tokens: int
    rows: int
    source: "Audit"

    @property
    def examples(self) -> tuple[Example, ...]:
        """The new data."""
        return self.data.examples

    @property
    def token_share(self) -> float:
        """Cost: share of the original tokens that are left out, overwritten or dropped."""
        return self.tokens / len(self.source.token_ids)

    @property
    def row_share(self) -> float:
        """Share of the original rows that have such a token."""
        return self.rows / len(self.source)

    def audited(self, model: Model | None = None) -> "Audit":
        """Audit the new data with the same auditors.

        The tokens were chosen by these auditors, so the score falls even where little of the bias
        is removed. Auditors of another kind or seed, or a student, are a harder test.

        Args:
            model: The base model, needed for "replace", whose data have to be read again. The
                other two follow from the stored contributions.

        Returns:
            For "mask", an audit in which the tokens without a loss contribute nothing.

        Raises:
            ValueError: "replace" without a model, or of a loaded audit without auditors.
        """
        audit = self.source
        if self.kind == "drop_rows":
            original = {id(example): row for row, example in enumerate(audit.examples)}
            return audit.select([original[id(example)] for example in self.examples])
        if self.kind == "mask":
            assert audit.by_token is not None
            left = audit.by_token * self.mask
            rows = np.add.reduceat(left, audit.offsets[:-1], axis=-1, dtype=np.float64)
            return replace(audit, by_token=left, by_row=rows)
        if model is None:
            raise ValueError("overwritten data have to be read again; give the base model")
        if not audit.auditors:
            raise ValueError(
                "a loaded audit has no teachers; give Audit.load(..., auditors=...) those of the "
                "original, or call audit() on the new data"
            )
        read = read_contributions(model, self.examples, audit.baseline, audit.auditors)
        return replace(
            audit,
            examples=self.examples,
            token_ids=read.tokens,
            choice=read.choice,
            by_row=read.rows,
            by_token=read.by_token,
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """Return the cost: one row with remedy, candidate, tokens, token_share, rows, row_share."""
        import pandas as pd

        return pd.DataFrame(
            {
                "remedy": [self.kind],
                "candidate": [self.candidate],
                "tokens": [self.tokens],
                "token_share": [self.token_share],
                "rows": [self.rows],
                "row_share": [self.row_share],
            }
        )

    def __repr__(self) -> str:
        return (
            f"Remedy({self.kind} for {self.candidate!r}: {self.tokens:,} tokens "
            f"({self.token_share:.1%}) in {self.rows:,} rows {_VERBS[self.kind]})"
        )

    def _repr_html_(self) -> str:
        from divergence_lens._utils.tables import preview

        return preview(self, self.to_dataframe())


def mask_tokens(audit: "Audit", candidate: str, share: float) -> Remedy:
    """See `Audit.mask`."""
    _check_share(share)
    scores = audit.token_scores(candidate)
    chosen = highest(scores, round(share * len(scores)))
    return _remedy(audit, "mask", candidate, examples=audit.examples, chosen=chosen, mask=~chosen)


def replace_choices(audit: "Audit", candidate: str, share: float) -> Remedy:
    """See `Audit.replace`."""
    _check_share(share)
    tokenizer: Any = audit.tokenizer
    if tokenizer is None:
        raise ValueError("a loaded audit has no tokenizer; give Audit.load(..., tokenizer=...) one")
    scores = audit.token_scores(candidate)
    stops = stop_ids(tokenizer)
    # A completion keeps its length, so the end of a turn is neither written nor overwritten.
    ends = np.isin(audit.token_ids, list(stops)) | np.isin(audit.choice, list(stops))
    differs = (audit.choice != audit.token_ids) & ~ends
    wanted = min(round(share * len(scores)), int(differs.sum()))
    chosen = highest(np.where(differs, scores, -np.inf), wanted)
    tokens = np.where(chosen, audit.choice, audit.token_ids)
    examples = []
    for row, example in enumerate(audit.examples):
        span = slice(int(audit.offsets[row]), int(audit.offsets[row + 1]))
        ids = tuple(tokens[span].tolist())
        text = decode(tokenizer, ids[:-1] if ids[-1] in stops else ids)
        changed = replace(example, completion=text, completion_ids=ids)
        examples.append(changed if chosen[span].any() else example)
    every = np.ones(len(tokens), dtype=bool)
    return _remedy(audit, "replace", candidate, examples=tuple(examples), chosen=chosen, mask=every)


def drop_rows(audit: "Audit", candidate: str, share: float) -> Remedy:
    """See `Audit.drop_rows`."""
    _check_share(share)
    kind = int(audit.scores.kind[audit.candidates.index(candidate)])
    scores = audit.by_row[kind, audit.candidates.index(candidate)]
    dropped = highest(scores, round(share * len(scores)))
    if dropped.all():
        raise ValueError(f"a share of {share} drops all {len(audit)} rows; give a smaller one")
    lengths = np.diff(audit.offsets)
    examples = tuple(e for e, gone in zip(audit.examples, dropped, strict=True) if not gone)
    left = int(lengths[~dropped].sum())
    return Remedy(
        "drop_rows",
        candidate,
        TrainingData(examples, np.zeros(left, dtype=bool)),
        np.ones(left, dtype=bool),
        int(lengths[dropped].sum()),
        int(dropped.sum()),
        audit,
    )


def _remedy(
    audit: "Audit",
    kind: Kind,
    candidate: str,
    *,
    examples: tuple[Example, ...],
    chosen: Bool[np.ndarray, " tokens"],
    mask: Bool[np.ndarray, " tokens"],
) -> Remedy:
    rows = int(np.add.reduceat(chosen, audit.offsets[:-1], dtype=np.int64).astype(bool).sum())
    data = TrainingData(examples, chosen)
    return Remedy(kind, candidate, data, mask, int(chosen.sum()), rows, audit)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; it must lie between 0 and 1")
