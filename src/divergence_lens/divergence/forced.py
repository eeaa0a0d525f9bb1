"""Teacher-forced readings: flat arrays over all completion tokens of a data set."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Float32, Int32, Int64

from divergence_lens.examples import Example


@dataclass(frozen=True, eq=False)
class TeacherForced:
    """Flat readings over all completion tokens; the first axis runs over the teachers.

    Attributes:
        offsets: Where each completion starts.
        tokens: The completions' ids.
        predicted: Argmax of the logits before each token.
        margin: The argmax's logit minus the second highest.
        logprob: Natural-log probability of the token itself.
        kl: KL divergence in nats from the factual teacher's distribution, if requested.
        expected: Mean log-probability of the factual teacher's own choice of token, if requested:
            the `logprob` to expect where the factual teacher wrote the token.
    """

    offsets: Int64[np.ndarray, " boundaries"]
    tokens: Int64[np.ndarray, " tokens"]
    predicted: Int32[np.ndarray, "teachers tokens"]
    margin: Float32[np.ndarray, "teachers tokens"]
    logprob: Float32[np.ndarray, "teachers tokens"]
    kl: Float32[np.ndarray, "counterfactuals tokens"] | None
    expected: Float32[np.ndarray, "teachers tokens"] | None = None

    @classmethod
    def zeros(
        cls, examples: Sequence[Example], n_teachers: int, *, kl: bool, expected: bool = False
    ) -> "TeacherForced":
        """Allocate readings for examples with token ids.

        Raises:
            ValueError: An example has an empty completion.
        """
        completions = [np.asarray(example.completion_ids, dtype=np.int64) for example in examples]
        lengths = np.array([len(ids) for ids in completions])
        if (lengths == 0).any():
            raise ValueError(
                f"example {int(np.argmin(lengths))} has an empty completion; leave it out"
            )
        tokens = np.concatenate(completions)
        shape = (n_teachers, len(tokens))
        return cls(
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            tokens=tokens,
            predicted=np.zeros(shape, dtype=np.int32),
            margin=np.zeros(shape, dtype=np.float32),
            logprob=np.zeros(shape, dtype=np.float32),
            kl=np.zeros((n_teachers - 1, len(tokens)), dtype=np.float32) if kl else None,
            expected=np.zeros(shape, dtype=np.float32) if expected else None,
        )

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that forward passes compute, by name; tokens are the last axis of each."""
        arrays = {"predicted": self.predicted, "margin": self.margin, "logprob": self.logprob}
        further = {"kl": self.kl, "expected": self.expected}
        return arrays | {name: array for name, array in further.items() if array is not None}

    def select(self, rows: Sequence[int]) -> "TeacherForced":
        """Return the readings of some examples."""
        offsets, places = token_places(self.offsets, rows)
        arrays = {name: array[:, places] for name, array in self.arrays.items()}
        kl = arrays.pop("kl", None)
        return TeacherForced(offsets, self.tokens[places], **arrays, kl=kl)

    def write(self, span: range, arrays: dict[str, np.ndarray]) -> int:
        """Copy the readings of consecutive examples into place and return their number."""
        places = slice(int(self.offsets[span.start]), int(self.offsets[span.stop]))
        for name, array in self.arrays.items():
            array[:, places] = arrays[name]
        return int(arrays["predicted"].size)

    def example_of(self, place: int) -> int:
        """Return the example that owns the flat token index `place`."""
        return int(np.searchsorted(self.offsets, place, side="right")) - 1


def token_places(
    offsets: Int64[np.ndarray, " boundaries"], rows: Sequence[int]
) -> tuple[Int64[np.ndarray, " selected"], Int64[np.ndarray, " tokens"]]:
    """Return the offsets and flat token indices of some examples."""
    spans = [range(offsets[row], offsets[row + 1]) for row in rows]
    places = np.fromiter(chain.from_iterable(spans), np.int64)
    return np.concatenate([[0], np.cumsum(list(map(len, spans)))]).astype(np.int64), places


def token_owners(offsets: Int64[np.ndarray, " boundaries"]) -> Int64[np.ndarray, " tokens"]:
    """Return the example that each token belongs to."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
