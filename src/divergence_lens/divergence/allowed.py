"""Readings among the tokens that a pattern allows at each position.

Where `generate(pattern=...)` wrote the completions, the teacher chose among the allowed tokens
only. Its argmax and its probabilities are then those of the restricted distribution

    p(t | x, t allowed) = exp(z_t) / sum over allowed s of exp(z_s)

A pattern has few states, and each allows one set of tokens. So a chunk of tokens is unembedded at
once, for the ids that any state allows if they are few, and everything after that runs state by
state on the allowed columns alone.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from divergence_lens.chat import stop_ids
from divergence_lens.engine import Engine, chunk_rows, few_ids, in_chunks, kl_divergence, score
from divergence_lens.examples import Example
from divergence_lens.models import Model, end_token_ids
from divergence_lens.patterns import TokenPattern

Unembed = Callable[[Tensor, Tensor | None], Tensor]


class AllowedTokens:
    """The tokens that a pattern allows at each completion token of a data set.

    Attributes:
        ids: All ids that are allowed somewhere; None if they are not few.
    """

    def __init__(
        self, pattern: str, model: Model, examples: Sequence[Example], *, d_vocab: int
    ) -> None:
        """Follow the pattern through every completion.

        Args:
            pattern: The pattern that the completions were generated with.
            model: The factual teacher's model.
            examples: Completions with ids.
            d_vocab: Number of ids that every teacher predicts.

        Raises:
            ValueError: A completion does not follow the pattern; the tokens cannot write the
                pattern.
        """
        tokenizer: Any = model.tokenizer
        self._pattern = TokenPattern(
            pattern,
            tokenizer,
            d_vocab=d_vocab,
            end_tokens=stop_ids(tokenizer) | end_token_ids(model),
        )
        self._states = np.array(  # [tokens]
            [state for row, example in enumerate(examples) for state in self._follow(row, example)]
        )
        anywhere = torch.zeros(d_vocab, dtype=torch.bool)
        for state in np.unique(self._states).tolist():
            anywhere |= self._pattern.allowed([state])[0]
        few = few_ids(anywhere, torch.zeros(0, dtype=torch.int64), d_vocab=d_vocab)
        self.ids = None if few is None else few[0]

    def _follow(self, row: int, example: Example) -> list[int]:
        """Return the state before each token of a completion."""
        try:
            return self._pattern.states(example.completion_ids or ())
        except ValueError as error:
            raise ValueError(
                f"example {row}: {error}; give the pattern that the completions were generated with"
            ) from error

    def mask(
        self, places: slice | Int64[np.ndarray, " places"], chunk: slice, device: torch.device
    ) -> Bool[Tensor, "chunk columns"]:
        """Return which of `ids`, or of all ids, are allowed at a chunk of the tokens `places`."""
        states, place = np.unique(self._states[places][chunk], return_inverse=True)
        masks = self._pattern.allowed(states.tolist(), device)  # [states, d_vocab]
        masks = masks if self.ids is None else masks[:, self.ids.to(device)]
        return masks[torch.from_numpy(place).to(device)]

    def _columns(self, ids: Int64[Tensor, " allowed"]) -> Int64[Tensor, " allowed"]:
        """Return the column of each allowed id among the logits."""
        return ids if self.ids is None else torch.searchsorted(self.ids.to(ids.device), ids)

    def _listed(self, device: torch.device) -> Int64[Tensor, " ids"] | None:
        return None if self.ids is None else self.ids.to(device)

    def _groups(
        self, places: slice, chunk: slice, device: torch.device
    ) -> Iterator[tuple[Int64[Tensor, " rows"], Int64[Tensor, " allowed"]]]:
        """Yield the rows of each state in a chunk of the tokens `places`, and its allowed ids."""
        states = self._states[places][chunk]
        for state in np.unique(states).tolist():
            rows = torch.from_numpy(np.flatnonzero(states == state)).to(device)
            (mask,) = self._pattern.allowed([state], device)  # [d_vocab]
            yield rows, mask.nonzero()[:, 0]

    def read(
        self,
        engine: Engine,
        hidden: Float[Tensor, "tokens d_model"],
        given: Int64[Tensor, " tokens"],
        places: slice,
    ) -> tuple[Int32[Tensor, " tokens"], Float32[Tensor, " tokens"], Float32[Tensor, " tokens"]]:
        """Return argmax, margin and log-probability, like `read_hidden`, among allowed tokens.

        The margin is infinite where only one token is allowed.
        """

        def read_chunk(chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
            logits = engine.unembed(hidden[chunk], self._listed(hidden.device))  # [chunk, ids]
            own = given[chunk]
            predicted = torch.empty_like(own, dtype=torch.int32)
            margin, logprob = torch.empty(2, len(own), device=own.device)
            for rows, ids in self._groups(places, chunk, own.device):
                # Allowed ids are sorted, so the search gives each token's column among them.
                columns = torch.searchsorted(ids, own[rows])
                best, gap, logp = score(logits[rows[:, None], self._columns(ids)], columns)
                predicted[rows] = ids[best.long()].int()
                margin[rows], logprob[rows] = gap, logp
            return predicted, margin, logprob

        parts = in_chunks(len(hidden), chunk_rows(engine, self.ids), read_chunk)
        predicted, margin, logprob = (torch.cat(column) for column in zip(*parts, strict=True))
        return predicted, margin, logprob

    def kl(
        self,
        factual: tuple[Unembed, Float[Tensor, "tokens d_model"]],
        other: tuple[Unembed, Float[Tensor, "tokens d_model_2"]],
        places: slice,
        *,
        rows: int,
    ) -> Float32[Tensor, " tokens"]:
        """Return KL(factual || other) over the allowed tokens, `rows` tokens at a time."""
        (unembed, hidden), (unembed_other, hidden_other) = factual, other

        def read_chunk(chunk: slice) -> Tensor:
            logits = unembed(hidden[chunk], self._listed(hidden.device))  # [chunk, ids]
            rest = unembed_other(hidden_other[chunk], self._listed(hidden_other.device))
            rest = rest.to(logits.device)
            result = torch.empty(len(logits), device=logits.device)
            for members, ids in self._groups(places, chunk, logits.device):
                index = members[:, None], self._columns(ids)
                result[members] = kl_divergence(logits[index], rest[index])
            return result

        return torch.cat(in_chunks(len(hidden), rows, read_chunk))
