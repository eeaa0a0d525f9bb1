"""Checkpoints of a training run: write its state to disk, and resume to the same weights.

Other long calls store finished parts with `_utils.checkpoints`, which also writes the file here.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from divergence_lens._utils.checkpoints import Checkpoints


class TrainingCheckpoint:
    """One file in a folder: the variables, the optimizer's state and the history.

    Args:
        folder: The run's own folder.
        identity: Hash of base, data and settings. The file of another run is refused.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder = folder
        self._store = Checkpoints(folder, "training checkpoint", identity)

    def save(
        self,
        values: list[Tensor],
        optimizer: torch.optim.Optimizer,
        history: list[dict[str, Any]],
    ) -> None:
        """Write the state, atomically.

        Args:
            values: The tensors that the optimizer updates.
            optimizer: Its state per tensor may hold tensors and numbers.
            history: One entry per update so far.
        """
        tensors = {f"value.{i}": value for i, value in enumerate(values)}
        numbers: dict[str, Any] = {}
        for i, value in enumerate(values):
            for key, item in optimizer.state[value].items():
                if isinstance(item, Tensor):
                    tensors[f"state.{i}.{key}"] = item
                else:
                    numbers[f"{i}.{key}"] = item
        # One shard, overwritten at each checkpoint.
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        self._store.save(0, arrays, {"numbers": numbers, "history": history})

    def load(
        self, values: list[Tensor], optimizer: torch.optim.Optimizer
    ) -> list[dict[str, Any]] | None:
        """Restore `values` and `optimizer`, and return the history; None without a file.

        Raises:
            ValueError: The file is damaged, or of a run with another base, data or settings.
        """
        stored = self._store.load(0)
        if stored is None:
            return None
        arrays, notes = stored
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with torch.no_grad():
            for i, value in enumerate(values):  # in place: the optimizer holds these tensors
                value.copy_(tensors[f"value.{i}"])
        for name, tensor in tensors.items():
            kind, index, *key = name.split(".")
            if kind == "state":
                value = values[int(index)]
                # Optimizers hold their step counters on the CPU.
                on_device = tensor.to(value.device) if tensor.ndim else tensor
                optimizer.state[value][".".join(key)] = on_device
        for name, number in notes["numbers"].items():
            index, key_name = name.split(".", 1)
            optimizer.state[values[int(index)]][key_name] = number
        history: list[dict[str, Any]] = notes["history"]
        return history

    def delete(self) -> None:
        """Delete the file, and the folder if nothing else is in it."""
        self._store.delete(0)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()
