"""Pages with figures: HTML that holds the figures' data and plotly's script.

The script is compressed (under 2 MB) and loaded from no network; the browser unpacks it (Chrome 80,
Safari 16.4, Firefox 113 or newer). It is stored once: in the page, or beside the pages of a folder.
"""

import base64
import functools
import gzip
import os
import re
from collections.abc import Mapping
from html import escape, unescape
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from divergence_lens._utils.storage import write_text
from divergence_lens.plots.fitting import NODE_LETTER, NODE_LINE

Theme = Literal["light", "dark"]
THEMES: dict[Theme, tuple[str, str]] = {
    "light": ("#1F2328", "#FFFFFF"),
    "dark": ("#E6E8EB", "#15181C"),
}
_SCRIPT = "plotly.js"

_TEXT_CSS = """
body { max-width: 60rem; padding: 0 1rem; overflow-wrap: anywhere;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; }
td, th { border-bottom: 1px solid rgba(128, 128, 128, 0.28); }
"""

# The text color of figures follows the page, not the figure's own color.
FIGURE_CSS = """
.dl-plot { width: 100%; position: relative; }
.dl-plot .gtitle, .dl-plot .xtitle, .dl-plot .ytitle, .dl-plot .xtick text, .dl-plot .ytick text,
.dl-plot .legendtext, .dl-plot .annotation-text, .dl-plot .cbtitle text, .dl-plot .cbaxis text
{ fill: var(--ink) !important; }
.dl-plot .modebar { opacity: 0.75; }
.dl-plot p { margin: 1rem; color: var(--quiet, inherit); }
"""

_LOADER = """
// Labels that fit beside each other, as `fitted` in fitting.py chooses them.
const fitNodes = (plot, layout) => {
  const notes = (layout.annotations || []).filter((note) => note.name === "node");
  if (!notes.length) return;
  const {l, r, t, b} = layout.margin;
  const room = [plot.clientWidth - l - r, layout.height - t - b];
  const boxes = [];
  for (const note of notes) {
    const [x, y] = ["x", "y"].map((axis, i) => {
      const [start, end] = layout[`${axis}axis`].range;
      return ((note[axis] - start) / (end - start)) * room[i];
    });
    const half = (NODE_LETTER * note.text.length) / 2;
    note.visible = boxes.every(([x0, y0, half0]) =>
      Math.abs(x - x0) >= half + half0 || Math.abs(y - y0) >= NODE_LINE);
    if (note.visible) boxes.push([x, y, half]);
  }
};
const fitLabels = (plot, layout) => {
  fitNodes(plot, layout);
  const items = layout.meta && layout.meta.items;
  if (!items) return;
  const room = plot.clientWidth - layout.margin.l - layout.margin.r;
  const pixels = (room * items.share) / items.texts.length;
  const chosen = [];
  for (const i of items.order)
    if (chosen.every((other) => Math.abs(i - other) * pixels >= items.letter)) chosen.push(i);
  chosen.sort((a, b) => a - b);
  for (const axis of items.axes) {
    layout[axis].tickvals = chosen;
    layout[axis].ticktext = chosen.map((i) => items.texts[i]);
  }
  for (const note of layout.annotations || []) {
    const place = /^group (\\d+) (\\d+)$/.exec(note.name || "");
    if (place) note.visible = (place[2] - place[1]) * pixels >= 6 * note.text.length;
  }
};
(async () => {
  const plots = [...document.querySelectorAll(".dl-plot")];
  const nonce = document.currentScript && document.currentScript.nonce;
  try {
    const inline = document.getElementById("dl-plotly");
    if (!inline && !self.dlPlotly) throw new Error("the file plotly.js is not beside this page");
    const packed = atob(inline ? inline.textContent : self.dlPlotly);
    const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    if (nonce) script.nonce = nonce;
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    const touch = matchMedia("(pointer: coarse)").matches;
    for (const plot of plots) {
      const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
      if (touch) figure.layout.dragmode = false;
      plot.replaceChildren();
      fitLabels(plot, figure.layout);
      await Plotly.newPlot(plot, figure.data, figure.layout, {
        responsive: true, displaylogo: false,
        modeBarButtons: [["toImage"]],
        toImageButtonOptions: {format: "svg", filename: plot.dataset.figure},
      });
    }
    const fit = () => plots.forEach((plot) => {
      fitLabels(plot, plot.layout);
      Plotly.react(plot, plot.data, plot.layout);
      Plotly.Plots.resize(plot);
    });
    let waiting;
    addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(fit, 200); });
    // A figure in a part that was folded has had no width so far.
    document.addEventListener("toggle", fit, true);
    addEventListener("beforeprint", fit);
    addEventListener("afterprint", fit);
    document.documentElement.dataset.figures = "drawn";
  } catch (error) {
    const words = `This figure could not be drawn (${error.message}).`;
    for (const plot of plots.filter((plot) => !plot.querySelector("svg"))) {
      const line = document.createElement("p");
      line.textContent = words;
      plot.replaceChildren(line);
    }
    document.documentElement.dataset.figures = "failed";
  }
})();
"""


