"""Write completions with a model of this process."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from divergence_lens._utils.batching import balanced_batches
from divergence_lens._utils.memory import run_halved
from divergence_lens.chat import Encoded, check_length
from divergence_lens.engine import Engine
from divergence_lens.generation.request import Completion, Finish, Request
from divergence_lens.generation.sampling import Sampler
from divergence_lens.patterns import TokenPattern


class LocalWriter:
    """Completions from an engine's decoder.

    Raises:
        ValueError: A prompt fills the context.
    """

    def __init__(self, engine: Engine, request: Request, encoded: Sequence[Encoded]) -> None:
        for number, prompt in enumerate(encoded):
            check_length(prompt, engine.n_ctx, new_tokens=1, row=number)
        settings = request.settings
        self._engine, self._request = engine, request
        self._decoder = engine.decoder()
        self._pattern = (
            None
            if settings.pattern is None
            else TokenPattern(
                settings.pattern,
                request.tokenizer,
                d_vocab=engine.d_vocab_out,
                end_tokens=request.stops,
            )
        )
        self._sampler = Sampler(
            settings.temperature,
            settings.top_p,
            settings.seed,
            request.prompts,
            settings.max_new_tokens,
            top_k=settings.top_k,
        )

    def batches(self) -> list[Int64[np.ndarray, " rows"]]:
        """Divide the prompts into batches, each shortest prompt first."""
        settings = self._request.settings
        lengths = np.array([len(row) for row in self._request.rows], dtype=np.int64)
        # In lockstep, a token of spread costs its batch a step, and a further batch costs up to
        # max_new_tokens steps.
        spread = None if self._decoder.ragged else max(1, settings.max_new_tokens // 2)
        return balanced_batches(
            lengths + settings.max_new_tokens, settings.batch_tokens, spread=spread
        )

    def write(self, batch: list[int], finish: Finish) -> None:
        """Complete a batch, and halve it where memory runs out.

        `finish` is called as completions end. A half that is run again calls it again with the
        same completions.
        """

        def decode(part: list[int]) -> None:
            for number, completion in self.decode(part):
                finish(number, completion)

        run_halved(batch, decode)

    def decode(self, batch: list[int]) -> Iterator[tuple[int, Completion]]:
        """Yield (prompt's number, completion) as the completions of one batch end."""
        request, engine, limit = self._request, self._engine, self._request.settings.max_new_tokens
        prompts = [request.rows[row] for row in batch]
        written: list[list[int]] = [[] for _ in prompts]
        constraint = None if self._pattern is None else _Constraint(self._pattern, len(prompts))
        factor = request.settings.repetition_penalty
        penalty = None if factor == 1 else _Penalty(factor, prompts, engine)
        rows, hidden = self._decoder.start(prompts, limit)
        while rows:
            logits = engine.unembed(hidden).float()  # [row, d_vocab]
            # One NaN or infinity makes the sum one, and a sum is faster than a test of each.
            if not bool(logits.sum(-1).isfinite().all()) and not bool(logits.isfinite().all()):
                bad = int(logits.isfinite().all(-1).logical_not().nonzero()[0])
                raise ValueError(
                    f"the logits after prompt {batch[rows[bad]]} are not all numbers; load the "
                    "model in a wider dtype, or check its weights"
                )
            if penalty is not None:
                logits = penalty.applied(logits, rows)
            if constraint is not None:
                logits = constraint.applied(logits, rows)
            steps = [(batch[row], len(written[row])) for row in rows]
            chosen = self._sampler.choose(logits, steps)
            if penalty is not None:
                penalty.append(rows, chosen)
            ended = set()
            for row, token in zip(rows, chosen.tolist(), strict=True):
                written[row].append(token)
                if constraint is not None:
                    constraint.append(row, token)
                length = len(written[row])
                full = length == limit or len(prompts[row]) + length == engine.n_ctx
                if full or token in request.stops:
                    ended.add(row)
                    removed = None if constraint is None else constraint.removed_mass(row, length)
                    yield batch[row], Completion(tuple(written[row]), removed)
            rows, hidden = self._decoder.step(chosen, ended)


class _Penalty:
    """The repetition penalty of Keskar et al. (arXiv 1909.05858), for every row of a batch."""

    def __init__(self, factor: float, prompts: Sequence[Sequence[int]], engine: Engine) -> None:
        self._factor = factor
        # Prompts may contain ids that the model reads but cannot write.
        width = max(engine.d_vocab, engine.d_vocab_out)
        self._seen = torch.zeros(len(prompts), width, dtype=torch.bool, device=engine.device)
        for row, ids in enumerate(prompts):
            self._seen[row, list(ids)] = True

    def applied(
        self, logits: Float[Tensor, "rows d_vocab"], rows: Sequence[int]
    ) -> Float[Tensor, "rows d_vocab"]:
        """Return the logits with a lower value for each token that occurred in its row."""
        lower = torch.where(logits < 0, logits * self._factor, logits / self._factor)
        return torch.where(self._seen[list(rows), : logits.shape[1]], lower, logits)

    def append(self, rows: Sequence[int], tokens: Int[Tensor, " rows"]) -> None:
        """Extend each row by a token."""
        self._seen[list(rows), tokens] = True


class _Constraint:
    """A pattern that every row of a batch follows."""

    def __init__(self, pattern: TokenPattern, rows: int) -> None:
        self._pattern = pattern
        self._states = [pattern.start] * rows
        self._removed = [0.0] * rows

    def applied(
        self, logits: Float[Tensor, "rows d_vocab"], rows: Sequence[int]
    ) -> Float[Tensor, "rows d_vocab"]:
        """Return the logits with minus infinity for tokens that cannot continue a match."""
        allowed = self._pattern.allowed([self._states[row] for row in rows], logits.device)
        constrained = logits.masked_fill(~allowed, -torch.inf)
        # Removed: 1 - sum of exp(allowed logits) / sum of exp(all logits).
        share = (constrained.logsumexp(-1) - logits.logsumexp(-1)).exp()  # [rows]
        for row, removed in zip(rows, (1 - share).tolist(), strict=True):
            self._removed[row] += removed
        return constrained

    def append(self, row: int, token: int) -> None:
        """Extend a row by a token."""
        self._states[row] = self._pattern.next_state(self._states[row], token)

    def removed_mass(self, row: int, tokens: int) -> float:
        """Return the mean probability that was removed from the first tokens of a row."""
        return self._removed[row] / tokens
