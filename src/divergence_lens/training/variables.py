"""The optimizer's variables: the parameters themselves, float32 copies, or low-rank factors.

Each kind receives gradients and writes its values into the model's own parameters. The forward pass
is therefore always the model's own, whatever is trained.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor, nn

from divergence_lens.deltas import Factors, Layout, LowRankTensors
from divergence_lens.engine import block_of, canonical
from divergence_lens.models import Model
from divergence_lens.training.shortcuts import has_low_rank_gradients, low_rank_gradients


class Variables(ABC):
    """The tensors that the optimizer updates, and their relation to the model's parameters.

    Attributes:
        parameters: The trained parameters of the model, by name.
        originals: Their values before training.
        values: The tensors that the optimizer updates.
        leaves: The tensors by which the loss is differentiated.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = dict(parameters)
        self.originals = {name: p.detach().clone() for name, p in parameters.items()}
        self.values: list[Tensor] = []
        self.leaves: list[Tensor] = list(self.parameters.values())

    def attached(self) -> AbstractContextManager[object]:
        """Return a context in which the loss is computed, so that gradients reach the leaves."""
        return nullcontext()

    @abstractmethod
    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Set the variables' `.grad` from the gradients of the leaves, in their order."""

    @abstractmethod
    def write(self) -> None:
        """Write the values of the variables into the model's parameters."""

    @abstractmethod
    def differences(self) -> Mapping[str, Tensor]:
        """Compute the change of each parameter since the start, in float32."""


class FullRank(Variables):
    """The parameters themselves, or in half precision float32 copies, rounded when written."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(parameters)
        self._masters = any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters.values())
        # Detached tensors share the parameters' memory, but not their .grad, which is left alone.
        self.values = [
            p.detach().float() if self._masters else p.detach() for p in parameters.values()
        ]

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Set the gradients, in the type of the values."""
        for value, gradient in zip(self.values, gradients, strict=True):
            value.grad = None if gradient is None else gradient.to(value.dtype)

    @torch.no_grad()
    def write(self) -> None:
        """Round the float32 copies into the parameters; without copies there is nothing to do."""
        if self._masters:
            for p, value in zip(self.parameters.values(), self.values, strict=True):
                p.copy_(value)

    def differences(self) -> dict[str, Tensor]:
        """Subtract the original values."""
        pairs = zip(self.originals.items(), self.values, strict=True)
        return {name: (v - o).float() for (name, o), v in pairs}


class LowRank(Variables):
    """LoRA (Hu et al., arXiv 2106.09685): each matrix W becomes W + (alpha / rank) A B.

    A is drawn as in peft, B starts at zero. The sum is written into W before each step, which gives
    the same numbers as a separate branch, for any model class. If W is the weight of a linear
    layer, its backward pass computes the gradients of A and B directly. Otherwise they follow from
    the gradient G of W by the chain rule, with s = alpha / rank: dL/dA = s G B^T, dL/dB = s A^T G.
    Attention matrices that TransformerLens stores per head share one A over all heads, as in
    Hugging Face's layout.
    """

    def __init__(
        self,
        model: Model,
        parameters: Mapping[str, nn.Parameter],
        *,
        rank: int,
        alpha: float,
        seed: int,
        direct: bool = True,
    ) -> None:
        super().__init__(parameters)
        owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
        generator = torch.Generator().manual_seed(seed)
        self._scale = alpha / rank
        self._layouts = [Layout.of(n, p, owners[id(p)]) for n, p in parameters.items()]
        self._base = [  # [in, out] each
            layout.matrix(o.float())
            for layout, o in zip(self._layouts, self.originals.values(), strict=True)
        ]
        names = list(parameters)
        starts: dict[str, Tensor] = {}
        # In an order that both model classes share, so that they train the same student. As in peft
        # (kaiming_uniform_ with a = sqrt(5)), A is uniform in +- 1 / sqrt(n_in).
        for name in sorted(names, key=lambda n: (block_of(n) or 0, canonical(n))):
            n_in = self._base[names.index(name)].shape[0]
            uniform = 2 * torch.rand(n_in, rank, generator=generator) - 1  # [in, rank]
            starts[name] = uniform / n_in**0.5
        for name, base in zip(names, self._base, strict=True):
            up = torch.zeros(rank, base.shape[1], device=base.device)  # [rank, out]: no change yet
            self.values += [starts[name].to(base.device), up]
        self._linear = [
            owner if direct and has_low_rank_gradients(owner) else None
            for owner in (owners[id(p)] for p in parameters.values())
        ]
        self.leaves = []
        for i, (linear, p) in enumerate(zip(self._linear, parameters.values(), strict=True)):
            self.leaves += [p] if linear is None else self.factors(i)
        for leaf in self.leaves:
            leaf.requires_grad_(True)

    def attached(self) -> AbstractContextManager[object]:
        """Let the linear layers compute the gradients of their factors."""
        stack = ExitStack()
        for i, linear in enumerate(self._linear):
            if linear is not None:
                stack.enter_context(low_rank_gradients(linear, *self.factors(i), self._scale))
        return stack

    @torch.no_grad()
    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Set the gradients of the factors, by the chain rule where W has the gradient."""
        of_leaves = iter(gradients)
        for i, (layout, linear) in enumerate(zip(self._layouts, self._linear, strict=True)):
            down, up = self.factors(i)
            first = next(of_leaves)
            if linear is not None:
                down.grad, up.grad = first, next(of_leaves)
                continue
            if first is None:
                down.grad = up.grad = None
                continue
            gradient = layout.matrix(first.float())  # [in, out]
            down.grad = self._scale * (gradient @ up.T)  # [in, rank]
            up.grad = self._scale * (down.T @ gradient)  # [rank, out]

    @torch.no_grad()
    def write(self) -> None:
        """Write W + s A B into each parameter."""
        for i, (layout, p) in enumerate(zip(self._layouts, self.parameters.values(), strict=True)):
            p.copy_(layout.tensor(self._base[i] + self._change(i)))

    def factors(self, i: int) -> tuple[Tensor, Tensor]:
        """Return A [in, rank] and B [rank, out] of the `i`-th parameter, not copied."""
        return self.values[2 * i], self.values[2 * i + 1]

    def _change(self, i: int) -> Tensor:
        down, up = self.factors(i)
        return self._scale * (down @ up)  # [in, out]

    def differences(self) -> LowRankTensors:
        """Return copies of the factors."""
        factors: dict[str, Factors] = {}
        for i, (name, layout) in enumerate(zip(self.parameters, self._layouts, strict=True)):
            down, up = self.factors(i)
            factors[name] = Factors(down.detach().clone(), up.detach().clone(), self._scale, layout)
        return LowRankTensors(factors)
