"""Figures of effects: heatmaps, profiles, heads, agreement and crossed models."""

import dataclasses
import re

import numpy as np
import pytest

from divergence_lens import plots
from divergence_lens.pairs import Pairs
from divergence_lens.patching.effects import Effects
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.plots.color_limits import color_limit
from divergence_lens.plots.export import themed
from divergence_lens.plots.fitting import fitted
from divergence_lens.plots.style import round_ticks
from tests.support.figures import (
    effects,
    heat,
    plain,
    plain_title,
)


@pytest.mark.parametrize("orientation", ["layers_down", "layers_across"])
def test_a_heatmap_has_the_examples_tokens_with_a_frame_around_the_target(orientation):
    figure = plots.effects_heatmap(effects(layers=4), orientation=orientation)
    down = orientation == "layers_down"
    z = np.asarray(heat(figure).z)
    shares = (effects(layers=4).values[0, :, :5] / -4.0).astype(float)
    np.testing.assert_allclose(z, shares if down else shares.T, rtol=1e-5)
    layers, tokens = figure.layout.yaxis, figure.layout.xaxis
    if not down:
        layers, tokens = tokens, layers
    assert layers.title.text == "layer"
    # Layer 0 is at the top, and the first token at the left or the top.
    assert layers.range == ((3.5, -0.5) if down else (-0.5, 3.5))
    assert list(tokens.ticktext) == ["You", "<b>·owl</b>", "↵", "·&lt;script&gt;", "·17"]
    along = "x" if down else "y"
    boxes = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    assert [(box[f"{along}0"], box[f"{along}1"]) for box in boxes] == [(3.5, 4.5)]


def test_a_limit_below_zero_is_an_error():
    with pytest.raises(ValueError, match="limit is -1"):
        plots.effects_heatmap(effects(), limit=-1.0)


def test_sites_of_the_same_pairs_share_one_color_scale():
    small, large = effects(), effects(heads=2)
    large = dataclasses.replace(large, values=large.values * 1.5)
    for stacked in (False, True):
        figure = plots.effects_heatmap({"small": small, "large": large}, stacked=stacked)
        assert [trace.name for trace in figure.data] == ["small", "large"]
        assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}
        largest = max(np.nanmax(np.abs(trace.z)) for trace in figure.data)
        assert figure.layout.coloraxis.cmax == pytest.approx(largest)
        ends = [figure.layout[axis].domain for axis in ("xaxis", "xaxis2", "yaxis", "yaxis2")]
        apart, together = (ends[2:], ends[:2]) if stacked else (ends[:2], ends[2:])
        assert together[0] == together[1] == (0, 1)
        assert min(apart[0][1], apart[1][1]) < max(apart[0][0], apart[1][0])
        assert {"small", "large"} <= {note.text for note in figure.layout.annotations}
    assert "summed over heads (large)" in plain_title(figure)
    with pytest.raises(ValueError, match="'b' are not of the same pairs"):
        plots.effects_heatmap({"a": small, "b": small[1:]})
    with pytest.raises(ValueError, match="at least one"):
        plots.effects_heatmap({})
    panels = plots.effects_by_segment({"small": small, "large": large})
    for trace, one in zip(panels.data, (small, large), strict=True):
        np.testing.assert_array_equal(trace.z, heat(plots.effects_by_segment(one)).z)
    assert "summed over positions and heads" in plain_title(panels)


@pytest.mark.parametrize("limit", [1e-4, 0.3, 0.99, 1.0, 1.93, 2.0, 4.9, 7.0, 123.0])
def test_the_ticks_of_a_color_bar_are_round_and_few(limit):
    ticks = round_ticks(limit)
    assert ticks == [-tick for tick in reversed(ticks)]
    assert 5 <= len(ticks) <= 9
    assert max(ticks) <= limit * (1 + 1e-9)
    assert [float(f"{tick:.2g}") for tick in ticks] == pytest.approx(ticks)


def test_a_few_outliers_do_not_compress_all_other_colors():
    usual = np.linspace(-1, 1, 400).reshape(20, 20)
    assert color_limit([usual]) == (1.0, 0)
    usual[3, 4] = 40.0
    limit, beyond = color_limit([usual], floor=1.0)
    assert (limit, beyond) == (1.0, 1)
    # Without a natural unit, one strong cell in noise stays five times stronger at least.
    assert color_limit([usual])[0] == pytest.approx(8.0)
    # A scale of shares does not end below the total effect, which would exaggerate noise.
    assert color_limit([usual / 100], floor=1.0) == (pytest.approx(0.4), 0)
    assert color_limit([usual[:4]])[0] == 40.0
    assert color_limit([np.full((2, 2), np.nan)]) == (1.0, 0)
    one = effects()
    one.values[0, 1, 3] = -160.0
    figure = plots.effects_heatmap(one)
    assert figure.layout.coloraxis.cmax < 1.5
    assert "1 cell beyond" in figure.layout.coloraxis.colorbar.title.text
    assert "40.000" in plain(heat(figure).text[1][3])
    set_by_hand = plots.effects_heatmap(one, limit=40.0).layout.coloraxis
    assert set_by_hand.cmax == 40.0
    assert "beyond" not in set_by_hand.colorbar.title.text


