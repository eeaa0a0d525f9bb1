"""Read data under all auditors: how much more likely each token is than the baseline expects.

For candidate c, with teacher p_c, the *advantage* of token x_k after x_<k is

    a_c(x_k) = log p_c(x_k | x_<k) - mean over the other candidates d of log p_d(x_k | x_<k)

and its contribution to the score is a_c(x_k) - E[a_c(x)], where x is drawn from the baseline: what
the base model would have written at this place. The expectation is computed from the logits, over
the whole vocabulary (or of the argmax, for greedy data). If the baseline wrote the data, the sums
over rows are a martingale with mean zero, for every candidate, whichever is nearest to the base.

The data are read in parts, and of each only the sums and, if requested, the tokens' contributions
are stored.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64, Int32, Int64

from divergence_lens.auditing.baseline import Baseline, possible_ids
from divergence_lens.auditing.candidates import Auditors
from divergence_lens.divergence import read_teachers
from divergence_lens.examples import Example
from divergence_lens.models import Model

PART_ROWS = 4096
"""Rows that are read under all teachers before the next ones are."""

MOST_VALUES = 2**28
"""Contributions of single tokens are stored up to this many (1 GiB)."""


@dataclass(frozen=True, eq=False)
class Contributions:
    """What each row, and each token, adds to each candidate's score, in nats.

    Attributes:
        offsets: Where each completion starts.
        tokens: The completions' ids.
        choice: The baseline's argmax at each token.
        rows: Sums over the tokens of each row.
        by_token: Contributions of the tokens; None if there are too many to store.
    """

    offsets: Int64[np.ndarray, " boundaries"]
    tokens: Int64[np.ndarray, " tokens"]
    choice: Int32[np.ndarray, " tokens"]
    rows: Float64[np.ndarray, "kinds candidates rows"]
    by_token: Float32[np.ndarray, "kinds candidates tokens"] | None


def contrast(
    values: Float[np.ndarray, "candidates tokens"],
) -> Float[np.ndarray, "candidates tokens"]:
    """Subtract from each candidate's values the mean over the other candidates."""
    n = len(values)
    # x_c - (S - x_c) / (n - 1) = n / (n - 1) (x_c - S / n)
    centered: np.ndarray = (values - values.mean(0, keepdims=True)) * (n / (n - 1))
    return centered


def read_contributions(
    model: Model,
    examples: Sequence[Example],
    baseline: Baseline,
    auditors: Sequence[Auditors],
    *,
    by_token: bool = True,
    batch_tokens: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> Contributions:
    """Read examples with token ids under the baseline and all auditors.

    Args:
        model: The base model.
        examples: The data.
        baseline: What the base model would write.
        auditors: One or more kinds of auditors.
        by_token: Whether to store the contributions of tokens, if there are not too many.
        batch_tokens: See `find_divergence`, also for the next three.
        checkpoint_dir: A folder, with a subfolder for each part of the data.
        accelerator: Divides the rows among its processes.
        progress: Whether to show a progress bar for each part.

    Raises:
        ValueError: See `find_divergence`.
    """
    n_candidates = len(auditors[0].teachers)
    lengths = [len(example.completion_ids or ()) for example in examples]
    by_token = by_token and len(auditors) * n_candidates * sum(lengths) <= MOST_VALUES
    possible = possible_ids(model, baseline.kinds)
    parts = []
    for start, part in _parts(examples):
        folder = None if checkpoint_dir is None else Path(checkpoint_dir) / f"rows-{start:09d}"
        forced = read_teachers(
            model,
            part,
            [baseline.teacher, *(teacher for kind in auditors for teacher in kind.teachers)],
            expected_at=baseline.temperature,
            possible=possible,
            pattern=baseline.pattern,
            batch_tokens=batch_tokens,
            checkpoint_dir=folder,
            accelerator=accelerator,
            progress=progress,
        )
        assert forced.expected is not None
        above = forced.logprob[1:] - forced.expected[1:]  # [kinds * candidates, tokens]
        own = np.stack([contrast(kind) for kind in np.split(above, len(auditors))])
        sums = np.add.reduceat(own, forced.offsets[:-1], axis=-1, dtype=np.float64)
        parts.append((forced.tokens, forced.predicted[0], sums, own if by_token else None))
    tokens, choice, rows, stored = zip(*parts, strict=True)
    return Contributions(
        np.cumsum([0, *lengths], dtype=np.int64),
        np.concatenate(tokens),
        np.concatenate(choice),
        np.concatenate(rows, axis=-1),
        np.concatenate(stored, axis=-1) if by_token else None,
    )


def _parts(examples: Sequence[Example]) -> Iterator[tuple[int, Sequence[Example]]]:
    for start in range(0, len(examples), PART_ROWS):
        yield start, examples[start : start + PART_ROWS]
