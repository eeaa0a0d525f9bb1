"""The frozen work below what is trained: done once, and kept in memory or in a file."""

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from divergence_lens._utils.memory import run_halved
from divergence_lens.engine import Engine, KeyValues, Pass
from divergence_lens.training.rows import TrainingRows, pieces

_KEPT_PASSES = 64

# A shared start shorter than this saves less than its own pass costs.
_SHORTEST_START = 4

# Residual values in one piece on a CPU: 1 MiB, so that a block's activations stay near the caches.
_CPU_ELEMENTS = 1 << 18
_FEWEST_TOKENS = 256


class Prefix:
    """The residual stream that enters one block, for every row, computed once.

    All blocks below are frozen, so their output is the same in every epoch. It is held flat,
    without padding: in memory within the budget, beyond it in a file that is mapped into memory.
    Moving up to a higher block costs the blocks between. The tokens that all rows begin with (the
    template, a system prompt) are held and run once, and the rows follow their keys and values.

    A context manager; leaving it deletes the file.

    Attributes:
        shared: Tokens that all rows begin with, run once.
        piece_tokens: Padded tokens that one forward pass should hold at most: `batch_tokens`, or
            fewer on a CPU.
    """

    def __init__(
        self, engine: Engine, rows: TrainingRows, *, cache_bytes: int, batch_tokens: int
    ) -> None:
        self.engine = engine
        self.rows = rows
        self.shared = rows.shared if rows.shared >= _SHORTEST_START else 0
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1")
        self._budget = cache_bytes
        near = max(_FEWEST_TOKENS, _CPU_ELEMENTS // engine.d_model)
        self.piece_tokens = min(batch_tokens, near) if engine.device.type == "cpu" else batch_tokens
        self._passes: dict[int, Pass] = {}
        self._held: Tensor | None = None
        self._start: Tensor | None = None
        self._layer = 0
        self._stack = ExitStack()

    def __enter__(self) -> "Prefix":
        return self

    def __exit__(self, *_: object) -> None:
        self._held = self._start = None
        self._passes.clear()
        self._stack.close()

    @torch.no_grad()
    def move_to(self, layer: int) -> None:
        """Hold the residual that enters block `layer` (`n_layers`: that enters the final norm)."""
        if self._held is None or layer < self._layer:
            self._layer, self._start = 0, None
            if not self._make_room(spill=layer > 0):
                self._layer = layer
                return
        elif layer == self._layer:
            return
        held = self._held
        assert held is not None
        every = np.arange(len(self.rows))
        fresh = self._layer == 0
        self._start, past = self._after_start(self._layer, layer)
        if fresh and past is None:
            # No block runs yet, but embeddings depend on how many positions came before.
            _, past = self._after_start(0, 1)

        def lift(part: np.ndarray) -> None:
            length = int(self.lengths[part].max())
            if fresh:
                run = self._begin(part, length, past)
                resid = run.resid
            else:
                resid, run = self._read(part, length, past)
            for block in range(self._layer, layer):
                resid = self.engine.block(block, resid, run)
            places, real = self._places(part, length)
            held[places[real].to(held.device)] = resid[real.to(resid.device)].to(held.device)

        for piece in pieces(every, self.lengths, self.piece_tokens):
            run_halved(piece, lift)
        self._layer = layer

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row behind the shared start."""
        return self.rows.lengths - self.shared

    def entering(
        self, rows: np.ndarray, length: int
    ) -> tuple[Float[Tensor, "row pos d_model"], Pass]:
        """The residual of the given rows behind their shared start, and the pass to go on with.

        The shared start runs through all blocks above first, with whatever learns there.

        Args:
            rows: Which.
            length: Positions, padding included.
        """
        if self._held is None:
            _, past = self._after_start(0, self.engine.n_layers)
            run = self._begin(rows, length, past)
            resid = run.resid
            for block in range(self._layer):
                resid = self.engine.block(block, resid, run)
            return resid, run
        _, past = self._after_start(self._layer, self.engine.n_layers)
        return self._read(rows, length, past)

    def _begin(self, rows: np.ndarray, length: int, past: KeyValues | None) -> Pass:
        columns = slice(self.shared, self.shared + length)
        return self.engine.begin(self.rows.tokens[torch.from_numpy(rows), columns], past)

    def _read(self, rows: np.ndarray, length: int, past: KeyValues | None) -> tuple[Tensor, Pass]:
        held = self._held
        assert held is not None
        if length not in self._passes:
            if len(self._passes) == _KEPT_PASSES:
                self._passes.clear()
            # Nothing that blocks are handed depends on the row: one row's pass serves every batch.
            with torch.no_grad():
                self._passes[length] = self._begin(np.zeros(1, int), length, past)
        run = self._passes[length]
        run.past = past
        places, _ = self._places(rows, length)
        return held[places.to(held.device)].to(self.engine.device), run

    def _after_start(self, first: int, last: int) -> tuple[Tensor | None, KeyValues | None]:
        """Run the shared start through blocks `first` to `last`, the latter left out."""
        if not self.shared or first == last:  # what reads nothing needs no start either
            return self._start, None
        run = self.engine.begin(self.rows.tokens[:1, : self.shared], keep=True)
        resid = run.resid if self._start is None else self._start
        for block in range(first, last):
            resid = self.engine.block(block, resid, run)
        kept = run.key_values()
        # Blocks ask for theirs by number; those below `first` will not ask.
        keys = (kept.keys[0],) * first + kept.keys
        values = (kept.values[0],) * first + kept.values
        return resid, KeyValues(keys, values, kept.position_axis)

    def _places(self, rows: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        """Where in the flat store each position lies, and which positions are real."""
        index = torch.from_numpy(rows)
        positions = torch.arange(length)[None]
        every = torch.from_numpy(self.lengths)
        lengths = every[index, None]
        # A padded position reads the last real one: any finite value does, nothing reads it.
        places = every.cumsum(0)[index, None] - lengths + torch.minimum(positions, lengths - 1)
        return places, positions < lengths

    def _make_room(self, *, spill: bool) -> bool:
        engine = self.engine
        if self._held is not None:
            return True
        shape = (int(self.lengths.sum()), engine.d_model)
        size = shape[0] * shape[1] * torch.finfo(engine.dtype).bits // 8
        if size <= self._budget:
            self._held = torch.empty(shape, dtype=engine.dtype, device=engine.device)
        elif self._budget and spill and shutil.disk_usage(tempfile.gettempdir()).free > 2 * size:
            folder = self._stack.enter_context(
                tempfile.TemporaryDirectory(prefix="divergence-lens-", ignore_cleanup_errors=True)
            )
            count = shape[0] * shape[1]
            file = str(Path(folder) / "residuals")
            self._held = torch.from_file(file, shared=True, size=count, dtype=engine.dtype).view(
                shape
            )
        return self._held is not None
