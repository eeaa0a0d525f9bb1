"""Figures of results. Each function takes a result and returns a plotly `Figure`.

No function shows or prints anything, or changes global settings. Titles state the measure and the
sample size, and hover texts describe each value. Color-blind readers can distinguish the colors.
Every figure is readable in a column of 80 mm and on light and dark pages. `save_figure` writes
figures to files.
"""

from divergence_lens.plots.agreement import agreement_scatter
from divergence_lens.plots.attention import attention_from, attention_pattern
from divergence_lens.plots.candidates import calibration_curve, candidate_dots
from divergence_lens.plots.circuits import circuit_graph, edge_graph, faithfulness_curves
from divergence_lens.plots.curves import mixing_curves, training_curves
from divergence_lens.plots.effect_lines import cross_patch_margins, layer_profile, layers_by_site
from divergence_lens.plots.effects import effects_by_segment, effects_heatmap, head_grid
from divergence_lens.plots.export import save_figure
from divergence_lens.plots.fitting import without_title
from divergence_lens.plots.labels import CONDITIONS
from divergence_lens.plots.pages import page as figure_page
from divergence_lens.plots.pages import save_figures
from divergence_lens.plots.students import (
    condition_bars,
    dissociation_bars,
    layer_sweep,
    preference_bars,
    transfer_bars,
)
from divergence_lens.plots.teachers import (
    rate_per_teacher,
    teacher_preferences,
    where_divergence_falls,
)
from divergence_lens.plots.tokens import divergence_tokens

__all__ = [
    "CONDITIONS",
    "agreement_scatter",
    "attention_from",
    "attention_pattern",
    "calibration_curve",
    "candidate_dots",
    "circuit_graph",
    "condition_bars",
    "cross_patch_margins",
    "dissociation_bars",
    "divergence_tokens",
    "edge_graph",
    "effects_by_segment",
    "effects_heatmap",
    "faithfulness_curves",
    "figure_page",
    "head_grid",
    "layer_profile",
    "layer_sweep",
    "layers_by_site",
    "mixing_curves",
    "preference_bars",
    "rate_per_teacher",
    "save_figure",
    "save_figures",
    "teacher_preferences",
    "training_curves",
    "transfer_bars",
    "where_divergence_falls",
    "without_title",
]
