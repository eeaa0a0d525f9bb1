"""Training data as padded arrays, and its batches."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from divergence_lens._utils.batching import ascending_batches, shared_prefix
from divergence_lens.chat import Prompt, after_turn, answer_header, encode_prompts, stop_ids
from divergence_lens.data import TrainingData
from divergence_lens.divergence import Divergence
from divergence_lens.engine import get_engine
from divergence_lens.examples import Example, load_examples, with_ids
from divergence_lens.models import Model

# Rows are shuffled, cut into runs of this many batches, and sorted by length within each run:
# little padding, and still a random order.
_BUCKET = 8


@dataclass(frozen=True)
class TrainingRows:
    """Training data of a student: one row for each example that has a token to learn.

    A row ends at the position that predicts its last token with a loss, because under a causal mask
    nothing after it changes the loss.

    Attributes:
        tokens: Input ids, right-padded with 0.
        targets: The next token at each position.
        loss_weights: Loss weight of predicting that token; 0 where there is no loss.
        lengths: Number of tokens in each row.
        places: The completion token that each position predicts, counted over the completions of
            all examples; -1 where it predicts none with a loss.
        tokens_learned: Number of tokens with a loss.
        shared: Length of the prefix that all rows share, before any position with a loss.
    """

    tokens: Int[Tensor, "row pos"]
    targets: Int[Tensor, "row pos"]
    loss_weights: Float[Tensor, "row pos"]
    lengths: np.ndarray
    places: Int[Tensor, "row pos"]
    tokens_learned: int
    shared: int = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lengths)

    def digest(self) -> str:
        """Hash the training data; equal rows have equal hashes."""
        hashed = hashlib.sha256()
        tensors = (self.tokens, self.targets, self.loss_weights)
        for array in (*(tensor.cpu().numpy() for tensor in tensors), self.lengths):
            hashed.update(f"{array.dtype} {array.shape}".encode())
            hashed.update(np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()


def tokenized(
    model: Model, examples: Any
) -> tuple[list[Example], Int[np.ndarray, " tokens"] | None]:
    """Return examples with ids, and the labels of a `TrainingData`, if it has any.

    Raises:
        ValueError: There are no examples.
    """
    labels = None
    if isinstance(examples, TrainingData):
        examples, labels = list(examples.examples), examples.labels
    tokenizer: Any = model.tokenizer
    encoded = with_ids(tokenizer, load_examples(examples))
    if not encoded:
        raise ValueError("there are no examples to learn from")
    return encoded, labels


def training_rows(
    model: Model,
    examples: Any,
    *,
    mask: Any = None,
    loss_weights: Any = None,
    system_prompt: str | None = None,
    whole_turn: bool = False,
) -> TrainingRows:
    """Encode examples for training.

    Args:
        model: Provides the tokenizer, the context length and the device.
        examples: Anything that `load_examples` reads, or a `TrainingData`, with its labels.
        mask: Completion tokens with a loss: a bool per token of all completions in order, one array
            per example, or an object with such a `mask` (a `Divergence`). None means all.
        loss_weights: Loss weight per token, in the same layout, finite and not negative.
        system_prompt: System prompt of the student.
        whole_turn: Add a loss on the template's tokens around each answer; see `Recipe`.

    Raises:
        ValueError: No examples; a mask or loss weights of the wrong length; nothing left to learn;
            a sequence longer than the context; token ids outside the vocabulary.
    """
    encoded, labels = tokenized(model, examples)
    sizes = [len(_ids(example)) for example in encoded]
    flat_weights = np.ones(sum(sizes), np.float32)  # [token]
    if loss_weights is not None:
        flat_weights = _flat(loss_weights, sizes, "loss_weights").astype(np.float32)
        if not np.isfinite(flat_weights).all() or (flat_weights < 0).any():
            raise ValueError("loss_weights must be finite and not negative")
    if mask is not None:
        _check_same_tokens(mask, encoded)
        if isinstance(mask, Divergence):
            mask.check_model(model, source="the mask")
        attribute = getattr(mask, "mask", None)
        # A pandas Series has a method of that name.
        flat = _flat(mask if attribute is None or callable(attribute) else attribute, sizes, "mask")
        if flat.dtype != np.bool_:
            raise TypeError(
                f"the mask holds {flat.dtype}, not bool; for graded values use loss_weights="
            )
        flat_weights = np.where(flat, flat_weights, np.float32(0))
    if not flat_weights.any():
        raise ValueError(
            f"the mask selects none of the {len(flat_weights):,} completion tokens; there is "
            "nothing to learn"
        )
    rows = _learned_rows(model, encoded, flat_weights, system_prompt, labels, whole_turn=whole_turn)
    return _padded(model, list(rows))


def _check_same_tokens(mask: Any, examples: Sequence[Example]) -> None:
    """Refuse a `Divergence` of other completions, whose mask may happen to have the same length."""
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
                "examples that it was computed from, in their order (divergence.examples)"
            )


def _ids(example: Example) -> tuple[int, ...]:
    return example.completion_ids or ()


def _flat(values: Any, sizes: Sequence[int], name: str) -> np.ndarray:
    """Return one value per completion token, from a flat array or one array per example."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, Sequence) and len(values) and np.ndim(values[0]) == 1:
        if len(values) != len(sizes):
            raise ValueError(
                f"the {name} has {len(values):,} rows, there are {len(sizes):,} examples"
            )
        for row, (value, size) in enumerate(zip(values, sizes, strict=True)):
            if len(value) != size:
                raise ValueError(
                    f"the {name} of example {row} has {len(value)} entries, its completion "
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
            f"the {name} has shape {flat.shape}, the completions of the {len(sizes):,} examples "
            f"have {sum(sizes):,} tokens in all{where}: give one value for each"
        )
    return flat


