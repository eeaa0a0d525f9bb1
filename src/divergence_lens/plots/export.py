"""Figures as files and in pages: HTML always, PNG, SVG and PDF where a browser is at hand.

A page that holds figures holds plotly's script as well, once and compressed, so that it needs no
network and stays under 2 MB; the browser unpacks it (Chrome 80, Safari 16.4, Firefox 113 or newer).
"""

import base64
import contextlib
import functools
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from html import escape, unescape
from pathlib import Path
from typing import Literal
from urllib.parse import unquote_to_bytes

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from divergence_lens._utils.storage import write_text

PICTURES = (".png", ".svg", ".pdf")
Theme = Literal["light", "dark"]

_THEMES: dict[Theme, tuple[str, str]] = {
    "light": ("#1F2328", "#FFFFFF"),
    "dark": ("#E6E8EB", "#15181C"),
}
_BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "msedge",
)
_BROWSER_FILES = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Microsoft/Edge/Application/msedge.exe",
)
_FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--disable-extensions",
    "--disable-sync",
    "--disable-component-update",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
)

# The ink of figures follows the page, whatever color the figure itself was given.
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
    timeout: float = 60.0,
) -> list[Path]:
    """Write a figure to a self-contained HTML page and, if asked for, to a picture beside it.

    Args:
        figure: The figure; it is not changed.
        path: Where to. The ending decides: `.html` (or none) writes the page alone; `.png`, `.svg`
            and `.pdf` write the picture as well, for which a Chrome, Chromium or Edge on this
            machine is used (the one that `BROWSER_PATH` names, if set).
        theme: Ink and paper of the picture; the page follows the reader's own setting.
        width_mm: Width of the picture in millimeters.
        dpi: Dots per inch of a PNG.
        timeout: Seconds after which the browser is given up.

    Returns:
        The files written. Where the picture could not be drawn there is one warning that says why,
        and the page alone.

    Raises:
        ValueError: If the ending is none of these.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (*PICTURES, ".html", ""):
        raise ValueError(f"{path} ends in {suffix!r}; write .html, .png, .svg or .pdf")
    page = path.with_suffix(".html")
    write_text(page, _page(figure))
    if suffix not in PICTURES:
        return [page]
    try:
        picture = _picture(figure, suffix, theme=theme, width_mm=width_mm, dpi=dpi, timeout=timeout)
    except BrowserError as error:
        warnings.warn(
            f"{path.name} was not drawn, because {error}; {page.name} holds the figure",
            stacklevel=2,
        )
        return [page]
    _write(path, picture)
    return [page, path]


def themed(figure: go.Figure, theme: Theme) -> go.Figure:
    """A copy of `figure` with solid paper and the ink that goes with it."""
    ink, paper = _THEMES[theme]
    copy = go.Figure(figure)
    return copy.update_layout(font_color=ink, paper_bgcolor=paper)


def figure_title(figure: go.Figure) -> str:
    """The title as plain text, for captions and for those who cannot see the figure."""
    text = str(figure.layout.title.text or "figure")
    # Where the bold lines end and the small ones begin, a full stop.
    text = text.replace("</b><br><span", "</b>. <span").replace("<br>", " ").replace("\u00a0", " ")
    return unescape(re.sub(r"<[^<>]*>", "", text))


def figure_div(figure: go.Figure, name: str) -> str:
    """The place of a figure in a page, with its data; `scripts` makes the page draw it.

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
    """What a page with figures ends with: plotly, compressed, and the few lines that draw."""
    mark = f' nonce="{escape(nonce)}"' if nonce else ""
    return (
        f'<script type="text/plain" id="dl-plotly">{_packed_plotly()}</script>\n'
        f"<script{mark}>{_LOADER}</script>"
    )


class BrowserError(RuntimeError):
    """No browser, or one that did not do what was asked."""


def find_browser() -> str:
    """The path of a Chrome, Chromium or Edge.

    Raises:
        BrowserError: If there is none.
    """
    chosen = os.environ.get("BROWSER_PATH")
    if chosen:
        found = shutil.which(chosen)
        if found is None:
            raise BrowserError(f"BROWSER_PATH is {chosen!r}, which is no program on this machine")
        return found
    for name in (*_BROWSERS, *_BROWSER_FILES):
        found = shutil.which(name)
        if found is not None:
            return found
    raise BrowserError(
        "no Chrome, Chromium or Edge was found (install one, or let BROWSER_PATH name it)"
    )


