"""Figures as files: pages, and images drawn by plotly or matplotlib."""

import base64
import gzip
import html
import json
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from divergence_lens import plots
from divergence_lens.plots import bars as bar_charts
from divergence_lens.plots import export
from divergence_lens.plots.fitting import fitted, rewrapped, without_title
from divergence_lens.plots.pages import figure_title, save_figures
from tests.support.figures import FIGURES


@pytest.fixture
def figure() -> go.Figure:
    bars = bar_charts.Bars("</script><script>x", ("a", "b"), np.array([0.5, 0.25]), ("one", "two"))
    return bar_charts.bars([bars], headline="A <b>title</b>", detail="2 bars", value_title="share")


@pytest.fixture
def without_plotly_images(monkeypatch):
    """Hide the browser from kaleido, so that matplotlib draws."""

    def broken(*_arguments, **_options):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.\nMore lines.")

    monkeypatch.setattr(go.Figure, "to_image", broken)


def test_the_page_holds_plotly_once_and_the_figure_unharmed(figure, tmp_path):
    before = figure.to_json()
    page = export.save_figure(figure, tmp_path / "new" / "bars.html")
    assert figure.to_json() == before
    text = page.read_text()
    assert page.stat().st_size < 2.5e6
    (packed,) = re.findall(r'id="dl-plotly">([^<]*)<', text)
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    (data,) = re.findall(r'<script type="application/json" id="figure">(.*?)</script>', text)
    assert json.loads(data) == json.loads(before)
    # Nothing is loaded from anywhere.
    assert not re.search(r"""(?:src|href)\s*=|@import|url\(""", text.replace(packed, ""))


def test_a_name_without_a_suffix_writes_the_page(figure, tmp_path):
    assert export.save_figure(figure, tmp_path / "bars") == tmp_path / "bars.html"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bars.html"]


def test_other_suffixes_are_refused_before_writing(figure, tmp_path):
    with pytest.raises(ValueError, match=r"'\.jpg'; write \.html, \.png, \.svg or \.pdf"):
        export.save_figure(figure, tmp_path / "bars.jpg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_matplotlib_draws_images_of_the_requested_size(
    figure, tmp_path, without_plotly_images, ending, start
):
    image = export.save_figure(figure, tmp_path / f"bars.{ending}", theme="dark", dpi=192)
    content = image.read_bytes()
    assert content.startswith(start)
    height = figure.layout.height
    if ending == "png":
        size = np.frombuffer(content[16:24], dtype=">u4").tolist()
        assert size == pytest.approx([604, 2 * height], abs=1)
    elif ending == "svg":
        assert f'height="{height * 0.75:g}pt"'.encode() in content
        assert b"A &lt;b&gt;title&lt;/b&gt;" in content
    else:
        # Points are 1/72 inch, pixels 1/96.
        (box,) = set(re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", content))
        assert [float(side) for side in box] == pytest.approx([226.5, height * 0.75], abs=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"bars.{ending}"]


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_matplotlib_draws_every_figure(name, tmp_path, without_plotly_images):
    figure = FIGURES[name]()
    image = export.save_figure(figure, tmp_path / "figure.svg")
    text = html.unescape(image.read_text("utf-8"))
    # Each line of the title and each name in the legend is in the image, as text.
    for line in rewrapped(figure, 302).layout.title.text.split("<br>"):
        assert html.unescape(re.sub(r"<[^<>]*>", "", line)) in text
    for note in fitted(figure, 302).layout.annotations:
        if note.visible is not False:
            assert html.unescape(note.text) in text
    for trace in figure.data:
        if trace.name and trace.showlegend is not False and figure.layout.showlegend:
            assert html.unescape(trace.name) in text


@pytest.mark.parametrize("highest", [0.019, 0.19, 0.3, 0.97])
def test_ticks_in_percent_are_not_rounded(highest, tmp_path, without_plotly_images):
    figure = plots.training_curves(
        pd.DataFrame({"step": [1, 2], "preference": [0.01, highest]}), before=0.005
    )
    image = export.save_figure(figure, tmp_path / "figure.svg")
    ticks = [float(tick) for tick in re.findall(r">([\d.]+)%<", image.read_text("utf-8"))]
    assert len(ticks) > 2
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0])
    assert re.search(r">student<.*>before training<", image.read_text("utf-8"), re.DOTALL)


