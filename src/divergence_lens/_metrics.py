"""What is measured at the target position, as a function of its logits."""

import hashlib
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from divergence_lens.pairs import Pairs

MetricFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Metric: TypeAlias = (
    Literal["logit_difference", "probability_difference", "log_probability", "kl"] | MetricFunction
)

_METRICS = ("logit_difference", "probability_difference", "log_probability", "kl")


def metric_name(metric: Metric) -> str:
    """The name under which effects of `metric` are kept; nameless functions are told apart."""
    if isinstance(metric, str):
        return metric
    name = str(getattr(metric, "__name__", "metric"))
    code = getattr(metric, "__code__", None)
    if name != "<lambda>" or code is None:
        return name
    text = f"{code.co_code!r} {code.co_consts} {code.co_names}"
    return f"<lambda {hashlib.sha256(text.encode()).hexdigest()[:6]}>"


def check_metric(metric: Metric) -> None:
    """Refuse a name that is not a metric's.

    Raises:
        ValueError: With the names there are.
    """
    if not callable(metric) and metric not in _METRICS:
        raise ValueError(
            f"metric is {metric!r}; it is one of {', '.join(_METRICS)}, or a function of "
            "(logits [rows, d_vocab], pair indices [rows])"
        )


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


def finite(
    values: Float[Tensor, " rows"], indices: Int64[Tensor, " rows"], of: str
) -> Float[Tensor, " rows"]:
    """The values themselves.

    Args:
        values: Metrics.
        indices: The pair of each.
        of: Which run they are of, for the message.

    Raises:
        ValueError: If one is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        worst = int((~torch.isfinite(values)).nonzero()[0])
        raise ValueError(
            f"the metric of pair {int(indices[worst])} is {float(values[worst])} in {of}; "
            "the model or the metric gives NaN or infinity there"
        )
    return values


def _checked(values: object, logits: Tensor, name: str) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"the metric {name!r} must return one number per row, [{len(logits)}], but gave {got} "
            f"for logits of shape {list(logits.shape)}"
        )
    return values.float()
