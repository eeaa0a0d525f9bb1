"""Run the notebooks and store their outputs, with a PNG next to every figure.

A plotly figure is drawn by a script in the browser, which GitHub and nbconvert do not run. They
show the PNG instead. It is rendered from the stored figure; the notebooks' code is not changed.

    python notebooks/store.py                                # all notebooks
    python notebooks/store.py notebooks/02_which_layers.ipynb
"""

import base64
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import plotly.graph_objects as go

from divergence_lens.plots import save_figure

PLOTLY = "application/vnd.plotly.v1+json"
WIDTH_MM, DPI = 120.0, 110.0


def main(paths: list[Path]) -> None:
    """Execute each notebook in place and clean up its outputs."""
    for path in paths:
        command = ["jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
        subprocess.run([sys.executable, "-m", *command, str(path)], check=True)  # noqa: S603
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            clean(cell)
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def clean(cell: dict) -> None:
    """Remove timings and warnings from a cell and add a PNG to each figure."""
    cell["metadata"].pop("execution", None)
    if cell["cell_type"] != "code":
        return
    outputs: list[dict] = []
    for output in cell["outputs"]:
        if output.get("name") == "stderr":
            continue
        # Printed text arrives in pieces whose number depends on timing: join them.
        if outputs and output["output_type"] == outputs[-1]["output_type"] == "stream":
            outputs[-1]["text"] += output["text"]
        else:
            outputs.append(output)
    cell["outputs"] = outputs
    for output in outputs:
        figure = output.get("data", {}).get(PLOTLY)
        if figure is not None:
            output["data"]["image/png"] = render(figure)


def render(stored: dict) -> str:
    """Render a figure as base64-encoded PNG."""
    figure = go.Figure({"data": stored["data"], "layout": stored["layout"]})
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "figure.png")
        save_figure(figure, target, width_mm=WIDTH_MM, dpi=DPI)
        return base64.b64encode(target.read_bytes()).decode("ascii")


if __name__ == "__main__":
    folder = Path(__file__).parent
    main([Path(name) for name in sys.argv[1:]] or sorted(folder.glob("*.ipynb")))
