"""The prompts and settings of one call of `generate`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from divergence_lens.chat import Conversation


class Completion(NamedTuple):
    """The completion of one prompt.

    Attributes:
        ids: Token ids, with the end token if there is one.
        removed_mass: With a pattern, the mean probability that it removed, over the tokens.
    """

    ids: tuple[int, ...]
    removed_mass: float | None = None


Finish = Callable[[int, Completion], None]
"""Takes a prompt's number and its completion."""


class Writer(Protocol):
    """The source of completions: a model of this process, or a server."""

    def batches(self) -> list[np.ndarray]:
        """Return the numbers of all prompts in batches; a batch is the unit of a checkpoint."""

    def write(self, batch: list[int], finish: Finish) -> None:
        """Complete a batch; call `finish` as completions end."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of generation; see `generate` for each.

    Raises:
        ValueError: A setting is out of range.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    batch_tokens: int
    top_k: int | None = None
    repetition_penalty: float = 1.0
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be 0 (greedy) or a positive number, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, or None for all tokens, got {self.top_k}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                "repetition_penalty must be a positive number, 1 for none, got "
                f"{self.repetition_penalty}"
            )
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens must be 1 or more, got {self.batch_tokens}")

    def local_only(self) -> dict[str, Any]:
        """Return the settings in use that only a model of this process supports."""
        unused = {"top_k": None, "repetition_penalty": 1.0, "pattern": None}
        return {
            name: getattr(self, name)
            for name, default in unused.items()
            if getattr(self, name) != default
        }


@dataclass(frozen=True)
class Request:
    """Prompts, as text and as ids, and how to complete them.

    Attributes:
        prompts: User texts and conversations.
        rows: The ids of each prompt, with the template around it.
        system_prompt: The teacher's system prompt.
        tokenizer: The tokenizer of the ids.
        stops: Ids that end a completion.
        settings: How completions are generated.
    """

    prompts: Sequence[str | Conversation]
    rows: Sequence[Sequence[int]]
    system_prompt: str | None
    tokenizer: Any
    stops: frozenset[int]
    settings: Settings
