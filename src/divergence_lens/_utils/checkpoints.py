"""Checkpoints of long runs, written in numbered shards, and the processes that share a run.

The result of a shard is a set of arrays. A finished shard is one file with a checksum, written
atomically, so a run that is killed at any moment resumes after its last finished shard. With
several processes, each takes every n-th shard, and their results are summed at the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from divergence_lens._utils.storage import load_tensors, save_tensors


class Checkpoints:
    """The finished shards of one run, one file each in a folder; `save` writes them.

    Args:
        folder: The folder of this run alone, created when the first shard is written.
        kind: Kind of result, for the file's header.
        identity: Hash of data and settings; the shards of another run are refused.
    """

    def __init__(self, folder: Path, kind: str, identity: str) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"checkpoint_dir {folder} is a file; give a folder")
        self._folder, self._kind, self._identity = folder, kind, identity

    def _path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:06d}.safetensors"

    def load(self, shard: int) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Load the arrays and notes of a shard; None if it is not finished.

        Raises:
            ValueError: The file is damaged, or belongs to a run on other data or settings.
        """
        path = self._path(shard)
        if not path.exists():
            return None
        tensors, header = load_tensors(path, self._kind)
        if header["identity"] != self._identity:
            raise ValueError(
                f"{path} is of another run (other data, teachers, model, settings or versions); "
                "delete its folder or give another checkpoint_dir"
            )
        return {name: tensor.numpy() for name, tensor in tensors.items()}, header.get("notes", {})

    def delete(self, shard: int) -> None:
        """Delete the file of a shard, if there is one."""
        self._path(shard).unlink(missing_ok=True)

    def save(
        self, shard: int, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any] | None = None
    ) -> None:
        """Write a finished shard; create the folder if needed."""
        path = self._path(shard)
        # Temporary files of a run that was killed while it wrote this shard.
        for part in self._folder.glob(f".{path.name}.*.part"):
            part.unlink(missing_ok=True)
        header = {"identity": self._identity, "notes": dict(notes or {})}
        save_tensors(path, arrays, header, self._kind)


def delete_shards(folder: Path) -> None:
    """Delete the shards in a folder, and the folder if nothing else is in it."""
    # A process that is killed while it writes leaves a hidden, unfinished file.
    for pattern in ("shard-*.safetensors", ".shard-*.safetensors.*.part"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


class Processes:
    """The processes that share a run; a single one unless an accelerator is given.

    Args:
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`, or None.

    Attributes:
        index: Number of this process.
        count: Number of processes.
    """

    def __init__(self, accelerator: Any = None) -> None:
        self.index, self.count = 0, 1
        if accelerator is None:
            return
        for name in ("process_index", "num_processes", "device"):
            if not hasattr(accelerator, name):
                raise TypeError(
                    f"accelerator is a {type(accelerator).__name__}; give an "
                    "accelerate.Accelerator or accelerate.PartialState, or leave it out"
                )
        self.index, self.count = accelerator.process_index, accelerator.num_processes
        self._device = accelerator.device

    def agree(self, identity: str) -> None:
        """Refuse a shared run whose processes got different inputs.

        Raises:
            ValueError: In every process, if the identities differ.
        """
        if self.count == 1:
            return
        from accelerate.utils import gather

        own = torch.tensor([list(bytes.fromhex(identity))], device=self._device, dtype=torch.uint8)
        every = gather(own.int())
        if bool((every != every[:1]).any()):
            raise ValueError(
                f"the {self.count} processes were given different data, teachers or settings; "
                "each must make the same call (check that prompts are drawn from one seed)"
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """End all processes when one of them fails, instead of leaving the rest waiting.

        Raises:
            RuntimeError: In the processes that did not fail themselves.
        """
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again below, once the others know
            failure = error
        failed = np.array([failure is not None], dtype=np.int32)
        self.add_up([failed])
        if failure is not None:
            raise failure
        if failed[0]:
            raise RuntimeError("another process of this run failed; its own message says why")

    def add_up(self, arrays: Sequence[np.ndarray]) -> None:
        """Replace each array by its sum over all processes.

        An entry that one process computed is 0 in all others, so the sum is exact.
        """
        if self.count == 1:
            return
        from accelerate.utils import reduce

        for array in arrays:
            total = reduce(torch.from_numpy(array).to(self._device), reduction="sum")
            array[...] = total.cpu().numpy()
