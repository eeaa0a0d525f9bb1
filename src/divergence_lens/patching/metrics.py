"""Metrics: functions of the logits at the target position."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens.engine import Engine
from divergence_lens.pairs import NO_TOKEN, Pairs, without_padding
from divergence_lens.patching.readings import Reading, Readings, readings_of

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
    """Return the name of `metric` in results."""
    if isinstance(metric, str):
        return metric
    if isinstance(metric, partial):
        arguments = [repr(value) for value in metric.args]
        arguments += [f"{key}={value!r}" for key, value in metric.keywords.items()]
        return f"{metric_name(metric.func)}({', '.join(arguments)})"
    return str(getattr(metric, "__name__", type(metric).__name__))


def check_resumable(metric: Metric) -> None:
    """Refuse a metric that a later process cannot recognize: a lambda or a closure.

    Raises:
        ValueError: Names the alternatives.
    """
    while isinstance(metric, partial):
        metric = metric.func
    name = "" if isinstance(metric, str) else metric_name(metric)
    if name == "<lambda>" or getattr(metric, "__closure__", None):
        kind = "a lambda" if name == "<lambda>" else "a function within another"
        raise ValueError(
            f"the metric {name!r} is {kind}, which a resumed run cannot tell from another; with "
            "checkpoint_dir, give a function that `def` names at the top level of a module, or a "
            "functools.partial of one"
        )


def metric_values(metric: Metric, pairs: int, engine: Engine) -> list[str]:
    """Evaluate a custom metric on fixed logits; two metrics with equal values count as the same.

    Unlike the name, the values reveal a changed function, or the state of an object.
    """
    if isinstance(metric, str):
        return []
    indices = torch.arange(min(pairs, _PROBES))
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(len(indices), engine.d_vocab_out, generator=draw)
    logits, indices = logits.to(engine.device), indices.to(engine.device)
    with torch.no_grad():
        values = _checked(metric(logits, indices), logits, metric_name(metric))
    return [f"{value:.4g}" for value in values.tolist()]


def check_metric(metric: Metric, pairs: Pairs) -> None:
    """Refuse an unknown metric, or one that reads tokens that the pairs lack.

    Raises:
        ValueError: Names the known metrics, or the pair.
        TypeError: A function does not take two arguments.
    """
    if callable(metric):
        _check_arguments(metric)
        multi_token = _several_tokens(pairs.answers) | _several_tokens(pairs.foils)
        if bool(multi_token.any()):
            raise ValueError(
                f"pair {int(multi_token.nonzero()[0])} has an answer or foil of several tokens, "
                "but a metric of your own gets the logits at the target position alone; use "
                "metric='logit_difference', or give answers and foils of one token or none"
            )
        return
    if metric not in _READS:
        raise ValueError(
            f"metric is {metric!r}; it is one of {', '.join(_READS)}, or a function of "
            "(logits [rows, d_vocab], pair indices [rows])"
        )
    for name in _READS[metric]:
        instead = ", or use a metric that reads none (metric='kl', or your own)"
        check_tokens(pairs, name, f"metric={metric!r}", instead)


def _check_arguments(metric: MetricFunction) -> None:
    """Refuse a function that cannot be called with logits and pair indices."""
    try:
        signature = inspect.signature(metric)
    except ValueError:  # some functions written in C have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"the metric {metric_name(metric)!r} takes {signature}, but is called with two "
            "arguments: logits [rows, d_vocab] and the indices of their pairs [rows]"
        ) from error


def _several_tokens(rows: Int64[Tensor, "pairs tokens"]) -> Bool[Tensor, " pairs"]:
    return (rows != NO_TOKEN).sum(1) > 1


def row_readings(metric: Metric, pairs: Pairs, i: int) -> tuple[Reading, ...]:
    """The one or two rows that the metric reads of pair `i`; empty if it reads one position.

    In the second case the metric is a function of the logits at the target position (see `bind`).
    """
    reads = _READS[metric] if isinstance(metric, str) else ()
    answer, foil = (
        without_padding(getattr(pairs, name)[i : i + 1])[0] if name in reads else []
        for name in ("answers", "foils")
    )
    return readings_of(answer, foil) if max(len(answer), len(foil)) > 1 else ()


def name_on(metric: Metric, pairs: Pairs) -> str:
    """Return the name of `metric` in results on these pairs.

    For answers of several tokens, `logit_difference` is a difference of summed log-probabilities
    and has that name. With one token each, the two are equal.
    """
    if metric == "logit_difference":
        multi_token = _several_tokens(pairs.answers) | _several_tokens(pairs.foils)
        return "log_probability_difference" if bool(multi_token.any()) else metric
    return metric_name(metric)


def check_tokens(pairs: Pairs, name: str, reader: str, instead: str = "") -> None:
    """Refuse pairs without the `answers` or `foils` that `reader` reads.

    Raises:
        ValueError: Names the first such pair.
    """
    without = (getattr(pairs, name)[:, 0] == NO_TOKEN).nonzero()
    if len(without):
        raise ValueError(
            f"pair {int(without[0])} has no {name.removesuffix('s')}, which {reader} reads; give "
            f"{name}={instead}"
        )


def bind(
    metric: Metric,
    pairs: Pairs,
    indices: Int64[Tensor, " batch"],
    clean_logits: Float[Tensor, "states d_vocab"] | None = None,
    readings: Readings | None = None,
) -> MetricFunction:
    """Bind the metric to a chunk, as a function of (logits, chunk rows) in float32.

    Only `kl` needs the logits of the clean run. With `readings`, the function takes the
    logits at all positions read of these rows, and a pair's metric is the sum over its rows.
    """
    if readings is not None:
        return partial(_of_readings, metric, readings)
    # `check_metric` refused metrics that read a missing answer or foil.
    answers, foils = (ids[:, 0].to(indices.device)[indices] for ids in (pairs.answers, pairs.foils))
    reference: Tensor | None = None
    if metric == "kl" and clean_logits is not None:
        reference = clean_logits.detach().log_softmax(-1)

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


def _of_readings(
    metric: Metric,
    readings: Readings,
    logits: Float[Tensor, "states d_vocab"],
    rows: Int64[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """The share of each row in the metric of its pair."""
    answer, foil = readings.log_probabilities(logits, rows)  # [rows] each
    if metric == "probability_difference":
        # A side that is not read on this row has the log-probability 0, but not probability 1.
        has_answer, has_foil = (
            side[rows, 0] != NO_TOKEN for side in (readings.answers, readings.foils)
        )
        return torch.where(has_answer, answer.exp(), 0.0) - torch.where(has_foil, foil.exp(), 0.0)
    return answer - foil  # `log_probability` reads no foil


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
