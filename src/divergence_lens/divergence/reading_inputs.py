"""Inputs of the teacher-forced reading: prompt ids, and models that can read them."""

from collections.abc import Sequence
from functools import cached_property
from itertools import chain

import numpy as np
from torch import nn

from divergence_lens._utils.batching import shared_prefix
from divergence_lens.divergence.forced import TeacherForced
from divergence_lens.engine import Engine
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher

# A shared prefix shorter than this saves less than the extra pass costs.
_SHORTEST_PREFIX = 4


class PromptIds:
    """The prompt ids of all examples under one system prompt, in one flat array."""

    def __init__(self, rows: Sequence[tuple[int, ...]]) -> None:
        self.lengths = np.array([len(row) for row in rows])
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        self.flat = np.fromiter(chain.from_iterable(rows), np.int32, self._offsets[-1])

    def __getitem__(self, row: int) -> np.ndarray:
        ids: np.ndarray = self.flat[self._offsets[row] : self._offsets[row + 1]]
        return ids

    @cached_property
    def prefix(self) -> int:
        """Number of ids shared by the start of all rows, without the last, which predicts."""
        rows = [self[row] for row in range(len(self.lengths))]
        shared = min(shared_prefix(rows), int(self.lengths.min()) - 1)
        return shared if shared >= _SHORTEST_PREFIX and len(rows) > 1 else 0

    @property
    def start(self) -> np.ndarray:
        """The ids that all rows start with."""
        return self[0][: self.prefix]


def refuse_dropout(model: Model) -> None:
    """Raise a ValueError if a forward pass of the model would drop activations at random."""
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, nn.Dropout) else 0.0
        # Hugging Face's attention layers store the rate as a plain number.
        own = getattr(module, "attention_dropout", 0.0)
        # Falcon and Bloom hold a module there, which this loop visits on its own.
        rate = max(rate, own if isinstance(own, float) else 0.0)
        if module.training and rate > 0:
            raise ValueError(
                f"the model is in training mode and {name} drops {rate:.0%} at random, so its "
                "outputs would be random too; call model.eval() first"
            )


def check_fits(engine: Engine, prompts: PromptIds, forced: TeacherForced, teacher: Teacher) -> None:
    """Refuse completions that a teacher's model cannot predict, or rows longer than its context.

    Raises:
        ValueError: Names the example and the teacher.
    """
    ids = forced.tokens
    # Every completion token is predicted, so it must be an id that the model predicts.
    if ids.min() < 0 or ids.max() >= engine.d_vocab_out:
        place = int(np.flatnonzero((ids < 0) | (ids >= engine.d_vocab_out))[0])
        raise ValueError(
            f"example {forced.example_of(place)} has the token id {ids[place]}, but the model of "
            f"teacher {teacher.name!r} predicts ids below {engine.d_vocab_out:,}; check that it "
            "was written with the same tokenizer"
        )
    totals = prompts.lengths + np.diff(forced.offsets)
    longest = int(np.argmax(totals))
    # The last completion token is predicted, but not read.
    if totals[longest] - 1 > engine.n_ctx:
        raise ValueError(
            f"example {longest} is {totals[longest]:,} tokens long under teacher {teacher.name!r} "
            f"({prompts.lengths[longest]:,} of prompt), over the context of {engine.n_ctx:,}; "
            "shorten it or leave it out"
        )
