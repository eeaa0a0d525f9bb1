"""Record how a result was computed: package versions, the model and its weights, settings."""

import hashlib
import importlib.metadata
import json
import platform
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from divergence_lens.models import Model, lens_model, model_name

_PROBE_TOKENS = 8
_PROBE_VALUES = 16
# Rounding, relative to the largest log-probability: float32 and float64, and half precision.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.03
_PACKAGES = ("divergence-lens", "transformer-lens", "torch", "transformers", "numpy")


def fingerprint(model: Model) -> str:
    """Hash the names, shapes and bytes of all parameters of `model`.

    Two models with the same fingerprint hold the same weights, bit for bit.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def run_metadata(model: Model | None = None, /, **settings: Any) -> dict[str, Any]:
    """Record package versions, the model and the caller's settings.

    Args:
        model: The model that a result is computed with, if there is one.
        settings: Options of the call. Values that JSON cannot hold become strings.

    Returns:
        A dictionary of JSON values.
    """
    record: dict[str, Any] = {
        "versions": {name: version_of(name) for name in _PACKAGES}
        | {"python": platform.python_version()}
    }
    if model is not None:
        parameter = next(model.parameters())
        record["model"] = {
            "name": model_name(model),
            "class": type(model).__name__,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
        }
    record["settings"] = json.loads(json.dumps(settings, default=str))
    return record


@torch.no_grad()
def model_probe(model: Model) -> dict[str, Any]:
    """Record predictions after a few fixed tokens, to recognize the model later.

    Unlike `fingerprint`, the probe is the same for both model classes and every data type, up to
    rounding, and costs one short forward pass.

    Returns:
        `vocabulary`, the number of logits, and `logprobs`, the log-probabilities of 16 tokens.
    """
    cfg, device = lens_model(model).cfg, next(model.parameters()).device
    length = min(_PROBE_TOKENS, int(cfg.n_ctx))
    tokens = torch.linspace(1, cfg.d_vocab - 1, length).long()[None].to(device)  # [1, pos]
    # The mask says that nothing is padding; a tokenizer that pads on the left would mask some ids.
    logits = model(tokens, attention_mask=torch.ones_like(tokens))[0, -1].float()  # [d_vocab]
    chosen = torch.linspace(0, len(logits) - 1, _PROBE_VALUES).long().to(device)
    logprobs = logits.log_softmax(-1)[chosen].clamp(min=-1e4)  # [16]; JSON has no infinity
    return {"vocabulary": len(logits), "logprobs": [round(x, 5) for x in logprobs.tolist()]}


def warn_if_other_model(metadata: Mapping[str, Any], model: Model, source: str) -> None:
    """Warn if a result was computed with another model than the one it is used with.

    Args:
        metadata: Metadata of the result, with the `model_probe` of its model under "probe";
            without one, nothing is checked.
        model: The model it is used with.
        source: The result, for the message.
    """
    probe = metadata.get("probe")
    if probe is None:
        return
    own = model_probe(model)
    recorded = metadata.get("model", {})
    types = {str(recorded.get("dtype")), str(next(model.parameters()).dtype).split(".")[-1]}
    relative = _TOLERANCE if types <= {"float32", "float64"} else _TOLERANCE_HALF
    tolerance = relative * max(1.0, *map(abs, probe["logprobs"]))
    differences = [abs(a - b) for a, b in zip(probe["logprobs"], own["logprobs"], strict=True)]
    if own["vocabulary"] == probe["vocabulary"] and max(differences) <= tolerance:
        return
    warnings.warn(
        f"{source} was computed with the model {recorded.get('name', 'unknown')!r}, but is used "
        f"with {model_name(model)!r}, whose predictions differ (log-probabilities of a probe by up "
        f"to {max(differences):.2g}); recompute it with this model, or load the other one",
        stacklevel=3,
    )


def version_of(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
