"""Low-rank changes, stored as two factors, and the matrix view of a parameter."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from divergence_lens.engine import block_of, canonical


@dataclass(frozen=True)
class Layout:
    """The view of a parameter as one matrix [in, out].

    Attributes:
        kind: "heads in" (TransformerLens's W_O, [head, d_head, d_model]), "heads out" (its W_Q, W_K
            and W_V, [head, d_model, d_head]), "out, in" (`nn.Linear`) or "in, out" (all others).
        shape: The parameter's shape.
    """

    kind: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, parameter: Tensor, owner: nn.Module) -> "Layout":
        """Return the layout of the parameter called `name` of the module `owner`."""
        if parameter.ndim == 3:
            kind = "heads in" if canonical(name).endswith("W_O") else "heads out"
        else:
            kind = "out, in" if isinstance(owner, nn.Linear) else "in, out"
        return cls(kind, tuple(parameter.shape))

    def matrix(self, tensor: Tensor) -> Float[Tensor, "n_in n_out"]:
        """View a tensor of the parameter's shape as one matrix."""
        if self.kind == "heads in":
            return rearrange(tensor, "head d_head d_model -> (head d_head) d_model")
        if self.kind == "heads out":
            return rearrange(tensor, "head n_in d_head -> n_in (head d_head)")
        return tensor.T if self.kind == "out, in" else tensor

    def tensor(self, matrix: Float[Tensor, "n_in n_out"]) -> Tensor:
        """Undo `matrix`."""
        if self.kind == "heads in":
            return rearrange(matrix, "(head d_head) n_out -> head d_head n_out", head=self.shape[0])
        if self.kind == "heads out":
            return rearrange(matrix, "n_in (head d_head) -> head n_in d_head", head=self.shape[0])
        return matrix.T if self.kind == "out, in" else matrix


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether LoRA can train the parameter: a matrix of attention or MLP."""
    # TransformerLens stores attention biases per head, in two dimensions.
    bias = canonical(name).split(".")[-1].startswith("b_")
    return parameter.ndim >= 2 and not bias and block_of(name) is not None


@dataclass(frozen=True, eq=False)
class Factors:
    """The change `scale * down @ up` of one matrix, as LoRA learns it.

    Attributes:
        down: LoRA's A.
        up: LoRA's B.
        scale: LoRA's alpha over its rank.
        layout: The view of the parameter as a matrix.
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
        """Number of columns of `down`."""
        return self.down.shape[1]

    def dense(self) -> Tensor:
        """Compute the change in the parameter's own shape."""
        return self.layout.tensor(self.scale * (self.down @ self.up))  # [in, out] -> its shape

    def square(self) -> float:
        """Sum of squares of the change, from [rank, rank] matrices.

        With D = down, U = up: ||s D U||^2 = s^2 tr(U^T D^T D U) = s^2 sum((D^T D) * (U U^T)).
        """
        down, up = self.down.double(), self.up.double()
        # Rounding can leave a sum near zero below it.
        return max(0.0, self.scale**2 * float(((down.T @ down) * (up @ up.T)).sum()))

    def scaled(self, factor: float) -> "Factors":
        """Multiply the change by `factor`."""
        return replace(self, scale=self.scale * factor)

    def plus(self, other: "Factors") -> "Factors":
        """Add two changes of one matrix: `[A A'] [s B; s' B']`. The ranks add up."""
        return Factors(
            torch.cat([self.down, other.down], 1),  # [in, rank + rank']
            torch.cat([self.scale * self.up, other.scale * other.up]),  # [rank + rank', out]
            1.0,
            self.layout,
        )


class LowRankTensors(Mapping[str, Tensor]):
    """Changes by parameter name, each computed from its factors when it is read.

    The factors of a large model are thousands of times smaller than the matrices they change.
    """

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self.factors = dict(factors)

    def __getitem__(self, name: str) -> Tensor:
        """Return the change of the parameter called `name`, in its shape."""
        return self.factors[name].dense()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.factors)

    def __len__(self) -> int:
        """Return the number of changed parameters."""
        return len(self.factors)

    def plus(self, other: "LowRankTensors") -> "LowRankTensors":
        """Add other changes, still as factors."""
        total = dict(self.factors)
        for name, change in other.factors.items():
            total[name] = total[name].plus(change) if name in total else change
        return LowRankTensors(total)

    def as_stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the JSON data that `from_stored` reads."""
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
        """Build the changes from the output of `as_stored`."""
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
