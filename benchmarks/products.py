"""Record the matrix products of a computation, count their operations, and time them alone."""

import math
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from tables import timed
from torch.utils._python_dispatch import TorchDispatchMode

Shape = tuple[int, ...]
_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm: 0, _ATEN.bmm: 0, _ATEN.addmm: 1, _ATEN.baddbmm: 1}  # the first factor
# Products with packed weights, where this build of torch has them.
_PACKED = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - a public operator
_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001


class Products(TorchDispatchMode):
    """Counts of the matrix products that run inside this context, by their shapes.

    `torch.utils.flop_counter` counts likewise, but it omits attention on a CPU, and its tracking of
    modules fails on leaves inside a trace.

    Attributes:
        shapes: How often each product ran: ("mm" or "packed", rows, inner, columns), ("bmm", batch,
            rows, inner, columns), or ("attention", passes, batch * heads, queries, keys, d_head). A
            backward pass through attention is five products, so 2.5 forward passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Record a product and run it."""
        del types
        packet = func.overloadpacket
        if packet in _PRODUCTS:
            left, right = args[_PRODUCTS[packet] :][:2]
            *batch, rows, inner = left.shape
            kind = "bmm" if batch else "mm"
            self.shapes[(kind, *batch, rows, inner, right.shape[-1])] += 1
        elif packet is _PACKED:
            inner, columns = args[0].shape[-1], args[1].shape[0]
            self.shapes["packed", args[0].numel() // inner, inner, columns] += 1
        elif packet in {_ATTENTION, _BACKWARD}:
            query, key = args[:2] if packet is _ATTENTION else args[1:3]
            passes = 1.0 if packet is _ATTENTION else 2.5
            rows = query.shape[0] * query.shape[1]
            self.shapes["attention", passes, rows, query.shape[2], key.shape[2], key.shape[3]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def flops(self) -> float:
        """The floating-point operations; of attention, all pairs of positions."""
        return sum(count * _flops(shape) for shape, count in self.shapes.items())

    def seconds(self, dtype: torch.dtype = torch.float32) -> float:
        """Measure the CPU time of these products alone, on random numbers."""
        return sum(count * _seconds(shape, dtype) for shape, count in self.shapes.items())


def _flops(shape: tuple[Any, ...]) -> float:
    if shape[0] == "attention":
        return 4.0 * math.prod(shape[1:])
    return 2.0 * math.prod(shape[1:])


def _seconds(shape: tuple[Any, ...], dtype: torch.dtype) -> float:
    """The time of one product, the best of three measurements."""
    kind, *sizes = shape
    factor, run = 1.0, None  # type: float, Callable[[], Any] | None
    if kind == "attention":
        factor, rows, queries, keys, width = sizes
        query = torch.randn(1, rows, queries, width).to(dtype)
        key = torch.randn(1, rows, keys, width).to(dtype)
        run = lambda: F.scaled_dot_product_attention(query, key, key)  # noqa: E731
    else:
        *batch, rows, inner, columns = sizes
        left = torch.randn(*batch, rows, inner).to(dtype)
        # Weights are stored as [columns, inner].
        right = torch.randn(*batch, columns, inner).to(dtype).mT
        run = lambda: left @ right  # noqa: E731
        if kind == "packed":
            weights = torch.ops.mkldnn._reorder_linear_weight(right.mT, None)  # noqa: SLF001
            run = lambda: _PACKED(left, weights, None, "none", [], "")  # noqa: E731
    repeats = max(1, min(100, int(2e7 / _flops(shape))))

    def repeated() -> None:
        for _ in range(repeats):
            run()

    with torch.inference_mode():
        return factor * min(timed(repeated)[1] for _ in range(3)) / repeats
