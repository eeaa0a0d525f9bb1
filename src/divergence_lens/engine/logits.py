"""Argmax, margin, log-probability and divergence, from hidden states.

The logits of all positions never exist at once: at a vocabulary of 150,000 they would be the
largest tensor of a run. They are computed for a chunk of positions at a time, and overwritten.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Float32, Int, Int32, Int64
from torch import Tensor

from divergence_lens._utils.memory import is_out_of_memory
from divergence_lens.engine.base import Engine

T = TypeVar("T")

# Logits held at a time: just under 32 MiB in float32 on a CPU. A product with fewer rows reads the
# unembedding more often; glibc returns larger blocks to the system, and every chunk would fault its
# pages in again.
_CHUNK_ELEMENTS = {"cpu": (1 << 23) - 1024}
_CHUNK_ELEMENTS_ACCELERATOR = 1 << 27

# The vocabulary is searched for its maximum in groups of this many: the largest of each group is a
# plain reduction, which is many times faster than one that also says where it was.
_GROUP = 64

# Copying the columns of a few ids costs less than a product with all of them.
_FEW = 8


def chunk_rows(engine: Engine, ids: Int64[Tensor, " ids"] | None = None) -> int:
    """Return the number of positions to unembed at a time, for all ids or for some."""
    elements = _CHUNK_ELEMENTS.get(engine.device.type, _CHUNK_ELEMENTS_ACCELERATOR)
    return max(1, elements // (engine.d_vocab_out if ids is None else len(ids)))


def read_hidden(
    engine: Engine, hidden: Float[Tensor, "tokens d_model"], given: Int64[Tensor, " tokens"]
) -> tuple[Int32[Tensor, " tokens"], Float32[Tensor, " tokens"], Float32[Tensor, " tokens"]]:
    """Return argmax, margin and log-probability of the given ids, from normed hidden states."""
    parts = in_chunks(
        len(hidden),
        chunk_rows(engine),
        lambda chunk: score(engine.unembed(hidden[chunk]), given[chunk]),
    )
    predicted, margin, logprob = (torch.cat(column) for column in zip(*parts, strict=True))
    return predicted, margin, logprob


def in_chunks(length: int, size: int, run: Callable[[slice], T]) -> list[T]:
    """Call `run` on consecutive slices of at most `size`; halve them when memory runs out."""
    results: list[T] = []
    start = 0
    while start < length:
        try:
            results.append(run(slice(start, min(start + size, length))))
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            size = (size + 1) // 2
            continue
        start += size
    return results


def score(
    logits: Float[Tensor, "rows d_vocab"], given: Int64[Tensor, " rows"]
) -> tuple[Int32[Tensor, " rows"], Float32[Tensor, " rows"], Float32[Tensor, " rows"]]:
    """Return argmax, its margin over the second choice, and log-probability of the given ids.

    The logits are overwritten.
    """
    logits = logits.float()
    group = min(_GROUP, logits.shape[1])
    whole = logits.shape[1] // group * group
    tops = logits[:, :whole].unflatten(-1, (-1, group)).amax(-1)  # [rows, groups]
    if whole < logits.shape[1]:
        tops = torch.cat([tops, logits[:, whole:].amax(-1, keepdim=True)], -1)
    best = tops.argmax(-1, keepdim=True)  # [rows, 1]
    # The last group overlaps the one before it, which changes no maximum.
    columns = (best * group).clamp(max=logits.shape[1] - group) + torch.arange(
        group, device=logits.device
    )
    inside = logits.gather(-1, columns)  # [rows, group]
    place = inside.argmax(-1, keepdim=True)
    predicted = columns.gather(-1, place)
    top = inside.gather(-1, place)
    inside.scatter_(-1, place, -torch.inf)
    tops.scatter_(-1, best, -torch.inf)
    second = torch.maximum(inside.amax(-1), tops.amax(-1))
    # log p = (logit - top) - log(sum(exp(logits - top))), computed in the memory of the logits.
    relative = logits.gather(-1, given[:, None]) - top  # [rows, 1]
    total = logits.sub_(top).exp_().sum(-1).log_()
    return predicted[:, 0].int(), top[:, 0] - second, relative[:, 0] - total


def few_ids(
    possible: Bool[Tensor, " ids"], given: Int64[Tensor, " tokens"], *, d_vocab: int
) -> tuple[Int64[Tensor, " listed"], Bool[Tensor, " listed"]] | None:
    """Return the ids that are possible or given, in order, and which of them are possible.

    Unembedding a few ids saves most of the time of reading, where the vocabulary is large.

    Args:
        possible: Whether each id is possible; ids beyond these are not.
        given: More ids.
        d_vocab: Ids from here on are left out.

    Returns:
        None if the ids are not few, or fewer than two, which have no second choice.
    """
    width = max(d_vocab, len(possible))
    every = torch.nn.functional.pad(possible, (0, width - len(possible)))
    listed = torch.cat([every.nonzero()[:, 0], given]).unique()
    listed = listed[listed < d_vocab]
    return (listed, every[listed]) if 2 <= len(listed) <= d_vocab // _FEW else None


def restricted(
    logits: Float[Tensor, "rows d_vocab"], possible: Bool[Tensor, "*rows ids"] | None
) -> Float[Tensor, "rows d_vocab"]:
    """Give all but the possible ids probability 0; the logits are overwritten.

    The possible ids are the same in all rows, or listed for each. Ids beyond those listed are not
    possible. Their logits become the lowest number instead of minus infinity, which times a
    probability of 0 would be NaN.
    """
    if possible is None:
        return logits
    width = logits.shape[1]
    beyond = max(0, width - possible.shape[-1])
    mask = torch.nn.functional.pad(possible, (0, beyond))[..., :width].to(logits.device)
    return logits.masked_fill_(~mask, torch.finfo(logits.dtype).min)


def score_expected(
    logits: Float[Tensor, "rows d_vocab"],
    given: Int64[Tensor, " rows"],
    chosen: Int[Tensor, " rows"] | Float[Tensor, "rows d_vocab_2"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `score` does, and the mean log-probability of another choice of tokens.

    The logits are overwritten.

    Args:
        logits: Logits of the teacher that is read.
        given: The given ids.
        chosen: The other choice: an id for each row, or the probability of every id.
    """
    logits = logits.float()
    own = logits.gather(-1, given[:, None])[:, 0]  # [rows]
    if chosen.ndim == 1:
        mean = logits.gather(-1, chosen.long()[:, None])[:, 0]  # [rows]
    else:
        # One of two models may pad its vocabulary further; an id of probability 0 adds nothing.
        width = min(logits.shape[1], chosen.shape[1])
        p = chosen[:, :width]
        mean = torch.einsum("rv,rv->r", p, logits[:, :width])  # [rows]
        if not mean.isfinite().all():  # a model's own logit of minus infinity, times 0
            mean = torch.where(p > 0, p * logits[:, :width], 0.0).sum(-1)
    predicted, margin, logprob = score(logits, given)
    # mean(log p) = mean(logit) - log(sum(exp(logits))), and that sum is in log p of the given id.
    return predicted, margin, logprob, mean - own + logprob


def kl_divergence(
    factual: Float[Tensor, "rows d_vocab"], counterfactual: Float[Tensor, "rows d_vocab_2"]
) -> Float32[Tensor, " rows"]:
    """Compute KL(factual || counterfactual) of rows of logits, in nats.

    Where one of two models pads its vocabulary further than the other, the columns that only it
    has are left out of both.
    """
    width = min(factual.shape[1], counterfactual.shape[1])
    log_p = factual[:, :width].float().log_softmax(-1)
    log_q = counterfactual[:, :width].float().log_softmax(-1)
    p = log_p.exp()
    # An id of probability 0 adds nothing, but 0 * (-inf - -inf) would be NaN.
    each = torch.where(p > 0, p * (log_p - log_q), 0.0)
    # A sum of terms of both signs can end a rounding error below zero.
    return each.sum(-1).clamp(min=0.0)
