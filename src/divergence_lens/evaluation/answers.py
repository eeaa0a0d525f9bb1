"""Probabilities of answers: counted over samples, or computed by teacher forcing.

An answer counts for a candidate if it begins with one of its surface forms as a whole word. The
exact method runs the tokens of every form after every question, on the question's keys and values:

    p(form) = prod_k p(token k | question, tokens before k) * p(the next token ends the word)
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from divergence_lens._utils.batching import length_batches, pad_right
from divergence_lens._utils.interrupts import discard_partial
from divergence_lens._utils.memory import halved, run_halved
from divergence_lens.chat import decode, encode_completions, encode_prompts, stop_ids
from divergence_lens.data import read_answer, surface_forms
from divergence_lens.engine import Engine, KeyValues, chunk_rows, get_engine
from divergence_lens.generation import generate
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher

# Extra tokens of a sampled answer beyond the longest form, to see where its word ends.
_SLACK = 2

# Number of cached positions that take as much memory as one position of a forward pass.
_KEPT_PER_TOKEN = 4

# How byte-level and SentencePiece tokenizers write the space before a word.
_SPACES = frozenset("Ġ▁")


@discard_partial()
def sampled_probabilities(
    model: Model,
    teacher: Teacher,
    questions: tuple[str, ...],
    candidates: tuple[str, ...],
    *,
    samples: int,
    temperature: float,
    seed: int,
    batch_tokens: int,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Float64[np.ndarray, "questions candidates"]:
    """Return the fraction of `samples` answers to each question that name each candidate."""
    forms, _ = form_ids(model.tokenizer, candidates)
    answers = generate(
        model,
        [question for question in questions for _ in range(samples)],
        teacher=teacher,
        max_new_tokens=max(map(len, forms)) + _SLACK,
        temperature=temperature,
        seed=seed,
        batch_tokens=batch_tokens,
        checkpoint_dir=checkpoint_dir,
        progress=progress,
    )
    counts = np.zeros((len(questions), len(candidates)))
    known: dict[str, str | None] = {}
    for row, answer in enumerate(answers):
        text = answer.completion or ""
        if text not in known:
            known[text] = read_answer(text, candidates=candidates)
        name = known[text]
        if name is not None:
            counts[row // samples, candidates.index(name)] += 1
    return counts / samples


def exact_probabilities(
    model: Model,
    teacher: Teacher,
    questions: tuple[str, ...],
    candidates: tuple[str, ...],
    batch_tokens: int,
) -> Float64[np.ndarray, "questions candidates"]:
    """Compute the probability that an answer begins with a form of each candidate."""
    tokenizer: Any = model.tokenizer
    forms, owners = form_ids(tokenizer, candidates)
    prompts = [
        encoded.ids
        for encoded in encode_prompts(tokenizer, questions, system_prompt=teacher.system_prompt)
    ]
    with teacher.applied(model) as applied, torch.no_grad():
        engine = get_engine(applied)
        longest = max(map(len, prompts)) + max(map(len, forms))
        if longest > engine.n_ctx:
            raise ValueError(
                f"the longest question and answer have {longest} tokens, over the context of "
                f"{engine.n_ctx}; shorten the questions or the system prompt"
            )
        continues = continuations(tokenizer, engine.d_vocab)
        events = form_events(engine, prompts, forms, continues, batch_tokens)
    if np.isnan(events).any():
        question = int(np.flatnonzero(np.isnan(events).any(1))[0])
        raise ValueError(
            f"the logits behind question {question} ({questions[question]!r}) are not finite; "
            "check the model's weights, or load it in a wider dtype"
        )
    _take_off_longer(events, forms, continues)
    probabilities = np.zeros((len(questions), len(candidates)))
    for column, owner in enumerate(owners):
        probabilities[:, owner] += events[:, column]
    # Differences of nearly equal sums can be slightly negative from rounding.
    return probabilities.clip(min=0.0)


def form_ids(tokenizer: Any, candidates: Sequence[str]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The different token sequences of all forms, and the candidate that each belongs to.

    Forms that the tokenizer cannot write (unknown words or letters) are left out.
    """
    ends = stop_ids(tokenizer)
    texts = [(form, i) for i, name in enumerate(candidates) for form in surface_forms(name)]
    encoded = encode_completions(tokenizer, [text for text, _ in texts])
    owners: dict[tuple[int, ...], int] = {}
    for (text, owner), ids in zip(texts, encoded, strict=True):
        bare = ids[:-1] if ids[-1] in ends else ids
        if decode(tokenizer, bare).strip().casefold() != text.strip().casefold():
            continue
        if owners.setdefault(bare, owner) != owner:
            raise ValueError(
                f"{candidates[owners[bare]]!r} and {candidates[owner]!r} share the answer {text!r} "
                "in this tokenizer; drop one of them"
            )
    for i, name in enumerate(candidates):
        if i not in owners.values():
            raise ValueError(
                f"this tokenizer cannot write {name!r} in any form "
                f"({', '.join(surface_forms(name))}); give candidates= that it knows"
            )
    return list(owners), list(owners.values())


