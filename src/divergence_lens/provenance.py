"""Record how a result was computed: package versions, the model and its weights, settings."""

import hashlib
import importlib.metadata
import json
import platform
from typing import Any

import torch

from divergence_lens.models import Model, model_name

_PACKAGES = ("divergence-lens", "transformer-lens", "torch", "transformers", "numpy")


def fingerprint(model: Model) -> str:
    """A hash over the names, shapes and bytes of all parameters of `model`.

    Two models with the same fingerprint hold the same weights, bit for bit.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def run_metadata(model: Model | None = None, /, **settings: Any) -> dict[str, Any]:
    """What a result was made with: package versions, the model, the caller's settings.

    Returns:
        A dictionary that `json.dumps` takes; values in `settings` it cannot take become strings.
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


def version_of(package: str) -> str:
    """The installed version of a package, in words."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
