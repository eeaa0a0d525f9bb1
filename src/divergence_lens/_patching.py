"""What exact and approximate patching share: metrics, checks, and pairs cut into padded chunks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens.effects import Direction
from divergence_lens.engine import Engine, KeyValues
from divergence_lens.models import Model
from divergence_lens.pairs import Pairs, weights_key
from divergence_lens.teachers import Teacher

MetricFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Metric: TypeAlias = (
    Literal["logit_difference", "probability_difference", "log_probability", "kl"] | MetricFunction
)
Cells: TypeAlias = Bool[np.ndarray, "pairs layers clean_pos *heads"]

_METRICS = ("logit_difference", "probability_difference", "log_probability", "kl")


def metric_name(metric: Metric) -> str:
    """The name under which effects of `metric` are kept."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")


@dataclass(frozen=True)
class Chunk:
    """Some pairs, padded on the right, seen from the run that is patched (the base).

    Attributes:
        indices: `[batch]`, which pairs.
        base: Tokens of the run that is patched.
        source: Tokens of the run whose states are put in.
        base_target: Position of the target in each base row.
        source_target: Position of the target in each source row.
        counterpart: For each base position the source position, -1 for none and for padding.
        clean: For each base position the clean position, -1 for none and for padding.
        start: `[batch]`, the first base position at which the two runs can differ.
        noising: Whether the base is the clean run.
    """

    indices: Int64[Tensor, " batch"]
    base: Int64[Tensor, "batch pos"]
    source: Int64[Tensor, "batch source_pos"]
    base_target: Int64[Tensor, " batch"]
    source_target: Int64[Tensor, " batch"]
    counterpart: Int64[Tensor, "batch pos"]
    clean: Int64[Tensor, "batch pos"]
    start: Int64[Tensor, " batch"]
    noising: bool

    @property
    def differs(self) -> Bool[Tensor, "batch pos"]:
        """Where a patch can matter: a counterpart, and not before the runs part."""
        positions = torch.arange(self.base.shape[1], device=self.base.device)
        return (self.counterpart >= 0) & (positions >= self.start[:, None])

    def aligned(self, activations: Float[Tensor, "batch source_pos ..."]) -> Tensor:
        """Source activations at each base position; arbitrary where there is no counterpart."""
        rows = torch.arange(len(activations), device=activations.device)[:, None]
        return activations[rows, self.counterpart.clamp(min=0)]


@dataclass(frozen=True)
class Trace:
    """What one forward pass left behind.

    Attributes:
        sites: The chosen site's activation per layer, `[batch, pos, ...]`.
        resid: `resid_pre` per layer, then the last `resid_post`; empty unless kept.
        past: Keys and values of all positions; None unless kept.
        logits: `[batch, d_vocab]` at the targets, float32.
    """

    sites: list[Tensor]
    resid: list[Tensor]
    past: KeyValues | None
    logits: Float[Tensor, "batch d_vocab"]


@torch.no_grad()
def trace(
    engine: Engine,
    tokens: Int64[Tensor, "batch pos"],
    target: Int64[Tensor, " batch"],
    site: str,
    *,
    keep: bool = False,
) -> Trace:
    """Run `tokens` and keep one site of every layer, and with `keep` residuals, keys and values."""
    sites: list[Tensor] = []
    resid: list[Tensor] = []

    def watch(activation: Tensor) -> None:
        sites.append(activation.detach())

    with engine.hooked([(layer, site, watch) for layer in range(engine.n_layers)]):
        run = engine.begin(tokens, keep=keep)
        x = run.resid
        for layer in range(engine.n_layers):
            if keep:
                resid.append(x)
            x = engine.block(layer, x, run)
    if keep:
        resid.append(x)
    return Trace(sites, resid, run.key_values() if keep else None, target_logits(engine, x, target))


def target_logits(
    engine: Engine,
    resid: Float[Tensor, "batch pos d_model"],
    target: Int64[Tensor, " batch"],
) -> Float[Tensor, "batch d_vocab"]:
    """Logits of each row at its own target position; nothing else is normed or unembedded."""
    at_target = resid[torch.arange(len(resid), device=resid.device), target]
    logits: Tensor = engine.unembed(engine.norm(at_target[:, None])[:, 0]).float()
    return logits