def test_captions_name_the_model_and_the_answer():
    named = dataclasses.replace(
        effects(),
        answer_labels=((" Paris",), (" Paris",)),
        foil_labels=((" Rome",), (" B", "onn")),
        metadata={"model": {"name": "folder/small-model/"}},
    )
    title = plain_title(plots.effects_heatmap(named, 1))
    assert "model small-model; answer “·Paris”; foil “·Bonn”" in title
    mean = plain_title(plots.effects_by_segment(named))
    assert "answer “·Paris”" in mean
    assert "foil" not in mean


def test_heatmap_shows_shares_of_the_total_effect_centered_on_zero():
    figure = plots.effects_heatmap(effects())
    trace = heat(figure)
    assert trace.z[0][1] == pytest.approx(-2.0 / -4.0)
    colors = figure.layout.coloraxis
    assert colors.cmid == 0
    assert colors.cmin == -colors.cmax
    assert colors.cmax == pytest.approx(np.nanmax(np.abs(np.asarray(trace.z, dtype=float))))
    middle = dict(colors.colorscale)[0.5]
    assert middle.upper() == "#F8F8F6"
    assert colors.colorbar.title.text == "share of the total effect"


def test_missing_cells_are_gray_and_their_hover_text_states_it():
    figure = plots.effects_heatmap(effects(), 1)
    trace = heat(figure)
    z = np.asarray(trace.z, dtype=float)
    assert np.isnan(z[:, 2]).all()
    assert np.isfinite(np.delete(z, 2, axis=1)).all()
    assert "not measured" in plain(trace.text[0][2])
    assert "not measured" not in plain(trace.text[0][3])
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
    assert list(figure.layout.xaxis.ticktext)[:4] == [
        "You",
        "<b>s|now → a|very|lo…</b>",
        "↵",
        "<b>·x</b>",
    ]
    assert "position 3, token" in plain(heat(figure).text[0][2])
    assert "(bias, differs)" in plain(heat(figure).text[0][1])
    mean = plots.effects_heatmap(united, "mean").layout.xaxis.ticktext
    assert [text.startswith("<b>") for text in mean] == [False, True, False, True, *[False] * 3]
    by_segment = plots.effects_by_segment(united)
    bold = [t for t in by_segment.layout.xaxis.ticktext if t.startswith("<b>")]
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
    bold = [text for text in effects.plot().layout.xaxis.ticktext if str(text).startswith("<b>")]
    assert bold == ["<b>your|favorite → an</b>"]
    rows = plots.effects_by_segment(effects).layout.xaxis.ticktext
    assert [text for text in rows if text.startswith("<b>")] == ["<b>user</b>"]


@pytest.mark.parametrize("kind", ["effects_heatmap", "effects_by_segment"])
def test_an_image_has_the_same_bold_words(kind):
    from divergence_lens.plots.matplotlib_images import draw_image

    figure = getattr(plots, kind)(effects())
    svg = draw_image(themed(figure, "light"), "svg", width=500, height=400, dpi=96).decode()
    texts = re.findall(r'<text style="([^"]*)"[^>]*>([^<]*)</text>', svg)
    word = "·owl" if kind == "effects_heatmap" else "bias"
    axis = [*(figure.layout.xaxis.ticktext), "<b>bias</b>"]
    axis = {text.replace("<b>", "").replace("</b>", "") for text in axis}
    bold = {text for style, text in texts if text in axis and re.search("bold|700", style)}
    assert bold == {word}


def test_a_pair_without_total_effect_is_shown_in_units_of_the_metric():
    flat = effects()
    flat.corrupted_metric[0] = flat.clean_metric[0]
    figure = plots.effects_heatmap(flat, 0)
    assert heat(figure).z[0][1] == pytest.approx(-2.0)
    assert figure.layout.coloraxis.colorbar.title.text == "change of the logit difference"


def test_pairs_without_total_effects_are_shown_in_units_of_the_metric():
    flat = effects(heads=2)
    flat.corrupted_metric[:] = flat.clean_metric
    means = {
        "effects_heatmap": plots.effects_heatmap(flat, "mean"),
        "effects_by_segment": plots.effects_by_segment(flat),
        "head_grid": plots.head_grid(flat),
    }
    for figure in means.values():
        assert figure.layout.coloraxis.colorbar.title.text == "change of the logit difference"
        assert "mean of 2 pairs" in plain_title(figure)
    summed = np.nansum(flat.values, axis=2).mean(0)  # [layer, head]
    np.testing.assert_allclose(heat(means["head_grid"]).z, summed, rtol=1e-5)
    single = plots.head_grid(flat, 1)
    assert single.layout.coloraxis.colorbar.title.text == "change of the logit difference"
    profile = plots.layer_profile(flat)
    assert profile.layout.yaxis.title.text == "change of the logit difference"
    np.testing.assert_allclose(profile.data[1].y, summed.sum(1), rtol=1e-5)


def test_the_mean_aligns_rows_segment_by_segment_and_names_tokens_that_are_shared():
    both = effects()
    figure = plots.effects_heatmap(both, "mean")
    z = np.asarray(heat(figure).z, dtype=float).T
    assert z.shape == (7, 3)
    share = both.normalized().values
    np.testing.assert_allclose(z[1], share[:, :, 1].mean(0), rtol=1e-5)
    # Only the second pair has a second user token and a completion.
    np.testing.assert_allclose(z[4], share[1, :, 4], rtol=1e-5)
    np.testing.assert_allclose(z[6], (share[0, :, 4] + share[1, :, 6]) / 2, rtol=1e-5)
    # The first pair alone has a value at the template.
    np.testing.assert_allclose(z[2], share[0, :, 2], rtol=1e-5)
    assert figure.layout.xaxis.ticktext[3] == "*"
    assert "mean of 2 pairs" in plain_title(figure)


def test_heads_are_summed():
    one = effects(heads=2)
    figure = plots.effects_heatmap(one, 0)
    z = np.asarray(heat(figure).z, dtype=float)
    np.testing.assert_allclose(z, one.values[0, :, :5].sum(-1) / -4.0, rtol=1e-5)
    assert "summed over heads" in plain_title(figure)
    assert "over heads" not in plain_title(plots.effects_heatmap(effects(), 0))
    for figure in (plots.effects_by_segment(one), plots.layer_profile(one)):
        assert "summed over positions and heads" in plain_title(figure)


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
    for figure in (
        plots.effects_heatmap(long),
        plots.effects_heatmap(long, orientation="layers_across"),
        fitted(plots.effects_heatmap(long), 302),
    ):
        down = figure.layout.yaxis.title.text == "layer"
        ticks = (figure.layout.xaxis if down else figure.layout.yaxis).ticktext
        assert 10 < len(ticks) < positions
        assert ticks[-1] == "t199"
        assert "<b>t7</b>" in ticks
        assert figure.layout.height < 2000


@pytest.mark.parametrize("width", [302, 680])
def test_60_positions_and_32_layers_have_labels_that_do_not_overlap(width):
    positions, layers = 60, 32
    long = Effects(
        values=np.ones((1, layers, positions), dtype=np.float32),
        site="resid_pre",
        method="exact",
        direction="noising",
        metric="logit_difference",
        clean_metric=np.ones(1, dtype=np.float32),
        corrupted_metric=np.zeros(1, dtype=np.float32),
        segments=(("user",) * 58 + ("template",) * 2,),
        labels=(tuple(f"word{i}" for i in range(positions)),),
        differs=((False,) * 30 + (True,) * 3 + (False,) * 27,),
    )
    figure = fitted(plots.effects_heatmap(long), width)
    margin = figure.layout.margin
    pixels = (width - margin.l - margin.r) / positions
    assert pixels > 4
    ticks = figure.layout.xaxis.tickvals
    assert np.diff(ticks).min() * pixels >= 11
    assert {30, 59} <= set(ticks)
    assert len(ticks) > 0.5 * positions * min(1, pixels / 11)
    rows = figure.layout.height - margin.t - margin.b
    assert 6 * layers <= rows <= 300
    assert np.diff(figure.layout.yaxis.tickvals).min() * rows / layers >= 12
    # The name of a group of two positions has no room at 80 mm.
    shown = {note.text for note in figure.layout.annotations if note.visible is not False}
    assert shown == {"user"}


def test_segments_hold_the_numbers_of_the_table():
    figure = plots.effects_by_segment(effects())
    table = effects().normalized().by_segment()
    np.testing.assert_allclose(np.asarray(heat(figure).z, dtype=float), table.to_numpy())
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax


def test_the_head_grid_adds_positions_and_averages_pairs():
    one = effects(heads=2)
    share = one.normalized().values
    np.testing.assert_allclose(
        np.asarray(heat(plots.head_grid(one)).z, dtype=float),
        np.nansum(share, axis=2).mean(0),
        rtol=1e-5,
    )
    single = np.asarray(heat(plots.head_grid(one, 1)).z, dtype=float)
    np.testing.assert_allclose(single, np.nansum(share[1], axis=1), rtol=1e-5)
    assert "head 1<" in heat(plots.head_grid(one)).text[0][1]
    with pytest.raises(ValueError, match="'resid_post', which has no heads"):
        plots.head_grid(effects())
    with pytest.raises(IndexError, match="no pair 2"):
        plots.head_grid(one, 2)
