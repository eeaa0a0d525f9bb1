"""The staggered passes of path patching: each row changes one receiver's input.

1. The patched run is the base run in which one receiver reads the residual plus one sender's
   change: new queries, keys or values of one head, another MLP input, or other logits.
2. Nothing changes below the receiver's layer, so one *staggered* pass runs many edges of all
   layers: a row joins at the block of its receiver, from the stored base run, and edges into the
   logits need no block at all. Nothing changes before the first changed position, whose keys and
   values are stored.
3. In the block of the receiver, only the changed head (and the MLP after it) is recomputed. Heads
   do not mix, so rows with different heads of one pair share one run of the attention.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from divergence_lens._utils.memory import halved
from divergence_lens.circuits.blocks import Blocks, Change
from divergence_lens.circuits.graph import READS
from divergence_lens.circuits.runs import first_position, sender_changes
from divergence_lens.engine import Pass
from divergence_lens.patching import PatchingRun, finite, logits_at, states_at


@dataclass(frozen=True)
class _Rows:
    """Patched rows, in the order in which they join a pass.

    Attributes:
        cell: Where the effect belongs: row of the chunk, column, edge.
        layer, head, sender: The receiver's layer and head, and the sender.
        kind: The number of the receiver's kind in `_KINDS`.
        start: The first changed position.
    """

    cell: Int64[Tensor, "rows 3"]
    layer: Int64[Tensor, " rows"]
    kind: Int64[Tensor, " rows"]
    head: Int64[Tensor, " rows"]
    sender: Int64[Tensor, " rows"]
    start: Int64[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, index: slice | Tensor) -> "_Rows":
        return _Rows(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    @property
    def batch(self) -> Int64[Tensor, " rows"]:
        return self.cell[:, 0]


_KINDS = (*READS, "mlp", "logits")


class PathPasses:
    """The staggered passes of one chunk."""

    def __init__(self, run: PatchingRun, blocks: Blocks, batch_rows: int) -> None:
        self.run, self.engine, self.chunk = run, run.engine, run.chunk
        self.blocks, self.graph, self.batch_rows = blocks, blocks.graph, batch_rows
        self.first = first_position(run)
        self.changes = sender_changes(run, blocks)  # [batch, sender, pos, d_model]
        self.patched = self._patched()  # [batch, column, pos]

    def _patched(self) -> Bool[Tensor, "batch column pos"]:
        """The positions of each column, from the first difference on."""
        chunk = self.chunk
        if chunk.members is not None:
            return chunk.members[:, :, self.first :]
        width = chunk.base.shape[1]
        own = torch.eye(width, dtype=torch.bool, device=chunk.base.device)
        return own[:, self.first :].expand(len(chunk.base), -1, -1)

    def effects(self, cells: Int64[Tensor, "rows 3"]) -> Float[Tensor, " rows"]:
        """The effect of each cell (row of the chunk, column, edge)."""
        result = torch.zeros(len(cells), device=cells.device)
        # Without a change at the patched positions, the patched run is the base run.
        changed = (self.changes != 0).any(-1)  # [batch, sender, pos]
        sender = torch.from_numpy(self.graph.edge_sender).to(cells.device)[cells[:, 2]]
        moved = changed[cells[:, 0], sender] & self.patched[cells[:, 0], cells[:, 1]]  # [rows, pos]
        active = moved.any(-1).nonzero()[:, 0]
        if not len(active):
            return result
        places = torch.tensor(
            [self._place(int(edge)) for edge in cells[active, 2].tolist()], device=cells.device
        )
        start = moved[active].int().argmax(-1) + self.first
        layer, kind, head = places.unbind(1)
        rows = _Rows(cells[active], layer, kind, head, sender[active], start)
        order = torch.argsort(rows.start * (self.graph.n_layers + 1) + rows.layer, stable=True)
        for first in range(0, len(order), self.batch_rows):
            chosen = order[first : first + self.batch_rows]
            chosen = chosen[torch.argsort(rows.layer[chosen], stable=True)]
            for part, metric in halved(chosen, lambda part: (part, self._metric(rows[part]))):
                effect = metric - self.run.base_metric[rows.batch[part]]
                result[active[part]] = effect
        return result

    def _place(self, edge: int) -> tuple[int, int, int]:
        layer, kind, head = self.graph.place(int(self.graph.edge_receiver[edge]))
        return layer, _KINDS.index(kind), head

    def _metric(self, rows: _Rows) -> Float[Tensor, " rows"]:
        """Run one staggered pass over rows sorted by layer."""
        engine, base, layers = self.engine, self.run.base, self.graph.n_layers
        first = int(rows.start.min())
        past = base.past
        assert past is not None
        # A pass needs the number of positions, not the tokens, so one row is enough.
        run = engine.begin(self.chunk.base[:1, first:], past.upto(first) if first else None)
        entries = rows.layer.tolist()
        target = self.chunk.base_target[rows.batch] - first
        x = base.resid[0].new_empty(0, self.chunk.base.shape[1] - first, engine.d_model)
        for layer in range(entries[0], layers):
            # No block follows the last one, so its positions before the first target are not read.
            since = int(target.min()) if layer == layers - 1 else 0
            if len(x):
                x = engine.block(layer, x, run, rows=rows.batch[: len(x)], since=since)
            joining = [i for i in range(len(x), len(entries)) if entries[i] == layer]
            if joining:
                new = rows[joining[0] : joining[-1] + 1]
                joined = self._joining(layer, new, run, first)[:, since:]
                x = torch.cat([x, joined]) if len(x) else joined
        direct = rows[len(x) :]  # edges into the logits change the last residual only
        since = int(target.min())
        if len(direct):
            last = base.resid[layers][direct.batch, first:] + self._sent(direct, first)
            x = torch.cat([x, last[:, since:]]) if len(x) else last[:, since:]
        read = states_at(x, target - since, rows.batch, self.chunk.readings)
        metric = self.run.measure(logits_at(engine, read), rows.batch)
        return finite(metric, self.chunk.indices[rows.batch], "a patched run")

    def _sent(self, rows: _Rows, first: int) -> Float[Tensor, "rows pos d_model"]:
        """The change that each row sends to its receiver: zero outside its column."""
        since = first - self.first
        change = self.changes[rows.batch, rows.sender][:, since:]  # [rows, pos, d_model]
        patched = self.patched[rows.batch, rows.cell[:, 1]][:, since:, None]  # [rows, pos, 1]
        return (change * patched).to(self.run.base.resid[0].dtype)

    def _joining(
        self, layer: int, rows: _Rows, run: Pass, first: int
    ) -> Float[Tensor, "rows pos d_model"]:
        """The output of a block for rows whose receivers are in it; all else is as in the base run.

        Without parallel blocks, attention writes before the MLP reads:

            resid_post = resid_mid + change + MLP(resid_mid + change)   of an edge into a head
            resid_post = resid_mid + MLP(resid_mid + sent)              of an edge into the MLP
        """
        base = self.run.base
        into_mlp = rows.kind == _KINDS.index("mlp")
        change = self._sent(rows, first)  # [rows, pos, d_model]: what the MLP's input changes by
        heads = (~into_mlp).nonzero()[:, 0]
        if len(heads):
            change[heads] = self._attention_change(layer, rows[heads], change[heads], run, first)
        before = base.resid[layer + 1][rows.batch, first:]
        after = before + change.masked_fill(into_mlp[:, None, None], 0.0)
        # The MLP of a parallel block reads no head of its own block.
        reading = into_mlp if self.graph.parallel else torch.ones_like(into_mlp)
        reading = reading.nonzero()[:, 0] if self.graph.mlps else reading[:0]
        if len(reading):
            own = base.sites["mlp_out"][layer][rows.batch[reading], first:]
            read = base.resid[layer][rows.batch[reading], first:]
            if not self.graph.parallel:
                read = before[reading] - own  # resid_mid
            after[reading] += self.engine.mlp_out(layer, read + change[reading]) - own
        # Elsewhere, keep the very bits of the base run.
        return torch.where((change != 0).any(-1, keepdim=True), after, before)

    def _attention_change(
        self,
        layer: int,
        rows: _Rows,
        sent: Float[Tensor, "rows pos d_model"],
        run: Pass,
        first: int,
    ) -> Float[Tensor, "rows pos d_model"]:
        """The change of a block's attention when one head (or group) of each row reads a change.

        Heads do not mix before they write, so that one run of the block serves one row of each
        group of heads.
        """
        graph, base = self.graph, self.run.base
        size = graph.n_heads // graph.n_kv_heads
        group = torch.where(rows.kind == 0, rows.head // size, rows.head)
        shared = _shared_runs(rows.batch, group)
        batch = shared.batch
        resid = base.resid[layer]
        changes: dict[str, Change] = {}
        for number, kind in enumerate(READS):
            own = (rows.kind == number).nonzero()[:, 0]
            if len(own):
                head = rows.head[own]
                read = resid[rows.batch[own], first:] + sent[own]
                new = self.blocks.read_by(layer, kind, head, read)
                where = (sent[own] != 0).any(-1)[..., None]  # [own, pos, 1]
                changes[kind] = _replaced(shared.run_of[own], head, new, where)
        z: list[Tensor] = []
        with self.blocks.reading(layer, {**changes, "z": z.append}):
            self.engine.block(layer, resid[batch, first:], run, rows=batch)
        change = z[0] - base.sites["z"][layer][batch, first:]  # [runs, pos, head, d_head]
        of_head = torch.arange(graph.n_heads, device=group.device) // size
        mine = (of_head == group[:, None])[:, None, :, None]  # [rows, 1, head, 1]
        return self.blocks.written_sum(layer, change[shared.run_of] * mine)


@dataclass(frozen=True)
class _SharedRuns:
    """Runs of a block that serve several rows each: the base row of a run, and the run of a row."""

    batch: Int64[Tensor, " runs"]
    run_of: Int64[Tensor, " rows"]


def _shared_runs(batch: Int64[Tensor, " rows"], group: Int64[Tensor, " rows"]) -> _SharedRuns:
    """Assign rows to runs so that the rows of a run share a base row and differ in their group."""
    order = torch.argsort(batch * (int(group.max()) + 1) + group, stable=True)
    key = torch.stack([batch, group], 1)[order]  # [rows, 2], equal keys side by side
    _, counts = torch.unique_consecutive(key, dim=0, return_counts=True)
    begins = (counts.cumsum(0) - counts).repeat_interleave(counts)  # [rows]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - begins  # number among its equals
    runs, run_of = torch.stack([batch, rank], 1).unique(dim=0, return_inverse=True)
    return _SharedRuns(runs[:, 0], run_of)


def _replaced(
    run: Int64[Tensor, " own"],
    head: Int64[Tensor, " own"],
    new: Float[Tensor, "own pos d_head"],
    where: Bool[Tensor, "own pos 1"],
) -> Change:
    """Replace the queries, keys or values of one head in some runs."""

    def replace(activation: Float[Tensor, "runs pos head d_head"]) -> Tensor:
        changed = activation.clone()
        changed[run, :, head] = torch.where(where, new, activation[run, :, head])
        return changed

    return replace
