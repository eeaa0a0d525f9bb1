"""Students as small named sets of tensors on top of an unmodified base model."""

from divergence_lens.deltas.delta import Delta, base_fingerprint, reserved, restore_values
from divergence_lens.deltas.low_rank import Factors, Layout, LowRankTensors, is_matrix

__all__ = [
    "Delta",
    "Factors",
    "Layout",
    "LowRankTensors",
    "base_fingerprint",
    "is_matrix",
    "reserved",
    "restore_values",
]
