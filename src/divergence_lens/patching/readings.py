"""Teacher forcing of answers and foils of several tokens.

By the chain rule, an answer a_1 ... a_k after a prompt has the log-probability

    log p(a_1 ... a_k | prompt) = sum over j of log p(a_j | prompt, a_1 ... a_{j-1}).

So the prompt is continued with all tokens of the answer but the last, and the logits are read at
the target position and at every position after it. An answer and its foil need two continued rows
if neither continuation begins with the other; a chunk then holds the pair twice. A metric is a sum
over the rows of a pair, and so are all effects on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens.pairs import NO_TOKEN


@dataclass(frozen=True)
class Reading:
    """One row of a pair, for its answer, its foil or both.

    Attributes:
        answer: The answer's tokens; empty if another row reads them, or none does.
        foil: The foil's tokens, or empty.
    """

    answer: tuple[int, ...] = ()
    foil: tuple[int, ...] = ()

    @property
    def continuation(self) -> tuple[int, ...]:
        """The tokens that continue the prompt: all but the last of the longer side."""
        return max(self.answer, self.foil, key=len)[:-1]


def readings_of(answer: Sequence[int], foil: Sequence[int]) -> tuple[Reading, ...]:
    """The rows needed to read an answer and a foil, either of which may be empty."""
    forced, other_forced = tuple(answer[:-1]), tuple(foil[:-1])
    shared = min(len(forced), len(other_forced))
    if forced[:shared] == other_forced[:shared]:
        return (Reading(tuple(answer), tuple(foil)),)
    return Reading(answer=tuple(answer)), Reading(foil=tuple(foil))


@dataclass(frozen=True)
class Readings:
    """The tokens that are read of each row of a chunk.

    The first rows of all pairs come first; the second rows of some pairs follow.

    Attributes:
        continuations: The tokens that continue each row after its target position.
        owner: For each row the number of its pair within the chunk.
        count: For each row the number of positions that are read, from the target position on.
        answers: The answer's tokens, `NO_TOKEN` where none is read.
        foils: The foil's tokens, likewise.
    """

    continuations: tuple[Int64[Tensor, " _"], ...]
    owner: Int64[Tensor, " rows"]
    count: Int64[Tensor, " rows"]
    answers: Int64[Tensor, "rows reads"]
    foils: Int64[Tensor, "rows reads"]

    @classmethod
    def of_pairs(
        cls, by_pair: Sequence[tuple[Reading, ...]], device: torch.device
    ) -> "Readings | None":
        """Stack the readings of pairs; None if no row is continued."""
        if not all(by_pair):
            return None
        second = [(i, rows[1]) for i, rows in enumerate(by_pair) if len(rows) > 1]
        owner = [*range(len(by_pair)), *(i for i, _ in second)]
        rows = [*(rows[0] for rows in by_pair), *(row for _, row in second)]
        continuations = tuple(torch.tensor(row.continuation, dtype=torch.int64) for row in rows)
        count = torch.tensor([len(tokens) + 1 for tokens in continuations])
        answers = torch.full((len(rows), int(count.max())), NO_TOKEN)  # [rows, reads]
        foils = answers.clone()  # [rows, reads]
        for i, row in enumerate(rows):
            answers[i, : len(row.answer)] = torch.tensor(row.answer, dtype=torch.int64)
            foils[i, : len(row.foil)] = torch.tensor(row.foil, dtype=torch.int64)
        tensors = (tensor.to(device) for tensor in (torch.tensor(owner), count, answers, foils))
        return cls(continuations, *tensors)

    def continued(self, rows: Sequence[Int64[Tensor, " _"]]) -> list[Int64[Tensor, " _"]]:
        """Append to each row its continuation."""
        return [torch.cat(both) for both in zip(rows, self.continuations, strict=True)]

    @property
    def pairs(self) -> int:
        """The number of pairs, which is the number of first rows."""
        return int(self.owner.max()) + 1

    @cached_property
    def read(self) -> Bool[Tensor, "rows reads"]:
        """Mask of the positions that are read, from the target position on."""
        return torch.arange(self.answers.shape[1], device=self.count.device) < self.count[:, None]

    def states(
        self,
        resid: Float[Tensor, "more pos d_model"],
        target: Int64[Tensor, " more"],
        rows: Int64[Tensor, " more"],
    ) -> Float[Tensor, "states d_model"]:
        """The states that are read, row by row.

        Args:
            resid: The last residual of any rows.
            target: The target position of each.
            rows: The row of the chunk that each is a run of.
        """
        row, offset = self.read[rows].nonzero(as_tuple=True)  # [states]
        return resid[row, target[row] + offset]

    def log_probabilities(
        self, logits: Float[Tensor, "states d_vocab"], rows: Int64[Tensor, " more"]
    ) -> tuple[Float[Tensor, " more"], Float[Tensor, " more"]]:
        """Sum the log-probabilities of each row's answer and of its foil, 0 where not read.

        Args:
            logits: The logits at `states`.
            rows: The rows that `states` was called with.
        """
        read = self.read[rows]  # [more, reads]
        # log p(token) = logit - logsumexp, without a copy of all logits.
        total = logits.logsumexp(-1)  # [states]

        def summed(tokens: Tensor) -> Tensor:
            token = tokens[rows][read]  # [states]
            logit = logits.gather(-1, token.clamp(min=0)[:, None])[:, 0]
            log_p = torch.where(token == NO_TOKEN, 0.0, logit - total)
            by_row = log_p.new_zeros(read.shape).masked_scatter(read, log_p)  # [more, reads]
            return by_row.sum(-1)

        return summed(self.answers), summed(self.foils)

    def merged(self, values: Float[Tensor, "..."], axis: int = 0) -> Float[Tensor, "..."]:
        """Add the values of each pair's second row to those of its first, along `axis`.

        Second rows become zero, so that the sum over rows stays the same.
        """
        first, second = values.split([self.pairs, values.shape[axis] - self.pairs], axis)
        # A pair has one second row at most, so no sum depends on the order.
        added = first.index_add(axis, self.owner[self.pairs :], second)
        return torch.cat([added, torch.zeros_like(second)], axis)
