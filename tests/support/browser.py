"""A page in a headless browser: does it draw, does it answer, does anything stick out?"""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from divergence_lens.plots import export as pictures

WIDTHS = (400, 800, 1600)


def check_in_a_browser(page: Path, folder: Path) -> int:
    """Open a page with figures at three widths; skips where no browser is.

    Nothing is said on its console, every figure draws, has a hover text and keeps its words within
    itself, and nothing else is wider than the page.

    Returns:
        How many figures the page has.
    """
    try:
        pictures.find_browser()
    except pictures.BrowserError as error:
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
    dom, log = pictures.run_browser(
        probe,
        ["--dump-dom", "--allow-file-access-from-files", "--window-size=1700,1000"],
        timeout=400,
    )
    console = [line for line in log.splitlines() if "CONSOLE" in line]
    assert not console
    found = re.search(r"<body>(\[.*\])</body>", dom.decode(), flags=re.DOTALL)
    assert found is not None
    looks: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    for width, seen in zip(WIDTHS, looks, strict=True):
        assert seen["state"] == "drawn"
        assert seen["width"] == width
        assert seen["scroll"] <= seen["width"]
        assert seen["wide"] == []
        assert seen["outside"] == []
        assert all(seen["drawn"])
        assert all(seen["said"])
    return len(looks[0]["drawn"])
