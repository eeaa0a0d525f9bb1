"""Changes of low rank, kept as their two factors, and how a parameter is read as one matrix."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from divergence_lens.engine import block_of, canonical


@dataclass(frozen=True)
class Layout:
    """How a parameter is read as one matrix [in, out].

    Attributes:
        kind: "heads in" (TransformerLens's W_O, [head, d_head, d_model]), "heads out" (its W_Q, W_K
            and W_V, [head, d_model, d_head]), "out, in" (`nn.Linear`) or "in, out" (all others).
        shape: The parameter's shape.
    """

    kind: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, parameter: Tensor, owner: nn.Module) -> "Layout":
        """The layout of the parameter called `name`, which belongs to the module `owner`."""
        if parameter.ndim == 3:
            kind = "heads in" if canonical(name).endswith("W_O") else "heads out"
        else:
            kind = "out, in" if isinstance(owner, nn.Linear) else "in, out"
        return cls(kind, tuple(parameter.shape))

    def matrix(self, tensor: Tensor) -> Float[Tensor, "n_in n_out"]:
        """A tensor of the parameter's shape as one matrix."""
        if self.kind == "heads in":
            return tensor.flatten(0, 1)
        if self.kind == "heads out":
            return tensor.transpose(0, 1).flatten(1)
        return tensor.T if self.kind == "out, in" else tensor

    def tensor(self, matrix: Float[Tensor, "n_in n_out"]) -> Tensor:
        """The way back from `matrix`."""
        if self.kind == "heads in":
            return matrix.reshape(self.shape)
        if self.kind == "heads out":
            heads, n_in, d_head = self.shape
            return matrix.reshape(n_in, heads, d_head).transpose(0, 1)
        return matrix.T if self.kind == "out, in" else matrix


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether LoRA can act on it: a matrix of attention or MLP."""
    # TransformerLens keeps biases per head, in two dimensions.
    bias = canonical(name).split(".")[-1].startswith("b_")
    return parameter.ndim >= 2 and not bias and block_of(name) is not None


@dataclass(frozen=True, eq=False)
class Factors:
    """The change `scale * down @ up` of one matrix, as LoRA learns it.

    Attributes:
        down: LoRA's A.
        up: LoRA's B.
        scale: LoRA's alpha over its rank.
        layout: How the parameter is read as a matrix.
    """

    down: Float[Tensor, "n_in rank"]
    up: Float[Tensor, "rank n_out"]
    scale: float
    layout: Layout

    def __post_init__(self) -> None:
        for name in ("down", "up"):
            value: Tensor = getattr(self, name)
            object.__setattr__(self, name, value.detach().to("cpu", torch.float32))

    @property
    def rank(self) -> int:
        """Columns of `down`."""
        return self.down.shape[1]

    def dense(self) -> Tensor:
        """The change in the parameter's own shape."""
        return self.layout.tensor(self.scale * (self.down @ self.up))

    def square(self) -> float:
        """Sum of squares of the change, without building it."""
        down, up = self.down.double(), self.up.double()
        return max(0.0, self.scale**2 * float(((down.T @ down) * (up @ up.T)).sum()))

    def scaled(self, factor: float) -> "Factors":
        """The change times `factor`."""
        return replace(self, scale=self.scale * factor)

    def plus(self, other: "Factors") -> "Factors":
        """The sum of two changes of one matrix; the ranks add up."""
        return Factors(
            torch.cat([self.down, other.down], 1),
            torch.cat([self.scale * self.up, other.scale * other.up]),
            1.0,
            self.layout,
        )


class LowRankTensors(Mapping[str, Tensor]):
    """Changes by parameter name, each multiplied out when it is asked for.

    LoRA on every matrix of a large model is thousands of times smaller than what it changes.
    """

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self.factors = dict(factors)

    def __getitem__(self, name: str) -> Tensor:
        """The change of the parameter called `name`, in its shape."""
        return self.factors[name].dense()

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self.factors)

    def __len__(self) -> int:
        """How many parameters change."""
        return len(self.factors)

    def plus(self, other: "LowRankTensors") -> "LowRankTensors":
        """The sum, still as factors."""
        total = dict(self.factors)
        for name, more in other.factors.items():
            total[name] = total[name].plus(more) if name in total else more
        return LowRankTensors(total)

    def as_stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON from which `from_stored` makes it again."""
        tensors: dict[str, Tensor] = {}
        for name, factors in self.factors.items():
            tensors |= {f"{name}/down": factors.down, f"{name}/up": factors.up}
        described = {
            name: {"scale": f.scale, "kind": f.layout.kind, "shape": list(f.layout.shape)}
            for name, f in self.factors.items()
        }
        return tensors, described

    @classmethod
    def from_stored(
        cls, tensors: Mapping[str, Tensor], described: Mapping[str, Any]
    ) -> "LowRankTensors":
        """Read what `as_stored` gave."""
        return cls(
            {
                name: Factors(
                    tensors[f"{name}/down"],
                    tensors[f"{name}/up"],
                    float(entry["scale"]),
                    Layout(entry["kind"], tuple(entry["shape"])),
                )
                for name, entry in described.items()
            }
        )
