"""Run the notebooks and store their outputs, with a picture beside every figure.

A figure's own output is drawn by a script in the reader's browser, which GitHub, nbconvert and the
documentation do not run. So each is stored as a PNG too, which they show in its place. The picture
is drawn from the stored figure by Chrome or Chromium; nothing is added to the notebooks' code.

    python notebooks/store.py                                # all of them
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
    """Execute each in place, then tidy what was stored."""
    for path in paths:
        command = ["jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace"]
        subprocess.run([sys.executable, "-m", *command, str(path)], check=True)  # noqa: S603
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            tidy(cell)
        text = json.dumps(notebook, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def tidy(cell: dict) -> None:
    """Take times and warnings out of a cell, and put a picture beside each figure."""
    cell["metadata"].pop("execution", None)
    if cell["cell_type"] != "code":
        return
    kept: list[dict] = []
    for output in cell["outputs"]:
        if output.get("name") == "stderr":
            continue
        # What is printed comes in as many pieces as the clock made of it.
        if kept and output["output_type"] == kept[-1]["output_type"] == "stream":
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    cell["outputs"] = kept
    for output in kept:
        figure = output.get("data", {}).get(PLOTLY)
        if figure is not None:
            output["data"]["image/png"] = picture(figure)


def picture(stored: dict) -> str:
    """The figure as PNG in base64."""
    figure = go.Figure({"data": stored["data"], "layout": stored["layout"]})
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "figure.png")
        if target not in save_figure(figure, target, width_mm=WIDTH_MM, dpi=DPI):
            raise SystemExit("a figure could not be drawn; the warning above says why")
        return base64.b64encode(target.read_bytes()).decode("ascii")


if __name__ == "__main__":
    folder = Path(__file__).parent
    main([Path(name) for name in sys.argv[1:]] or sorted(folder.glob("*.ipynb")))
