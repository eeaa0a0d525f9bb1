"""Figures as files and in pages: HTML, PNG, SVG and PDF.

A page that holds figures also holds plotly's script, once and compressed, so that it needs no
network and stays under 2 MB; the browser unpacks it (Chrome 80, Safari 16.4, Firefox 113 or newer).
Images are drawn by plotly with kaleido and Chrome, or else by matplotlib.
"""

import base64
import functools
import gzip
import os
import re
from html import escape, unescape
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from divergence_lens._utils.storage import write_text

IMAGE_SUFFIXES = (".png", ".svg", ".pdf")
Theme = Literal["light", "dark"]

_THEMES: dict[Theme, tuple[str, str]] = {
    "light": ("#1F2328", "#FFFFFF"),
    "dark": ("#E6E8EB", "#15181C"),
}

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
(async () => {
  const plots = [...document.querySelectorAll(".dl-plot")];
  const nonce = document.currentScript && document.currentScript.nonce;
  try {
    const packed = atob(document.getElementById("dl-plotly").textContent);
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
      await Plotly.newPlot(plot, figure.data, figure.layout, {
        responsive: true, displaylogo: false,
        modeBarButtons: [["toImage"]],
        toImageButtonOptions: {format: "svg", filename: plot.dataset.figure},
      });
    }
    const fit = () => plots.forEach((plot) => Plotly.Plots.resize(plot));
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


def save_figure(
    figure: go.Figure,
    path: str | os.PathLike[str],
    *,
    theme: Theme = "light",
    width_mm: float = 80.0,
    dpi: float = 300.0,
) -> list[Path]:
    """Write a figure to a self-contained HTML page, and to an image if the name asks for one.

    Args:
        figure: The figure; it is not changed.
        path: The file. `.html` (or no suffix) writes the page alone; `.png`, `.svg` and `.pdf`
            write the image and the page beside it. Images need `pip install
            'divergence-lens[images]'`. Plotly draws them if Chrome is installed, otherwise
            matplotlib redraws heatmaps, lines and bars.
        theme: Colors of the image; the page follows the reader's own setting.
        width_mm: Width of the image in millimeters.
        dpi: Dots per inch of a PNG.

    Returns:
        The files written: the page, then the image.

    Raises:
        ValueError: If the suffix is none of these.
        RuntimeError: If the image cannot be drawn on this machine; nothing is written then.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in {*IMAGE_SUFFIXES, ".html", ""}:
        raise ValueError(f"{path} ends in {suffix!r}; write .html, .png, .svg or .pdf")
    image = None
    if suffix in IMAGE_SUFFIXES:
        image = _image(themed(figure, theme), path, width_mm=width_mm, dpi=dpi)
    page = path.with_suffix(".html")
    write_text(page, _page(figure))
    if image is None:
        return [page]
    _write(path, image)
    return [page, path]


def _image(figure: go.Figure, path: Path, *, width_mm: float, dpi: float) -> bytes:
    """Draw an image with plotly, or with matplotlib where kaleido or Chrome is missing."""
    kind = path.suffix.lower()[1:]
    width = round(width_mm / 25.4 * 96)  # CSS pixels: 96 to the inch
    height = int(figure.layout.height or 420)
    reason = "kaleido is not installed"
    if find_spec("kaleido") is not None:
        scale = dpi / 96 if kind == "png" else 1
        try:
            image: bytes = figure.to_image(format=kind, width=width, height=height, scale=scale)
        except (RuntimeError, ValueError, OSError) as error:  # no Chrome, or one that fails
            lines = str(error).strip().splitlines() or [type(error).__name__]
            reason = f"plotly could not draw it ({lines[0]})"
        else:
            return image
    advice = "pip install 'divergence-lens[images]' and Chrome, or write .html"
    if find_spec("matplotlib") is None:
        raise RuntimeError(
            f"{path.name} was not drawn: {reason}, and matplotlib is not installed; {advice}"
        )
    from divergence_lens.plots.matplotlib_images import UnsupportedFigureError, draw_image

    try:
        return draw_image(figure, kind, width=width, height=height, dpi=dpi)
    except UnsupportedFigureError as error:
        raise RuntimeError(f"{path.name} was not drawn: {reason}, and {error}; {advice}") from error


def themed(figure: go.Figure, theme: Theme) -> go.Figure:
    """Return a copy of `figure` with an opaque background and a matching text color."""
    ink, paper = _THEMES[theme]
    copy = go.Figure(figure)
    return copy.update_layout(font_color=ink, paper_bgcolor=paper)


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


def scripts(nonce: str = "") -> str:
    """Return the end of a page with figures: compressed plotly, and the script that draws them."""
    mark = f' nonce="{escape(nonce)}"' if nonce else ""
    return (
        f'<script type="text/plain" id="dl-plotly">{_packed_plotly()}</script>\n'
        f"<script{mark}>{_LOADER}</script>"
    )


def _page(figure: go.Figure) -> str:
    light, dark = _THEMES["light"], _THEMES["dark"]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(figure_title(figure))}</title>
<style>
:root {{ --ink: {light[0]}; --paper: {light[1]}; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --ink: {dark[0]}; --paper: {dark[1]}; }}
}}
body {{ margin: 12px; background: var(--paper); color: var(--ink); }}
{FIGURE_CSS}</style>
</head>
<body>
{figure_div(figure, "figure")}
{scripts()}
</body>
</html>
"""


@functools.cache
def _packed_plotly() -> str:
    # A fixed time stamp, so that the same figure gives the same file.
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode("ascii")


def _write(path: Path, content: bytes) -> None:
    """Write an image atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
