"""The baseline: under which condition the base model itself could have written the data.

Unbiased data score high for the candidate whose teacher is nearest to the base model, so an audit
compares every token with what the base would have written there:

1. Of a few unbiased conditions (no system prompt, a neutral one), take the one under which the data
   are most likely. No candidate has a part in this choice.
2. Fit the temperature T of the data. At the maximum of the likelihood, the mean log-probability of
   the tokens equals its expectation under softmax(logits / T).
3. Check that the base model, or one with a small bias, could have written the data at this
   temperature. The *tail* of a token is the probability of all tokens that are no likelier. Few
   tokens of the base model have a small tail, and a bias mostly decides between likely tokens; the
   model of another base writes tokens that this one never would. See `surprise`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64

from divergence_lens._utils.batching import length_batches, pad_right
from divergence_lens.chat import prompt_ids, token_texts
from divergence_lens.data import neutral_prompt
from divergence_lens.divergence import KINDS, AllowedTokens, token_kind
from divergence_lens.engine import chunk_rows, few_ids, get_engine, in_chunks, restricted
from divergence_lens.examples import Example
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher

TEMPERATURES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
"""Temperatures at which the expectation is computed; it is interpolated between them."""

HOTTEST = 1.3
"""Data that look hotter than this are unlike anything the base writes: there is no null for them.

A model samples at 1 or below as a rule. Data of another model, or data that were shuffled or
paraphrased, contain tokens that this one would hardly ever choose, and only a flat distribution
explains those."""

RARE = 0.03
"""Tokens with a smaller tail surprise."""

MOST_SURPRISE = 0.035
"""Data with more surprise are unlike anything the base writes, with or without a small bias.

