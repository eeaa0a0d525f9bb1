"""The graph of a transformer: which parts write to the residual stream, and which read from it.

The residual stream is a sum, so each input of a part is a sum over the outputs of all parts before
it. One such summand is an *edge*, from a sender to a receiver (Elhage et al. 2021; Wang et al.
2023, arXiv 2211.00593):

    senders    embed; a{layer}.h{head}, the output of a head; m{layer}, the output of an MLP
    receivers  a{layer}.h{head}.q, .k and .v, the inputs of a head; m{layer}; logits

Where queries are grouped (fewer key than query heads), the keys and values of group g are
a{layer}.g{g}.k and .v. All senders of lower layers reach a receiver, and the heads of the same
layer reach its MLP, unless attention and MLP are parallel.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

READS = ("q", "k", "v")


@dataclass(frozen=True)
class Graph:
    """The senders, receivers and edges of a model; two models of the same shape share one.

    Attributes:
        n_layers: The number of blocks.
        n_heads: Query heads of each block.
        n_kv_heads: Key and value heads of each block.
        mlps: Whether blocks have an MLP.
        parallel: Whether the MLP reads the input of its block instead of the attention's output.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlps: bool = True
    parallel: bool = False

    @cached_property
    def senders(self) -> tuple[str, ...]:
        """The names of the senders, in the order in which they write."""
        names = ["embed"]
        for layer in range(self.n_layers):
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names += [f"m{layer}"] * self.mlps
        return tuple(names)

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """The names of the receivers: by layer queries, keys, values, MLP; then the logits."""
        names = []
        for layer in range(self.n_layers):
            for read in READS:
                kind = "h" if read == "q" or self.n_kv_heads == self.n_heads else "g"
                names += [f"a{layer}.{kind}{head}.{read}" for head in range(self.heads(read))]
            names += [f"m{layer}"] * self.mlps
        return (*names, "logits")

    def heads(self, read: str) -> int:
        """The number of heads that have their own queries, keys or values."""
        return self.n_heads if read == "q" else self.n_kv_heads

    @property
    def _senders_per_layer(self) -> int:
        return self.n_heads + self.mlps

    @property
    def _receivers_per_layer(self) -> int:
        return self.n_heads + 2 * self.n_kv_heads + self.mlps

    def heads_from(self, layer: int) -> int:
        """The number of the first head of a layer among the senders."""
        return 1 + layer * self._senders_per_layer

    def reach_mlp(self, layer: int) -> int:
        """The number of senders before a layer's MLP; they are the first ones."""
        return self.heads_from(layer) + (0 if self.parallel else self.n_heads)

    def reading(self, layer: int, read: str) -> slice:
        """The receivers that are the queries, keys or values of a layer."""
        first = layer * self._receivers_per_layer
        first += sum(self.heads(other) for other in READS[: READS.index(read)])
        return slice(first, first + self.heads(read))

    def mlp_receiver(self, layer: int) -> int:
        """The number of a layer's MLP among the receivers."""
        return (layer + 1) * self._receivers_per_layer - 1

    def mlp_sender(self, layer: int) -> int:
        """The number of a layer's MLP among the senders."""
        return self.heads_from(layer + 1) - 1

    def layer_of(self, receiver: int) -> int:
        """The layer of a receiver; `n_layers` for the logits."""
        return receiver // self._receivers_per_layer

    def place(self, receiver: int) -> tuple[int, str, int]:
        """The layer, kind (`q`, `k`, `v`, `mlp` or `logits`) and head of a receiver."""
        layer = self.layer_of(receiver)
        if layer == self.n_layers:
            return layer, "logits", 0
        for read in READS:
            own = self.reading(layer, read)
            if own.start <= receiver < own.stop:
                return layer, read, receiver - own.start
        return layer, "mlp", 0

    @cached_property
    def reach(self) -> Int64[np.ndarray, " receivers"]:
        """For each receiver the number of senders before it."""
        counts = []
        for layer in range(self.n_layers):
            counts += [self.heads_from(layer)] * (self.n_heads + 2 * self.n_kv_heads)
            counts += [self.reach_mlp(layer)] * self.mlps
        return np.array([*counts, len(self.senders)], dtype=np.int64)

    @cached_property
    def offsets(self) -> Int64[np.ndarray, " receivers"]:
        """For each receiver the number of the first edge into it; edges are sorted by receiver."""
        return np.concatenate([[0], np.cumsum(self.reach)[:-1]])

    @cached_property
    def edge_sender(self) -> Int64[np.ndarray, " edges"]:
        """The sender of each edge."""
        return np.concatenate([np.arange(count) for count in self.reach])

    @cached_property
    def edge_receiver(self) -> Int64[np.ndarray, " edges"]:
        """The receiver of each edge."""
        return np.repeat(np.arange(len(self.reach)), self.reach)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """For each sender but `embed` its receivers: a head's q, k and v, or the MLP's input."""
        group = self.n_heads // self.n_kv_heads
        own: list[tuple[int, ...]] = [()]
        for layer in range(self.n_layers):
            for head in range(self.n_heads):
                heads = (head, head // group, head // group)
                reads = zip(READS, heads, strict=True)
                own.append(tuple(self.reading(layer, read).start + h for read, h in reads))
            own += [(self.mlp_receiver(layer),)] * self.mlps
        return tuple(own)

    def __len__(self) -> int:
        """The number of edges."""
        return int(self.reach.sum())

    def __repr__(self) -> str:
        return (
            f"Graph({self.n_layers} layers of {self.n_heads} heads: {len(self.senders)} senders, "
            f"{len(self.receivers)} receivers, {len(self):,} edges)"
        )

    def edge(self, sender: str, receiver: str) -> int:
        """The number of an edge.

        Raises:
            ValueError: There is no such sender or receiver, or the receiver does not come later.
        """
        try:
            row, column = self._sender_numbers[sender], self._receiver_numbers[receiver]
        except KeyError as error:
            raise ValueError(
                f"the model has no node {error.args[0]!r} at this end of the edge {sender!r} -> "
                f"{receiver!r}; senders are embed, a0.h0 (a head) and m0 (an MLP), receivers "
                f"{self.receivers[0]}, {self.receivers[self.n_heads]} (its keys), m0 and logits, "
                f"with {self.n_layers} layers of {self.n_heads} heads"
            ) from error
        if row >= self.reach[column]:
            raise ValueError(
                f"the edge {sender!r} -> {receiver!r} runs backward: {receiver!r} reads the "
                f"residual before {sender!r} writes to it"
            )
        return int(self.offsets[column]) + row

    def edges(self, named: Sequence[tuple[str, str]]) -> Int64[np.ndarray, " edges"]:
        """The numbers of edges given as (sender, receiver).

        Raises:
            ValueError: An entry is no such pair of names, or names an edge that does not exist.
        """
        for entry in named:
            if isinstance(entry, str) or not isinstance(entry, Collection) or len(entry) != 2:
                raise ValueError(
                    f"edges contains {entry!r}; give a list of (sender, receiver), such as "
                    '[("embed", "logits")]'
                )
        return np.array([self.edge(*names) for names in named], dtype=np.int64)

    def names(self, edge: int) -> tuple[str, str]:
        """The sender and the receiver of an edge."""
        return self.senders[self.edge_sender[edge]], self.receivers[self.edge_receiver[edge]]

    @cached_property
    def _sender_numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.senders)}

    @cached_property
    def _receiver_numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.receivers)}

    def matrix(self, chosen: Bool[np.ndarray, " edges"]) -> Bool[np.ndarray, "senders receivers"]:
        """A mask of edges as a matrix of senders by receivers."""
        result = np.zeros((len(self.senders), len(self.receivers)), dtype=bool)
        result[self.edge_sender, self.edge_receiver] = chosen
        return result

    def leading(self, chosen: Bool[np.ndarray, " edges"]) -> Bool[np.ndarray, " senders"]:
        """Whether a path of chosen edges leads from each sender to the logits."""
        matrix = self.matrix(chosen)  # [sender, receiver]
        result = np.zeros(len(self.senders), dtype=bool)
        receivers = np.zeros(len(self.receivers), dtype=bool)
        receivers[-1] = True
        for sender in reversed(range(len(result))):  # senders are sorted by depth
            result[sender] = bool((matrix[sender] & receivers).any())
            if result[sender]:
                receivers[list(self.readers[sender])] = True
        return result

    def to_json(self) -> dict[str, Any]:
        """The attributes, for files."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
