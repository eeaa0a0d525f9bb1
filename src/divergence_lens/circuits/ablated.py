"""Runs of the model in which each receiver reads its own residual: a circuit's senders live.

With U the change of a sender's live output from the clean run, and A that of its ablated output,

    input of r = clean residual + sum over s of (U_s if s -> r is in the circuit else A_s)
               = clean residual + sum over s of A_s + sum over s -> r in the circuit of (U_s - A_s)
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from divergence_lens.circuits.blocks import Blocks
from divergence_lens.circuits.graph import READS
from divergence_lens.circuits.runs import first_position, sender_changes
from divergence_lens.patching import PatchingRun, finite, logits_at, states_at


class CircuitPass:
    """Runs of one chunk in which each receiver reads its own residual."""

    def __init__(self, run: PatchingRun, blocks: Blocks) -> None:
        self.run, self.engine, self.chunk = run, run.engine, run.chunk
        self.blocks, self.graph = blocks, blocks.graph
        self.first = first_position(run)
        self.ablated = sender_changes(run, blocks)  # A: [batch, sender, pos, d_model]
        self.live = torch.empty_like(self.ablated)  # U - A, filled sender by sender
        self.sums: dict[int, Tensor] = {}  # by number of senders, the sum of A over the first ones
        self.rows = torch.arange(len(run.chunk.indices), device=run.chunk.base.device)

    def metric(self, chosen: Bool[np.ndarray, " edges"]) -> Float[Tensor, " batch"]:
        """The metric of each row with all edges ablated but those chosen.

        Blocks from which no chosen path leads to the logits are not run.
        """
        run, engine, first, graph = self.run, self.engine, self.first, self.graph
        used = graph.leading(chosen)
        matrix = torch.from_numpy(graph.matrix(chosen)).to(self.live)  # [sender, receiver]
        self.live[:, 0] = -self.ablated[:, 0]  # the embeddings stay as they are: U = 0
        past = run.base.past
        assert past is not None
        begun = engine.begin(self.chunk.base[:1, first:], past.upto(first) if first else None)
        for layer in range(graph.n_layers):
            own = slice(graph.heads_from(layer), graph.heads_from(layer + 1))
            if not used[own].any():
                self.live[:, own] = 0.0  # nothing reads it
                continue
            with self.blocks.reading(layer, self._changes_at(layer, matrix)):
                engine.block(layer, self._base(layer), begun, rows=self.rows)
        last = self._read(graph.n_layers, len(graph.receivers) - 1, matrix)
        target = self.chunk.base_target - first
        read = states_at(last, target, self.rows, self.chunk.readings)
        metric = run.measure(logits_at(engine, read.to(engine.dtype)), self.rows)
        return finite(metric, self.chunk.indices, "the circuit's run")

    def _base(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        return self.run.base.resid[layer][:, self.first :]

    def _inputs(
        self, base: Float[Tensor, "batch pos d_model"], receivers: slice, matrix: Tensor
    ) -> Float[Tensor, "batch receiver pos d_model"]:
        """What some receivers of one depth read."""
        senders = int(self.graph.reach[receivers.start])
        # sum of (U if chosen else A) = sum of A + sum over chosen of (U - A)
        chosen = matrix[:senders, receivers].T @ self.live[:, :senders].flatten(2)
        if senders not in self.sums:
            self.sums[senders] = self.ablated[:, :senders].sum(1, keepdim=True)
        ablated = self.sums[senders]  # [batch, 1, pos, d_model]
        result: Tensor = base[:, None].float() + ablated + chosen.unflatten(2, base.shape[1:])
        return result.to(base.dtype)

    def _read(self, layer: int, receiver: int, matrix: Tensor) -> Float[Tensor, "batch pos d"]:
        return self._inputs(self._base(layer), slice(receiver, receiver + 1), matrix)[:, 0]

    def _changes_at(self, layer: int, matrix: Tensor) -> dict[str, Any]:
        """The inputs of a block's parts, and functions that record what its parts write."""
        graph, blocks, base = self.graph, self.blocks, self.run.base
        heads = slice(graph.heads_from(layer), graph.heads_from(layer) + graph.n_heads)

        def reader(read: str) -> Any:
            inputs = self._inputs(self._base(layer), graph.reading(layer, read), matrix)
            new = blocks.read(layer, read, inputs)  # [batch, pos, head, d_head]
            return lambda _: new

        def store_heads(z: Tensor) -> None:
            change = z.float() - base.sites["z"][layer][:, self.first :].float()
            self.live[:, heads] = blocks.written(layer, change) - self.ablated[:, heads]

        changes: dict[str, Any] = {read: reader(read) for read in READS} | {"z": store_heads}
        if graph.mlps:
            sender, receiver = graph.mlp_sender(layer), graph.mlp_receiver(layer)
            own = base.sites["mlp_out"][layer][:, self.first :]

            def mlp_input(_: Tensor) -> Tensor:
                if graph.parallel:
                    return self._read(layer, receiver, matrix)
                middle = self._base(layer + 1) - own  # the clean resid_mid
                return self._inputs(middle, slice(receiver, receiver + 1), matrix)[:, 0]

            def store_mlp(out: Tensor) -> None:
                self.live[:, sender] = out.float() - own.float() - self.ablated[:, sender]

            changes |= {"mlp": mlp_input, "mlp_out": store_mlp}
        return changes