def run_browser(
    page: Path, arguments: Sequence[str], *, timeout: float = 60.0
) -> tuple[bytes, str]:
    """Open a page in a headless browser that touches no profile of the user.

    Args:
        page: The file to open.
        arguments: Such as `--dump-dom` or `--screenshot=...`.
        timeout: Seconds after which it and its children are ended.

    Returns:
        What it wrote to its output, and what it logged, the page's console included.

    Raises:
        BrowserError: If there is no browser, or it failed or took too long.
    """
    browser = find_browser()
    # Chrome's sandbox refuses the superuser, who is who runs most containers.
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        out, log = Path(folder, "out"), Path(folder, "log")
        command = [
            browser,
            *_FLAGS,
            *(["--no-sandbox"] if root else []),
            f"--user-data-dir={folder}/profile",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
            *arguments,
            page.absolute().as_uri(),
        ]
        # Into files, not pipes: a child that outlives the browser would keep a pipe open.
        with out.open("wb") as stdout, log.open("wb") as stderr:
            process = subprocess.Popen(  # noqa: S603 (a browser that the user installed or named)
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise BrowserError(
                    f"{Path(browser).name} did not finish within {timeout:g} seconds"
                ) from None
            finally:
                _end(process)
        if code != 0:
            raise BrowserError(f"{Path(browser).name} ended with status {code}")
        return out.read_bytes(), log.read_text(encoding="utf-8", errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the browser and what it started."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _picture(
    figure: go.Figure, suffix: str, *, theme: Theme, width_mm: float, dpi: float, timeout: float
) -> bytes:
    find_browser()
    width = round(width_mm / 25.4 * 96)
    height = int(figure.layout.height or 420)
    drawn = themed(figure, theme).update_layout(width=width, height=height)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder, "figure.html")
        Path(folder, "plotly.js").write_text(get_plotlyjs(), encoding="utf-8")
        data = str(drawn.to_json()).replace("<", "\\u003c")
        options = json.dumps(
            {
                "format": suffix[1:] if suffix != ".pdf" else "svg",
                "width": width,
                "height": height,
                "scale": dpi / 96 if suffix == ".png" else 1,
            }
        )
        # The page replaces itself by the picture: as its address in text, or to be printed.
        end = (
            'document.body.innerHTML = "<img src=\'" + address.replace(/\'/g, "%27") + "\'>"'
            if suffix == ".pdf"
            else "document.body.textContent = address"
        )
        page.write_text(
            f"""<!doctype html><meta charset="utf-8">
<style>@page {{ size: {width}px {height}px; margin: 0 }} body {{ margin: 0 }}
img {{ display: block; width: {width}px; height: {height}px }}</style>
<script src="plotly.js"></script><body><div id="plot"></div>
<script type="application/json" id="data">{data}</script><script>
const figure = JSON.parse(document.getElementById("data").textContent);
Plotly.newPlot("plot", figure.data, figure.layout)
  .then((plot) => Plotly.toImage(plot, {options}))
  .then((address) => {{ {end}; }});
</script></body>""",
            encoding="utf-8",
        )
        if suffix == ".pdf":
            target = Path(folder, "figure.pdf")
            run_browser(
                page, [f"--print-to-pdf={target}", "--no-pdf-header-footer"], timeout=timeout
            )
            if not target.is_file():
                raise BrowserError("the browser printed nothing")
            return target.read_bytes()
        dom, _ = run_browser(page, ["--dump-dom"], timeout=timeout)
    marker = b"data:image/"
    start, stop = dom.rfind(marker), dom.rfind(b"</body>")
    if start < 0:
        raise BrowserError("the browser drew nothing")
    head, _, body = dom[start:stop].strip().partition(b",")
    return base64.b64decode(body) if b"base64" in head else unquote_to_bytes(body)


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
    """Write a picture whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
