"""Training data as padded arrays, and its batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from divergence_lens._utils.batching import ascending_batches, shared_prefix
from divergence_lens.chat import encode_prompts
from divergence_lens.divergence import Divergence
from divergence_lens.engine import get_engine
from divergence_lens.examples import Example, as_examples, with_ids
from divergence_lens.models import Model

# Batches are cut from runs of so many batches sorted by length: little padding, and still shuffled.
_BUCKET = 8


@dataclass(frozen=True)
class Rows:
    """What a student learns from: one row for each example that has a token to learn.

    A row ends at the position that predicts its last token with a loss: what follows matters to
    nothing.

    Attributes:
        tokens: Input ids, right padded with 0.
        targets: The next token at each position.
        weights: Loss weight of predicting that token; 0 where there is no loss.
        lengths: Tokens of each row.
        tokens_learned: How many tokens have a loss.
        shared: How many tokens all rows begin with, short of any position with a loss.
    """

    tokens: Int[Tensor, "row pos"]
    targets: Int[Tensor, "row pos"]
    weights: Float[Tensor, "row pos"]
    lengths: np.ndarray
    tokens_learned: int
    shared: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def digest(self) -> str:
        """A hash of everything that a run learns from; equal rows have equal ones."""
        hashed = hashlib.sha256()
        tensors = (self.tokens, self.targets, self.weights)
        for array in (*(tensor.cpu().numpy() for tensor in tensors), self.lengths):
            hashed.update(f"{array.dtype} {array.shape}".encode())
            hashed.update(np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()


def training_rows(
    model: Model,
    examples: Any,
    *,
    mask: Any = None,
    weights: Any = None,
    system_prompt: str | None = None,
) -> Rows:
    """Encode examples for training.

    Args:
        model: Gives tokenizer, context and device.
        examples: Whatever `as_examples` reads.
        mask: Which completion tokens have a loss: a bool per token of all completions in order, one
            array per example, or an object with such a `mask` (a `Divergence`). None means all.
        weights: Loss weight per token, in the same layout, finite and not negative.
        system_prompt: The student's.

    Raises:
        ValueError: No examples; a mask or weights of the wrong length; nothing left to learn; a
            sequence longer than the context; token ids outside the vocabulary.
    """
    tokenizer: Any = model.tokenizer
    given = with_ids(tokenizer, as_examples(examples))
    if not given:
        raise ValueError("there are no examples to learn from")
    sizes = [len(_ids(example)) for example in given]
    share = np.ones(sum(sizes), np.float32)
    if weights is not None:
        share = _flat(weights, sizes, "weights").astype(np.float32)
        if not np.isfinite(share).all() or (share < 0).any():
            raise ValueError("weights must be finite and not negative")
    if mask is not None:
        _check_same_tokens(mask, given)
        held = getattr(mask, "mask", None)
        # A pandas Series has a method of that name.
        flat = _flat(mask if held is None or callable(held) else held, sizes, "mask")
        if flat.dtype != np.bool_:
            raise TypeError(
                f"the mask holds {flat.dtype}, not bool; for graded values use weights="
            )
        share = np.where(flat, share, np.float32(0))
    if not share.any():
        raise ValueError(
            f"the mask lets none of the {len(share):,} completion tokens through; there is nothing "
            "to learn"
        )
    return _padded(model, given, share, system_prompt)


def _check_same_tokens(mask: Any, examples: Sequence[Example]) -> None:
    """Refuse a `Divergence` of other completions, whose mask may fit by its length alone."""
    if not isinstance(mask, Divergence):
        return
    read = [example.completion_ids for example in mask.examples]
    if len(read) != len(examples):
        raise ValueError(
            f"the mask is a divergence of {len(read):,} examples, there are {len(examples):,}"
        )
    for row, (ids, example) in enumerate(zip(read, examples, strict=True)):
        if ids != example.completion_ids:
            raise ValueError(
                f"the mask is a divergence that read another completion as example {row}; give the "
                "examples that it was found in, in their order (divergence.examples)"
            )


def _ids(example: Example) -> tuple[int, ...]:
    return example.completion_ids or ()


def _flat(values: Any, sizes: Sequence[int], what: str) -> np.ndarray:
    """One value per completion token, from a flat array or one array per example."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, Sequence) and len(values) and np.ndim(values[0]) == 1:
        if len(values) != len(sizes):
            raise ValueError(
                f"the {what} has {len(values):,} rows, there are {len(sizes):,} examples"
            )
        for row, (value, size) in enumerate(zip(values, sizes, strict=True)):
            if len(value) != size:
                raise ValueError(
                    f"the {what} of example {row} has {len(value)} entries, its completion "
                    f"{size} tokens"
                )
        values = np.concatenate([np.asarray(value) for value in values])
    flat = np.asarray(values)
    if flat.shape != (sum(sizes),):
        ends = np.cumsum(sizes)
        where = (
            f"; it ends within example {int(np.searchsorted(ends, flat.size, side='right'))}"
            if flat.ndim == 1 and flat.size < ends[-1]
            else ""
        )
        raise ValueError(
            f"the {what} has shape {flat.shape}, the completions of the {len(sizes):,} examples "
            f"have {sum(sizes):,} tokens in all{where}: give one value for each"
        )
    return flat


