"""The `plot()` methods of results, without importing a higher package.

Results live below `plots` in the order of the packages, so their `plot()` methods look the drawing
function up by name when they are called, as pandas does with its plotting backends. Plotly is
imported then, and not before.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def draw(function: str, result: object, **options: Any) -> "Figure":
    """Draw `result` with `divergence_lens.plots.<function>`.

    Args:
        function: Name of a public function of `divergence_lens.plots`.
        result: Its first argument.
        options: Its keyword arguments.

    Returns:
        The plotly figure.
    """
    plots = importlib.import_module("divergence_lens.plots")
    figure: Figure = getattr(plots, function)(result, **options)
    return figure