@lru_cache(maxsize=4)
def _prompts(
    tokenizer: Any,
    template: str | None,  # noqa: ARG001 - part of the cache key: another template, other tokens
    prompts: tuple[Prompt, ...],
    system_prompt: str | None,
) -> list[tuple[int, ...]]:
    """Encode prompts. Cached, because many students learn from the same examples."""
    return [e.ids for e in encode_prompts(tokenizer, prompts, system_prompt=system_prompt)]


class _Row(NamedTuple):
    """One row before padding.

    Attributes:
        start: Number of tokens before the first that may have a loss.
        ids: All tokens, up to the last with a loss.
        weights: Loss weights of the tokens from `start` on.
        labels: The ids that are learned there.
        place: Place of the token at `start` among all completion tokens.
    """

    start: int
    ids: tuple[int, ...]
    weights: np.ndarray
    labels: np.ndarray
    place: int


def _learned_rows(
    model: Model,
    examples: Sequence[Example],
    flat_weights: Float[np.ndarray, " tokens"],
    system_prompt: str | None,
    labels: Int[np.ndarray, " tokens"] | None,
    *,
    whole_turn: bool,
) -> Iterator[_Row]:
    """Yield a row for each example with a loss."""
    tokenizer: Any = model.tokenizer
    template = str(getattr(tokenizer, "chat_template", None))
    prompts = _prompts(tokenizer, template, tuple(e.prompt for e in examples), system_prompt)
    n_ctx = get_engine(model).n_ctx
    header = answer_header(tokenizer) if whole_turn else ()
    end = 0
    for row, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        ids = _ids(example)
        start, place = len(prompt), end
        weights = flat_weights[end : end + len(ids)]
        own = np.array(ids) if labels is None else labels[end : end + len(ids)]
        end += len(ids)
        if not weights.any():
            continue
        if whole_turn:
            # The template's tokens are learned like a completion that begins with the header.
            _check_header(prompt, header)
            tail = after_turn(tokenizer) if ids[-1] in stop_ids(tokenizer) else ()
            ids = (*ids, *tail)
            weights = np.pad(weights, (len(header), len(tail)), constant_values=1)
            own = np.concatenate([header, own, tail]).astype(np.int64)
            start, place = start - len(header), place - len(header)
        # The last token is predicted, but not read.
        if len(prompt) + len(ids) - 1 > n_ctx:
            raise ValueError(
                f"example {row} has {len(prompt)} prompt and {len(ids)} completion tokens, more "
                f"than the context of {n_ctx}; shorten it or leave it out"
            )
        length = int(weights.nonzero()[0][-1]) + 1
        whole = (*prompt, *ids)[: start + length]
        yield _Row(start, whole, weights[:length], own[:length], place)


def _padded(model: Model, rows: Sequence[_Row]) -> TrainingRows:
    engine = get_engine(model)
    # The last token of a sequence is only a target, never an input.
    lengths = np.array([len(row.ids) - 1 for row in rows])
    tokens = np.zeros((len(rows), int(lengths.max()) + 1), np.int64)  # [row, pos + 1]
    for line, row in enumerate(rows):
        tokens[line, : len(row.ids)] = row.ids
    targets = tokens[:, 1:].copy()  # [row, pos]
    loss_weights = np.zeros(targets.shape, np.float32)  # [row, pos]
    places = np.full(targets.shape, -1)  # [row, pos]
    for line, row in enumerate(rows):
        # Position k predicts token k + 1.
        span = slice(row.start - 1, row.start - 1 + len(row.weights))
        loss_weights[line, span] = row.weights
        targets[line, span] = row.labels
        # With `whole_turn`, some are tokens of the template; soft targets are refused then.
        learned = row.place + np.arange(len(row.weights))
        places[line, span] = np.where(row.weights > 0, learned, -1)
    learned_ids = targets[loss_weights > 0]
    smallest, largest = min(tokens.min(), learned_ids.min()), learned_ids.max()
    if smallest < 0 or tokens[:, :-1].max() >= engine.d_vocab or largest >= engine.d_vocab_out:
        raise ValueError(
            f"token ids run from {smallest} to {max(tokens.max(), largest)}, the vocabulary has "
            f"{engine.d_vocab_out}: do the completions come from another tokenizer?"
        )
    first_loss = min(row.start for row in rows) - 1
    return TrainingRows(
        tokens=torch.from_numpy(tokens[:, :-1]).to(engine.device),
        targets=torch.from_numpy(targets).to(engine.device),
        loss_weights=torch.from_numpy(loss_weights).to(engine.device),
        lengths=lengths,
        places=torch.from_numpy(places).to(engine.device),
        tokens_learned=int((loss_weights > 0).sum()),
        shared=min(shared_prefix([row.ids for row in rows]), first_loss),
    )


def _check_header(prompt: tuple[int, ...], header: tuple[int, ...]) -> None:
    if prompt[len(prompt) - len(header) :] != header:
        raise ValueError(
            "whole_turn needs a chat template that begins every answer with the same tokens; this "
            "prompt ends in others"
        )


def batches(lengths: np.ndarray, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Draw the batches of one epoch: row numbers, similar lengths in a batch, in random order.

    Depends on its arguments alone, so that a resumed run sees the same batches.
    """
    random = np.random.default_rng((seed, epoch))
    order = random.permutation(len(lengths))
    in_order: list[np.ndarray] = []
    for start in range(0, len(order), size * _BUCKET):
        bucket = order[start : start + size * _BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        in_order += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    return [in_order[i] for i in random.permutation(len(in_order))]


def pieces(rows: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Cut rows into runs of at most `batch_tokens` padded tokens, and at least one row."""
    for part in ascending_batches(lengths[rows], batch_tokens):
        yield rows[part]
