"""Decoders: read a batch of prompts, then extend every row by one token at a time.

`LockstepDecoder` runs any model through `Engine.extend`, with all rows at the same position.
`engine.static.StaticDecoder` runs models with fused blocks, with each row at its own position.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from divergence_lens._utils.batching import shared_prefix

if TYPE_CHECKING:
    from divergence_lens.engine.base import Engine
    from divergence_lens.engine.passes import KeyValues

Reading = tuple[list[int], Float[Tensor, "active d_model"]]
"""Rows that need a next token, and the normed hidden states at their last positions."""


class Decoder(ABC):
    """Decoding of one batch after another. Get it with `engine.decoder()`.

    The weights must not change while a decoder is used.

    Attributes:
        ragged: Whether a row costs the same in a batch with longer and shorter ones.
    """

    ragged: bool

    @abstractmethod
    def start(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Reading:
        """Read the prompts of a new batch.

        Args:
            prompts: Ids, the shortest prompt first; none is empty.
            new_tokens: The most tokens that any row will be extended by.

        Returns:
            The rows that need a token first, and their hidden states [rows, d_model].
        """

    @abstractmethod
    def step(self, tokens: Int[Tensor, " rows"], ended: Collection[int]) -> Reading:
        """Extend rows by one token each.

        Args:
            tokens: One token for each of the rows last returned, in their order.
            ended: Rows to drop; their tokens are ignored.

        Returns:
            The rows that need a token next, and their hidden states; no rows once all have ended.
        """


class LockstepDecoder(Decoder):
    """Decoding through `Engine.extend`, with all rows at the same position.

    1. Read the batch up to the length of its shortest prompt; shared first ids are read once.
    2. Extend all rows by one position per pass. Rows with longer prompts read their next prompt
       token while the others already write.
    """

    ragged = False

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def start(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Reading:
        """Read the prompts up to the length of the shortest."""
        del new_tokens  # the keys and values grow with each pass
        self._prompts = prompts
        self._rows = list(range(len(prompts)))
        shortest = len(prompts[0])
        first = torch.tensor([ids[:shortest] for ids in prompts], device=self._engine.device)
        # The last position is left for the batch: every row's hidden state is needed there.
        shared = min(shared_prefix(prompts), shortest - 1)
        past: KeyValues | None = None
        if len(prompts) > 1 and shared:
            _, past = self._engine.prefill(first[:1, :shared])
        else:
            shared = 0
        hidden, self._past = self._engine.extend(first[:, shared:], past)
        return self._ready(hidden[:, -1])

    def _ready(self, hidden: Float[Tensor, "rows d_model"]) -> Reading:
        """Return the rows whose prompts have been read."""
        at = [i for i, row in enumerate(self._rows) if len(self._prompts[row]) <= self._past.length]
        self._writing = [self._rows[i] for i in at]
        return self._writing, hidden[torch.tensor(at, dtype=torch.long, device=hidden.device)]

    def step(self, tokens: Int[Tensor, " rows"], ended: Collection[int]) -> Reading:
        """Extend all rows, until at least one needs a token."""
        written = dict(zip(self._writing, tokens.tolist(), strict=True))
        active = [i for i, row in enumerate(self._rows) if row not in ended]
        if len(active) < len(self._rows):
            self._rows = [self._rows[i] for i in active]
            self._past = self._past.select(
                torch.tensor(active, dtype=torch.long, device=self._engine.device)
            )
        reading: Reading = [], torch.empty(0, self._engine.d_model, device=tokens.device)
        while self._rows and not reading[0]:
            position = self._past.length
            # A row writes, or reads its own prompt.
            column = [
                written[row] if row in written else self._prompts[row][position]
                for row in self._rows
            ]
            next_tokens = torch.tensor(column, device=self._engine.device)[:, None]  # [rows, 1]
            hidden, self._past = self._engine.extend(next_tokens, self._past)
            reading = self._ready(hidden[:, -1])
        return reading