def check(
    model: Model, pairs: Pairs, *, site: str, direction: str, metric: Metric, batch_rows: int
) -> Engine:
    """Refuse what cannot be patched, and give the model's engine.

    Raises:
        ValueError: Named in the docstrings of the public functions.
    """
    if direction not in ("noising", "denoising"):
        raise ValueError(f'direction is {direction!r}; it is "noising" or "denoising"')
    if not callable(metric) and metric not in _METRICS:
        raise ValueError(
            f"metric is {metric!r}; it is one of {', '.join(_METRICS)}, or a function of "
            "(logits [rows, d_vocab], pair indices [rows])"
        )
    if batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}; at least 1 row is needed")
    engine = Engine.of(model)
    if site not in engine.sites:
        reason = (
            "its blocks are parallel: attention and MLP read the same residual"
            if site == "resid_mid" and "mlp_out" in engine.sites
            else "unknown name or not in this architecture"
        )
        raise ValueError(
            f"this model has no site {site!r} ({reason}); it has {', '.join(engine.sites)}"
        )
    _check_models(engine, pairs)
    for i in range(len(pairs)):
        _check_rows(engine, pairs, i)
    return engine


def _check_models(engine: Engine, pairs: Pairs) -> None:
    models = [engine.model, *(t.model for t in _teachers(pairs) if t.model is not None)]
    if any(m.training for m in models):
        raise ValueError("the model is in training mode; call model.eval() first")
    for other in map(Engine.of, models):
        mine = (engine.n_layers, engine.n_heads, engine.d_model, engine.d_vocab)
        theirs = (other.n_layers, other.n_heads, other.d_model, other.d_vocab)
        if mine != theirs:
            raise ValueError(
                "states can only be put into a model of the same shape; layers, heads, d_model and "
                f"vocabulary are {mine} and {theirs}"
            )


def _check_rows(engine: Engine, pairs: Pairs, i: int) -> None:
    for name, row in (("clean", pairs.clean[i]), ("corrupted", pairs.corrupted[i])):
        if len(row) > engine.n_ctx:
            raise ValueError(
                f"the {name} row of pair {i} has {len(row)} tokens, "
                f"but the model's context holds {engine.n_ctx}"
            )
        if int(row.max()) >= engine.d_vocab:
            raise ValueError(
                f"the {name} row of pair {i} holds token id {int(row.max())}, "
                f"but the model's vocabulary has {engine.d_vocab}"
            )
    for name, token in (("answer", pairs.answers[i]), ("foil", pairs.foils[i])):
        if int(token) >= engine.d_vocab:
            raise ValueError(
                f"the {name} of pair {i} is token id {int(token)}, "
                f"but the model's vocabulary has {engine.d_vocab}"
            )


def weights(teacher: Teacher | None, model: Model) -> AbstractContextManager[Model]:
    """The model under the teacher's weights, if it has weights of its own."""
    if teacher is None or weights_key(teacher) is None:
        return nullcontext(model)
    return teacher.applied(model)


def chunks(
    pairs: Pairs, direction: Direction, size: int, device: torch.device
) -> Iterator[tuple[Chunk, Teacher | None, Teacher | None]]:
    """Pairs in chunks of at most `size` that share both sides' weights and are of like length.

    Yields:
        The chunk, the teacher whose weights the base run has, and that of the source run.
    """
    noising = direction == "noising"
    groups: dict[tuple[object, object], list[int]] = {}
    for i in range(len(pairs)):
        key = (weights_key(pairs.clean_teacher[i]), weights_key(pairs.corrupted_teacher[i]))
        groups.setdefault(key, []).append(i)
    for members in groups.values():
        members.sort(key=lambda i: (-len(pairs.clean[i]), i))
        for first in range(0, len(members), size):
            chosen = members[first : first + size]
            clean, corrupted = pairs.clean_teacher[chosen[0]], pairs.corrupted_teacher[chosen[0]]
            base, source = (clean, corrupted) if noising else (corrupted, clean)
            yield _chunk(pairs, chosen, device, noising=noising), base, source


