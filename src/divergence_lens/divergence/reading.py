"""Teacher-forced reading: what each teacher would have written at every completion token.

The one expensive step of `find_divergence`. Rows are sorted by length and batched by a token
budget, padded on the right (under a causal mask the padding needs no attention mask, and no
padded position is ever read); the tokens that all prompts of a teacher begin with, such as its
system prompt, are run once; and only completion positions are unembedded, a chunk at a time, so
that no [batch, position, vocabulary] tensor ever exists.

The examples are cut into shards, in order. A shard is read under every teacher before the next one,
and is what a long run writes to disk, and what several processes share.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn

from divergence_lens._utils.batching import length_batches, shared_prefix
from divergence_lens._utils.checkpoints import Checkpoints, Processes
from divergence_lens._utils.interrupts import partial_on_interrupt
from divergence_lens._utils.memory import halved, run_halved
from divergence_lens.chat import prompt_ids
from divergence_lens.deltas import base_fingerprint
from divergence_lens.engine import (
    Engine,
    KeyValues,
    chunk_rows,
    get_engine,
    in_chunks,
    kl_divergence,
    read_hidden,
)
from divergence_lens.examples import Example
from divergence_lens.models import Model
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    from tqdm.auto import tqdm

# A shared start shorter than this saves less than the extra pass costs.
_SHORTEST_PREFIX = 4

# Tokens per pass: on a CPU so few that activations stay near the caches, otherwise enough to fill
# the device.
_BATCH_TOKENS = {"cpu": 2048}
_BATCH_TOKENS_ACCELERATOR = 16384

# A shard has about so many full batches for each teacher: enough to sort rows by length.
_SHARD_BATCHES = 8

_SHARD = "divergence shard"


@dataclass(frozen=True, eq=False)
class TeacherForced:
    """Flat readings over all completion tokens; the first axis runs over the teachers.

    Attributes:
        offsets: Where each completion starts.
        tokens: The completions' ids.
        predicted: Argmax of the logits before each token.
        margin: Its logit minus the second highest.
        logprob: Natural-log probability of the token itself.
        kl: KL divergence in nats from the factual teacher's distribution, if asked for.
    """

    offsets: Int64[np.ndarray, " boundaries"]
    tokens: Int64[np.ndarray, " tokens"]
    predicted: Int32[np.ndarray, "teachers tokens"]
    margin: Float32[np.ndarray, "teachers tokens"]
    logprob: Float32[np.ndarray, "teachers tokens"]
    kl: Float32[np.ndarray, "counterfactuals tokens"] | None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What forward passes give, by name; the last axis of each is that of the tokens."""
        found = {"predicted": self.predicted, "margin": self.margin, "logprob": self.logprob}
        return found if self.kl is None else found | {"kl": self.kl}

    def of(self, rows: Sequence[int]) -> "TeacherForced":
        """The readings of some examples."""
        spans = [range(self.offsets[row], self.offsets[row + 1]) for row in rows]
        places = np.fromiter(chain.from_iterable(spans), np.int64)
        offsets = np.concatenate([[0], np.cumsum(list(map(len, spans)))]).astype(np.int64)
        arrays = {name: array[:, places] for name, array in self.arrays.items()}
        kl = arrays.pop("kl", None)
        return TeacherForced(offsets, self.tokens[places], **arrays, kl=kl)


