"""Choose tokens from logits: the most likely, or by a number drawn for each prompt and step."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from divergence_lens.chat import Conversation

# Probabilities are added up in groups of this many first, so that only the chosen token's group is
# added up one by one.
_GROUP = 256

# Number of most likely tokens among which a nucleus is first sought; sorting a whole vocabulary
# is slow.
_CANDIDATES = 256


class Sampler:
    """Choice of tokens: the most likely, or by a number drawn for each row and step."""

    def __init__(
        self,
        temperature: float,
        top_p: float,
        seed: int,
        prompts: Sequence[str | Conversation],
        max_new_tokens: int,
        *,
        top_k: int | None = None,
    ) -> None:
        self._temperature, self._top_p, self._top_k = temperature, top_p, top_k
        if temperature == 0:
            return
        self._draws = np.empty((len(prompts), max_new_tokens))
        for row, own_seed in enumerate(prompt_seeds(seed, prompts)):
            self._draws[row] = np.random.default_rng(own_seed).random(max_new_tokens)

    def choose(
        self, logits: Float[Tensor, "rows vocab"], steps: Sequence[tuple[int, int]]
    ) -> Int[Tensor, " rows"]:
        """Choose one token per row of logits; `steps` holds the (prompt, step) of each row."""
        if self._temperature == 0:
            return logits.argmax(-1)
        if self._top_k is not None and self._top_k < logits.shape[1]:
            least = logits.topk(self._top_k).values[:, -1:]  # [rows, 1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        # Subtract the maximum first, so that a low temperature does not overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / self._temperature
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        rows, places = zip(*steps, strict=True)
        draws = torch.as_tensor(self._draws[list(rows), list(places)], dtype=wide)
        draws = draws.to(logits.device)  # [rows]
        if self._top_p < 1:
            return _from_nucleus(logits, draws, self._top_p)
        return _at_draws(logits.to(wide).exp_(), draws)


def prompt_seeds(seed: int, prompts: Sequence[str | Conversation]) -> list[int]:
    """Return a seed per prompt, from its text and the number of earlier prompts with that text."""
    seeds: list[int] = []
    seen: dict[str | Conversation, int] = {}
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, 0) + 1
        key = hashlib.blake2b(f"{seed} {seen[prompt]} {prompt}".encode(), digest_size=16)
        seeds.append(int.from_bytes(key.digest(), "little"))
    return seeds


def _at_draws(
    weights: Float[Tensor, "rows vocab"], draws: Float[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """Inverse transform sampling: the first token whose cumulative weight exceeds the draw.

    Weights need not sum to 1. A token of weight zero does not increase the sum, so it is never
    chosen.
    """
    vocab = weights.shape[1]
    whole = vocab // _GROUP * _GROUP
    sums = weights[:, :whole].unflatten(-1, (-1, _GROUP)).sum(-1)
    if whole < vocab:
        sums = torch.cat([sums, weights[:, whole:].sum(-1, keepdim=True)], -1)  # [rows, group]
    cumulative = sums.cumsum(-1)
    target = draws[:, None] * cumulative[:, -1:]  # [rows, 1]
    group = _first_above(cumulative, target, sums)  # [rows, 1]
    before = (cumulative - sums).gather(-1, group)
    columns = group * _GROUP + torch.arange(_GROUP, device=weights.device)  # [rows, column]
    inside = weights.gather(-1, columns.clamp(max=vocab - 1)).masked_fill_(columns >= vocab, 0)
    place = _first_above(before + inside.cumsum(-1), target, inside)
    return columns.gather(-1, place)[:, 0]


def _first_above(cumulative: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The first column whose cumulative weight exceeds `target`, [rows, 1].

    Rounding may leave all of them below it; then the last column with a weight.
    """
    below = (cumulative <= target).sum(-1, keepdim=True)
    last = weights.shape[1] - 1 - weights.flip(-1).ne(0).int().argmax(-1, keepdim=True)
    return torch.minimum(below, last)


def _from_nucleus(
    logits: Float[Tensor, "rows vocab"], draws: Float[Tensor, " rows"], top_p: float
) -> Int[Tensor, " rows"]:
    """Sample from the smallest set of tokens whose probability reaches `top_p`.

    Of equally likely tokens, those with lower ids come first.
    """
    probabilities = logits.softmax(-1, dtype=draws.dtype)  # [rows, vocab]
    vocab = logits.shape[1]
    count = _CANDIDATES
    while True:
        if count >= vocab:
            columns = torch.arange(vocab, device=logits.device).expand_as(logits)
            complete = True
        else:
            top = logits.topk(count + 1)
            # A tie with the first token left out would leave the order to topk.
            complete = bool((top.values[:, -1] < top.values[:, -2]).all())
            columns = top.indices[:, :-1].sort(-1).values
        candidates = probabilities.gather(-1, columns)  # [rows, candidate], by id
        ranked, order = candidates.sort(dim=-1, descending=True, stable=True)
        total = ranked.cumsum(-1)
        if count >= vocab or (complete and bool((total[:, -1] >= top_p).all())):
            break
        count *= 4
    ranked[total - ranked >= top_p] = 0
    nucleus = torch.zeros_like(candidates).scatter_(-1, order, ranked)
    cumulative = nucleus.cumsum(-1)
    place = _first_above(cumulative, draws[:, None] * cumulative[:, -1:], nucleus)
    return columns.gather(-1, place)[:, 0]
