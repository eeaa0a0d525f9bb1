"""Edges between the parts of a model, path patching, circuits and their faithfulness."""

from divergence_lens.circuits.circuit import Circuit
from divergence_lens.circuits.edges import EdgeMethod, edge_scores
from divergence_lens.circuits.graph import Graph
from divergence_lens.circuits.measures import SHARES, faithfulness, faithfulness_curve
from divergence_lens.circuits.paths import path_patch
from divergence_lens.circuits.result import Faithfulness
from divergence_lens.circuits.scores import EdgeScores

__all__ = [
    "SHARES",
    "Circuit",
    "EdgeMethod",
    "EdgeScores",
    "Faithfulness",
    "Graph",
    "edge_scores",
    "faithfulness",
    "faithfulness_curve",
    "path_patch",
]
