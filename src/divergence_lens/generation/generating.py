"""Generate completions of prompts.

1. Encode the prompts with the teacher's system prompt.
2. Divide them into batches. Several processes take every n-th batch; checkpoints store batches.
3. Let a writer complete each batch: `generation.local` with a model of this process,
   `generation.server` with a server.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from divergence_lens._utils.checkpoints import Checkpoints, Processes
from divergence_lens._utils.interrupts import partial_on_interrupt
from divergence_lens._utils.validation import refuse_one_string
from divergence_lens.chat import Encoded, Prompt, as_prompt, decode, encode_prompts, stop_ids
from divergence_lens.deltas import base_fingerprint
from divergence_lens.engine import get_engine
from divergence_lens.examples import Example
from divergence_lens.generation.local import LocalWriter
from divergence_lens.generation.request import Completion, Request, Settings, Writer
from divergence_lens.generation.server import Server, ServerWriter
from divergence_lens.models import Model, check_model, end_token_ids
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher, check_teacher

_BATCH = "generated batch"


@torch.no_grad()
def generate(
    model: Model | Server,
    prompts: Sequence[Prompt],
    *,
    teacher: Teacher | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    pattern: str | None = None,
    batch_tokens: int = 16384,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: Any = None,
    progress: bool = False,
) -> list[Example]:
    r"""Generate a teacher's completions of prompts.

    A completion ends with the end-of-turn or end-of-sequence token or another end token of the
    model's generation configuration. That token is the last of its ids. Or it ends without one, at
    `max_new_tokens` or at the end of the model's context.

    Sampling draws from a generator seeded by `seed`, the prompt's text and the number of earlier
    prompts with the same text. So a prompt's completion does not depend on the other prompts, their
    order, or the size of batches (except for rounding, where a draw falls within about 1e-6 of the
    border between two tokens). A server draws itself, from a seed per prompt that is derived in
    the same way, as far as it honors `seed`.

    Args:
        model: The base model, or a `Server`.
        prompts: User texts, or conversations: lists of messages that end before the answer.
        teacher: The condition; None for the model itself, without a system prompt. With a server,
            a teacher has no `delta` or `model`.
        max_new_tokens: The longest completion, in tokens, the end-of-turn token included.
        temperature: Divides the logits; 0 takes the most likely token (greedy).
        top_p: Sample from the smallest set of tokens with at least this probability (nucleus
            sampling, Holtzman et al. 2020, arXiv 1904.09751); 1 takes all. Unused when greedy.
        top_k: Sample from this many most likely tokens, before `top_p`; None for all. Unused when
            greedy.
        repetition_penalty: Divides positive logits, and multiplies negative ones, of tokens in the
            prompt or the completion so far (Keskar et al. 2019, arXiv 1909.05858); 1 for none. Not
            available with a server, like `top_k`. `models.sampling_defaults` returns a model's
            own values.
        seed: Seed of the sampling.
        pattern: A regular expression for whole completions, such as `r"\d{1,3}(, \d{1,3}){5}"`: at
            each step only tokens that can still lead to a match are allowed, and end tokens only
            after one. `Example.removed_mass` tells how much probability that removed. Classes such
            as `\d` are ASCII; there is no look-around. Not available with a server.
        batch_tokens: Tokens per batch, of prompts and completions together. Unused with a server.
        checkpoint_dir: A folder for this run's finished batches. After an interruption, the same
            call resumes from them and returns the same completions as an undisturbed run. Delete
            the folder once the result is saved.
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`, whose processes
            divide the batches. All processes make the same call, and each returns all examples.
        progress: Whether to show a progress bar.

    Returns:
        One example per prompt, in their order, with text, ids and the teacher's name.

    Raises:
        Interrupted: The call was stopped; `partial` holds the finished examples.
        ValueError: A setting out of range; a pattern that the model's tokens cannot write; a prompt
            that fills the context; a system prompt for a tokenizer without a chat template; logits
            that are not finite; a `checkpoint_dir` that is damaged or belongs to another run;
            processes that made different calls; a server that refuses a request or whose text does
            not match its tokens.
        TypeError: `prompts` is one string, or `teacher` is not a `Teacher`.
        ConnectionError: A server that cannot be reached, or that still fails after all retries.
    """
    settings = Settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        batch_tokens=batch_tokens,
        pattern=pattern,
    )
    request, encoded = _request(model, prompts, teacher, settings)
    processes = Processes(accelerator)
    identity = ""
    if checkpoint_dir is not None or processes.count > 1:
        identity = _identity(model, teacher, request)
        processes.agree(identity)
    completions: dict[int, Completion] = {}

    def examples() -> list[Example]:
        return [
            Example(
                request.prompts[row],
                completion=decode(request.tokenizer, ids[:-1] if ids[-1] in request.stops else ids),
                completion_ids=ids,
                teacher=teacher.name if teacher is not None else None,
                removed_mass=removed,
            )
            for row, (ids, removed) in sorted(completions.items())
        ]

    with (
        processes.together(),
        _writer(model, teacher, request, encoded) as writer,
        tqdm(
            total=len(prompts),
            desc="generate",
            unit="row",
            disable=not (progress and processes.index == 0),
        ) as bar,
        partial_on_interrupt("generate", completions, len(prompts), "prompts", examples),
    ):

        def finish(row: int, completion: Completion) -> None:
            bar.update(row not in completions)
            completions[row] = completion

        checkpoints = (
            None if checkpoint_dir is None else Checkpoints(Path(checkpoint_dir), _BATCH, identity)
        )
        batches = list(enumerate(writer.batches()))
        for number, members in batches[processes.index :: processes.count]:
            batch = members.tolist()
            stored = None if checkpoints is None else checkpoints.load(number)
            if stored is not None:
                completions.update(zip(batch, _unpacked(stored[0]), strict=True))
                bar.update(len(batch))
                continue
            writer.write(batch, finish)
            if checkpoints is not None:
                checkpoints.save(number, _packed([completions[row] for row in batch]))
    if processes.count > 1:
        completions = _merged(processes, completions, len(prompts), max_new_tokens)
    return examples()


def _request(
    model: Model | Server,
    prompts: Sequence[Prompt],
    teacher: Teacher | None,
    settings: Settings,
) -> tuple[Request, list[Encoded]]:
    """Check and encode the prompts."""
    if not isinstance(model, Server):
        check_model(model)
    if teacher is not None:
        check_teacher(teacher)
    refuse_one_string(prompts, "prompts")
    checked = [as_prompt(prompt, f"prompt {row}") for row, prompt in enumerate(prompts)]
    tokenizer: Any = model.load_tokenizer() if isinstance(model, Server) else model.tokenizer
    system_prompt = teacher.system_prompt if teacher is not None else None
    encoded = encode_prompts(tokenizer, checked, system_prompt=system_prompt)
    stops = stop_ids(tokenizer)
    if not isinstance(model, Server):
        base = model if teacher is None or teacher.model is None else teacher.model
        stops |= end_token_ids(base)
    rows = [prompt.ids for prompt in encoded]
    return Request(checked, rows, system_prompt, tokenizer, stops, settings), encoded


@contextmanager
def _writer(
    model: Model | Server, teacher: Teacher | None, request: Request, encoded: Sequence[Encoded]
) -> Iterator[Writer]:
    """Yield the writer of a call, while the teacher's weights are applied."""
    if isinstance(model, Server):
        if teacher is not None and (teacher.delta is not None or teacher.model is not None):
            raise ValueError(
                f"teacher {teacher.name!r} has weights of its own, which a server does not have; "
                "serve that model, and leave delta= and model= out"
            )
        for name, value in request.settings.local_only().items():
            raise ValueError(
                f"a server does not take {name}={value!r}; generate with a model of this process "
                "instead"
            )
        with closing(ServerWriter(model, request)) as writer:
            yield writer
    elif teacher is None:
        with get_engine(model).packed():
            yield LocalWriter(get_engine(model), request, encoded)
    else:
        with teacher.applied(model) as active, get_engine(active).packed():
            yield LocalWriter(get_engine(active), request, encoded)


def _identity(model: Model | Server, teacher: Teacher | None, request: Request) -> str:
    """Hash everything that the completions depend on."""
    settings = request.settings
    listed = [
        *(settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed),
        *(settings.batch_tokens, settings.local_only(), sorted(request.stops)),
    ]
    if isinstance(model, Server):
        source = [run_metadata(None, settings=listed), model.identity(), request.system_prompt]
    else:
        base = model if teacher is None or teacher.model is None else teacher.model
        delta = None if teacher is None or teacher.delta is None else teacher.delta.digest()
        source = [run_metadata(model, settings=listed), base_fingerprint(base), delta]
    record = [*source, list(map(str, request.prompts)), [list(row) for row in request.rows]]
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _merged(
    processes: Processes, own: Mapping[int, Completion], rows: int, width: int
) -> dict[int, Completion]:
    """Return the completions of all processes."""
    lengths = np.zeros(rows, dtype=np.int64)
    padded = np.zeros((rows, width), dtype=np.int64)
    removed = np.zeros(rows)
    for row, completion in own.items():
        lengths[row] = len(completion.ids)
        padded[row, : len(completion.ids)] = completion.ids
        removed[row] = np.nan if completion.removed_mass is None else completion.removed_mass
    processes.add_up([lengths, padded, removed])
    return {
        row: Completion(tuple(padded[row, : lengths[row]].tolist()), _number(removed[row]))
        for row in range(rows)
    }


def _packed(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    """Store completions of unequal length as flat ids and lengths."""
    return {
        "ids": np.fromiter(chain.from_iterable(c.ids for c in completions), np.int64),
        "lengths": np.array([len(c.ids) for c in completions], dtype=np.int64),
        "removed_mass": np.array([c.removed_mass for c in completions], dtype=np.float64),
    }


def _unpacked(arrays: Mapping[str, np.ndarray]) -> list[Completion]:
    """Read completions that `_packed` stored."""
    parts = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
    return [
        Completion(tuple(part.tolist()), _number(removed))
        for part, removed in zip(parts, arrays["removed_mass"], strict=True)
    ]


def _number(value: float) -> float | None:
    """Return a stored number; NaN stands for none."""
    return None if np.isnan(value) else float(value)
