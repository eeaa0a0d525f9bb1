"""Generate completions: batched greedy and sampled decoding with a key-value cache.

1. Sort the prompts by length and divide them into balanced batches under a token budget.
2. Read a batch's prompts; ids that they all begin with (a system prompt) are read once.
3. Choose a token for every row, drop the rows whose completion has ended, and extend the others
   by one position (`engine.decoder`), until no row is left.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from divergence_lens._utils.batching import balanced_batches
from divergence_lens._utils.checkpoints import Checkpoints
from divergence_lens._utils.interrupts import partial_on_interrupt
from divergence_lens._utils.memory import run_halved
from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.chat import Prompt, as_prompt, check_length, decode, encode_prompts, stop_ids
from divergence_lens.deltas import base_fingerprint
from divergence_lens.engine import Decoder, Engine, get_engine
from divergence_lens.examples import Example
from divergence_lens.models import Model, check_model, end_token_ids
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher, check_teacher

_BATCH = "generated batch"


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    teacher: Teacher | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_tokens: int = 8192,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> list[Example]:
    """Generate a teacher's completions of prompts.

    A completion ends with the end-of-turn or end-of-sequence token or another end token of the
    model's generation configuration. That token is the last of its ids. Or it ends without one, at
    `max_new_tokens` or at the end of the model's context.

    Sampling draws from a generator seeded by `seed`, the prompt's text and the number of earlier
    prompts with the same text. So a prompt's completion does not depend on the other prompts, their
    order, or the size of batches (except for rounding, where a draw falls within about 1e-6 of the
    border between two tokens).

    Args:
        model: The base model.
        prompts: User texts, or conversations: lists of messages that end before the answer.
        teacher: The condition; None for the model itself, without a system prompt.
        max_new_tokens: The longest completion, in tokens, the end-of-turn token included.
        temperature: Divides the logits; 0 takes the most likely token (greedy).
        top_p: Sample from the smallest set of tokens with at least this probability (nucleus
            sampling, Holtzman et al. 2020, arXiv 1904.09751); 1 takes all. Unused when greedy.
        seed: Seed of the sampling.
        batch_tokens: Tokens per batch, of prompts and completions together.
        checkpoint_dir: A folder for this run's finished batches. After an interruption, the same
            call resumes from them and returns the same completions as an undisturbed run. Delete
            the folder once the result is saved.
        progress: Whether to show a progress bar.

    Returns:
        One example per prompt, in their order, with text, ids and the teacher's name.

    Raises:
        Interrupted: The call was stopped; `partial` holds the finished examples.
        ValueError: A setting out of range; a prompt that fills the context; a system prompt for a
            tokenizer without a chat template; logits that are not finite; a `checkpoint_dir` that
            is damaged or belongs to another run.
        TypeError: `prompts` is one string, or `teacher` is not a `Teacher`.
    """
    check_model(model)
    _check_settings(max_new_tokens, temperature, top_p, batch_tokens)
    if teacher is not None:
        check_teacher(teacher)
    refuse_one_string(prompts, "prompts")
    prompts = [as_prompt(prompt, f"prompt {row}") for row, prompt in enumerate(prompts)]
    tokenizer: Any = model.tokenizer
    system_prompt = teacher.system_prompt if teacher is not None else None
    encoded = encode_prompts(tokenizer, prompts, system_prompt=system_prompt)
    rows = [prompt.ids for prompt in encoded]
    base = model if teacher is None or teacher.model is None else teacher.model
    stops = stop_ids(tokenizer) | end_token_ids(base)
    checkpoints = None
    if checkpoint_dir is not None:
        settings = [max_new_tokens, temperature, top_p, seed, batch_tokens, sorted(stops)]
        identity = _identity(model, teacher, prompts, rows, settings)
        checkpoints = Checkpoints(Path(checkpoint_dir), _BATCH, identity)
    with teacher.applied(model) if teacher is not None else nullcontext(model) as active:
        engine = get_engine(active)
        for number, prompt in enumerate(encoded):
            check_length(prompt, engine.n_ctx, new_tokens=1, row=number)
        decoder = engine.decoder()
        sampler = _Sampler(temperature, top_p, seed, prompts, max_new_tokens)
        completions: dict[int, tuple[int, ...]] = {}

        def examples() -> list[Example]:
            return [
                Example(
                    prompts[row],
                    completion=decode(tokenizer, ids[:-1] if ids[-1] in stops else ids),
                    completion_ids=ids,
                    teacher=teacher.name if teacher is not None else None,
                )
                for row, ids in sorted(completions.items())
            ]

        with (
            tqdm(total=len(rows), desc="generate", unit="row", disable=not progress) as bar,
            partial_on_interrupt("generate", completions, len(rows), "prompts", examples),
        ):

            def complete(batch: list[int]) -> None:
                completed = _decode(
                    decoder,
                    engine,
                    batch,
                    [rows[row] for row in batch],
                    sampler,
                    stops=stops,
                    limit=max_new_tokens,
                )
                for row, ids in completed:
                    bar.update(row not in completions)
                    completions[row] = ids

            lengths = np.array([len(row) + max_new_tokens for row in rows], dtype=np.int64)
            # In lockstep, a token of spread costs its batch a step; a further batch costs up to
            # max_new_tokens.
            spread = None if decoder.ragged else max(1, max_new_tokens // 2)
            batches = balanced_batches(lengths, batch_tokens, spread=spread)
            for number, members in enumerate(batches):
                batch = members.tolist()
                stored = None if checkpoints is None else checkpoints.load(number)
                if stored is not None:
                    completions.update(zip(batch, _unpacked(stored[0]), strict=True))
                    bar.update(len(batch))
                    continue
                run_halved(batch, complete)
                if checkpoints is not None:
                    checkpoints.save(number, _packed([completions[row] for row in batch]))
    return examples()


def _identity(
    model: Model,
    teacher: Teacher | None,
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[int]],
    settings: Sequence[Any],
) -> str:
    """Hash everything that the completions depend on."""
    base = model if teacher is None or teacher.model is None else teacher.model
    delta = None if teacher is None else teacher.delta
    record = [
        run_metadata(model, settings=list(settings)),
        base_fingerprint(base),
        None if delta is None else delta.digest(),
        list(map(str, prompts)),
        [list(row) for row in rows],
    ]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _packed(completions: Sequence[tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Store completions of unequal length as flat ids and lengths."""
    return {
        "ids": np.fromiter(chain.from_iterable(completions), np.int64),
        "lengths": np.array([len(ids) for ids in completions], dtype=np.int64),
    }


