"""Two threads that share a call as two processes do."""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import numpy as np

from divergence_lens._utils.checkpoints import Processes


class Shared(Processes):
    """Stands in for `Processes`: threads that add their arrays up."""

    barrier = threading.Barrier(2)
    arrays: ClassVar[dict[int, list[np.ndarray]]] = {}

    @staticmethod
    def of(accelerator: "Shared | None") -> Processes:
        """Replaces `Processes` in a module; calls without an accelerator stay alone."""
        return Processes() if accelerator is None else accelerator

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index, self.count = index, 2

    def agree(self, identity: str) -> None:
        pass

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def add_up(self, arrays: list[np.ndarray]) -> None:
        self.arrays[self.index] = [array.copy() for array in arrays]
        self.barrier.wait(60)
        for array, other in zip(arrays, self.arrays[1 - self.index], strict=True):
            np.add(array, other, out=array)
        self.barrier.wait(60)
