"""Cells of a study on disk: computed once, recognised by all that they depend on, by any process.

A cell is one file of JSON, `cells/<name>.<key>.json`, whose key is a hash of name and settings;
other settings make another file, so that a result is never mistaken for that of changed settings.
What does not fit JSON lies beside it under the same stem and is written first. A file appears whole
or not at all. Processes keep out of each other's way by locks that the system lets go when a
process dies; without them they would do the same work twice and write the same files.
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

from divergence_lens._utils.storage import write_text

try:
    import fcntl
except ImportError:  # Windows has no such locks: cells may be computed twice, to the same end
    fcntl = None  # type: ignore[assignment]

FORMAT = 2
"""Part of every key: raised when the same settings come to mean another result."""


class CellError(RuntimeError):
    """A cell, or one that it needs, could not be computed."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One piece of work.

    Attributes:
        name: Where it stands in the study, with slashes: "students/finetuned/owl/all-0".
        settings: All that its result depends on, as JSON holds it.
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
        self._locks: int | None = None
        # The system counts a lock as the process's own: asked twice, it is given twice.
        self._held: set[str] = set()

    def path(self, cell: Cell, suffix: str = ".json") -> Path:
        """A file of the cell; `suffix` tells several apart."""
        return self.folder / f"{cell.name}.{cell.key}{suffix}"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The cell's result, or None if it is not there (or the file was damaged)."""
        try:
            record = json.loads(self.path(cell).read_text(encoding="utf-8"))
            same: bool = record["settings"] == json.loads(json.dumps(cell.settings))
            result: dict[str, Any] = record["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return result if same else None

    def has(self, cell: Cell) -> bool:
        """Whether the cell was computed."""
        return self.path(cell).exists()

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """Why the cell failed in this run: `error` and `traceback`; None if it did not."""
        try:
            found: dict[str, Any] = json.loads(self._failed(cell).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found

    def forget_failures(self) -> None:
        """Let cells that failed be tried again."""
        for path in self.folder.rglob("*.failed"):
            path.unlink(missing_ok=True)

    def get(self, cell: Cell, compute: Callable[[Cell], dict[str, Any]]) -> dict[str, Any]:
        """The cell's result, computed now if need be; another process that is at it is waited for.

        Args:
            cell: Which.
            compute: Computes the result, after it has written the other files of the cell.

        Raises:
            CellError: It cannot be computed, now or earlier in this run.
        """
        found = self.read(cell)
        if found is not None:
            return found
        with self.reserved(cell, wait=True):
            return self._get(cell, compute)

    def attempt(self, cell: Cell, compute: Callable[[Cell], dict[str, Any]], *, wait: bool) -> bool:
        """Compute a cell that nobody else is at; a failure is written down and not raised.

        Returns:
            Whether the cell is settled: done, or failed.
        """
        if self.has(cell) or self.failure(cell) is not None:
            return True
        with self.reserved(cell, wait=wait) as mine:
            if not mine:
                return False
            with suppress(CellError):
                self._get(cell, compute)
        return True

    def _get(self, cell: Cell, compute: Callable[[Cell], dict[str, Any]]) -> dict[str, Any]:
        found = self.read(cell)
        if found is not None:
            return found
        failed = self.failure(cell)
        if failed is not None:
            raise CellError(f"{cell.name}: {failed['error']}")
        try:
            result = compute(cell)
            text = json.dumps(
                {"cell": cell.name, "settings": cell.settings, "result": result},
                indent=1,
                allow_nan=False,
            )
        except Exception as error:
            reason = str(error) if isinstance(error, CellError) else _reason(error)
            failure = {"cell": cell.name, "error": reason, "traceback": traceback.format_exc()}
            write_text(self._failed(cell), json.dumps(failure, indent=1))
            raise CellError(f"{cell.name}: {reason}") from error
        write_text(self.path(cell), text)
        self._failed(cell).unlink(missing_ok=True)
        found = self.read(cell)
        if found is None:
            raise CellError(f"{self.path(cell)} cannot be read back")
        return found

    def _failed(self, cell: Cell) -> Path:
        return self.path(cell, ".failed")

    @contextmanager
    def reserved(self, cell: Cell, *, wait: bool) -> Iterator[bool]:
        """Keep other processes from a cell; whether that worked is what comes back."""
        if fcntl is None or cell.key in self._held:
            yield True
            return
        # One byte of one file for each cell: nothing is left behind by a process that died.
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
        # Kept open: closing any descriptor of it would let go of all locks of this process.
        if self._locks is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._locks = os.open(self.folder / ".locks", os.O_RDWR | os.O_CREAT, 0o666)
        return self._locks

    def close(self) -> None:
        """Let go of everything."""
        if self._locks is not None:
            os.close(self._locks)
            self._locks = None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