def test_the_same_figure_gives_the_same_image(figure, tmp_path, without_plotly_images):
    for suffix in export.IMAGE_SUFFIXES:
        images = [export.save_figure(figure, tmp_path / f"{n}{suffix}") for n in "ab"]
        assert images[0].read_bytes() == images[1].read_bytes()


def test_plotly_draws_the_image_if_it_can(figure, tmp_path, monkeypatch):
    calls = []

    def to_image(_figure, **options):
        calls.append(options)
        return b"an image"

    monkeypatch.setattr(export, "find_spec", lambda _name: True)
    monkeypatch.setattr(go.Figure, "to_image", to_image)
    image = export.save_figure(figure, tmp_path / "bars.png", dpi=192)
    assert image.read_bytes() == b"an image"
    height = figure.layout.height
    assert calls == [{"format": "png", "width": 302, "height": height, "scale": 2}]


def test_an_image_that_cannot_be_drawn_is_an_error(tmp_path, without_plotly_images):
    pie = go.Figure(go.Pie(values=[1, 2]))
    with pytest.raises(RuntimeError, match=r"a.png was not drawn: .*Chrome.*cannot redraw pie"):
        export.save_figure(pie, tmp_path / "a.png")
    with pytest.raises(RuntimeError, match=r"a.png was not drawn: plotly could not .*Chrome"):
        export.save_figure(FIGURES["layer_profile"](), tmp_path / "a.png", renderer="kaleido")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("title", "caption"), [(True, False), (False, True), (False, False)])
def test_titles_and_captions_are_left_out_on_request(title, caption, figure, tmp_path):
    shown = without_title(figure, title=title, caption=caption)
    removed = figure.layout.height - shown.layout.height
    assert removed == figure.layout.margin.t - shown.layout.margin.t > 0
    image = export.save_figure(
        figure, tmp_path / "a.svg", renderer="matplotlib", title=title, caption=caption
    )
    text = image.read_text("utf-8")
    assert ("A &lt;b&gt;title" in text) == title
    assert ("2\xa0bars" in text) == caption
    assert figure.layout.title.text.count("<br>") == 1


def test_titles_are_wrapped_for_the_width_of_the_image():
    figure = FIGURES["effects_heatmap"]()
    wide = rewrapped(figure, 680)
    lines, fewer = (f.layout.title.text.count("<br>") for f in (figure, wide))
    assert fewer < lines
    assert figure.layout.height - wide.layout.height == 17 * (lines - fewer)


def test_a_folder_of_pages_holds_plotly_once(figure, tmp_path):
    figures = {"early: a heatmap": FIGURES["effects_heatmap"](), "bars/2": figure}
    pages = save_figures(figures, tmp_path / "figures")
    assert [page.name for page in pages] == ["early-a-heatmap.html", "bars-2.html"]
    for page in pages:
        assert page.stat().st_size < 100_000
        assert '<script src="plotly.js"></script>' in page.read_text("utf-8")
    script = (tmp_path / "figures" / "plotly.js").read_text("utf-8")
    packed = re.fullmatch(r'self.dlPlotly = "([^"]*)";\n', script)[1]
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    with pytest.raises(ValueError, match="two figures have the same file name"):
        save_figures({"a b": figure, "a-b": figure}, tmp_path)


def test_missing_packages_are_named_in_the_error(figure, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda _name: None)
    with pytest.raises(RuntimeError, match=r"kaleido is not installed.*divergence-lens\[images\]"):
        export.save_figure(figure, tmp_path / "bars.png")
    assert not list(tmp_path.iterdir())


def test_titles_read_as_plain_text(figure):
    assert figure_title(figure) == "A <b>title</b>. 2 bars"