def save_figures(figures: Mapping[str, go.Figure], folder: str | os.PathLike[str]) -> list[Path]:
    """Write figures to one HTML page each, which share one copy of plotly's script.

    Args:
        figures: Figures by name; letters, digits and hyphens of the name form the name of the file.
        folder: The folder. It stays readable without a network if it is moved as a whole.

    Returns:
        The pages, in the order of `figures`.
    """
    folder = Path(folder)
    names = {name: "-".join(re.findall(r"[^\W_]+", name)) for name in figures}
    if len(set(names.values())) < len(names):
        raise ValueError(f"two figures have the same file name: {sorted(names.values())}")
    write_text(folder / _SCRIPT, f'self.dlPlotly = "{_packed_plotly()}";\n')
    pages = []
    for name, figure in figures.items():
        pages.append(folder / f"{names[name]}.html")
        write_text(pages[-1], page(figure, script=_SCRIPT))
    return pages


def figure_title(figure: go.Figure) -> str:
    """Return the title as plain text, for captions and screen readers."""
    text = str(figure.layout.title.text or "figure")
    # Separate the bold lines from the small ones by a full stop.
    text = text.replace("</b><br><span", "</b>. <span").replace("<br>", " ").replace("\u00a0", " ")
    return unescape(re.sub(r"<[^<>]*>", "", text))


def figure_div(figure: go.Figure, name: str) -> str:
    """Return the HTML of one figure with its data; `scripts` makes the page draw it.

    Args:
        figure: The figure.
        name: Letters, digits and hyphens; unique in the page.
    """
    meta = figure.layout.meta or {}
    widest = int(meta.get("widest", 720))
    height = int(figure.layout.height or 420)
    # "<" could end the script element early; JSON reads the escape as the same letter.
    data = str(figure.to_json()).replace("<", "\\u003c")
    return (
        f'<div class="dl-plot" data-figure="{escape(name)}" role="img" '
        f'aria-label="{escape(figure_title(figure))}" '
        f'style="height:{height}px;max-width:{widest}px">'
        "<noscript><p>This figure needs JavaScript.</p></noscript>"
        f'</div><script type="application/json" id="{escape(name)}">{data}</script>'
    )


def scripts(nonce: str = "", *, file: str | None = None) -> str:
    """Return the end of a page with figures: compressed plotly, and the script that draws them.

    Args:
        nonce: Of the page's content security policy.
        file: The file beside the page that holds plotly's script; None stores it in the page.
    """
    mark = f' nonce="{escape(nonce)}"' if nonce else ""
    library = f'<script type="text/plain" id="dl-plotly">{_packed_plotly()}</script>'
    if file is not None:
        library = f'<script{mark} src="{escape(file)}"></script>'
    sizes = f"const NODE_LETTER = {NODE_LETTER}, NODE_LINE = {NODE_LINE};"
    return f"{library}\n<script{mark}>{sizes}{_LOADER}</script>"


def page(
    figure: go.Figure,
    *,
    script: str | None = None,
    title: str = "",
    above: str = "",
    below: str = "",
) -> str:
    """Return a page with one figure.

    Args:
        figure: The figure.
        script: The file beside the page that holds plotly's script; None stores it in the page.
        title: Heading of the page; empty for none, and the figure's title in the browser's tab.
        above: HTML between the heading and the figure. It is not escaped.
        below: HTML after the figure. It is not escaped.
    """
    light, dark = THEMES["light"], THEMES["dark"]
    heading = f"<h1>{escape(title)}</h1>" if title else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title or figure_title(figure))}</title>
<style>
:root {{ --ink: {light[0]}; --paper: {light[1]}; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --ink: {dark[0]}; --paper: {dark[1]}; }}
}}
body {{ margin: 12px; background: var(--paper); color: var(--ink); }}
{_TEXT_CSS if above or below else ""}{FIGURE_CSS}</style>
</head>
<body>
{heading}{above}{figure_div(figure, "figure")}
{below}{scripts(file=script)}
</body>
</html>
"""


@functools.cache
def _packed_plotly() -> str:
    # A fixed time stamp, so that the same figure gives the same file.
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode("ascii")
