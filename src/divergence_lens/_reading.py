"""Teacher-forced reading: what each teacher would have written at every completion token.

The one expensive step of `find_divergence`. Rows are sorted by length and batched by a token
budget, padded on the right (under a causal mask the padding needs no attention mask, and no
padded position is ever read); the tokens that all prompts of a teacher begin with, such as its
system prompt, are run once; and only completion positions are unembedded, a chunk at a time, so
that no [batch, position, vocabulary] tensor ever exists.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor, nn

from divergence_lens.chat import encode_prompts
from divergence_lens.engine import Engine, KeyValues
from divergence_lens.examples import Example
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    from tqdm import tqdm

# Logits held at a time: 16 MiB in float32 on a CPU, where small chunks stay near the caches.
_CHUNK_ELEMENTS = {"cpu": 1 << 22}
_CHUNK_ELEMENTS_ACCELERATOR = 1 << 27

# A shared start shorter than this saves less than the extra pass costs.
_SHORTEST_PREFIX = 4


@dataclass(frozen=True, eq=False)
class TeacherForced:
    """Flat readings over all completion tokens; the first axis runs over the teachers.

    Attributes:
        offsets: Where each completion starts.
        tokens: The completions' ids.
        predicted: Argmax of the logits before each token.
        margin: Its logit minus the second highest.
        logprob: Natural-log probability of the token itself.
    """

    offsets: Int64[np.ndarray, " boundaries"]
    tokens: Int64[np.ndarray, " tokens"]
    predicted: Int32[np.ndarray, "teachers tokens"]
    margin: Float32[np.ndarray, "teachers tokens"]
    logprob: Float32[np.ndarray, "teachers tokens"]


def read_teachers(
    model: Model,
    examples: Sequence[Example],
    teachers: Sequence[Teacher],
    *,
    batch_tokens: int,
    progress: bool = False,
) -> TeacherForced:
    """Read the completions of `examples` under every teacher.

    Args:
        model: The base model.
        examples: Data whose completions have ids.
        teachers: Conditions to read under; each is applied in turn.
        batch_tokens: Tokens per forward pass, padding included.
        progress: Whether to show a progress bar.

    Returns:
        The readings, in the order of the examples.

    Raises:
        ValueError: As `find_divergence` says.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be 1 or more, got {batch_tokens}")
    completions = [np.asarray(example.completion_ids, dtype=np.int64) for example in examples]
    lengths = np.array([len(ids) for ids in completions])
    if (lengths == 0).any():
        raise ValueError(f"example {int(np.argmin(lengths))} has an empty completion; leave it out")
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate(completions)
    shape = (len(teachers), len(tokens))
    forced = TeacherForced(
        offsets=offsets,
        tokens=tokens,
        predicted=np.zeros(shape, dtype=np.int32),
        margin=np.zeros(shape, dtype=np.float32),
        logprob=np.zeros(shape, dtype=np.float32),
    )
    prompts = _encode(model, examples, teachers)
    for teacher in teachers:
        base = model if teacher.model is None else teacher.model
        refuse_dropout(base)
        _check_fits(Engine.of(base), prompts[teacher.system_prompt], forced, teacher)
    bar = _progress_bar(len(teachers) * len(tokens)) if progress else None
    for index, teacher in enumerate(teachers):
        with teacher.applied(model) as applied, torch.no_grad():
            _read_one(
                Engine.of(applied),
                prompts[teacher.system_prompt],
                forced,
                teacher=index,
                budget=batch_tokens,
                bar=bar,
            )
    if bar is not None:
        bar.close()
    return forced


def refuse_dropout(model: Model) -> None:
    """Raise a ValueError if a forward pass of the model would drop activations at random."""
    for name, module in model.named_modules():
        share = module.p if isinstance(module, nn.Dropout) else 0.0
        # Hugging Face's attention layers keep theirs as a plain number.
        share = max(share, getattr(module, "attention_dropout", 0.0) or 0.0)
        if module.training and share > 0:
            raise ValueError(
                f"the model is in training mode and {name} drops {share:.0%} at random, so its "
                "answers would be random too; call model.eval() first"
            )


def shared_prefix(rows: Sequence[tuple[int, ...]]) -> int:
    """How many ids all rows begin with."""
    low, high = min(rows), max(rows)
    for place, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return place
    return min(len(low), len(high))


