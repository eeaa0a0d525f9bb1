"""Metrics: functions of the logits at the target position."""

import hashlib
from collections.abc import Callable
from functools import partial
from types import CodeType
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from divergence_lens.engine import Engine
from divergence_lens.pairs import NO_TOKEN, Pairs

MetricFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Metric: TypeAlias = (
    Literal["logit_difference", "probability_difference", "log_probability", "kl"] | MetricFunction
)

# The number of rows on which two custom metrics are compared.
_PROBES = 64

# The tokens that each metric reads.
_READS = {
    "logit_difference": ("answers", "foils"),
    "probability_difference": ("answers", "foils"),
    "log_probability": ("answers",),
    "kl": (),
}


def metric_name(metric: Metric) -> str:
    """The name of `metric` in results; lambdas are distinguished by a hash of their code."""
    if isinstance(metric, str):
        return metric
    if isinstance(metric, partial):
        given = [repr(value) for value in metric.args]
        given += [f"{key}={value!r}" for key, value in metric.keywords.items()]
        return f"{metric_name(metric.func)}({', '.join(given)})"
    name = str(getattr(metric, "__name__", type(metric).__name__))
    code = getattr(metric, "__code__", None)
    if name != "<lambda>" or code is None:
        return name
    return f"<lambda {hashlib.sha256(_text(code).encode()).hexdigest()[:6]}>"


def _text(code: CodeType) -> str:
    """A text of a function's code, without memory addresses."""
    constants = [_text(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code!r} {constants} {code.co_names}"


def metric_values(metric: Metric, pairs: int, engine: Engine) -> list[str]:
    """Values of a custom metric on fixed logits; two metrics with equal values count as the same.

    The name and the code do not show the values that a metric reads from its closure; these do.
    """
    if isinstance(metric, str):
        return []
    indices = torch.arange(min(pairs, _PROBES))
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(len(indices), engine.d_vocab, generator=draw)
    logits, indices = logits.to(engine.device), indices.to(engine.device)
    with torch.no_grad():
        values = _checked(metric(logits, indices), logits, metric_name(metric))
    return [f"{value:.4g}" for value in values.tolist()]


def check_metric(metric: Metric, pairs: Pairs) -> None:
    """Refuse an unknown metric, or one that reads tokens that the pairs lack.

    Raises:
        ValueError: Names the known metrics, or the pair.
    """
    if callable(metric):
        return
    if metric not in _READS:
        raise ValueError(
            f"metric is {metric!r}; it is one of {', '.join(_READS)}, or a function of "
            "(logits [rows, d_vocab], pair indices [rows])"
        )
    for name in _READS[metric]:
        instead = ", or use a metric that reads none (metric='kl', or your own)"
        check_tokens(pairs, name, f"metric={metric!r}", instead)


def check_tokens(pairs: Pairs, name: str, what: str, instead: str = "") -> None:
    """Refuse pairs without the `answers` or `foils` that `what` reads.

    Raises:
        ValueError: Names the first such pair.
    """
    without = (getattr(pairs, name) == NO_TOKEN).nonzero()
    if len(without):
        raise ValueError(
            f"pair {int(without[0])} has no {name.removesuffix('s')}, which {what} reads; give "
            f"{name}={instead}"
        )


def bind(
    metric: Metric,
    pairs: Pairs,
    indices: Int64[Tensor, " batch"],
    clean_logits: Float[Tensor, "batch d_vocab"],
) -> MetricFunction:
    """Bind the metric to a chunk, as a function of (logits, chunk rows) in float32."""
    device = clean_logits.device
    # `check_metric` refused metrics that read a missing answer or foil.
    answers, foils = (ids.to(device)[indices] for ids in (pairs.answers, pairs.foils))
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
        # KL(clean || patched) = sum of p (log p - log q).
        expected = reference[rows]  # [rows, d_vocab]
        return (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1)

    return measure


def finite(
    values: Float[Tensor, " rows"], indices: Int64[Tensor, " rows"], of: str
) -> Float[Tensor, " rows"]:
    """Return the values, or refuse NaN and infinity.

    Args:
        values: Metrics.
        indices: The pair of each value.
        of: The run, for the message.

    Raises:
        ValueError: If one is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        worst = int((~torch.isfinite(values)).nonzero()[0])
        raise ValueError(
            f"the metric of pair {int(indices[worst])} is {float(values[worst])} in {of}; "
            "check the model and the metric there"
        )
    return values


def _checked(values: object, logits: Tensor, name: str) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the metric {name!r} must return one number per row, [{len(logits)}], but returned "
            f"{got} for logits of shape {list(logits.shape)}"
        )
    return values.float()