def bind(
    metric: Metric,
    pairs: Pairs,
    indices: Int64[Tensor, " batch"],
    clean_logits: Float[Tensor, "batch d_vocab"],
) -> MetricFunction:
    """A function of (logits, chunk rows) that gives the metric in float32 and checks its shape."""
    device = clean_logits.device
    answers = pairs.answers.to(device)[indices]
    foils = pairs.foils.to(device)[indices]
    reference = clean_logits.detach().log_softmax(-1) if metric == "kl" else None

    def measure(logits: Tensor, rows: Tensor) -> Tensor:
        def at(values: Tensor, tokens: Tensor) -> Tensor:
            return values.gather(-1, tokens[rows][:, None])[:, 0]

        if callable(metric):
            return _checked(metric(logits, indices[rows]), logits, metric_name(metric))
        if metric == "logit_difference":
            return at(logits, answers) - at(logits, foils)
        if metric == "probability_difference":
            probabilities = logits.softmax(-1)
            return at(probabilities, answers) - at(probabilities, foils)
        if metric == "log_probability":
            return at(logits.log_softmax(-1), answers)
        assert reference is not None
        expected = reference[rows]
        return (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)

    return measure


def baselines(
    measure: MetricFunction,
    chunk: Chunk,
    base: Float[Tensor, "batch d_vocab"],
    source: Float[Tensor, "batch d_vocab"],
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The metric of the unpatched base and source runs.

    Raises:
        ValueError: If one is NaN or infinite.
    """
    rows = torch.arange(len(chunk.indices), device=base.device)
    results = measure(base, rows).detach(), measure(source, rows).detach()
    names = ("clean", "corrupted") if chunk.noising else ("corrupted", "clean")
    for name, values in zip(names, results, strict=True):
        if not bool(torch.isfinite(values).all()):
            worst = int((~torch.isfinite(values)).nonzero()[0])
            raise ValueError(
                f"the metric of pair {int(chunk.indices[worst])} is {float(values[worst])} in the "
                f"{name} run; the model or the metric gives NaN or infinity there"
            )
    return results


def empty_values(pairs: Pairs, engine: Engine, site: str) -> np.ndarray:
    """NaN for every cell."""
    longest = max(len(row) for row in pairs.clean)
    heads = (engine.n_heads,) if site == "z" else ()
    return np.full((len(pairs), engine.n_layers, longest, *heads), np.nan, dtype=np.float32)


def store(values: np.ndarray, chunk: Chunk, found: Float[Tensor, "layer batch pos ..."]) -> None:
    """Put a chunk's values, by base position, into the result, by clean position."""
    result = found.float().cpu().numpy()
    clean = chunk.clean.cpu().numpy()
    for row, pair in enumerate(chunk.indices.tolist()):
        here = np.flatnonzero(clean[row] >= 0)
        values[pair][:, clean[row][here]] = result[:, row, here]


def _teachers(pairs: Pairs) -> list[Teacher]:
    return [t for t in (*pairs.clean_teacher, *pairs.corrupted_teacher) if t is not None]


def _chunk(pairs: Pairs, chosen: list[int], device: torch.device, *, noising: bool) -> Chunk:
    clean = [pairs.clean[i] for i in chosen]
    corrupted = [pairs.corrupted[i] for i in chosen]
    base, source = (clean, corrupted) if noising else (corrupted, clean)
    width = max(len(row) for row in base)
    counterpart = np.full((len(chosen), width), -1, dtype=np.int64)
    to_clean = counterpart.copy()
    for row, i in enumerate(chosen):
        there = np.flatnonzero(pairs.alignment[i] >= 0)
        other = pairs.alignment[i][there]
        if noising:
            counterpart[row, there], to_clean[row, there] = other, there
        else:
            counterpart[row, other] = to_clean[row, other] = there
    return Chunk(
        indices=torch.tensor(chosen, device=device),
        base=_padded(base, device),
        source=_padded(source, device),
        base_target=torch.tensor([len(row) - 1 for row in base], device=device),
        source_target=torch.tensor([len(row) - 1 for row in source], device=device),
        counterpart=torch.from_numpy(counterpart).to(device),
        clean=torch.from_numpy(to_clean).to(device),
        start=torch.tensor([pairs.first_difference(i) for i in chosen], device=device),
        noising=noising,
    )


def _padded(
    rows: Sequence[Int64[Tensor, " _"]], device: torch.device
) -> Int64[Tensor, "batch pos"]:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True).to(device)


def _checked(values: object, logits: Tensor, name: str) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the metric {name!r} must return one number per row, [{len(logits)}], but gave {got} "
            f"for logits of shape {list(logits.shape)}"
        )
    return values.float()
