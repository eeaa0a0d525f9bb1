"""Figures as files: HTML, PNG, SVG and PDF.

Images are drawn by plotly with kaleido and Chrome, or by matplotlib without a browser.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go

from divergence_lens._utils.storage import write_text
from divergence_lens.plots.fitting import fitted, rewrapped, without_title
from divergence_lens.plots.pages import THEMES, Theme, page

IMAGE_SUFFIXES = (".png", ".svg", ".pdf")
Renderer = Literal["auto", "kaleido", "matplotlib"]


def save_figure(
    figure: go.Figure,
    path: str | os.PathLike[str],
    *,
    theme: Theme = "light",
    width_mm: float = 80.0,
    dpi: float = 300.0,
    title: bool = True,
    caption: bool = True,
    renderer: Renderer = "auto",
) -> Path:
    """Write a figure to an image, or to a page that loads nothing.

    Args:
        figure: The figure; it is not changed.
        path: The file. `.html` (or no suffix) writes a page; `.png`, `.svg` and `.pdf` write an
            image, for which `pip install 'divergence-lens[images]'` is needed.
        theme: Colors of the image; a page follows the reader's own setting.
        width_mm: Width of the image in millimeters: 80 for a column, 180 for a page. Labels that
            do not fit beside each other are thinned.
        dpi: Dots per inch of a PNG.
        title: Whether the figure has its title.
        caption: Whether the figure has the lines below the title.
        renderer: "kaleido" (plotly, which needs Chrome), "matplotlib" (no browser), or "auto", the
            first that works.

    Returns:
        The file.

    Raises:
        ValueError: If the suffix or the renderer is none of these.
        RuntimeError: If the image cannot be drawn on this machine; nothing is written then.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in {*IMAGE_SUFFIXES, ".html", ""}:
        raise ValueError(f"{path} ends in {suffix!r}; write .html, .png, .svg or .pdf")
    if renderer not in ("auto", "kaleido", "matplotlib"):
        raise ValueError(f"renderer is {renderer!r}; it is 'auto', 'kaleido' or 'matplotlib'")
    shown = without_title(figure, title=title, caption=caption)
    if suffix in IMAGE_SUFFIXES:
        width = round(width_mm / 25.4 * 96)  # CSS pixels: 96 to the inch
        ready = themed(fitted(rewrapped(shown, width), width), theme)
        image = _image(ready, path, width=width, dpi=dpi, renderer=renderer)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, image)
        return path
    path = path.with_suffix(".html")
    write_text(path, page(shown))
    return path


def _image(figure: go.Figure, path: Path, *, width: int, dpi: float, renderer: Renderer) -> bytes:
    """Draw an image with plotly, or with matplotlib where kaleido or Chrome is missing."""
    kind = path.suffix.lower()[1:]
    height = int(figure.layout.height or 420)
    reason = "kaleido was not asked for"
    if renderer != "matplotlib":
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
    if renderer == "kaleido":
        raise RuntimeError(f"{path.name} was not drawn: {reason}; {advice}")
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
    ink, paper = THEMES[theme]
    copy = go.Figure(figure)
    return copy.update_layout(font_color=ink, paper_bgcolor=paper)


def _write(path: Path, content: bytes) -> None:
    """Write an image atomically."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
