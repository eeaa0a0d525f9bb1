"""Stored notebooks: readable without running them, with text that matches their outputs.

`make notebooks` runs them; these tests read the stored outputs, which `notebooks/store.py` writes.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PLOTLY = "application/vnd.plotly.v1+json"
ENCODED = {"bdata", "image/png"}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text(encoding="utf-8"))


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """All code cells but the one that installs the library, which `make notebooks` skips."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [cell for cell in cells if "skip-execution" not in cell["metadata"].get("tags", ())]


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def strings(value: Any) -> list[str]:
    """All strings in a JSON value except encoded data."""
    if isinstance(value, dict):
        return [s for key, item in value.items() if key not in ENCODED for s in strings(item)]
    if isinstance(value, list):
        return [s for item in value for s in strings(item)]
    return [value] if isinstance(value, str) else []


def heatmap_numbers(figure: dict[str, Any]) -> list[str]:
    """The numbers shown in the cells of a heatmap."""
    numbers = []
    for trace in figure["data"]:
        if trace.get("texttemplate") == "%{z:.2f}":
            values = np.frombuffer(base64.b64decode(trace["z"]["bdata"]), trace["z"]["dtype"])
            numbers += [f"{value:.2f}" for value in values]
    return numbers


def test_there_are_notebooks():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07"]


def test_first_cell_names_the_model_and_last_section_the_limits(notebook):
    first = "".join(code_cells(notebook)[0]["source"])
    assert "# Another model: its name or folder here" in first
    assert 'model = dl.load_model("tiny")' in first
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    assert re.findall(r"^## .*", text, flags=re.MULTILINE)[-1].endswith("not")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_in_colab_and_installs_the_library(path):
    """The addresses are those of `project.urls`."""
    project = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^Repository = "(https://github.com/(.+))"$', project, re.MULTILINE)
    assert match is not None
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    colab = f"https://colab.research.google.com/github/{match[2]}/blob/main/notebooks/{path.name}"
    assert f"]({colab})" in "".join(cells[0]["source"])
    install = cells[1]
    assert install["metadata"]["tags"] == ["skip-execution"]
    assert f'%pip install -q "divergence-lens @ git+{match[1]}"' in "".join(install["source"])
    assert (install["execution_count"], install["outputs"]) == (None, [])


def test_every_notebook_is_in_the_documentation():
    pages = (FOLDER.parent / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"notebooks/{path.name}" in pages for path in NOTEBOOKS)


def test_every_stored_figure_has_a_png(notebook):
    figures = [output["data"] for output in outputs(notebook) if PLOTLY in output.get("data", {})]
    assert figures
    for data in figures:
        png = base64.b64decode(data["image/png"])
        assert png.startswith(b"\x89PNG\r\n")
        assert int.from_bytes(png[16:20], "big") >= 400  # pixels across


def test_outputs_come_from_one_run_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output["output_type"] != "error" for output in outputs(notebook))


def test_no_warnings_timings_or_local_paths_are_stored(notebook):
    assert all(output.get("name") != "stderr" for output in outputs(notebook))
    for cell in notebook["cells"]:
        assert "execution" not in cell["metadata"]
        for text in strings(cell.get("outputs", [])):
            assert not re.search(r"(?<![\w<])/(home|root|tmp|work|mnt|Users|var|opt)/", text), text


def test_every_decimal_in_the_text_is_in_an_output(notebook):
    shown = "\n".join(strings(outputs(notebook)))
    figures = [o["data"][PLOTLY] for o in outputs(notebook) if PLOTLY in o.get("data", {})]
    shown += "\n".join(number for figure in figures for number in heatmap_numbers(figure))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"`[^`]*`|arXiv \S+", "", "".join(cell["source"]))
            for number in re.findall(r"-?\d+\.\d+", text):
                assert re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", shown), number
