"""Split work when memory runs out, and return freed memory to the system."""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

# A CPU's allocator and Apple's GPUs raise a plain RuntimeError.
_MESSAGES = ("can't allocate memory", "not enough memory", "out of memory")


@runtime_checkable
class _Sliceable(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Any: ...


R = TypeVar("R")
S = TypeVar("S", bound=_Sliceable)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def return_freed_memory() -> None:
    """Return freed memory to the operating system.

    glibc keeps it for later allocations, in pieces that seldom fit: a process that trains students
    of 135 M parameters one after another grew from 3 to 12 GB. Does nothing with other C libraries.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def run_halved(items: S, run: Callable[[S], object]) -> None:
    """Call `halved` for the side effects of `run`."""
    for _ in halved(items, run):
        pass


def halved(items: S, run: Callable[[S], R]) -> Iterator[R]:
    """Yield `run(items)`, or, where memory runs out, that of its halves, down to single items.

    Args:
        items: A list, range, array or tensor, not empty.
        run: Must leave no state behind when it fails.

    Yields:
        Results in the order of the items.
    """
    waiting = [items]
    while waiting:
        part = waiting.pop()
        try:
            result = run(part)
        except (RuntimeError, MemoryError) as error:
            if len(part) < 2 or not is_out_of_memory(error):
                raise
            middle = (len(part) + 1) // 2
            waiting += [part[middle:], part[:middle]]
            continue  # outside the handler, whose traceback still references the tensors
        yield result
        del result
