"""Stopping a long call without losing what it has found by then."""

import signal
import threading
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A long call was stopped, by Ctrl-C or a notebook's stop button, and had found something.

        try:
            effects = causal_mediation(model, pairs)
        except Interrupted as stopped:
            effects = stopped.partial

    In a notebook in which nobody wrote `try`, the next cell can say `sys.last_value.partial`. It is
    a `KeyboardInterrupt`, so that whoever handles those handles this. The model is as it was. A
    call that had found nothing raises a plain `KeyboardInterrupt`.

    Attributes:
        partial: A result of the usual type, of what was finished alone: a list of the examples that
            were written to their end (`generate`); the divergence of the examples that all teachers
            had read (the metadata's setting `finished_examples` has their numbers); effects or
            margins of whole pairs (the metadata's setting `finished_pairs`); a sweep of whole
            students.
    """

    def __init__(self, message: str, partial: Any) -> None:
        super().__init__(message)
        self.partial = partial


@contextmanager
def partial_on_interrupt(
    call: str, finished: Sized, total: int, noun: str, partial: Callable[[], Any]
) -> Iterator[None]:
    """Give back what is finished if the block is stopped.

    Args:
        call: Who is stopped.
        finished: What grows as the block goes on; its length is how many are finished.
        total: Of how many.
        noun: Of what, in the plural.
        partial: Makes the result of those. Not called if there are none.

    Raises:
        Interrupted: The block was stopped, and something was finished.
    """
    try:
        yield
    except KeyboardInterrupt as stopped:
        if not len(finished):
            if isinstance(
                stopped, Interrupted
            ):  # what a step gives back is not what its caller does
                raise KeyboardInterrupt from None
            raise
        raise Interrupted(
            f"{call} was stopped after {len(finished):,} of {total:,} {noun}; they are in "
            "`.partial` of this exception (in a notebook: sys.last_value.partial)",
            partial(),
        ) from None


@contextmanager
def convert_partial(convert: Callable[[Any], Any]) -> Iterator[None]:
    """Let a call give back, of what the one that it made gives back, what its own caller wants."""
    try:
        yield
    except Interrupted as stopped:
        stopped.partial = convert(stopped.partial)
        raise


@contextmanager
def discard_partial() -> Iterator[None]:
    """Let a step be stopped without giving back what its caller does not: plain Ctrl-C."""
    try:
        yield
    except Interrupted:
        raise KeyboardInterrupt from None


@contextmanager
def defer_interrupts() -> Iterator[None]:
    """Let a Ctrl-C that comes in the block take effect at its end, so that nothing is half done."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread alone
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
