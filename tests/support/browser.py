"""A page in a headless browser: does it draw, does it answer, does anything stick out?"""

import contextlib
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (400, 800, 1600)
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


class BrowserError(RuntimeError):
    """There is no browser, or it failed."""


def find_browser() -> str:
    """The path of a Chrome, Chromium or Edge.

    Raises:
        BrowserError: If there is none.
    """
    chosen = os.environ.get("BROWSER_PATH")
    if chosen:
        path = shutil.which(chosen)
        if path is None:
            raise BrowserError(f"BROWSER_PATH is {chosen!r}, which is no program on this machine")
        return path
    for name in (*_BROWSERS, *_BROWSER_FILES):
        path = shutil.which(name)
        if path is not None:
            return path
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
            process = subprocess.Popen(
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


def check_in_a_browser(page: Path, folder: Path) -> int:
    """Open a page with figures at three widths; skip where there is no browser.

    Check that its console is empty, that every figure draws, has a hover text and contains its own
    text, and that nothing is wider than the page.

    Returns:
        How many figures the page has.
    """
    try:
        find_browser()
    except BrowserError as error:
        pytest.skip(str(error))
    frames = "".join(
        f'<iframe src="{page.as_uri()}" style="width:{width}px;height:900px"></iframe>'
        for width in WIDTHS
    )
    probe = folder / "probe.html"
    probe.write_text(f"""<!doctype html><meta charset="utf-8"><body>{frames}<script>
    const look = (frame) => {{
      const page = frame.contentDocument, root = page.documentElement;
      const edge = root.clientWidth;
      const inside = (node) => node.closest(".scroll, .block, .unseen, .skip, svg, thead");
      const wide = [...page.body.querySelectorAll("*")].filter(
        (node) => !inside(node) && node.getBoundingClientRect().right > edge + 1);
      const plots = [...page.querySelectorAll(".dl-plot")];
      const said = plots.map((plot) => {{
        const curve = plot.data.findIndex((trace) => trace.hoverinfo === "text");
        const heat = plot.data[curve].type === "heatmap";
        const at = heat ? {{xval: 0, yval: 1}} : [{{curveNumber: curve, pointNumber: 0}}];
        frame.contentWindow.Plotly.Fx.hover(plot, at);
        return plot.querySelector(".hoverlayer").textContent;
      }});
      return {{state: root.dataset.figures, width: edge, scroll: root.scrollWidth,
        wide: wide.map((node) => node.outerHTML.slice(0, 80)), said,
        drawn: plots.map((plot) => plot.querySelectorAll("svg.main-svg").length > 0),
        outside: plots.map((plot) => [...plot.querySelectorAll("svg text")].filter((text) =>
          text.getBoundingClientRect().right > plot.getBoundingClientRect().right + 1)
          .map((text) => text.textContent)).flat()}};
    }};
    const wait = () => {{
      const frames = [...document.querySelectorAll("iframe")];
      if (frames.some((frame) => !frame.contentDocument.documentElement.dataset.figures))
        return setTimeout(wait, 50);
      document.body.textContent = JSON.stringify(frames.map(look));
    }};
    addEventListener("load", wait);
    </script>""")
    dom, log = run_browser(
        probe,
        ["--dump-dom", "--allow-file-access-from-files", "--window-size=1700,1000"],
        timeout=400,
    )
    console = [line for line in log.splitlines() if "CONSOLE" in line]
    assert not console
    match = re.search(r"<body>(\[.*\])</body>", dom.decode(), flags=re.DOTALL)
    assert match is not None
    looks: list[dict[str, Any]] = json.loads(html.unescape(match[1]))
    for width, seen in zip(WIDTHS, looks, strict=True):
        assert seen["state"] == "drawn"
        assert seen["width"] == width
        assert seen["scroll"] <= seen["width"]
        assert seen["wide"] == []
        assert seen["outside"] == []
        assert all(seen["drawn"])
        assert all(seen["said"])
    return len(looks[0]["drawn"])
