"""Causal mediation and attribution patching over layers, positions and heads."""

from divergence_lens.patching.agreement import agreement_row, inner_agreement, inner_cells
from divergence_lens.patching.attribution import Method, attribution_patch, attribution_patch_sites
from divergence_lens.patching.corruption import EmbeddingNoise
from divergence_lens.patching.cross import CrossPatch, cross_patch, first_disagreements
from divergence_lens.patching.effects import Agreement, Effects
from divergence_lens.patching.exact import causal_mediation

__all__ = [
    "Agreement",
    "CrossPatch",
    "Effects",
    "EmbeddingNoise",
    "Method",
    "agreement_row",
    "attribution_patch",
    "attribution_patch_sites",
    "causal_mediation",
    "cross_patch",
    "first_disagreements",
    "inner_agreement",
    "inner_cells",
]