def chunk_rows(engine: Engine) -> int:
    """How many positions to unembed at a time."""
    elements = _CHUNK_ELEMENTS.get(engine.device.type, _CHUNK_ELEMENTS_ACCELERATOR)
    return max(1, elements // engine.d_vocab)


def length_batches(lengths: Int64[np.ndarray, " rows"], budget: int) -> list[np.ndarray]:
    """Row numbers in batches, longest rows first, each at most `budget` tokens when padded."""
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, budget // max(1, int(lengths[order[start]])))
        batches.append(order[start : start + size])
        start += size
    return batches


def _encode(
    model: Model, examples: Sequence[Example], teachers: Sequence[Teacher]
) -> dict[str | None, list[tuple[int, ...]]]:
    """Prompt ids of all examples, once per distinct system prompt."""
    tokenizer: Any = model.tokenizer
    texts = [example.prompt for example in examples]
    return {
        system: [encoded.ids for encoded in encode_prompts(tokenizer, texts, system_prompt=system)]
        for system in dict.fromkeys(teacher.system_prompt for teacher in teachers)
    }


def _check_fits(
    engine: Engine, prompts: list[tuple[int, ...]], forced: TeacherForced, teacher: Teacher
) -> None:
    ids = forced.tokens
    if ids.min() < 0 or ids.max() >= engine.d_vocab:
        place = int(np.flatnonzero((ids < 0) | (ids >= engine.d_vocab))[0])
        raise ValueError(
            f"example {_owner(forced, place)} has the token id {ids[place]}, but the model of "
            f"teacher {teacher.name!r} has {engine.d_vocab:,} tokens; was it written with another "
            "tokenizer?"
        )
    totals = np.array([len(prompt) for prompt in prompts]) + np.diff(forced.offsets)
    longest = int(np.argmax(totals))
    if totals[longest] > engine.n_ctx:
        raise ValueError(
            f"example {longest} is {totals[longest]:,} tokens long under teacher {teacher.name!r} "
            f"({len(prompts[longest]):,} of prompt), over the context of {engine.n_ctx:,}; shorten "
            "it or leave it out"
        )


def _owner(forced: TeacherForced, place: int) -> int:
    return int(np.searchsorted(forced.offsets, place, side="right")) - 1


def _read_one(
    engine: Engine,
    prompts: list[tuple[int, ...]],
    forced: TeacherForced,
    *,
    teacher: int,
    budget: int,
    bar: "tqdm[None] | None",
) -> None:
    """Fill the rows of one teacher, whose weights `engine` has now."""
    # The last prompt token predicts the first completion token, so it is never in the prefix.
    prefix = min(shared_prefix(prompts), min(map(len, prompts)) - 1)
    past: KeyValues | None = None
    if prefix >= _SHORTEST_PREFIX and len(prompts) > 1:
        _, past = engine.prefill(torch.tensor([prompts[0][:prefix]], device=engine.device))
    else:
        prefix = 0
    prompt_lengths = np.array([len(prompt) for prompt in prompts]) - prefix
    # The last completion token predicts nothing that is asked.
    lengths = prompt_lengths + np.diff(forced.offsets) - 1
    waiting = length_batches(lengths, budget)[::-1]
    while waiting:
        rows = waiting.pop()
        batch = np.zeros((len(rows), int(lengths[rows[0]])), dtype=np.int64)
        sources, places = [], []
        for line, row in enumerate(rows):
            start, end = int(forced.offsets[row]), int(forced.offsets[row + 1])
            head = int(prompt_lengths[row])
            batch[line, :head] = prompts[row][prefix:]
            batch[line, head : lengths[row]] = forced.tokens[start : end - 1]
            first = line * batch.shape[1] + head - 1
            sources.append(np.arange(first, first + end - start))
            places.append(np.arange(start, end))
        place = np.concatenate(places)
        try:
            readings = _read_batch(
                engine, batch, past, np.concatenate(sources), forced.tokens[place]
            )
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            waiting += [rows[len(rows) // 2 :], rows[: len(rows) // 2]]
            continue
        predicted, margin, logprob = (reading.cpu().numpy() for reading in readings)
        forced.predicted[teacher, place] = predicted
        forced.margin[teacher, place] = margin
        forced.logprob[teacher, place] = logprob
        bad = np.flatnonzero(~np.isfinite(margin) | np.isnan(logprob))
        if len(bad):
            raise ValueError(
                f"the logits of example {_owner(forced, int(place[bad].min()))} are not finite "
                "(NaN or infinity); check the model's weights, or load it in a wider dtype"
            )
        if bar is not None:
            bar.update(len(place))


def _read_batch(
    engine: Engine,
    batch: Int64[np.ndarray, "rows pos"],
    past: KeyValues | None,
    source: Int64[np.ndarray, " selected"],
    given: Int64[np.ndarray, " selected"],
) -> tuple[Int32[Tensor, " selected"], Float32[Tensor, " selected"], Float32[Tensor, " selected"]]:
    """Argmax, margin and log-probability of the given token at the flat positions `source`."""
    hidden = engine.final(torch.from_numpy(batch).to(engine.device), past=past)
    flat = hidden.reshape(-1, hidden.shape[-1])
    where = torch.from_numpy(source).to(engine.device)
    asked = torch.from_numpy(given).to(engine.device)
    size = chunk_rows(engine)
    parts = [
        score(engine.unembed(flat[where[at : at + size]]), asked[at : at + size])
        for at in range(0, len(where), size)
    ]
    predicted, margin, logprob = (torch.cat(column) for column in zip(*parts, strict=True))
    return predicted, margin, logprob


def score(
    logits: Float[Tensor, "rows d_vocab"], given: Int64[Tensor, " rows"]
) -> tuple[Int32[Tensor, " rows"], Float32[Tensor, " rows"], Float32[Tensor, " rows"]]:
    """Argmax, its margin over the second choice, and log-probability of the given ids.

    The logits are used up: everything happens in their own memory, since at a vocabulary of
    150,000 a second copy of them would be the largest tensor of the run.
    """
    logits = logits.float()
    top, predicted = logits.max(-1, keepdim=True)
    logits.sub_(top)
    asked = logits.gather(-1, given[:, None])
    logits.scatter_(-1, predicted, -torch.inf)
    second = logits.amax(-1)
    logits.scatter_(-1, predicted, 0.0)
    logprob = asked[:, 0] - logits.exp_().sum(-1).log_()
    return predicted[:, 0].int(), -second, logprob


def _progress_bar(total: int) -> "tqdm[None]":
    from tqdm import tqdm

    return tqdm(total=total, unit=" tokens", unit_scale=True, desc="reading under each teacher")
