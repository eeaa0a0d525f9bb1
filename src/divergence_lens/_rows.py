"""Training data as padded arrays, its batches, and the frozen work below what is trained."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from divergence_lens._reading import shared_prefix
from divergence_lens.chat import encode_prompts
from divergence_lens.engine import Engine, KeyValues, Pass
from divergence_lens.examples import Example, as_examples, with_ids
from divergence_lens.models import Model

# Batches are cut from runs of so many batches sorted by length: little padding, and still shuffled.
_BUCKET = 8
_KEPT_PASSES = 64

# A shared start shorter than this saves less than its own pass costs.
_SHORTEST_START = 4


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
    engine = Engine.of(model)
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
    rows = rows[np.argsort(lengths[rows], kind="stable")]
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or (end + 1 - start) * lengths[rows[end]] > batch_tokens:
            yield rows[start:end]
            start = end


class Prefix:
    """The residual stream that enters one block, for every row, computed once.

    All blocks below are frozen, so their output is the same in every epoch. It is held flat,
    without padding: in memory within the budget, beyond it in a file that is mapped into memory.
    Moving up to a higher block costs the blocks between. The tokens that all rows begin with (the
    template, a system prompt) are held and run once, and the rows follow their keys and values.

    A context manager; leaving it deletes the file.
    """

    def __init__(self, engine: Engine, rows: Rows, *, cache_bytes: int, batch_tokens: int) -> None:
        self.engine = engine
        self.rows = rows
        self.shared = rows.shared if rows.shared >= _SHORTEST_START else 0
        self._budget = cache_bytes
        self._batch_tokens = batch_tokens
        self._passes: dict[int, Pass] = {}
        self._held: Tensor | None = None
        self._start: Tensor | None = None
        self._layer = 0
        self._stack = ExitStack()

    def __enter__(self) -> "Prefix":
        return self

    def __exit__(self, *_: object) -> None:
        self._held = self._start = None
        self._passes.clear()
        self._stack.close()

    @torch.no_grad()
    def move_to(self, layer: int) -> None:
        """Hold the residual that enters block `layer` (`n_layers`: that enters the final norm)."""
        if self._held is None or layer < self._layer:
            self._layer, self._start = 0, None
            if not self._make_room(spill=layer > 0):
                self._layer = layer
                return
        elif layer == self._layer:
            return
        held = self._held
        assert held is not None
        every = np.arange(len(self.rows))
        fresh = self._layer == 0
        self._start, past = self._after_start(self._layer, layer)
        for part in pieces(every, self.lengths, self._batch_tokens):
            length = int(self.lengths[part].max())
            if fresh:
                run = self._begin(part, length, past)
                resid = run.resid
            else:
                resid, run = self._read(part, length, past)
            for block in range(self._layer, layer):
                resid = self.engine.block(block, resid, run)
            places, real = self._places(part, length)
            held[places[real].to(held.device)] = resid[real.to(resid.device)].to(held.device)
        self._layer = layer

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row behind the shared start."""
        return self.rows.lengths - self.shared

    def entering(
        self, rows: np.ndarray, length: int
    ) -> tuple[Float[Tensor, "row pos d_model"], Pass]:
        """The residual of the given rows behind their shared start, and the pass to go on with.

        The shared start runs through all blocks above first, with whatever learns there.

        Args:
            rows: Which.
            length: Positions, padding included.
        """
        if self._held is None:
            _, past = self._after_start(0, self.engine.n_layers)
            run = self._begin(rows, length, past)
            resid = run.resid
            for block in range(self._layer):
                resid = self.engine.block(block, resid, run)
            return resid, run
        _, past = self._after_start(self._layer, self.engine.n_layers)
        return self._read(rows, length, past)

    def _begin(self, rows: np.ndarray, length: int, past: KeyValues | None) -> Pass:
        columns = slice(self.shared, self.shared + length)
        return self.engine.begin(self.rows.tokens[torch.from_numpy(rows), columns], past)

    def _read(self, rows: np.ndarray, length: int, past: KeyValues | None) -> tuple[Tensor, Pass]:
        held = self._held
        assert held is not None
        if length not in self._passes:
            if len(self._passes) == _KEPT_PASSES:
                self._passes.clear()
            # Nothing that blocks are handed depends on the row: one row's pass serves every batch.
            with torch.no_grad():
                self._passes[length] = self._begin(np.zeros(1, int), length, past)
        run = self._passes[length]
        run.past = past
        places, _ = self._places(rows, length)
        return held[places.to(held.device)].to(self.engine.device), run

    def _after_start(self, first: int, last: int) -> tuple[Tensor | None, KeyValues | None]:
        """Run the shared start from block `first` to below `last`: its residual, keys and values."""
        if not self.shared or first == last:  # what reads nothing needs no start either
            return self._start, None
        run = self.engine.begin(self.rows.tokens[:1, : self.shared], keep=True)
        resid = run.resid if self._start is None else self._start
        for block in range(first, last):
            resid = self.engine.block(block, resid, run)
        kept = run.key_values()
        # Blocks ask for theirs by number; those below `first` will not ask.
        keys = (kept.keys[0],) * first + kept.keys
        values = (kept.values[0],) * first + kept.values
        return resid, KeyValues(keys, values, kept.position_axis)

    def _places(self, rows: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        """Where in the flat store each position lies, and which positions are real."""
        index = torch.from_numpy(rows)
        positions = torch.arange(length)[None]
        every = torch.from_numpy(self.lengths)
        lengths = every[index, None]
        # A padded position reads the last real one: any finite value does, nothing reads it.
        places = every.cumsum(0)[index, None] - lengths + torch.minimum(positions, lengths - 1)
        return places, positions < lengths

    def _make_room(self, *, spill: bool) -> bool:
        engine = self.engine
        if self._held is not None:
            return True
        shape = (int(self.lengths.sum()), engine.d_model)
        size = shape[0] * shape[1] * torch.finfo(engine.dtype).bits // 8
        if size <= self._budget:
            self._held = torch.empty(shape, dtype=engine.dtype, device=engine.device)
        elif self._budget and spill and shutil.disk_usage(tempfile.gettempdir()).free > 2 * size:
            folder = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="divergence-lens-", ignore_cleanup_errors=True)
            )
            count = shape[0] * shape[1]
            file = str(Path(folder) / "residuals")
            self._held = torch.from_file(file, shared=True, size=count, dtype=engine.dtype).view(
                shape
            )
        return self._held is not None
