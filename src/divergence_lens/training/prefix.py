"""The frozen computation below the trained layers, done once and cached in memory or a file."""

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

_CACHED_PASSES = 64

# A shorter shared prefix saves less time than its own pass costs.
_SHORTEST_PREFIX = 4

# Residual entries in one piece on a CPU: 1 MiB, so that a layer's activations fit into its caches.
_CPU_ELEMENTS = 1 << 18
_FEWEST_TOKENS = 256


class Prefix:
    """The residual stream that enters one layer, for every row, computed once.

    All layers below are frozen, so their output is the same in every epoch. It is stored flat,
    without padding: in memory up to `cache_bytes`, otherwise in a memory-mapped file. Moving up to
    a higher layer runs only the layers between. The prefix that all rows share (the template, a
    system prompt) is run once, and the rows attend to its keys and values.

    A context manager; leaving it deletes the file.

    Attributes:
        shared: Length of the prefix that all rows share.
        piece_tokens: Maximum padded tokens in one forward pass: `batch_tokens`, or fewer on a
            CPU.
    """

    def __init__(
        self, engine: Engine, rows: TrainingRows, *, cache_bytes: int, batch_tokens: int
    ) -> None:
        self.engine = engine
        self.rows = rows
        self.shared = rows.shared if rows.shared >= _SHORTEST_PREFIX else 0
        self._budget = cache_bytes
        near = max(_FEWEST_TOKENS, _CPU_ELEMENTS // engine.d_model)
        self.piece_tokens = min(batch_tokens, near) if engine.device.type == "cpu" else batch_tokens
        self._passes: dict[int, Pass] = {}
        self._held: Tensor | None = None
        self._start: Tensor | None = None
        self._layer = 0
        self._stack = ExitStack()

    def __enter__(self) -> "Prefix":
        """Return the prefix itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the memory and delete the file."""
        self._held = self._start = None
        self._passes.clear()
        self._stack.close()

    @torch.no_grad()
    def move_to(self, layer: int) -> None:
        """Compute the residual that enters `layer` (`n_layers`: that enters the final norm)."""
        if self._held is None or layer < self._layer:
            self._layer, self._start = 0, None
            if not self._allocate(spill=layer > 0):
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
            # No layer runs yet, but position embeddings depend on the length of the prefix.
            _, past = self._after_start(0, 1)

        def lift(part: np.ndarray) -> None:
            length = int(self.lengths[part].max())
            if fresh:
                run = self._begin(part, length, past)
                resid = run.resid
            else:
                resid, run = self._read(part, length, past)
            for below in range(self._layer, layer):
                resid = self.engine.block(below, resid, run)
            places, real = self._places(part, length)
            # [token, d_model] <- [row, pos, d_model], without the padding
            held[places[real].to(held.device)] = resid[real.to(resid.device)].to(held.device)

        for piece in pieces(every, self.lengths, self.piece_tokens):
            run_halved(piece, lift)
        self._layer = layer

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row after the shared prefix."""
        return self.rows.lengths - self.shared

    def entering(
        self, rows: np.ndarray, length: int
    ) -> tuple[Float[Tensor, "row pos d_model"], Pass]:
        """Return the residual of some rows after their shared prefix, and the pass to continue.

        The shared prefix first runs through all layers above, with their current weights.

        Args:
            rows: Row numbers.
            length: Number of positions, including padding.
        """
        if self._held is None:
            _, past = self._after_start(0, self.engine.n_layers)
            run = self._begin(rows, length, past)
            resid = run.resid
            for layer in range(self._layer):
                resid = self.engine.block(layer, resid, run)
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
            if len(self._passes) == _CACHED_PASSES:
                self._passes.clear()
            # The inputs of a block besides the residual (masks, position embeddings) do not depend
            # on the row, so the pass of one row serves every batch.
            with torch.no_grad():
                self._passes[length] = self._begin(np.zeros(1, int), length, past)
        run = self._passes[length]
        run.past = past
        places, _ = self._places(rows, length)
        return held[places.to(held.device)].to(self.engine.device), run  # [row, pos, d_model]

    def _after_start(self, first: int, last: int) -> tuple[Tensor | None, KeyValues | None]:
        """Run the shared prefix through the layers `first` to `last - 1`."""
        if not self.shared or first == last:  # no layer attends to it
            return self._start, None
        run = self.engine.begin(self.rows.tokens[:1, : self.shared], keep=True)
        resid = run.resid if self._start is None else self._start
        for layer in range(first, last):
            resid = self.engine.block(layer, resid, run)  # [1, shared, d_model]
        cache = run.key_values()
        # Layers index keys and values by number. The entries below `first` are never read.
        keys = (cache.keys[0],) * first + cache.keys
        values = (cache.values[0],) * first + cache.values
        return resid, KeyValues(keys, values, cache.position_axis)

    def _places(self, rows: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
        """Return the index of each position in the flat store, and which positions are real."""
        index = torch.from_numpy(rows)
        positions = torch.arange(length)[None]  # [1, pos]
        every = torch.from_numpy(self.lengths)
        lengths = every[index, None]  # [row, 1]
        starts = every.cumsum(0)[index, None] - lengths  # [row, 1]
        # Padding reads the last real position. Any finite value will do: nothing attends to it.
        places = starts + torch.minimum(positions, lengths - 1)  # [row, pos]
        return places, positions < lengths

    def _allocate(self, *, spill: bool) -> bool:
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
