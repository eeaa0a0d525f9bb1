"""Copies of weights in the layout that oneDNN's matrix products read fastest on a CPU.

A product of few rows spends much of its time reordering the weights that it reads. Packing reorders
them once: on the CPU of docs/speed.md, products of 16 rows then take 0.6 of the time and those of
500 rows 0.85. A copy costs as much as a few passes, so a matrix is packed once its use would have
paid for it, and only within one call of the library.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cache, cached_property
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

T = TypeVar("T")

# Smaller matrices fit the cache, where packing gains less than its operator costs.
_FEWEST_ENTRIES = 1 << 16
# Packed copies need as much memory as the model; larger models are not copied.
_MOST_BYTES = 1 << 31
# Packing a matrix takes as long as it saves over about this much `packing_gain`.
_COST = 768


def can_pack(model: nn.Module) -> bool:
    """Return whether weights of `model` can be packed: float32 on a CPU, and not too large."""
    parameters = list(model.parameters())
    return (
        all(p.device.type == "cpu" and p.dtype == torch.float32 for p in parameters)
        and not any(p.is_inference() for p in parameters)  # their changes are not counted
        and sum(p.nbytes for p in parameters) <= _MOST_BYTES
        and not torch.is_autocast_enabled("cpu")
        and _operators_work()
    )


@cache
def _operators_work() -> bool:
    """Try the operators once: torch has no public name for them, and may not be built with them."""
    try:
        weight = torch.linspace(-1, 1, 96 * 64).reshape(96, 64).sin()
        x = weight[:5].cos()
        product = _multiplied(x, _reordered(weight), None)
        return bool(torch.allclose(product, F.linear(x, weight), atol=1e-4))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _reordered(weight: Float[Tensor, "d_out d_in"]) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)  # noqa: SLF001
    return packed


def _multiplied(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    function = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001
    out: Tensor = function(x, packed, bias, "none", [], "")
    return out


class PackedMatrix:
    """A packed copy of a frozen matrix, and of its transpose once a gradient needs it."""

    def __init__(self, matrix: Float[Tensor, "d_in d_out"]) -> None:
        self._matrix = matrix
        self.packed = _reordered(matrix.T)

    @cached_property
    def transposed(self) -> Tensor:
        """The packed transpose: grad_x = grad_out @ matrix^T."""
        return _reordered(self._matrix)


class _Product(torch.autograd.Function):
    """x @ matrix + bias, with a gradient of x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
        ctx.matrix = matrix
        return _multiplied(x, matrix.packed, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _multiplied(gradients[0].contiguous(), ctx.matrix.transposed, None), None, None


def packed_matrix(matrix: Float[Tensor, "d_in d_out"]) -> Tensor | PackedMatrix:
    """Return a packed copy; small matrices are returned unchanged."""
    return PackedMatrix(matrix) if matrix.numel() >= _FEWEST_ENTRIES else matrix


def affine(
    x: Float[Tensor, "*batch d_in"], matrix: Tensor | PackedMatrix, bias: Tensor | None
) -> Float[Tensor, "*batch d_out"]:
    """Compute x @ matrix + bias, with a plain matrix [d_in, d_out] or a packed one."""
    if isinstance(matrix, Tensor):
        return F.linear(x, matrix.T, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Product.apply(x, matrix, bias)  # type: ignore[no-untyped-call]
        return out
    return _multiplied(x, matrix.packed, bias)


def packing_gain(rows: int) -> int:
    """Return what packing saves in a product of `rows` rows, in units of `_COST`.

    Each row saves a little, and each product with more than one row saves the reordering.
    """
    return rows + 16 * min(rows, 4)


class Packs(Generic[T]):
    """Packed copies by key, made again when a parameter they were read from has changed."""

    def __init__(self, pack: Callable[[T], T]) -> None:
        self._pack = pack
        self._gains: dict[Hashable, int] = {}
        self._held: dict[Hashable, tuple[list[tuple[int, int, int]], Sequence[Tensor], T]] = {}

    def get(
        self, key: Hashable, parameters: Sequence[Tensor], gain: int, read: Callable[[], T]
    ) -> T:
        """Return the packed value of `read`, or the plain one as long as packing has not paid off.

        Args:
            key: Names the value.
            parameters: Everything that `read` reads.
            gain: What this use would save (see `packing_gain`).
            read: Return the plain value.
        """
        # In-place changes raise a tensor's version. The tensors are held, so that no new one can
        # have the address of an old one.
        state = [(id(p), p.data_ptr(), p._version) for p in parameters]  # noqa: SLF001
        if key in self._held and self._held[key][0] == state:
            return self._held[key][2]
        self._held.pop(key, None)
        self._gains[key] = self._gains.get(key, 0) + gain
        if self._gains[key] < _COST:
            return read()
        del self._gains[key]
        value = self._pack(read())
        self._held[key] = (state, parameters, value)
        return value
