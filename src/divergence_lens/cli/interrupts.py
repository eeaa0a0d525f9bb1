"""Ctrl-C at any time: one line and exit code 130.

Python raises `KeyboardInterrupt` wherever the program is. Inside an import that is too early: a
package may catch it, wrap it in an ImportError, or print it and continue, and the imports of torch
and TransformerLens take seconds. So the process ends at once if it is importing, or if no command
is running. It is safe to end there, because files are written atomically. Otherwise the exception
is raised as usual, and the library keeps what it has finished.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

STOPPED = 130

_running: list[str] = []  # the message of the command that is running


def handle_interrupts() -> None:
    """Handle Ctrl-C in this process from now on."""
    signal.signal(signal.SIGINT, _interrupt)


@contextmanager
def running(message: str) -> Iterator[None]:
    """Let Ctrl-C raise `KeyboardInterrupt` in the block, except during imports.

    Args:
        message: Printed if the process ends during an import.
    """
    _running.append(message)
    try:
        yield
    finally:
        _running.pop()


def _interrupt(_number: int, frame: FrameType | None) -> None:
    if _running and not _importing(frame):
        raise KeyboardInterrupt
    with suppress(Exception):  # the stream may be in use by the interrupted code
        sys.stdout.flush()
    message = _running[-1] if _running else "Stopped."
    os.write(2, f"\n{message}\n".encode())
    os._exit(STOPPED)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported: Python's import system is on the stack."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
