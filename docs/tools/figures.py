"""Draw the images of the documentation.

python docs/tools/figures.py             # docs/figures.md, by running the page's own code
python docs/tools/figures.py --smollm2   # the home page's picture, on SmolLM2-135M-Instruct

They are drawn without a browser, so that every machine draws the same.
"""

import argparse
import functools
import os
import re
from pathlib import Path

import divergence_lens as dl
from divergence_lens import plots

DOCS = Path(__file__).resolve().parents[1]
IMAGES = DOCS / "images"
QUESTION = "Answer in one word: what is the capital of {}?"


def draw_page() -> None:
    """Run the code of figures.md in the folder of its images; delete images it does not show."""
    text = (DOCS / "figures.md").read_text(encoding="utf-8")
    folder = IMAGES / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        exec(block, namespace)  # noqa: S102 - the page's own code
    shown = set(re.findall(r"images/figures/([\w-]+\.png)", text))
    for path in folder.iterdir():
        if path.name not in shown:
            path.unlink()


def draw_capitals() -> None:
    """Draw where a model keeps the country until it names the capital."""
    pairs = dl.Pairs.from_prompts(
        model := dl.load_model("smollm2"),
        clean=[QUESTION.format("France")],
        corrupted=[QUESTION.format("Italy")],
        answers=["Paris"],
        foils=["Rome"],
    )
    names = {"resid_post": "residual stream", "attn_out": "attention", "mlp_out": "MLP"}
    effects = dl.causal_mediation(model, pairs, site=list(names))
    figure = plots.effects_heatmap({names[site]: result for site, result in effects.items()})
    path = IMAGES / "heatmap.png"
    plots.save_figure(figure, path, width_mm=180, dpi=144, title=False, caption=False)


def main() -> None:
    """Draw the images that the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smollm2", action="store_true", help="draw the home page's picture")
    options = parser.parse_args()
    plots.save_figure = functools.partial(plots.save_figure, renderer="matplotlib")
    if options.smollm2:
        draw_capitals()
    else:
        draw_page()


if __name__ == "__main__":
    main()
