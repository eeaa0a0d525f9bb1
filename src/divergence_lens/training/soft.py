"""Soft distillation: learn a teacher's whole next-token distributions instead of its tokens.

Cloud et al. (arXiv 2507.14805) train students on tokens; Hinton et al. (arXiv 1503.02531) on the
teacher's distributions p, here with the student's q, both at a temperature T:

    forward: T^2 KL(p || q)        reverse: T^2 KL(q || p)

1. Run the teacher once, and store the normed hidden state before each completion token: d_model
   numbers instead of d_vocab.
2. In every update, unembed the teacher's and the student's hidden states of a chunk of positions,
   and compare them. All logits never exist at once.

With `top_k`, the outcomes are the teacher's k most likely tokens, and "any other token".
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from divergence_lens.divergence import read_states
from divergence_lens.engine import Engine, get_engine
from divergence_lens.examples import Example
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher, check_teacher
from divergence_lens.training.cross_entropy import chunked_loss, recomputed_loss

DIRECTIONS = ("forward", "reverse")

# Logits of teacher and student, their log-softmaxes and the terms of the sum are held at once.
_TENSORS = 6


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """A teacher's next-token distributions as the targets of `finetune`.

    Attributes:
        teacher: The teacher, which reads the same completions under its own system prompt and
            weights.
        direction: "forward", KL(teacher || student), makes the student cover all tokens that the
            teacher finds likely. "reverse", KL(student || teacher), makes it avoid those that the
            teacher finds unlikely.
        temperature: Divides both models' logits. The loss is multiplied by its square, so that
            gradients keep their size.
        top_k: Compare only the teacher's k most likely tokens, and the sum of all others as one
            outcome; None compares all tokens.

    Raises:
        ValueError: A setting is out of range.
        TypeError: `teacher` is not a `Teacher`.
    """

    teacher: Teacher
    direction: str = "forward"
    temperature: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_teacher(self.teacher)
        if self.direction not in DIRECTIONS:
            raise ValueError(f'direction is {self.direction!r}; use "forward" or "reverse"')
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be 1 or more, or None for all tokens")


def as_soft_targets(soft: object) -> SoftTargets | None:
    """Return soft targets; a teacher alone means the default settings.

    Raises:
        TypeError: It is neither.
    """
    if soft is None or isinstance(soft, SoftTargets):
        return soft
    if isinstance(soft, Teacher):
        return SoftTargets(teacher=soft)
    raise TypeError(f"soft is a {type(soft).__name__}; give a Teacher or SoftTargets(teacher=...)")


class SoftLoss:
    """The loss of `SoftTargets` on one data set."""

    def __init__(
        self,
        model: Model,
        examples: list[Example],
        targets: SoftTargets,
        *,
        trained: dict[str, nn.Parameter],
        batch_tokens: int,
    ) -> None:
        """Run the teacher over the completions.

        Args:
            model: The student's base model, with its own weights.
            examples: Completions with ids.
            targets: The settings.
            trained: The parameters that the student will train.
            batch_tokens: Tokens per forward pass.
        """
        self._targets = targets
        teacher = targets.teacher
        with torch.no_grad():
            states = read_states(model, examples, teacher, batch_tokens=batch_tokens)
            with teacher.applied(model) as active:
                engine = get_engine(active)
                copy = engine.unembedding_copy()
                during = [p.clone() for p in engine.unembedding_parameters()]
            after = list(engine.unembedding_parameters())
        # The copy is needed only if the teacher's delta changes the unembedding, or training does.
        ids = {id(parameter) for parameter in trained.values()}
        changes = any(not torch.equal(p, q) for p, q in zip(during, after, strict=True))
        own = changes or any(id(parameter) in ids for parameter in after)
        self._unembed: Callable[[Tensor], Tensor] = copy if own else engine.unembed
        self._device = engine.device
        # On the CPU: the states of a large data set would fill a GPU.
        self._states = states.cpu()  # [tokens, d_model]

    def describe(self) -> dict[str, Any]:
        """Return the settings and a hash of the teacher's states, as JSON data."""
        targets = self._targets
        states = self._states.contiguous().view(torch.uint8).numpy()
        return {
            "teacher": targets.teacher.name,
            "system_prompt": targets.teacher.system_prompt,
            "direction": targets.direction,
            "temperature": targets.temperature,
            "top_k": targets.top_k,
            "states": hashlib.sha256(states.tobytes()).hexdigest()[:16],
        }

    def __call__(
        self,
        engine: Engine,
        hidden: Float[Tensor, "pos d_model"],
        places: Int64[Tensor, " pos"],
        weights: Float[Tensor, " pos"],
    ) -> Float[Tensor, ""]:
        """Sum the weighted divergences of some positions.

        Args:
            engine: The student's engine.
            hidden: Its normed hidden states.
            places: The completion token that each position predicts, counted over all examples.
            weights: Of the positions in the sum.
        """
        places = places.cpu()

        def loss(logits: Float[Tensor, "chunk d_vocab"], chunk: slice) -> Float[Tensor, ""]:
            with torch.no_grad():
                target = self._unembed(self._states[places[chunk]].to(self._device))
            divergence = soft_divergence(logits, target.to(logits.device), self._targets)
            return divergence.to(weights.dtype) @ weights[chunk]

        def unembed(part: Tensor) -> Tensor:
            return engine.unembed(part[None])[0]

        chunked = chunked_loss if engine.unembedding_frozen() else recomputed_loss
        return chunked(unembed, hidden, loss, d_vocab=_TENSORS * engine.d_vocab_out)


def soft_divergence(
    logits: Float[Tensor, "pos d_vocab"],
    target: Float[Tensor, "pos d_vocab_2"],
    settings: SoftTargets,
) -> Float[Tensor, " pos"]:
    """Compute the divergence of a student's logits from a teacher's, in nats.

    Where one model pads its vocabulary further than the other, the columns that only it has are
    left out of both.
    """
    width = min(logits.shape[1], target.shape[1])
    # The log-sum-exp over the vocabulary loses digits in half precision.
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q, log_p = (z[:, :width].to(wide) / settings.temperature for z in (logits, target))
    if settings.top_k is not None and settings.top_k < width:
        top = log_p.topk(settings.top_k).indices  # [pos, k]
        log_q, log_p = _outcomes(log_q, top), _outcomes(log_p, top)  # [pos, k + 1]
    else:
        log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
    first, second = (log_p, log_q) if settings.direction == "forward" else (log_q, log_p)
    return settings.temperature**2 * (first.exp() * (first - second)).sum(-1)


def _outcomes(
    logits: Float[Tensor, "pos d_vocab"], top: Int64[Tensor, "pos k"]
) -> Float[Tensor, "pos outcomes"]:
    """Return the log-probabilities of the chosen tokens, and of all others together."""
    total = logits.logsumexp(-1, keepdim=True)  # [pos, 1]
    others = logits.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, top), others], -1) - total