def _unpacked(arrays: Mapping[str, np.ndarray]) -> list[tuple[int, ...]]:
    """Read completions that `_packed` stored."""
    parts = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
    return [tuple(part.tolist()) for part in parts]


def _check_settings(
    max_new_tokens: int, temperature: float, top_p: float, batch_tokens: int
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be 1 or more, got {batch_tokens}")


def _decode(
    decoder: Decoder,
    engine: Engine,
    numbers: Sequence[int],
    prompts: Sequence[Sequence[int]],
    sampler: "_Sampler",
    *,
    stops: frozenset[int],
    limit: int,
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Decode one batch; yield (prompt's number, completion) as completions end."""
    written: list[list[int]] = [[] for _ in prompts]
    rows, hidden = decoder.start(prompts, limit)
    while rows:
        logits = engine.unembed(hidden).float()  # [row, d_vocab]
        # One NaN or infinity makes the sum one, and a sum is many times faster than a test of each.
        if not bool(logits.sum(-1).isfinite().all()) and not bool(logits.isfinite().all()):
            bad = int(logits.isfinite().all(-1).logical_not().nonzero()[0])
            raise ValueError(
                f"the logits after prompt {numbers[rows[bad]]} are not all numbers; load the "
                "model in a wider dtype, or check its weights"
            )
        chosen = sampler.choose(logits, [(numbers[row], len(written[row])) for row in rows])
        ended = set()
        for row, token in zip(rows, chosen.tolist(), strict=True):
            written[row].append(token)
            full = (
                len(written[row]) == limit or len(prompts[row]) + len(written[row]) == engine.n_ctx
            )
            if full or token in stops:
                ended.add(row)
                yield numbers[row], tuple(written[row])
        rows, hidden = decoder.step(chosen, ended)


class _Sampler:
    """Choice of tokens: the most likely, or by a number drawn for each row and step."""

    def __init__(
        self,
        temperature: float,
        top_p: float,
        seed: int,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
    ) -> None:
        self._temperature, self._top_p = temperature, top_p
        if temperature == 0:
            return
        self._draws = np.empty((len(prompts), max_new_tokens))
        seen: dict[Prompt, int] = {}
        for row, prompt in enumerate(prompts):
            seen[prompt] = seen.get(prompt, 0) + 1
            key = hashlib.blake2b(f"{seed} {seen[prompt]} {prompt}".encode(), digest_size=16)
            generator = np.random.default_rng(int.from_bytes(key.digest(), "little"))
            self._draws[row] = generator.random(max_new_tokens)

    def choose(
        self, logits: Float[Tensor, "rows vocab"], steps: Sequence[tuple[int, int]]
    ) -> Int[Tensor, " rows"]:
        """Choose one token per row of logits; `steps` holds the (prompt, step) of each row."""
        if self._temperature == 0:
            return logits.argmax(-1)
        # Subtract the maximum first, so that a low temperature does not overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / self._temperature
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        probabilities = logits.softmax(-1, dtype=wide)  # [rows, d_vocab]
        if self._top_p < 1:
            ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
            before = ranked.cumsum(-1) - ranked
            ranked[before >= self._top_p] = 0
            probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ranked)
        # Inverse transform sampling: the first token at which the cumulative probability exceeds
        # the draw. Tokens of probability zero do not increase it, so they are never chosen.
        cumulative = probabilities.cumsum(-1)  # [rows, d_vocab]
        rows, places = zip(*steps, strict=True)
        draws = torch.as_tensor(self._draws[list(rows), list(places)], dtype=wide)
        draws = draws.to(logits.device)
        below = (cumulative <= draws[:, None] * cumulative[:, -1:]).sum(-1)
        last = probabilities.shape[-1] - 1 - probabilities.flip(-1).ne(0).int().argmax(-1)
        return torch.minimum(below, last)