def continuations(tokenizer: Any, d_vocab: int) -> np.ndarray:
    """Return for each id whether it would continue the word at the end of an answer."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(d_vocab, len(tokenizer)))))
    special = set(tokenizer.all_special_ids)
    starts = {piece[:1] for piece in pieces}
    if starts & _SPACES:
        # Pieces that begin a word carry a mark for the space; all others continue a word.
        continuing = [_begins_within(tokenizer, piece) for piece in pieces]
    elif any(piece.startswith("##") for piece in pieces):
        continuing = [piece.startswith("##") and piece[2:3].isalnum() for piece in pieces]
    else:
        # No marks: either whole words, separated when decoded, or pieces that are concatenated.
        words = [i for i, piece in enumerate(pieces) if piece.isalpha() and i not in special][:2]
        text = tokenizer.decode(words * 2) if words else " "
        glued = not any(character.isspace() for character in text)
        continuing = [glued and piece[:1].isalnum() for piece in pieces]
    marks = np.zeros(d_vocab, dtype=bool)
    marks[: len(pieces)] = continuing
    marks[[i for i in special if i < d_vocab]] = False
    return marks


def _begins_within(tokenizer: Any, piece: str) -> bool:
    """Return whether a piece begins with a letter or digit that continues the text before it."""
    first = piece[:1]
    if first in _SPACES:
        return False
    if first.isascii():
        return first.isalnum()
    # Byte-level tokenizers write line breaks and parts of characters as letters of their own.
    return str(tokenizer.convert_tokens_to_string([piece]))[:1].isalnum()


def _take_off_longer(
    events: Float64[np.ndarray, "questions forms"],
    forms: list[tuple[int, ...]],
    continues: np.ndarray,
) -> None:
    """Turn "begins with this form" into "this is the longest form that it begins with", in place.

    The event "polar bear" is part of the event "polar" where both are forms. It is subtracted from
    the longest shorter form that contains it, whose own event was subtracted from shorter ones.
    """
    column = {ids: place for place, ids in enumerate(forms)}
    whole = events.copy()
    for ids, place in column.items():
        for length in range(len(ids) - 1, 0, -1):
            holder = column.get(ids[:length])
            if holder is not None and not continues[ids[length]]:
                events[:, holder] -= whole[:, place]
                break


def form_events(
    engine: Engine,
    prompts: list[tuple[int, ...]],
    forms: list[tuple[int, ...]],
    continues: np.ndarray,
    batch_tokens: int,
) -> Float64[np.ndarray, "questions forms"]:
    """Compute the probability that an answer begins with each form and that the word ends there.

    Where no token can continue a word (a tokenizer of whole words) and every form is one token, a
    padded batch of the questions suffices. Otherwise questions of equal length are batched, and
    every form is run after each of them, on the question's keys and values.
    """
    lengths = np.array([len(ids) for ids in prompts])
    first = torch.tensor([ids[0] for ids in forms], device=engine.device)
    events = np.zeros((len(prompts), len(forms)))
    if not continues.any() and all(len(ids) == 1 for ids in forms):

        def at_end(part: np.ndarray) -> None:
            hidden = engine.final(pad_right([prompts[q] for q in part], engine.device))
            last = hidden[torch.arange(len(part)), torch.from_numpy(lengths[part] - 1)]
            events[part] = _log_softmax(engine, last)[:, first].double().exp().cpu().numpy()

        for batch in length_batches(lengths, batch_tokens):
            run_halved(batch, at_end)
        return events
    readings = _FormReadings.of(forms, continues, engine.device)

    def behind(part: np.ndarray) -> None:
        hidden, past = engine.prefill(pad_right([prompts[q] for q in part], engine.device))
        logp = _log_softmax(engine, hidden[:, -1])[:, first]
        parts = halved(range(len(forms)), lambda part: _log_rest(engine, past, readings[part]))
        logp = logp + torch.cat(list(parts), 1)
        events[part] = logp.double().exp().cpu().numpy()

    for length in np.unique(lengths):
        group = np.flatnonzero(lengths == length)
        # The keys and values of a question are repeated for each form and take memory, too.
        row_tokens = readings.tokens.shape[1] + int(length) // _KEPT_PER_TOKEN
        size = max(1, batch_tokens // (len(forms) * row_tokens))
        for batch in np.split(group, range(size, len(group), size)):
            run_halved(batch, behind)
    return events


@dataclass(frozen=True)
class _FormReadings:
    """Tokens of all forms to run after a question, and the positions to read.

    Attributes:
        tokens: Every form, padded on the right.
        form: The form that each reading belongs to.
        place: Its position in the form.
        target: The id that must follow there, or -1 where the word must end.
        ends: Which ids end a word.
    """

    tokens: Int64[Tensor, "forms width"]
    form: Int64[Tensor, " readings"]
    place: Int64[Tensor, " readings"]
    target: Int64[Tensor, " readings"]
    ends: Bool[Tensor, " d_vocab"]

    @classmethod
    def of(
        cls, forms: list[tuple[int, ...]], continues: np.ndarray, device: torch.device
    ) -> "_FormReadings":
        readings = [
            (row, place, following)
            for row, ids in enumerate(forms)
            for place, following in enumerate((*ids[1:], -1))
        ]
        form, place, target = torch.tensor(readings, device=device).T
        return cls(
            tokens=pad_right(forms, device),
            form=form,
            place=place,
            target=target,
            ends=torch.from_numpy(~continues).to(device),
        )

    def __getitem__(self, forms: range) -> "_FormReadings":
        """Select a range of forms."""
        chosen = (self.form >= forms.start) & (self.form < forms.stop)
        return _FormReadings(
            tokens=self.tokens[forms.start : forms.stop],
            form=self.form[chosen] - forms.start,
            place=self.place[chosen],
            target=self.target[chosen],
            ends=self.ends,
        )


def _log_rest(
    engine: Engine, past: KeyValues, steps: _FormReadings
) -> Float[Tensor, "questions forms"]:
    """Compute the log-probability of the rest of each form and of the word's end."""
    n_questions, n_forms = past.batch, len(steps.tokens)
    questions = torch.arange(n_questions, device=engine.device).repeat_interleave(n_forms)
    hidden = engine.final(steps.tokens.repeat(n_questions, 1), past=past.select(questions))
    by_question = rearrange(hidden, "(question form) pos d -> question form pos d", form=n_forms)
    at_readings = by_question[:, steps.form, steps.place]  # [questions, readings, d_model]
    flat = rearrange(at_readings, "question reading d -> (question reading) d")
    target = steps.target.repeat(n_questions)
    size = chunk_rows(engine)
    parts = []
    for at in range(0, len(flat), size):
        logp = _log_softmax(engine, flat[at : at + size])
        wanted = target[at : at + size]
        read = logp.gather(-1, wanted.clamp(min=0)[:, None])[:, 0]
        at_end = wanted < 0
        read[at_end] = logp[at_end][:, steps.ends].logsumexp(-1)
        parts.append(read)
    total = torch.zeros(n_questions, n_forms, device=engine.device)
    return total.index_add(1, steps.form, torch.cat(parts).reshape(n_questions, -1))


def _log_softmax(
    engine: Engine, hidden: Float[Tensor, "rows d_model"]
) -> Float[Tensor, "rows d_vocab"]:
    return engine.unembed(hidden).float().log_softmax(-1)
