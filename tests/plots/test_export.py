"""Figures as files: pages, and images drawn by plotly or matplotlib."""

import base64
import gzip
import html
import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from divergence_lens.plots import bars as bar_charts
from divergence_lens.plots import export
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
    (page,) = export.save_figure(figure, tmp_path / "new" / "bars.html")
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
    assert export.save_figure(figure, tmp_path / "bars") == [tmp_path / "bars.html"]
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
    page, image = export.save_figure(figure, tmp_path / f"bars.{ending}", theme="dark", dpi=192)
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
    assert page.is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"bars.html", f"bars.{ending}"}


@pytest.mark.parametrize("name", sorted(set(FIGURES) - {"divergence_tokens"}))
def test_matplotlib_draws_every_other_figure(name, tmp_path, without_plotly_images):
    figure = FIGURES[name]()
    _, image = export.save_figure(figure, tmp_path / "figure.svg")
    text = html.unescape(image.read_text("utf-8"))
    # Each line of the title and each name in the legend is in the image, as text.
    for line in figure.layout.title.text.split("<br>"):
        assert html.unescape(re.sub(r"<[^<>]*>", "", line)) in text
    for trace in figure.data:
        if trace.name and trace.showlegend is not False and figure.layout.showlegend:
            assert html.unescape(trace.name) in text


def test_the_same_figure_gives_the_same_image(figure, tmp_path, without_plotly_images):
    for suffix in export.IMAGE_SUFFIXES:
        images = [export.save_figure(figure, tmp_path / f"{n}{suffix}")[1] for n in "ab"]
        assert images[0].read_bytes() == images[1].read_bytes()


def test_plotly_draws_the_image_if_it_can(figure, tmp_path, monkeypatch):
    calls = []

    def to_image(_figure, **options):
        calls.append(options)
        return b"an image"

    monkeypatch.setattr(export, "find_spec", lambda _name: True)
    monkeypatch.setattr(go.Figure, "to_image", to_image)
    _, image = export.save_figure(figure, tmp_path / "bars.png", dpi=192)
    assert image.read_bytes() == b"an image"
    height = figure.layout.height
    assert calls == [{"format": "png", "width": 302, "height": height, "scale": 2}]


def test_an_image_that_cannot_be_drawn_is_an_error(tmp_path, without_plotly_images):
    with pytest.raises(RuntimeError, match=r"tokens.png was not drawn: .*Chrome.*consists of text"):
        export.save_figure(FIGURES["divergence_tokens"](), tmp_path / "tokens.png")
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_in_the_error(figure, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda _name: None)
    with pytest.raises(RuntimeError, match=r"kaleido is not installed.*divergence-lens\[images\]"):
        export.save_figure(figure, tmp_path / "bars.png")
    assert not list(tmp_path.iterdir())


def test_titles_read_as_plain_text(figure):
    assert export.figure_title(figure) == "A <b>title</b>. 2 bars"
