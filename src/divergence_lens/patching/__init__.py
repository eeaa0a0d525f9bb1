"""Causal mediation and attribution patching over layers, positions and heads."""

from divergence_lens.patching.agreement import Agreement
from divergence_lens.patching.attention import AttentionPatterns, attention_patterns, head_name
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.corruption import EmbeddingNoise
from divergence_lens.patching.cross import CrossPatch, cross_patch
from divergence_lens.patching.effects import Effects
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.patching.gradients import Method
from divergence_lens.patching.inner_agreements import agreement_row, inner_agreement, inner_cells

__all__ = [
    "Agreement",
    "AttentionPatterns",
    "CrossPatch",
    "Effects",
    "EmbeddingNoise",
    "Method",
    "agreement_row",
    "attention_patterns",
    "attribution_patch",
    "causal_mediation",
    "cross_patch",
    "head_name",
    "inner_agreement",
    "inner_cells",
]