@lru_cache(maxsize=4)
def _prompts(
    tokenizer: Any,
    template: str | None,  # noqa: ARG001 - another template gives other tokens
    prompts: tuple[str, ...],
    system_prompt: str | None,
) -> list[tuple[int, ...]]:
    """Token ids of prompts. Kept, because many students learn from the same examples."""
    return [e.ids for e in encode_prompts(tokenizer, prompts, system_prompt=system_prompt)]


def _padded(
    model: Model,
    examples: Sequence[Example],
    share: Float[np.ndarray, " tokens"],
    system_prompt: str | None,
) -> Rows:
    engine = get_engine(model)
    tokenizer: Any = model.tokenizer
    template = str(getattr(tokenizer, "chat_template", None))
    prompts = _prompts(tokenizer, template, tuple(e.prompt for e in examples), system_prompt)
    inputs: list[list[int]] = []
    kept: list[tuple[int, np.ndarray]] = []
    end = 0
    for row, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        ids = _ids(example)
        own = share[end : end + len(ids)]
        end += len(ids)
        if not own.any():
            continue
        if len(prompt) + len(ids) > engine.n_ctx:
            raise ValueError(
                f"example {row} has {len(prompt)} prompt and {len(ids)} completion tokens, more "
                f"than the context of {engine.n_ctx}; shorten it or leave it out"
            )
        last = int(own.nonzero()[0][-1])
        inputs.append([*prompt, *ids[: last + 1]])
        kept.append((len(prompt), own[: last + 1]))
    lengths = np.array([len(ids) - 1 for ids in inputs])
    tokens = np.zeros((len(inputs), int(lengths.max()) + 1), np.int64)
    weights = np.zeros((len(inputs), int(lengths.max())), np.float32)
    for row, (held, (start, own)) in enumerate(zip(inputs, kept, strict=True)):
        tokens[row, : len(held)] = held
        weights[row, start - 1 : start - 1 + len(own)] = own
    if tokens.min() < 0 or tokens.max() >= engine.d_vocab:
        raise ValueError(
            f"token ids run from {tokens.min()} to {tokens.max()}, the vocabulary has "
            f"{engine.d_vocab}: were the completions made with another tokenizer?"
        )
    padded = torch.from_numpy(tokens).to(engine.device)
    return Rows(
        tokens=padded[:, :-1],
        targets=padded[:, 1:],
        weights=torch.from_numpy(weights).to(engine.device),
        lengths=lengths,
        tokens_learned=int((weights > 0).sum()),
        shared=min(shared_prefix([tuple(ids) for ids in inputs]), min(n for n, _ in kept) - 1),
    )


def batches(lengths: np.ndarray, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch: row numbers, of like length within a batch, in random order.

    Depends on its arguments alone, so that a run that is resumed sees the same batches.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    found: list[np.ndarray] = []
    for start in range(0, len(order), size * _BUCKET):
        bucket = order[start : start + size * _BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        found += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return [found[i] for i in random.permutation(len(found))]


def pieces(rows: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Cut rows into runs of at most `batch_tokens` padded tokens, and at least one row."""
    for part in ascending_batches(lengths[rows], batch_tokens):
        yield rows[part]
