"""Runs that take hours: shards of the work on disk, and several processes that share them.

The work comes in numbered shards whose results are arrays. A finished shard is one checked file,
written whole or not at all, so a run that is killed at any moment goes on from the shards that it
has. Several processes take every n-th shard each; what each has found is added up at the end.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from divergence_lens._utils.storage import load_tensors, save_tensors


class Checkpoints:
    """The finished shards of one run in a folder, one file each."""

    def __init__(self, folder: Path, kind: str, identity: str) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"checkpoint_dir {folder} is a file; give a folder")
        self._folder, self._kind, self._identity = folder, kind, identity

    def _path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:06d}.safetensors"

    def load(self, shard: int) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The arrays of a shard and what was noted with them; None where it is not finished.

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

    def save(
        self, shard: int, arrays: Mapping[str, np.ndarray], notes: Mapping[str, Any] | None = None
    ) -> None:
        """Write a finished shard; the folder is made if there is none."""
        path = self._path(shard)
        # What a run left behind that was killed while it wrote this shard.
        for part in self._folder.glob(f".{path.name}.*.part"):
            part.unlink(missing_ok=True)
        header = {"identity": self._identity, "notes": dict(notes or {})}
        save_tensors(path, arrays, header, self._kind)


class Processes:
    """The processes that share a run; one alone, unless an accelerator is given.

    Args:
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`, or None.

    Attributes:
        index: The number of this process.
        count: How many there are.
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
        """Refuse to share a run whose processes were not given the same.

        Raises:
            ValueError: In every process, where the identities are not all equal.
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
        """Let an error of one process end all of them, in place of leaving the rest to wait.

        Raises:
            RuntimeError: In the processes that had no error, where another had one.
        """
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:  # noqa: BLE001 - raised again below, when the others know
            failure = error
        failed = np.array([failure is not None], dtype=np.int32)
        self.add_up([failed])
        if failure is not None:
            raise failure
        if failed[0]:
            raise RuntimeError("another process of this run failed; its own message says why")

    def add_up(self, arrays: Sequence[np.ndarray]) -> None:
        """Replace each array by its sum over all processes.

        Every number that one process has found is 0 in all others, so the sum is exact.
        """
        if self.count == 1:
            return
        from accelerate.utils import reduce

        for array in arrays:
            total = reduce(torch.from_numpy(array).to(self._device), reduction="sum")
            array[...] = total.cpu().numpy()
