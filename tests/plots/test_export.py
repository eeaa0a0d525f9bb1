"""Figures as files, with and without a browser."""

import base64
import gzip
import json
import re
import stat
import time

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from divergence_lens.plots import bars as bar_charts
from divergence_lens.plots import export as pictures


@pytest.fixture
def figure() -> go.Figure:
    bars = bar_charts.Bars("</script><script>x", ("a", "b"), np.array([0.5, 0.25]), ("one", "two"))
    return bar_charts.bars([bars], what="A <b>title</b>", detail="2 bars", value_title="share")


def needs_browser() -> None:
    try:
        pictures.find_browser()
    except pictures.BrowserError as error:
        pytest.skip(str(error))


def script(tmp_path, text: str) -> str:
    program = tmp_path / "browser"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def test_the_page_holds_plotly_once_and_the_figure_unharmed(figure, tmp_path):
    before = figure.to_json()
    (page,) = pictures.save_figure(figure, tmp_path / "new" / "bars.html")
    assert figure.to_json() == before
    text = page.read_text()
    assert page.stat().st_size < 2.5e6
    (packed,) = re.findall(r'id="dl-plotly">([^<]*)<', text)
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    (data,) = re.findall(r'<script type="application/json" id="figure">(.*?)</script>', text)
    assert json.loads(data) == json.loads(before)
    # Nothing is loaded from anywhere.
    assert not re.search(r"""(?:src|href)\s*=|@import|url\(""", text.replace(packed, ""))


def test_a_name_without_an_ending_gives_the_page(figure, tmp_path):
    assert pictures.save_figure(figure, tmp_path / "bars") == [tmp_path / "bars.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars.html"]


def test_other_endings_are_refused_before_anything_is_written(figure, tmp_path):
    with pytest.raises(ValueError, match=r"'\.jpg'; write \.html, \.png, \.svg or \.pdf"):
        pictures.save_figure(figure, tmp_path / "bars.jpg")
    assert not list(tmp_path.iterdir())


def test_without_a_browser_there_is_one_sentence_and_the_page(figure, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nothing"))
    with pytest.warns(UserWarning, match="bars.png was not drawn, because BROWSER_PATH is") as said:
        written = pictures.save_figure(figure, tmp_path / "bars.png")
    assert len(said) == 1
    assert written == [tmp_path / "bars.html"]
    monkeypatch.delenv("BROWSER_PATH")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(pictures, "_BROWSER_FILES", ())
    with pytest.warns(UserWarning, match="no Chrome, Chromium or Edge was found"):
        pictures.save_figure(figure, tmp_path / "bars.svg")


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("sleep 60 & sleep 60", "did not finish within 1 seconds"),
        ("exit 3", "ended with status 3"),
        ("echo nothing", "drew nothing"),
    ],
)
def test_a_browser_that_hangs_or_fails_is_given_up(figure, tmp_path, monkeypatch, does, says):
    monkeypatch.setenv("BROWSER_PATH", script(tmp_path, does))
    started = time.monotonic()
    with pytest.warns(UserWarning, match=says):
        written = pictures.save_figure(figure, tmp_path / "bars.png", timeout=1)
    assert time.monotonic() - started < 20
    assert [path.name for path in written] == ["bars.html"]


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<svg"), ("pdf", b"%PDF")]
)
def test_pictures_are_drawn_at_80_mm(figure, tmp_path, ending, start):
    needs_browser()
    page, picture = pictures.save_figure(
        figure, tmp_path / f"bars.{ending}", theme="dark", dpi=192, timeout=300
    )
    content = picture.read_bytes()
    assert content.startswith(start)
    height = figure.layout.height
    if ending == "png":
        size = np.frombuffer(content[16:24], dtype=">u4").tolist()
        assert size == [604, 2 * height]
    elif ending == "svg":
        assert b'width="302"' in content
        assert b"A &#60;b&#62;title&#60;/b&#62;" in content
    else:
        # Points are 1/72 inch, pixels 1/96.
        (box,) = set(re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", content))
        assert [float(side) for side in box] == pytest.approx([226.5, height * 0.75], abs=1)
    assert page.is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"bars.html", f"bars.{ending}"}


def test_titles_read_as_plain_text(figure):
    assert pictures.figure_title(figure) == "A <b>title</b>. 2 bars"
