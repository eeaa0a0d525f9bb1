"""Interrupts: stop a long call without losing its finished results."""

import signal
import threading
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A long call was stopped, by Ctrl-C or a notebook's stop button, with results to return.

        try:
            effects = causal_mediation(model, pairs)
        except Interrupted as stopped:
            effects = stopped.partial

    In a notebook without `try`, the next cell can read `sys.last_value.partial`. The class is a
    `KeyboardInterrupt`, so existing handlers catch it. The model is unchanged. A call that had
    finished nothing raises a plain `KeyboardInterrupt`.

    Attributes:
        partial: A result of the usual type that contains only finished items: the complete examples
            (`generate`); the divergence of the examples that all teachers had read (numbered in
            the metadata's setting `finished_examples`); effects or margins of complete pairs (the
            metadata's setting `finished_pairs`); a sweep of fully trained students;
            the student after its last complete update (`finetune`).
    """

    def __init__(self, message: str, partial: Any) -> None:
        super().__init__(message)
        self.partial = partial


@contextmanager
def partial_on_interrupt(
    call: str, finished: Sized, total: int, noun: str, partial: Callable[[], Any]
) -> Iterator[None]:
    """Attach the finished part of the result if the block is interrupted.

    Args:
        call: Name of the public function, for the message.
        finished: Collection that the block fills with finished items.
        total: Number of items in all.
        noun: What an item is, in the plural.
        partial: Builds the result of the finished items. Not called if there are none.

    Raises:
        Interrupted: The block was interrupted after at least one item.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        if not len(finished):
            # The partial result of an inner call is not of the type that this call returns.
            if isinstance(stopped, Interrupted):
                raise KeyboardInterrupt from None
            raise
        raise Interrupted(
            f"{call} was stopped after {len(finished):,} of {total:,} {noun}; they are in "
            "`.partial` of this exception (in a notebook: sys.last_value.partial)",
            partial(),
        ) from None


@contextmanager
def convert_partial(convert: Callable[[Any], Any]) -> Iterator[None]:
    """Convert the partial result of an interrupted inner call to the outer call's type."""
    try:
        yield
    except Interrupted as stopped:
        stopped.partial = convert(stopped.partial)
        raise


@contextmanager
def discard_partial() -> Iterator[None]:
    """Turn the `Interrupted` of an inner call into a plain `KeyboardInterrupt`."""
    try:
        yield
    except Interrupted:
        raise KeyboardInterrupt from None


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block, so that the block is not cut short."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt
