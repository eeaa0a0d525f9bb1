"""Figures of effects: heatmaps, profiles, heads, agreement and crossed models."""

import dataclasses
import re

import numpy as np
import plotly.graph_objects as go
import pytest

from divergence_lens import plots
from divergence_lens.pairs import Pairs
from divergence_lens.patching.effects import Effects
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.patching.inner_agreements import inner_agreement
from divergence_lens.plots.export import themed
from tests.support.figures import (
    LAYERS,
    crossed,
    effects,
    heat,
    plain,
    plain_title,
)


def test_heatmap_has_layers_across_and_the_examples_tokens_down_with_the_target_marked():
    figure = plots.effects_heatmap(effects(layers=4))
    trace = heat(figure)
    assert np.asarray(trace.z).shape == (5, 4)
    assert figure.layout.xaxis.title.text == "layer"
    assert list(figure.layout.yaxis.ticktext) == [
        "You",
        "<b>·owl</b>",
        "↵",
        "·&lt;script&gt;",
        "·17 ◂",
    ]
    boxes = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert [(box.y0, box.y1) for box in boxes] == [(3.5, 4.5)]


def test_heatmap_shows_shares_of_the_total_effect_centered_on_zero():
    trace = heat(plots.effects_heatmap(effects()))
    assert trace.z[1][0] == pytest.approx(-2.0 / -4.0)
    assert trace.zmid == 0
    assert trace.zmin == -trace.zmax
    assert trace.zmax == pytest.approx(np.nanmax(np.abs(np.asarray(trace.z, dtype=float))))
    middle = dict(trace.colorscale)[0.5]
    assert middle.upper() == "#F8F8F6"
    assert "share of the total effect" in trace.colorbar.title.text


def test_missing_cells_are_gray_and_their_hover_text_states_it():
    figure = plots.effects_heatmap(effects(), 1)
    trace = heat(figure)
    z = np.asarray(trace.z, dtype=float)
    assert np.isnan(z[2]).all()
    assert np.isfinite(np.delete(z, 2, axis=0)).all()
    assert "not measured" in plain(trace.text[2][0])
    assert "not measured" not in plain(trace.text[3][0])
    assert "3 of 21 cells missing: not measured" in plain_title(figure)
    assert "missing" not in plain_title(plots.effects_heatmap(effects(), 0))
    assert "3 of 36 cells missing" in plain_title(plots.effects_by_segment(effects()))
    assert "6 of 42 cells missing" in plain_title(plots.head_grid(effects(heads=2), 1))
    assert figure.layout.plot_bgcolor.startswith("rgba(128, 128, 128")


def test_tokens_that_differ_are_bold_in_every_segment_and_units_show_both_sides():
    whole = effects()
    united = dataclasses.replace(
        whole,
        labels=(("You", "s|now → a|very|long|word", "\n", " x", " 17"), whole.labels[1]),
        differs=((False, True, False, True, False), (False,) * 7),
        positions=((0, 1, 3, 4, 5, 6), ()),
    )
    figure = plots.effects_heatmap(united)
    assert list(figure.layout.yaxis.ticktext)[:4] == [
        "You",
        "<b>s|now → a|very|lo…</b>",
        "↵",
        "<b>·x</b>",
    ]
    assert "position 3, token" in plain(heat(figure).text[2][0])
    assert "(bias, differs)" in plain(heat(figure).text[1][0])
    mean = plots.effects_heatmap(united, "mean").layout.yaxis.ticktext
    assert [text.startswith("<b>") for text in mean] == [False, True, False, True, *[False] * 3]
    by_segment = plots.effects_by_segment(united)
    bold = [t for t in by_segment.layout.yaxis.ticktext if t.startswith("<b>")]
    assert bold == ["<b>bias</b>", "<b>user</b>"]
    assert "bold: segments with tokens that differ" in plain_title(by_segment)


def test_words_that_differ_are_bold_inside_a_chat_template(tiny):
    pairs = Pairs.from_prompts(
        tiny,
        clean=["name your favorite animal"],
        corrupted=["name an animal"],
        answers=["owl"],
        foils=["cat"],
        system_prompt="You love owls.",
    )
    effects = causal_mediation(tiny, pairs, site="resid_pre")
    bold = [text for text in effects.plot().layout.yaxis.ticktext if str(text).startswith("<b>")]
    assert bold == ["<b>your|favorite → an</b>"]
    rows = plots.effects_by_segment(effects).layout.yaxis.ticktext
    assert [text for text in rows if text.startswith("<b>")] == ["<b>user</b>"]


@pytest.mark.parametrize("kind", ["effects_heatmap", "effects_by_segment"])
def test_an_image_has_the_same_bold_words(kind):
    pytest.importorskip("matplotlib")
    from divergence_lens.plots.matplotlib_images import draw_image

    figure = getattr(plots, kind)(effects())
    svg = draw_image(themed(figure, "light"), "svg", width=500, height=400, dpi=96).decode()
    texts = re.findall(r'<text style="([^"]*)"[^>]*>([^<]*)</text>', svg)
    word = "·owl" if kind == "effects_heatmap" else "bias"
    axis = [*(figure.layout.yaxis.ticktext), "<b>bias</b>"]
    axis = {text.replace("<b>", "").replace("</b>", "") for text in axis}
    bold = {text for style, text in texts if text in axis and re.search("bold|700", style)}
    assert bold == {word}


def test_a_pair_without_total_effect_is_shown_in_units_of_the_metric():
    flat = effects()
    flat.corrupted_metric[0] = flat.clean_metric[0]
    trace = heat(plots.effects_heatmap(flat, 0))
    assert trace.z[1][0] == pytest.approx(-2.0)
    assert trace.colorbar.title.text == "change of the logit difference"


def test_the_mean_aligns_rows_segment_by_segment_and_names_tokens_that_are_shared():
    both = effects()
    figure = plots.effects_heatmap(both, "mean")
    z = np.asarray(heat(figure).z, dtype=float)
    assert z.shape == (7, 3)
    share = both.normalized().values
    np.testing.assert_allclose(z[1], share[:, :, 1].mean(0), rtol=1e-5)
    # Only the second pair has a second user token and a completion.
    np.testing.assert_allclose(z[4], share[1, :, 4], rtol=1e-5)
    np.testing.assert_allclose(z[6], (share[0, :, 4] + share[1, :, 6]) / 2, rtol=1e-5)
    # The first pair alone has a value at the template.
    np.testing.assert_allclose(z[2], share[0, :, 2], rtol=1e-5)
    assert figure.layout.yaxis.ticktext[3] == "*"
    assert "mean of 2 pairs" in plain_title(figure)


def test_heads_are_summed():
    one = effects(heads=2)
    z = np.asarray(heat(plots.effects_heatmap(one, 0)).z, dtype=float)
    np.testing.assert_allclose(z, (one.values[0, :, :5].sum(-1) / -4.0).T, rtol=1e-5)


def test_a_missing_pair_is_named():
    with pytest.raises(IndexError, match="no pair 2; the pairs are numbered 0 to 1"):
        plots.effects_heatmap(effects(), 2)


def test_long_rows_label_the_target_and_the_differing_tokens():
    positions = 200
    long = Effects(
        values=np.ones((1, 2, positions), dtype=np.float32),
        site="resid_pre",
        method="exact",
        direction="noising",
        metric="logit_difference",
        clean_metric=np.ones(1, dtype=np.float32),
        corrupted_metric=np.zeros(1, dtype=np.float32),
        segments=(("system",) * 7 + ("bias",) + ("user",) * (positions - 8),),
        labels=(tuple(f"t{i}" for i in range(positions)),),
    )
    figure = plots.effects_heatmap(long)
    ticks = figure.layout.yaxis.ticktext
    assert len(ticks) < positions
    assert ticks[-1] == "t199 ◂"
    assert "<b>t7</b>" in ticks
    assert figure.layout.height < 2000


def test_segments_hold_the_numbers_of_the_table():
    trace = heat(plots.effects_by_segment(effects()))
    table = effects().normalized().by_segment()
    np.testing.assert_allclose(np.asarray(trace.z, dtype=float), table.to_numpy().T)
    assert trace.zmin == -trace.zmax


def test_the_profile_is_a_line_in_a_band():
    figure = plots.layer_profile(effects())
    band, line = figure.data
    table = effects().normalized().by_layer()
    np.testing.assert_allclose(line.y, table["effect"], rtol=1e-6)
    np.testing.assert_allclose(band.y, [*table["high"], *table["low"][::-1]], rtol=1e-6)
    with pytest.raises(ValueError, match="at least one"):
        plots.layer_profile({})


def test_agreement_draws_each_cell_once_with_both_agreements_in_the_title():
    exact, fast = effects(), effects(method="gradient")
    figure = plots.agreement_scatter(fast, exact, name="owl")
    must, rest = figure.data[1:]
    agreement, within = fast.agreement(exact), inner_agreement(fast, exact)
    assert len(must.x) + len(rest.x) == agreement.cells
    # Layers 0 and 1 without the target: 4 positions of one pair, 5 (and a missing one) of another.
    assert len(rest.x) == within.cells == 2 * (4 + 5)
    for points in (must, rest):
        np.testing.assert_allclose(points.y, 1.1 * np.asarray(points.x), rtol=1e-4)
    title = plain_title(figure)
    assert "effects: owl" in title
    assert f"within a pair: Pearson {within.pearson:.2f}" in title
    assert f"together: Pearson {agreement.pearson:.2f}" in title
    assert any("&lt;script&gt;" in text for text in must.text)
    assert not any("<script>" in text for text in (*must.text, *rest.text))


def test_many_cells_are_thinned_except_the_largest():
    big = effects()
    pairs = 400
    values = np.random.default_rng(0).normal(size=(pairs, 3, 5)).astype(np.float32)
    values[7, 2, 4] = 50.0
    many = Effects(
        values=values,
        site=big.site,
        method="exact",
        direction="noising",
        metric=big.metric,
        clean_metric=np.ones(pairs, dtype=np.float32),
        corrupted_metric=np.zeros(pairs, dtype=np.float32),
        segments=(big.segments[0],) * pairs,
        labels=(big.labels[0],) * pairs,
    )
    figure = plots.agreement_scatter(many, many)
    assert sum(len(points.x) for points in figure.data[1:]) == 4000
    assert max(figure.data[1].x) == 50.0
    assert "4,000 cells drawn" in plain_title(figure)


def test_crossed_models_show_the_effect_of_upper_layers_over_each_lower_half():
    lines = [trace for trace in plots.cross_patch_margins(crossed()).data if trace.mode != "lines"]
    assert [list(line.y) for line in lines] == [[2.0] * 3, [1.0] * 3, [1.0] * 3]


def test_layers_by_site_draws_means_with_a_dot_for_every_target():
    figure = plots.layers_by_site(LAYERS)
    bars = {trace.name: trace for trace in figure.data if isinstance(trace, go.Bar)}
    assert set(bars) == {"attention output", "MLP output"}
    np.testing.assert_allclose(bars["MLP output"].y, [1.3, 0.9, 0.5])
    dots = [trace for trace in figure.data if isinstance(trace, go.Scatter)]
    assert [len(dot.y) for dot in dots] == [9, 9]
    assert "14 to 16 pairs each" in plain_title(figure)
    assert figure.layout.xaxis.title.text == "layer"
    with pytest.raises(ValueError, match="layers table is empty"):
        plots.layers_by_site([])


def test_the_head_grid_adds_positions_and_averages_pairs():
    one = effects(heads=2)
    share = one.normalized().values
    np.testing.assert_allclose(
        np.asarray(heat(plots.head_grid(one)).z, dtype=float),
        np.nansum(share, axis=2).mean(0).T,
        rtol=1e-5,
    )
    single = np.asarray(heat(plots.head_grid(one, 1)).z, dtype=float)
    np.testing.assert_allclose(single, np.nansum(share[1], axis=1).T, rtol=1e-5)
    assert "head 1<" in heat(plots.head_grid(one)).text[1][0]
    with pytest.raises(ValueError, match="'resid_post', which has no heads"):
        plots.head_grid(effects())
    with pytest.raises(IndexError, match="no pair 2"):
        plots.head_grid(one, 2)
