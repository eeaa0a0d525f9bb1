"""Patch layers, positions and heads, exactly or approximately, and read attention patterns."""

from divergence_lens.patching.ablations import ablation_of
from divergence_lens.patching.agreement import (
    Agreement,
    agreement_from_json,
    agreement_of_cells,
    agreement_to_json,
)
from divergence_lens.patching.attention import AttentionPatterns, attention_patterns, head_name
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.cells import Span
from divergence_lens.patching.corruption import Corruption, EmbeddingNoise
from divergence_lens.patching.cross import CrossPatch, cross_patch
from divergence_lens.patching.effects import Direction, Effects
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.patching.gradients import Method
from divergence_lens.patching.inner_agreements import agreement_row, inner_agreement, inner_cells
from divergence_lens.patching.metrics import Metric, finite
from divergence_lens.patching.request import PatchingRequest, validate
from divergence_lens.patching.runner import patching_run
from divergence_lens.patching.trace import (
    Chunk,
    PatchingRun,
    groups_of_pairs,
    logits_at,
    states_at,
)

__all__ = [
    "Agreement",
    "AttentionPatterns",
    "Chunk",
    "Corruption",
    "CrossPatch",
    "Direction",
    "Effects",
    "EmbeddingNoise",
    "Method",
    "Metric",
    "PatchingRequest",
    "PatchingRun",
    "Span",
    "ablation_of",
    "agreement_from_json",
    "agreement_of_cells",
    "agreement_row",
    "agreement_to_json",
    "attention_patterns",
    "attribution_patch",
    "causal_mediation",
    "cross_patch",
    "finite",
    "groups_of_pairs",
    "head_name",
    "inner_agreement",
    "inner_cells",
    "logits_at",
    "patching_run",
    "states_at",
    "validate",
]
