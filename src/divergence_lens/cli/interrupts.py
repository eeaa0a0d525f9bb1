"""Ctrl-C at any time: one line and exit code 130.

Python raises `KeyboardInterrupt` wherever the program is. Inside an import that is too early: a
package may catch it, wrap it in an ImportError, or print it and continue, and the imports of torch
and TransformerLens take seconds. So the process ends at once if it is importing, or if no command
is running. It is safe to end there, because files are written atomically. Otherwise the exception
is raised as usual, and the library keeps what it has finished.

This module imports little, so that Ctrl-C is handled a few milliseconds after Python has started.
"""

import os
import signal
import sys
from types import FrameType

STOPPED = 130

_running: list[str] = []  # the message of the command that is running


def handle_interrupts() -> None:
    """Handle Ctrl-C in this process from now on."""
    signal.signal(signal.SIGINT, _interrupt)


class Running:
    """A block in which Ctrl-C raises `KeyboardInterrupt`, except during imports."""

    def __init__(self, message: str) -> None:
        """Create a block.

        Args:
            message: Printed if the process ends during an import.
        """
        self._message = message

    def __enter__(self) -> None:
        """Enter the block."""
        _running.append(self._message)

    def __exit__(self, *_error: object) -> None:
        """Leave the block."""
        _running.pop()


def _interrupt(_number: int, frame: FrameType | None) -> None:
    if _running and not _importing(frame):
        raise KeyboardInterrupt
    try:  # noqa: SIM105 - importing contextlib takes time
        sys.stdout.flush()
    except Exception:  # noqa: BLE001, S110 - the interrupted code may be using the stream
        pass
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
