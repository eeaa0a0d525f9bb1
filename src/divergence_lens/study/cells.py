"""Cells of a study on disk: pieces of work that are computed once, by any process.

A cell is a JSON file `cells/<name>.<key>.json`. Its key is a hash of its name and settings, so a
result cannot be mistaken for that of other settings. Data that JSON cannot represent are stored in
files with the same stem, which are written first. All files are written atomically. Locks keep two
processes from computing the same cell; the operating system releases them when a process dies.
"""

import hashlib
import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from divergence_lens._utils.memory import return_freed_memory
from divergence_lens._utils.storage import write_text

try:
    import fcntl
except ImportError:  # Windows: without locks, two processes may compute a cell, to the same result
    fcntl = None  # type: ignore[assignment]

FORMAT = 2
"""Part of every key. Increase it when the same settings come to mean another result."""


class CellError(RuntimeError):
    """A cell, or a cell that it needs, could not be computed."""


@dataclass(frozen=True, eq=False)
class Cell:
    """A piece of work.

    Attributes:
        name: Its place in the study, with slashes: "students/finetuned/owl/all-0".
        settings: Everything that the result depends on, as JSON values.
    """

    name: str
    settings: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """Hash of name and settings."""
        text = json.dumps([FORMAT, self.name, self.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __repr__(self) -> str:
        """Name and key."""
        return f"{self.name} ({self.key})"


class CellStore:
    """The cells of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cells"
        self._lock_descriptor: int | None = None
        # The system grants a process a lock that it already holds, so held locks are tracked here.
        self._held: set[str] = set()

    def path(self, cell: Cell, suffix: str = ".json") -> Path:
        """A file of the cell."""
        return self.folder / f"{cell.name}.{cell.key}{suffix}"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result; None if it is missing or the file is damaged."""
        try:
            record = json.loads(self.path(cell).read_text(encoding="utf-8"))
            same: bool = record["settings"] == json.loads(json.dumps(cell.settings))
            result: dict[str, Any] = record["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return result if same else None

    def has(self, cell: Cell) -> bool:
        """Whether the cell has been computed."""
        return self.path(cell).exists()

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """`error` and `traceback` of a cell that failed in this run; None if it did not."""
        try:
            failure: dict[str, Any] = json.loads(self._failed(cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return failure

    def forget_failures(self) -> None:
        """Allow failed cells to be tried again."""
        for path in self.folder.rglob("*.failed"):
            path.unlink(missing_ok=True)

    def write(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Store a result that was computed elsewhere."""
        record = {"cell": cell.name, "settings": cell.settings, "result": result}
        write_text(self.path(cell), json.dumps(record, indent=1, allow_nan=False))

    def get(self, cell: Cell, compute: Callable[[Cell], dict[str, Any]]) -> dict[str, Any]:
        """Read the cell's result, or compute it, or wait for the process that is computing it.

        Args:
            cell: The cell.
            compute: Writes the other files of the cell and returns its result.

        Raises:
            CellError: The computation failed, now or earlier in this run.
        """
        result = self.read(cell)
        if result is not None:
            return result
        with self.reserved(cell, wait=True):
            return self._get(cell, compute)

    def attempt(self, cell: Cell, compute: Callable[[Cell], dict[str, Any]], *, wait: bool) -> bool:
        """Compute a cell unless another process is computing it; record a failure, do not raise.

        Args:
            cell: The cell.
            compute: As in `get`.
            wait: Whether to wait for the other process.

        Returns:
            Whether the cell has been computed or has failed.
        """
        if self.has(cell) or self.failure(cell) is not None:
            return True
        with self.reserved(cell, wait=wait) as acquired:
            if not acquired:
                return False
            with suppress(CellError):
                self._get(cell, compute)
        return True

    def _get(self, cell: Cell, compute: Callable[[Cell], dict[str, Any]]) -> dict[str, Any]:
        # Another process may have finished the cell before this one acquired the lock.
        result = self.read(cell)
        if result is not None:
            return result
        failed = self.failure(cell)
        if failed is not None:
            raise CellError(f"{cell.name}: {failed['error']}")
        try:
            record = {"cell": cell.name, "settings": cell.settings, "result": compute(cell)}
            text = json.dumps(record, indent=1, allow_nan=False)
        except Exception as error:
            reason = str(error) if isinstance(error, CellError) else _reason(error)
            failure = {"cell": cell.name, "error": reason, "traceback": traceback.format_exc()}
            write_text(self._failed(cell), json.dumps(failure, indent=1))
            raise CellError(f"{cell.name}: {reason}") from error
        finally:
            return_freed_memory()
        write_text(self.path(cell), text)
        self._failed(cell).unlink(missing_ok=True)
        # The result has passed through JSON, in this process as in any other.
        result = self.read(cell)
        if result is None:
            raise CellError(f"{self.path(cell)} cannot be read back")
        return result

    def _failed(self, cell: Cell) -> Path:
        return self.path(cell, ".failed")

    @contextmanager
    def reserved(self, cell: Cell, *, wait: bool) -> Iterator[bool]:
        """Lock a cell against other processes; yield whether the lock was acquired."""
        if fcntl is None or cell.key in self._held:
            yield True
            return
        # Each cell is one byte of one file, so a process that dies leaves no lock file behind.
        place = int(cell.key, 16) % 2**40
        descriptor = self._lock_file()
        try:
            mode = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.lockf(descriptor, mode, 1, place)
        except BlockingIOError:
            yield False
            return
        self._held.add(cell.key)
        try:
            yield True
        finally:
            self._held.discard(cell.key)
            fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, place)

    def _lock_file(self) -> int:
        # Closing any descriptor of the file would release all locks of this process.
        if self._lock_descriptor is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_descriptor = os.open(self.folder / ".locks", os.O_RDWR | os.O_CREAT, 0o666)
        return self._lock_descriptor

    def close(self) -> None:
        """Release all locks."""
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
