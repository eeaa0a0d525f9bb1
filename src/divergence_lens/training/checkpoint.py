"""The state of a training run on disk, from which it continues to the same weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divergence_lens._utils.storage import load_tensors, save_tensors

_KIND = "checkpoint"


def save_checkpoint(
    path: Path,
    identity: str,
    values: list[Tensor],
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, Any]],
) -> None:
    """Write the variables, the optimizer's state and the history.

    Args:
        path: Where to.
        identity: Of the run: base, data and settings. Another run refuses the file.
        values: What the optimizer moves.
        optimizer: Its state per value may hold tensors and numbers.
        history: Of every update so far.
    """
    tensors = {f"value.{i}": value for i, value in enumerate(values)}
    numbers: dict[str, Any] = {}
    for i, value in enumerate(values):
        for key, item in optimizer.state[value].items():
            if isinstance(item, Tensor):
                tensors[f"state.{i}.{key}"] = item
            else:
                numbers[f"{i}.{key}"] = item
    header = {"identity": identity, "numbers": numbers, "history": history}
    save_tensors(path, tensors, header, _KIND)


def load_checkpoint(
    path: Path, identity: str, values: list[Tensor], optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Put a saved state back into `values` and `optimizer`, and return its history.

    Raises:
        ValueError: The file is damaged, or of a run with another base, data or settings.
    """
    tensors, header = load_tensors(path, _KIND)
    if header["identity"] != identity:
        raise ValueError(
            f"{path} is the checkpoint of another run (other base, data, mask, blocks, recipe or "
            "seed); delete it or give another path"
        )
    with torch.no_grad():
        for i, value in enumerate(values):
            value.copy_(tensors[f"value.{i}"])
    for name, tensor in tensors.items():
        kind, place, *key = name.split(".")
        if kind == "state":
            value = values[int(place)]
            # Step counters stay on the CPU, as optimizers keep them.
            optimizer.state[value][".".join(key)] = (
                tensor.to(value.device) if tensor.ndim else tensor
            )
    for name, number in header["numbers"].items():
        position, field = name.split(".", 1)
        optimizer.state[values[int(position)]][field] = number
    history: list[dict[str, Any]] = header["history"]
    return history