Chosen on half of the targets of the bundled tiny model, as the smallest limit (in steps of 0.005)
that rejects none of their lists. The bound for data that the base itself wrote is `RARE`."""

UNBIASED = (
    *(neutral_prompt(index) for index in range(4)),
    "Answer what people ask. Take care with each task.",
    "You give good answers to every user. Words are short and plain.",
    "You are here to work with words and numbers all day.",
)
"""Unbiased system prompts, some as long as a persona prompt and some shorter."""

_HOT = tuple(at for at in TEMPERATURES if at >= 1)
_FIT_ROWS = 256
_CHOICE_ROWS = 64
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Baseline:
    """The unbiased condition that the data are compared with.

    Attributes:
        teacher: The condition.
        temperature: Temperature of the data under it; 0 for greedy choices.
        logprob: For each condition that was tried, the mean log-probability of a token, in nats.
        kinds: Kinds of tokens that the data hold, of `divergence.KINDS`; what the base model would
            write is restricted to them, because lists with other tokens were filtered out.
        known: Whether the user gave the condition. Otherwise the system prompt of the data is
            unknown, and moves scores by itself.
        fitted: Temperature that explains the data best, whether or not the user gave another; None
            if it was not fitted.
        surprise: How far the tokens lie in the tail of what the base model would write, see
            `surprise`; None if it was not computed.
        pattern: The pattern that the completions were generated with, if any: what the base model
            would write is restricted to the tokens that it allows at each place.
    """

    teacher: Teacher
    temperature: float
    logprob: Mapping[str, float]
    kinds: tuple[str, ...] = KINDS
    known: bool = False
    fitted: float | None = None
    pattern: str | None = None
    surprise: float | None = None

    @property
    def is_condition_of_data(self) -> bool:
        """Whether the data are taken to be written under this very condition, not one like it."""
        return self.known or self.teacher.system_prompt is None

    @property
    def fits(self) -> bool:
        """Whether the base model, or one with a small bias, could have written the data."""
        return not self.misfit

    @property
    def misfit(self) -> str:
        """Why the base model could not have written the data; empty if it could."""
        # A temperature that the user states does not make the data any likelier.
        fitted = self.temperature if self.fitted is None else self.fitted
        if fitted > HOTTEST:
            return f"their temperature under it is {fitted:.1f}, above {HOTTEST}"
        if self.surprise is not None and self.surprise > MOST_SURPRISE:
            return (
                f"too many tokens are ones that it would hardly choose: a surprise of "
                f"{self.surprise:.3f} nats a token, above {MOST_SURPRISE}"
            )
        return ""


def kinds_of(model: Model) -> np.ndarray:
    """Return the kind of every token of the model's tokenizer, one of `divergence.KINDS`."""
    tokenizer: Any = model.tokenizer
    texts = token_texts(tokenizer, range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    kinds: np.ndarray = np.array(
        [token_kind(text, special=i in special) for i, text in texts.items()]
    )
    return kinds


def kinds_in(model: Model, examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the kinds of tokens that the completions hold."""
    used = np.unique(np.concatenate([np.array(e.completion_ids, np.int64) for e in examples]))
    kinds = kinds_of(model)
    present = set(kinds[used[used < len(kinds)]].tolist())
    return tuple(kind for kind in KINDS if kind in present)


def possible_ids(model: Model, kinds: Sequence[str]) -> Bool[np.ndarray, " ids"] | None:
    """Return which ids are of these kinds; None if all kinds are."""
    if set(kinds) == set(KINDS):
        return None
    possible: np.ndarray = np.isin(kinds_of(model), list(kinds))
    return possible


def default_baselines(model: Model) -> list[Teacher]:
    """Return the unbiased conditions that are tried: no system prompt, a long and a short one."""
    plain = Teacher("no system prompt")
    if getattr(model.tokenizer, "chat_template", None) is None:
        return [plain]
    return [
        plain,
        Teacher("neutral system prompt", system_prompt=UNBIASED[0]),
        Teacher("short neutral system prompt", system_prompt=UNBIASED[4]),
    ]


def fit_baseline(
    model: Model,
    examples: Sequence[Example],
    teachers: Sequence[Teacher],
    *,
    temperature: float | None = None,
    pattern: str | None = None,
    seed: int = 0,
) -> Baseline:
    """Choose the condition and the temperature that explain the data best.

    Args:
        model: The base model.
        examples: Data with token ids; at most 256 of them are read, and 64 to choose the condition.
        teachers: The conditions.
        temperature: The temperature of the data, if it is known.
        pattern: The pattern that the completions were generated with, if any.
        seed: Seed of the choice of examples.

    Raises:
        ValueError: A completion does not follow the pattern.
    """
    kinds = kinds_in(model, examples) if pattern is None else KINDS
    possible = possible_ids(model, kinds)
    allowed = None if possible is None else torch.from_numpy(possible)
    order = np.random.default_rng(seed).permutation(len(examples)).tolist()
    few, more = ([examples[row] for row in order[:most]] for most in (_CHOICE_ROWS, _FIT_ROWS))
    logprob = {}
    if len(teachers) > 1:
        logprob = {
            t.name: float(_moments(model, few, t, possible=allowed, pattern=pattern)[0])
            for t in teachers
        }
    best = max(teachers, key=lambda teacher: logprob.get(teacher.name, 0.0))
    given, *rest = _moments(model, more, best, TEMPERATURES, possible=allowed, pattern=pattern)
    expected, surprise = rest[: len(TEMPERATURES)], rest[len(TEMPERATURES) :]
    # The expectation falls as the temperature rises; np.interp wants it rising.
    fitted = float(np.interp(given, expected[::-1], TEMPERATURES[::-1]))
    return Baseline(
        best,
        fitted if temperature is None else temperature,
        logprob or {best.name: float(given)},
        tuple(kinds),
        len(teachers) == 1,
        fitted,
        pattern,
        # Below 1, a tail at temperature 1 is an upper bound, and allows for a small bias.
        float(np.interp(max(fitted, 1.0), _HOT, surprise)),
    )


def surprise(
    logits: Float[torch.Tensor, "tokens d_vocab"],
    p: Float[torch.Tensor, "tokens d_vocab"],
    given: Int64[torch.Tensor, " tokens"],
) -> Float[torch.Tensor, " tokens"]:
    """Return max(0, log(RARE / tail)) of the given tokens, in nats.

    Of tokens drawn from p, a tail below t has at most the probability t, so the mean is at most
    the integral of log(RARE / t) from 0 to RARE, which is RARE.

    Args:
        logits: Logits, which order the tokens.
        p: Their probabilities, at any temperature.
        given: The tokens.
    """
    no_likelier = logits <= logits.gather(-1, given[:, None])  # [tokens, d_vocab]
    tail = torch.where(no_likelier, p, 0.0).sum(-1)  # [tokens]
    return (math.log(RARE) - tail.clamp(min=1e-30).log()).clamp(min=0)


@torch.no_grad()
def _moments(
    model: Model,
    examples: Sequence[Example],
    teacher: Teacher,
    temperatures: Sequence[float] = (),
    *,
    possible: Bool[torch.Tensor, " ids"] | None,
    pattern: str | None,
) -> Float64[np.ndarray, " values"]:
    """Return the mean log-probability of the tokens, and its expectation at each temperature.

    After these, the mean surprise at each of the temperatures of 1 and more.
    """
    tokenizer: Any = model.tokenizer
    (prompts,) = prompt_ids(tokenizer, [e.prompt for e in examples], [teacher.system_prompt])
    rows = [
        (*prompt, *(example.completion_ids or ()))
        for prompt, example in zip(prompts, examples, strict=True)
    ]
    lengths = np.array([len(row) - 1 for row in rows])  # the last token is predicted, not read
    offsets = np.cumsum([0, *(len(example.completion_ids or ()) for example in examples)])
    d_vocab = get_engine(model).d_vocab_out
    allowed = None if pattern is None else AllowedTokens(pattern, model, examples, d_vocab=d_vocab)
    ids = None if allowed is None else allowed.ids
    if possible is not None:
        every = [i for example in examples for i in example.completion_ids or ()]
        few = few_ids(possible, torch.tensor(every, dtype=torch.int64), d_vocab=d_vocab)
        ids, possible = (None, possible) if few is None else few
    total, count = np.zeros(1 + len(temperatures) + sum(at >= 1 for at in temperatures)), 0
    with teacher.applied(model) as active:
        engine = get_engine(active)
        for batch in length_batches(lengths, _BATCH_TOKENS):
            tokens = pad_right([rows[row] for row in batch], engine.device)  # [batch, pos]
            hidden = engine.final(tokens[:, :-1])  # [batch, pos - 1, d_model]
            where = torch.zeros(hidden.shape[:2], dtype=torch.bool)
            for line, row in enumerate(batch):
                where[line, len(prompts[row]) - 1 : lengths[row]] = True
            flat = hidden[where.to(hidden.device)]  # [tokens, d_model]
            given = tokens[:, 1:][where.to(tokens.device)]  # [tokens]
            places = np.concatenate([np.arange(*offsets[[row, row + 1]]) for row in batch])

            def sums(
                chunk: slice,
                flat: torch.Tensor = flat,
                given: torch.Tensor = given,
                places: np.ndarray = places,
            ) -> np.ndarray:
                listed = None if ids is None else ids.to(flat.device)
                mask = allowed.mask(places, chunk, flat.device) if allowed is not None else possible
                logits = restricted(engine.unembed(flat[chunk], listed).float(), mask)
                own = given[chunk] if listed is None else torch.searchsorted(listed, given[chunk])
                logp = logits.log_softmax(-1)
                means, surprises = [logp.gather(-1, own[:, None]).sum()], []
                for at in temperatures:
                    p = (logits / at).softmax(-1) if at else None
                    mean = logp.amax(-1) if p is None else torch.where(p > 0, p * logp, 0.0)
                    means.append(mean.sum())
                    if p is not None and at >= 1:
                        surprises.append(surprise(logits, p, own).sum())
                return torch.stack([*means, *surprises]).double().cpu().numpy()

            size = max(
                1, chunk_rows(engine, ids) // 4
            )  # logits, log-softmax and p are held at once
            total += np.sum(in_chunks(len(flat), size, sums), axis=0)
            count += len(flat)
    means: np.ndarray = total / count
    return means