def read_teachers(
    model: Model,
    examples: Sequence[Example],
    teachers: Sequence[Teacher],
    *,
    batch_tokens: int | None = None,
    kl: bool = False,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> TeacherForced:
    """Read the completions of `examples` under every teacher.

    Args:
        model: The base model.
        examples: Data whose completions have ids.
        teachers: Conditions to read under, the factual one first; each is applied in turn.
        batch_tokens: Tokens per forward pass, padding included; None chooses by the device.
        kl: Whether to compare the whole distributions too.
        checkpoint_dir: Where to keep finished shards, and to go on from those that are there.
        accelerator: Shares the shards among the processes that it knows.
        progress: Whether to show a progress bar, in the first process.

    Returns:
        The readings, in the order of the examples.

    Raises:
        Interrupted: It was stopped; `partial` holds the rows of the finished shards, and the
            readings of these.
        ValueError: As `find_divergence` says.
    """
    job = _Job(model, examples, teachers, batch_tokens=batch_tokens, kl=kl)
    processes = Processes(accelerator)
    if processes.count > 1:
        processes.agree(job.identity())
    forced = job.forced
    with processes.together():
        store = (
            None
            if checkpoint_dir is None
            else Checkpoints(Path(checkpoint_dir), _SHARD, job.identity(weights=True))
        )
        waiting, ready = [], 0
        finished: list[range] = []

        def partial() -> tuple[list[int], TeacherForced]:
            rows = sorted(chain.from_iterable(finished))
            return rows, forced.of(rows)

        for number, span in list(enumerate(job.shards))[processes.index :: processes.count]:
            kept = None if store is None else store.load(number)
            if kept is None:
                waiting.append((number, span))
            else:
                ready += _put(forced, span, kept[0])
                finished.append(span)
        total = ready + sum(map(job.work, (span for _, span in waiting)))
        with (
            _progress(total, ready, shown=progress and processes.index == 0) as bar,
            partial_on_interrupt("reading", finished, len(job.shards), "shards", partial),
        ):
            for number, span in waiting:
                arrays = job.read(span, bar)
                _put(forced, span, arrays)
                finished.append(span)
                if store is not None:
                    store.save(number, arrays)
    processes.add_up(list(forced.arrays.values()))
    return forced


class _Prompts:
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
        """How many ids all rows begin with, but never the last one: it predicts a completion."""
        rows = [self[row] for row in range(len(self.lengths))]
        shared = min(shared_prefix(rows), int(self.lengths.min()) - 1)
        return shared if shared >= _SHORTEST_PREFIX and len(rows) > 1 else 0

    @property
    def start(self) -> np.ndarray:
        """The ids that all rows begin with."""
        return self[0][: self.prefix]


class _Job:
    """What is to be read, checked, and cut into shards."""

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        teachers: Sequence[Teacher],
        *,
        batch_tokens: int | None,
        kl: bool,
    ) -> None:
        if batch_tokens is None:
            device = next(model.parameters()).device.type
            batch_tokens = _BATCH_TOKENS.get(device, _BATCH_TOKENS_ACCELERATOR)
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be 1 or more, got {batch_tokens}")
        self._model, self._teachers, self._budget = model, teachers, batch_tokens
        self.forced = _empty(examples, teachers, kl=kl)
        tokenizer: Any = model.tokenizer
        texts = [example.prompt for example in examples]
        systems = list(dict.fromkeys(teacher.system_prompt for teacher in teachers))
        rows = prompt_ids(tokenizer, texts, systems)
        self._prompts = {s: _Prompts(found) for s, found in zip(systems, rows, strict=True)}
        for teacher in teachers:
            base = model if teacher.model is None else teacher.model
            refuse_dropout(base)
            _check_fits(
                get_engine(base), self._prompts[teacher.system_prompt], self.forced, teacher
            )
        self._pasts: dict[int, KeyValues] = {}

    @cached_property
    def shards(self) -> list[range]:
        """Consecutive examples, of about `_SHARD_BATCHES` batches for each teacher."""
        offsets = self.forced.offsets
        rows = self._prompts[self._teachers[0].system_prompt].lengths + np.diff(offsets)
        number = (np.cumsum(rows) - 1) // (_SHARD_BATCHES * self._budget)
        edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(rows)]
        return [range(a, b) for a, b in pairwise(edges)]

    def work(self, span: range) -> int:
        """How many tokens all teachers together read in a shard."""
        offsets = self.forced.offsets
        return len(self._teachers) * int(offsets[span.stop] - offsets[span.start])

    def identity(self, *, weights: bool = False) -> str:
        """A hash over all that the readings depend on; over the weights of models if asked for."""
        digest = hashlib.sha256()
        settings = [self._budget, self.forced.kl is not None, len(self._teachers)]
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
        """The readings of one shard, under every teacher."""
        offsets = self.forced.offsets
        places = slice(int(offsets[span.start]), int(offsets[span.stop]))
        tokens = self.forced.tokens[places]
        columns: dict[str, list[np.ndarray]] = {"predicted": [], "margin": [], "logprob": []}
        divergences: list[np.ndarray] = []
        factual: Tensor | None = None
        for index, teacher in enumerate(self._teachers):
            with teacher.applied(self._model) as applied:
                engine = get_engine(applied)
                hidden = self._hidden(engine, index, span, bar)
                given = torch.from_numpy(tokens).to(engine.device)
                readings = read_hidden(engine, hidden, given)
            for name, reading in zip(columns, readings, strict=True):
                columns[name].append(reading.cpu().numpy())
            self._refuse_not_finite(columns, places.start)
            if self.forced.kl is not None and factual is not None:
                divergences.append(self._kl(factual, index, hidden))
            if self.forced.kl is not None and index == 0:
                factual = hidden
        arrays = {name: np.stack(rows) for name, rows in columns.items()}
        return arrays | ({"kl": np.stack(divergences)} if divergences else {})

    def _hidden(
        self, engine: Engine, index: int, span: range, bar: "tqdm[None] | None"
    ) -> Float[Tensor, "tokens d_model"]:
        """Normed hidden states that predict each completion token of a shard, in order."""
        prompts = self._prompts[self._teachers[index].system_prompt]
        prefix = prompts.prefix
        past = self._past(engine, index) if prefix else None
        offsets = self.forced.offsets[span.start : span.stop + 1]
        heads = prompts.lengths[span.start : span.stop] - prefix
        # The last completion token predicts nothing that is asked.
        lengths = heads + np.diff(offsets) - 1

        def run(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, Tensor]:
            batch = np.zeros((len(rows), int(lengths[rows[0]])), dtype=np.int64)
            first = int(heads[rows].min()) - 1
            sources, places = [], []
            for line, row in enumerate(rows):
                start, end, head = int(offsets[row]), int(offsets[row + 1]), int(heads[row])
                batch[line, :head] = prompts[span.start + int(row)][prefix:]
                batch[line, head : lengths[row]] = self.forced.tokens[start : end - 1]
                at = line * (batch.shape[1] - first) + head - 1 - first
                sources.append(np.arange(at, at + end - start))
                places.append(np.arange(start, end) - offsets[0])
            tokens = torch.from_numpy(batch).to(engine.device)
            hidden = engine.final(tokens, past=past, since=first)
            return np.concatenate(sources), np.concatenate(places), hidden.flatten(0, 1)

        found: Tensor | None = None
        batches = length_batches(lengths, self._budget)
        for source, place, hidden in chain.from_iterable(halved(rows, run) for rows in batches):
            if found is None:
                found = hidden.new_empty(int(offsets[-1] - offsets[0]), hidden.shape[-1])
            where = torch.from_numpy(place).to(hidden.device)
            found[where] = hidden[torch.from_numpy(source).to(hidden.device)]
            if bar is not None:
                bar.update(len(place))
        assert found is not None
        return found

    def _past(self, engine: Engine, index: int) -> KeyValues:
        """Keys and values of a teacher's prefix; those of the same weights are run together."""
        if index not in self._pasts:
            own = self._teachers[index]
            alike = [
                i
                for i, teacher in enumerate(self._teachers)
                if teacher.delta is own.delta
                and teacher.model is own.model
                and self._prompts[teacher.system_prompt].prefix
            ]

            def keep(some: list[int]) -> None:
                starts = [self._prompts[self._teachers[i].system_prompt].start for i in some]
                batch = np.zeros((len(some), max(map(len, starts))), dtype=np.int64)
                for line, start in enumerate(starts):
                    batch[line, : len(start)] = start
                _, kept = engine.prefill(torch.from_numpy(batch).to(engine.device))
                for line, (i, start) in enumerate(zip(some, starts, strict=True)):
                    row = torch.tensor([line], device=engine.device)
                    self._pasts[i] = kept.select(row).upto(len(start))

            run_halved(alike, keep)
        return self._pasts[index]

    def _kl(
        self, factual: Float[Tensor, "tokens d_model"], index: int, hidden: Float[Tensor, "..."]
    ) -> Float32[np.ndarray, " tokens"]:
        """KL(factual || counterfactual `index`) at each token of a shard."""
        one, other = self._unembedding(0), self._unembedding(index)
        size = max(1, chunk_rows(get_engine(self._base(index))) // 4)
        parts = in_chunks(
            len(hidden),
            size,
            lambda chunk: kl_divergence(
                one(factual[chunk]), other(hidden[chunk]).to(factual.device)
            ),
        )
        return torch.cat(parts).cpu().numpy()

    def _base(self, index: int) -> Model:
        teacher = self._teachers[index]
        return self._model if teacher.model is None else teacher.model

    def _unembedding(self, index: int) -> Callable[[Tensor], Tensor]:
        """What makes logits under a teacher, outside of its `applied`."""
        teacher, base = self._teachers[index], self._base(index)
        engine = get_engine(base)
        blocks = (engine.block_parameters(layer) for layer in range(engine.n_layers))
        inside = {name for block in blocks for name in block}
        if teacher.delta is None or inside.issuperset(teacher.delta.tensors):
            return engine.unembed

        def unembed(hidden: Tensor) -> Tensor:
            # The delta may change the unembedding itself.
            with teacher.applied(self._model):
                return engine.unembed(hidden)

        return unembed

    def _refuse_not_finite(self, columns: dict[str, list[np.ndarray]], start: int) -> None:
        margin, logprob = columns["margin"][-1], columns["logprob"][-1]
        bad = np.flatnonzero(~np.isfinite(margin) | np.isnan(logprob))
        if len(bad):
            raise ValueError(
                f"the logits of example {_owner(self.forced, start + int(bad[0]))} are not finite "
                "(NaN or infinity); check the model's weights, or load it in a wider dtype"
            )


def refuse_dropout(model: Model) -> None:
    """Raise a ValueError if a forward pass of the model would drop activations at random."""
    for name, module in model.named_modules():
        share = module.p if isinstance(module, nn.Dropout) else 0.0
        # Hugging Face's attention layers keep theirs as a plain number.
        own = getattr(module, "attention_dropout", 0.0)
        # Falcon and Bloom hold a module there, which this loop reaches by itself.
        share = max(share, own if isinstance(own, float) else 0.0)
        if module.training and share > 0:
            raise ValueError(
                f"the model is in training mode and {name} drops {share:.0%} at random, so its "
                "answers would be random too; call model.eval() first"
            )


def _empty(examples: Sequence[Example], teachers: Sequence[Teacher], *, kl: bool) -> TeacherForced:
    """Readings with room for everything that forward passes give."""
    completions = [np.asarray(example.completion_ids, dtype=np.int64) for example in examples]
    lengths = np.array([len(ids) for ids in completions])
    if (lengths == 0).any():
        raise ValueError(f"example {int(np.argmin(lengths))} has an empty completion; leave it out")
    tokens = np.concatenate(completions)
    shape = (len(teachers), len(tokens))
    return TeacherForced(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        tokens=tokens,
        predicted=np.zeros(shape, dtype=np.int32),
        margin=np.zeros(shape, dtype=np.float32),
        logprob=np.zeros(shape, dtype=np.float32),
        kl=np.zeros((shape[0] - 1, shape[1]), dtype=np.float32) if kl else None,
    )


def _put(forced: TeacherForced, span: range, arrays: dict[str, np.ndarray]) -> int:
    """Write the readings of a shard into their place; how many they are."""
    places = slice(int(forced.offsets[span.start]), int(forced.offsets[span.stop]))
    for name, array in forced.arrays.items():
        array[:, places] = arrays[name]
    return int(arrays["predicted"].size)


def _check_fits(engine: Engine, prompts: _Prompts, forced: TeacherForced, teacher: Teacher) -> None:
    ids = forced.tokens
    if ids.min() < 0 or ids.max() >= engine.d_vocab:
        place = int(np.flatnonzero((ids < 0) | (ids >= engine.d_vocab))[0])
        raise ValueError(
            f"example {_owner(forced, place)} has the token id {ids[place]}, but the model of "
            f"teacher {teacher.name!r} has {engine.d_vocab:,} tokens; was it written with another "
            "tokenizer?"
        )
    totals = prompts.lengths + np.diff(forced.offsets)
    longest = int(np.argmax(totals))
    if totals[longest] > engine.n_ctx:
        raise ValueError(
            f"example {longest} is {totals[longest]:,} tokens long under teacher {teacher.name!r} "
            f"({prompts.lengths[longest]:,} of prompt), over the context of {engine.n_ctx:,}; "
            "shorten it or leave it out"
        )


def _owner(forced: TeacherForced, place: int) -> int:
    return int(np.searchsorted(forced.offsets, place, side="right")) - 1


@contextmanager
def _progress(total: int, ready: int, *, shown: bool) -> Iterator["tqdm[None] | None"]:
    """A bar with tokens per second and the time left, if one is to be shown."""
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
