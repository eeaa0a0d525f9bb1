"""Teacher-forced reading: each teacher's prediction at every completion token.

This is the expensive step of `find_divergence`:

1. Cut the examples into consecutive shards. A shard is read under every teacher before the next
   one starts; checkpoints store shards, and several processes divide them among themselves.
2. Run the tokens that all prompts of a teacher begin with, such as its system prompt, once, and
   reuse their keys and values.
3. Sort the rows of a shard by length, batch them by a token budget, and pad on the right. Under a
   causal mask, right padding needs no attention mask, and no padded position is ever read.
4. Unembed only the positions that predict completion tokens, in chunks, so that no
   [batch, pos, d_vocab] tensor ever exists.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int32
from torch import Tensor

from divergence_lens._utils.batching import length_batches
from divergence_lens._utils.checkpoints import Checkpoints, Processes
from divergence_lens._utils.interrupts import partial_on_interrupt
from divergence_lens._utils.memory import halved, run_halved
from divergence_lens.chat import prompt_ids
from divergence_lens.deltas import base_fingerprint
from divergence_lens.divergence.allowed import AllowedTokens, Unembed
from divergence_lens.divergence.forced import TeacherForced
from divergence_lens.divergence.reading_inputs import PromptIds, check_fits, refuse_dropout
from divergence_lens.engine import (
    Engine,
    KeyValues,
    chunk_rows,
    few_ids,
    get_engine,
    in_chunks,
    kl_divergence,
    read_hidden,
    restricted,
    score_expected,
)
from divergence_lens.examples import Example
from divergence_lens.models import Model
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    from tqdm.auto import tqdm

# Tokens per pass: few on a CPU, so that activations stay in its caches; otherwise enough to fill
# the device.
_BATCH_TOKENS = {"cpu": 2048}
_BATCH_TOKENS_ACCELERATOR = 16384

# Approximate number of full batches per shard and teacher: enough to gain from sorting by length.
_SHARD_BATCHES = 8

_SHARD = "divergence shard"


def read_teachers(
    model: Model,
    examples: Sequence[Example],
    teachers: Sequence[Teacher],
    *,
    batch_tokens: int | None = None,
    kl: bool = False,
    pattern: str | None = None,
    expected_at: float | None = None,
    possible: Bool[np.ndarray, " ids"] | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> TeacherForced:
    """Run every teacher over the completions of `examples`.

    Args:
        model: The base model.
        examples: Data whose completions have ids.
        teachers: The teachers, the factual one first; each is applied in turn.
        batch_tokens: Tokens per forward pass, padding included; None chooses by device.
        kl: Whether to also compute KL divergences from the factual teacher.
        pattern: Read only the tokens that this pattern allows at each position.
        expected_at: A temperature at which the factual teacher might have written the completions,
            0 for greedy choices; each teacher's mean log-probability of such tokens is computed
            as well. None computes none.
        possible: With `expected_at`, the ids that a completion may hold; all others have
            probability 0 under every teacher. None allows all.
        checkpoint_dir: A folder for finished shards; the call resumes from those already there.
        accelerator: Divides the shards among its processes.
        progress: Whether to show a progress bar, in the first process.

    Returns:
        The readings, in the order of the examples.

    Raises:
        Interrupted: The call was stopped; `partial` holds the rows of the finished shards and
            their readings.
        ValueError: See `find_divergence`.
    """
    reader = _Reader(
        model,
        examples,
        teachers,
        batch_tokens=batch_tokens,
        kl=kl,
        pattern=pattern,
        expected_at=expected_at,
        possible=possible,
    )
    processes = Processes(accelerator)
    if processes.count > 1:
        processes.agree(reader.identity())
    forced = reader.forced
    with processes.together():
        store = (
            None
            if checkpoint_dir is None
            else Checkpoints(Path(checkpoint_dir), _SHARD, reader.identity(weights=True))
        )
        waiting, ready = [], 0
        finished: list[range] = []

        def partial() -> tuple[list[int], TeacherForced]:
            rows = sorted(chain.from_iterable(finished))
            return rows, forced.select(rows)

        for number, span in list(enumerate(reader.shards))[processes.index :: processes.count]:
            stored = None if store is None else store.load(number)
            if stored is None:
                waiting.append((number, span))
            else:
                ready += forced.write(span, stored[0])
                finished.append(span)
        total = ready + sum(map(reader.work, (span for _, span in waiting)))
        with (
            get_engine(model).packed(),  # for all teachers
            _progress(total, ready, shown=progress and processes.index == 0) as bar,
            partial_on_interrupt("reading", finished, len(reader.shards), "shards", partial),
        ):
            for number, span in waiting:
                arrays = reader.read(span, bar)
                forced.write(span, arrays)
                finished.append(span)
                if store is not None:
                    store.save(number, arrays)
    processes.add_up(list(forced.arrays.values()))
    return forced


@torch.no_grad()
def read_states(
    model: Model, examples: Sequence[Example], teacher: Teacher, *, batch_tokens: int
) -> Float[Tensor, "tokens d_model"]:
    """Return a teacher's normed hidden state before each completion token, on its device.

    Args:
        model: The base model.
        examples: Data whose completions have ids.
        teacher: The teacher.
        batch_tokens: Tokens per forward pass.

    Raises:
        ValueError: See `find_divergence`.
    """
    reader = _Reader(model, examples, [teacher], batch_tokens=batch_tokens)
    with teacher.applied(model) as applied:
        engine = get_engine(applied)
        return torch.cat([reader.states(engine, 0, span) for span in reader.shards])


class _Reader:
    """Validated inputs of `read_teachers`, cut into shards, and the pass over one shard."""

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        teachers: Sequence[Teacher],
        *,
        batch_tokens: int | None,
        kl: bool = False,
        pattern: str | None = None,
        expected_at: float | None = None,
        possible: Bool[np.ndarray, " ids"] | None = None,
    ) -> None:
        if batch_tokens is None:
            device = next(model.parameters()).device.type
            batch_tokens = _BATCH_TOKENS.get(device, _BATCH_TOKENS_ACCELERATOR)
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be 1 or more, got {batch_tokens}")
        self._model, self._teachers, self._budget = model, teachers, batch_tokens
        self._temperature = expected_at
        self._possible = None if possible is None else torch.from_numpy(possible)
        self.forced = TeacherForced.zeros(
            examples, len(teachers), kl=kl, expected=expected_at is not None
        )
        tokenizer: Any = model.tokenizer
        texts = [example.prompt for example in examples]
        systems = list(dict.fromkeys(teacher.system_prompt for teacher in teachers))
        rows = prompt_ids(tokenizer, texts, systems)
        self._prompts = {s: PromptIds(ids) for s, ids in zip(systems, rows, strict=True)}
        for teacher in teachers:
            base = model if teacher.model is None else teacher.model
            refuse_dropout(base)
            check_fits(get_engine(base), self._prompts[teacher.system_prompt], self.forced, teacher)
        self._pasts: dict[int, KeyValues] = {}
        self._pattern = pattern
        self._allowed: AllowedTokens | None = None
        # The only ids to unembed, where all others have no probability, and which are possible.
        self._ids: Tensor | None = None
        bases = [self._base(index) for index in range(len(teachers))]
        d_vocab = min(get_engine(base).d_vocab_out for base in bases)
        if pattern is not None:
            self._allowed = AllowedTokens(pattern, bases[0], examples, d_vocab=d_vocab)
            self._ids = self._allowed.ids
        elif self._possible is not None:
            given = torch.from_numpy(self.forced.tokens)
            few = few_ids(self._possible, given, d_vocab=d_vocab)
            self._ids, self._possible = (None, self._possible) if few is None else few

    @cached_property
    def shards(self) -> list[range]:
        """Consecutive examples with about `_SHARD_BATCHES` full batches per teacher."""
        offsets = self.forced.offsets
        rows = self._prompts[self._teachers[0].system_prompt].lengths + np.diff(offsets)
        number = (np.cumsum(rows) - 1) // (_SHARD_BATCHES * self._budget)
        edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(rows)]
        return [range(a, b) for a, b in pairwise(edges)]

    def work(self, span: range) -> int:
        """Return the number of completion tokens in a shard, counted once per teacher."""
        offsets = self.forced.offsets
        return len(self._teachers) * int(offsets[span.stop] - offsets[span.start])

    def identity(self, *, weights: bool = False) -> str:
        """Hash everything that the readings depend on, the models' weights only if requested."""
        digest = hashlib.sha256()
        settings: list[Any] = [
            *(self._budget, self.forced.kl is not None, self._pattern, len(self._teachers)),
            *(() if self._temperature is None else (self._temperature,)),
            *(() if self._possible is None else (self._possible.nonzero().tolist(),)),
            *(() if self._possible is None or self._ids is None else (self._ids.tolist(),)),
        ]
        record = run_metadata(self._model, settings=settings)
        digest.update(json.dumps(record, sort_keys=True).encode())
        prints: dict[int, str] = {}
        for teacher in self._teachers:
            base = self._model if teacher.model is None else teacher.model
            if weights and id(base) not in prints:
                prints[id(base)] = base_fingerprint(base)
            digest.update(json.dumps([teacher.name, prints.get(id(base))]).encode())
            prompts = self._prompts[teacher.system_prompt]
            digest.update(prompts.lengths.tobytes() + prompts.flat.tobytes())
            digest.update(b"" if teacher.delta is None else teacher.delta.digest().encode())
        digest.update(self.forced.offsets.tobytes() + self.forced.tokens.tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def read(self, span: range, bar: "tqdm[None] | None" = None) -> dict[str, np.ndarray]:
        """Run every teacher over one shard and return the readings by name."""
        offsets = self.forced.offsets
        places = slice(int(offsets[span.start]), int(offsets[span.stop]))
        tokens = self.forced.tokens[places]
        columns: dict[str, list[np.ndarray]] = {"predicted": [], "margin": [], "logprob": []}
        columns |= {} if self._temperature is None else {"expected": []}
        divergences: list[np.ndarray] = []
        factual: Tensor | None = None
        for index, teacher in enumerate(self._teachers):
            with teacher.applied(self._model) as applied, get_engine(applied).packed():
                engine = get_engine(applied)
                hidden = self.states(engine, index, span, bar)  # [tokens, d_model]
                given = torch.from_numpy(tokens).to(engine.device)
                readings: tuple[Tensor, ...] = ()
                if self._temperature is not None:
                    pass
                elif self._allowed is not None:
                    readings = self._allowed.read(engine, hidden, given, places)
                else:
                    readings = read_hidden(engine, hidden, given)  # three of [tokens]
            factual = hidden if factual is None else factual
            if self._temperature is not None:
                choice = torch.from_numpy(columns["predicted"][0]) if index else None
                readings = self._read_expected(index, hidden, places, factual, choice)
            for name, reading in zip(columns, readings, strict=True):
                columns[name].append(reading.cpu().numpy())
            self._refuse_not_finite(columns, places.start)
            if self.forced.kl is not None and index:
                divergences.append(self._kl(factual, index, hidden, places))
        arrays = {name: np.stack(rows) for name, rows in columns.items()}
        return arrays | ({"kl": np.stack(divergences)} if divergences else {})

    def states(
        self, engine: Engine, index: int, span: range, bar: "tqdm[None] | None" = None
    ) -> Float[Tensor, "tokens d_model"]:
        """Return the normalized hidden states that predict a shard's completion tokens."""
        prompts = self._prompts[self._teachers[index].system_prompt]
        prefix = prompts.prefix
        past = self._past(engine, index) if prefix else None
        offsets = self.forced.offsets[span.start : span.stop + 1]
        # Prompt tokens of each row that come after the shared prefix.
        heads = prompts.lengths[span.start : span.stop] - prefix  # [rows]
        # The last completion token is not an input: its prediction is not needed.
        lengths = heads + np.diff(offsets) - 1  # [rows]

        def run(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, Tensor]:
            # Rows come longest first, so row 0 gives the width.
            batch = np.zeros((len(rows), int(lengths[rows[0]])), dtype=np.int64)  # [batch, pos]
            # Earlier positions predict prompt tokens in every row, so their final states are
            # not computed (`since`).
            first = int(heads[rows].min()) - 1
            sources, places = [], []
            for line, row in enumerate(rows):
                start, end, head = int(offsets[row]), int(offsets[row + 1]), int(heads[row])
                batch[line, :head] = prompts[span.start + int(row)][prefix:]
                batch[line, head : lengths[row]] = self.forced.tokens[start : end - 1]
                # Index of the position before the completion in the flattened batch.
                at = line * (batch.shape[1] - first) + head - 1 - first
                sources.append(np.arange(at, at + end - start))
                places.append(np.arange(start, end) - offsets[0])
            tokens = torch.from_numpy(batch).to(engine.device)
            hidden = engine.final(tokens, past=past, since=first)  # [batch, pos - first, d_model]
            flat = rearrange(hidden, "batch pos d_model -> (batch pos) d_model")
            return np.concatenate(sources), np.concatenate(places), flat

        states: Tensor | None = None
        batches = length_batches(lengths, self._budget)
        for source, place, hidden in chain.from_iterable(halved(rows, run) for rows in batches):
            if states is None:  # the first batch tells dtype and device
                n_tokens = int(offsets[-1] - offsets[0])
                states = hidden.new_empty(n_tokens, hidden.shape[-1])  # [tokens, d_model]
            where = torch.from_numpy(place).to(hidden.device)
            states[where] = hidden[torch.from_numpy(source).to(hidden.device)]
            if bar is not None:
                bar.update(len(place))
        assert states is not None
        return states

    def _past(self, engine: Engine, index: int) -> KeyValues:
        """Return keys and values of a teacher's prefix, batched over teachers of equal weights."""
        if index not in self._pasts:
            own = self._teachers[index]
            alike = [
                i
                for i, teacher in enumerate(self._teachers)
                if teacher.delta is own.delta
                and teacher.model is own.model
                and self._prompts[teacher.system_prompt].prefix
            ]

            def prefill(members: list[int]) -> None:
                starts = [self._prompts[self._teachers[i].system_prompt].start for i in members]
                batch = np.zeros((len(members), max(map(len, starts))), dtype=np.int64)
                for line, start in enumerate(starts):
                    batch[line, : len(start)] = start
                _, past = engine.prefill(torch.from_numpy(batch).to(engine.device))
                for line, (i, start) in enumerate(zip(members, starts, strict=True)):
                    row = torch.tensor([line], device=engine.device)
                    # Right padding: the padded positions come last and are cut off.
                    self._pasts[i] = past.select(row).upto(len(start))

            run_halved(alike, prefill)
        return self._pasts[index]

    def _kl(
        self,
        factual: Float[Tensor, "tokens d_model"],
        index: int,
        hidden: Float[Tensor, "..."],
        places: slice,
    ) -> Float32[np.ndarray, " tokens"]:
        """Return KL(factual || counterfactual `index`) at each token of a shard."""
        one, other = self._unembedding(0), self._unembedding(index)
        # Two sets of logits, and their log-softmaxes, are in memory at once.
        ids = None if self._allowed is None else self._allowed.ids
        size = max(1, chunk_rows(get_engine(self._base(index)), ids) // 4)
        if self._allowed is not None:
            return (
                self._allowed.kl((one, factual), (other, hidden), places, rows=size).cpu().numpy()
            )
        parts = in_chunks(
            len(hidden),
            size,
            lambda chunk: kl_divergence(
                one(factual[chunk], None), other(hidden[chunk], None).to(factual.device)
            ),
        )
        return torch.cat(parts).cpu().numpy()

    def _read_expected(
        self,
        index: int,
        hidden: Float[Tensor, "tokens d_model"],
        places: slice,
        factual: Float[Tensor, "tokens d_model"],
        choice: Int32[Tensor, " tokens"] | None,
    ) -> tuple[Tensor, ...]:
        """Return what `read_hidden` does, and the log-probability of the factual choice of token.

        Args:
            index: The teacher.
            hidden: Its hidden states.
            places: The completions' tokens in the data.
            factual: The factual teacher's hidden states.
            choice: Its argmaxes; None while it is read itself.
        """
        own, first = self._unembedding(index), self._unembedding(0)
        temperature = self._temperature
        given = torch.from_numpy(self.forced.tokens[places]).to(hidden.device)

        ids = None if self._ids is None else self._ids.to(hidden.device)

        def column(of: Tensor) -> Tensor:
            return of if ids is None else torch.searchsorted(ids, of.to(ids))

        def run(chunk: slice) -> tuple[Tensor, ...]:
            possible = self._possible
            if self._allowed is not None:
                possible = self._allowed.mask(places, chunk, hidden.device)
            logits = restricted(own(hidden[chunk], ids), possible)  # [rows, columns]
            if temperature:
                there = None if ids is None else ids.to(factual.device)
                theirs = restricted(first(factual[chunk], there), possible).float()
                chosen = theirs.div_(temperature).softmax(-1).to(logits.device)  # [rows, columns]
            elif choice is None:
                chosen = logits.argmax(-1)
            else:
                chosen = column(choice[chunk].to(logits.device))
            predicted, *rest = score_expected(logits, column(given[chunk]), chosen)
            return (predicted if ids is None else ids[predicted.long()].int()), *rest

        # Two sets of logits are in memory at once.
        rows = chunk_rows(get_engine(self._base(index)), ids)
        size = max(1, rows // (2 if temperature else 1))
        parts = in_chunks(len(hidden), size, run)
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _base(self, index: int) -> Model:
        teacher = self._teachers[index]
        return self._model if teacher.model is None else teacher.model

    def _unembedding(self, index: int) -> Unembed:
        """Return the unembedding under a teacher, usable outside of its `applied` block."""
        teacher, base = self._teachers[index], self._base(index)
        engine = get_engine(base)
        if teacher.delta is None:
            return engine.unembed
        blocks = (engine.block_parameters(layer) for layer in range(engine.n_layers))
        inside = {name for block in blocks for name in block}
        if inside.issuperset(teacher.delta.tensors):
            return engine.unembed

        def unembed(hidden: Tensor, ids: Tensor | None = None) -> Tensor:
            # The delta may change the unembedding itself.
            with teacher.applied(self._model):
                return engine.unembed(hidden, ids)

        return unembed

    def _refuse_not_finite(self, columns: dict[str, list[np.ndarray]], start: int) -> None:
        margin, logprob = columns["margin"][-1], columns["logprob"][-1]
        # Where a pattern allows one token, nothing is second, and the margin is infinite.
        no_margin = ~np.isfinite(margin) if self._allowed is None else np.isnan(margin)
        bad = np.flatnonzero(no_margin | np.isnan(logprob))
        if len(bad):
            example = self.forced.example_of(start + int(bad[0]))
            raise ValueError(
                f"the logits of example {example} are not finite "
                "(NaN or infinity); check the model's weights, or load it in a wider dtype"
            )


@contextmanager
def _progress(total: int, ready: int, *, shown: bool) -> Iterator["tqdm[None] | None"]:
    """Show a bar with tokens per second and the time left, if `shown`."""
    if not shown:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(
        total=total,
        initial=ready,
        unit=" tokens",
        unit_scale=True,
        desc="reading under each teacher",
    ) as bar:
        yield bar
