"""Figures: what is in them, in words and numbers, and what they leave alone."""

import dataclasses
import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest
import torch

from divergence_lens import plots
from divergence_lens.deltas.delta import Delta
from divergence_lens.divergence import Divergence
from divergence_lens.examples import Example
from divergence_lens.patching.effects import Effects
from divergence_lens.patching.inner_agreements import inner_agreement
from divergence_lens.plots.export import figure_title, themed
from divergence_lens.teachers import Teacher
from tests.support.figures import (
    FIGURES,
    LAYERS,
    MIXED,
    RATES,
    TARGETS,
    TEACHERS,
    crossed,
    divergence,
    effects,
    example,
    history,
    many,
    masked,
    preference,
    students,
    sweep,
)


def plain_title(figure: go.Figure) -> str:
    """The words of the title in one line."""
    return " ".join(figure_title(figure).split())


def plain(hover: str) -> str:
    """A hover text in one line."""
    return hover.replace("<br>", " ").replace("\u00a0", " ")


def heat(figure: go.Figure) -> go.Heatmap:
    (trace,) = figure.data
    assert isinstance(trace, go.Heatmap)
    return trace


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_title_with_n_and_hover_in_words_and_no_global_style(name):
    before = (
        plotly.io.templates.default,
        plotly.io.renderers.default,
        sorted(plotly.io.templates),
    )
    plotly.io.templates.default = "ggplot2"
    try:
        figure = FIGURES[name]()
        assert plotly.io.templates.default == "ggplot2"
    finally:
        plotly.io.templates.default = before[0]
    after = (plotly.io.templates.default, plotly.io.renderers.default, sorted(plotly.io.templates))
    assert after == before
    assert isinstance(figure, go.Figure)
    # The reader's template has no say in how the figure looks.
    assert figure.layout.template.layout.paper_bgcolor is None
    assert figure.layout.title.text.startswith("<b>")
    assert any(letter.isdigit() for letter in figure.layout.title.text)
    for trace in figure.data:
        assert trace.hoverinfo in {"text", "skip"}
        if trace.hoverinfo == "text":
            assert trace.text is not None


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_fits_a_column_of_80_mm(name):
    figure = FIGURES[name]()
    margin = figure.layout.margin
    assert 302 - margin.l - margin.r >= 120
    assert figure.layout.height - margin.t - margin.b >= 90
    # Titles do not wrap by themselves.
    lines = figure.layout.title.text.replace('<span style="font-size:12px">', "").split("<br>")
    assert max(len(line) for line in lines) <= 36 + len("<b></b>") + len("</span>")
    # Nor do the names of the legend, which begin at the left margin after a sign of 40 pixels.
    named = [trace.name or "" for trace in figure.data if trace.showlegend is not False]
    if figure.layout.showlegend:
        assert margin.l + 40 + 6.5 * max(len(name) for name in named) <= 302


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
        positions=((0, 1, 3, 4, 5), ()),
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


def test_divergence_tokens_are_split_into_first_and_later_by_position():
    figure = plots.where_divergence_falls(divergence())
    first, later = figure.data
    # Places 1 to 3 hold 2, 2 and 1 tokens; the divergence tokens are 1, 2 and 3.
    np.testing.assert_allclose(first.y, [0.5, 0.5, 0.0])
    np.testing.assert_allclose(later.y, [0.0, 0.0, 1.0])
    twice = plots.where_divergence_falls([divergence(), divergence()])
    np.testing.assert_allclose(twice.data[0].y, first.y)
    with pytest.raises(ValueError, match="at least one"):
        plots.where_divergence_falls([])


def test_positions_with_few_tokens_are_pale_and_hover_states_the_count():
    long = 30
    many = Divergence(
        examples=(*[Example("a", "b", (5, 6))] * long, Example("a", "b", (5,))),
        teacher=Teacher("owl"),
        counterfactuals=(Teacher("cat"),),
        offsets=np.array([*range(0, 2 * long + 1, 2), 2 * long + 1]),
        tokens=np.array([5, 6] * long + [5]),
        predicted=np.array([[5, 6] * long + [5], [9, 6] * long + [5]], dtype=np.int32),
        margin=np.ones((2, 2 * long + 1), dtype=np.float32),
        logprob=np.full((2, 2 * long + 1), -1.0, dtype=np.float32),
    )
    figure = plots.where_divergence_falls(many)
    assert set(figure.data[0].marker.opacity) == {1}
    assert "fewer than" not in plain_title(figure)
    assert "of 31 tokens" in plain(figure.data[0].text[0])
    rare = plots.where_divergence_falls(divergence())
    assert max(rare.data[0].marker.opacity) < 0.5
    assert "pale: fewer than 20 tokens" in plain_title(rare)


def test_rates_are_those_of_the_table_and_of_each_counterfactual():
    (bars,) = plots.rate_per_teacher(pd.DataFrame(RATES)).data
    np.testing.assert_allclose(bars.y, [0.13] * 3)
    (bars,) = plots.rate_per_teacher(divergence()).data
    np.testing.assert_allclose(bars.y, [0.4, 0.4, 0.6])


def test_transfer_shows_means_as_bars_students_as_dots_and_base_and_control_as_lines():
    figure = plots.transfer_bars(students())
    bars = [trace for trace in figure.data if isinstance(trace, go.Bar)]
    assert [bar.name for bar in bars] == ["all tokens", "divergence only", "no divergence"]
    np.testing.assert_allclose(bars[1].y, [0.305] * 3)
    dots = [t for t in figure.data if isinstance(t, go.Scatter) and t.mode == "markers"]
    assert [len(dot.y) for dot in dots] == [6, 6, 6]
    lines = {t.name: t for t in figure.data if isinstance(t, go.Scatter) and t.mode == "lines"}
    assert set(lines) == {"before training", "control"}
    assert lines["before training"].y[0] == pytest.approx(0.1)
    assert lines["control"].y[0] == pytest.approx(0.095)
    assert list(figure.layout.xaxis.ticktext) == list(TARGETS)


def test_students_and_shared_controls_are_counted_once():
    rows = students()
    title = plain_title(plots.transfer_bars(rows))
    # Three conditions of three targets with two seeds; the control's rows repeat for each target.
    assert "3 targets, 18 students and 2 controls shared by all targets" in title
    alone = [row for row in rows if row["target"] == "owl"]
    assert "6 students and 2 controls; bars" in plain_title(plots.transfer_bars(alone))
    title = plain_title(plots.layer_sweep(rows))
    assert "12 students of one layer, 6 of all layers, 2 controls shared by all targets" in title
    assert "24 students and 2 controls" in plain_title(plots.condition_bars(masked(), "masks"))


def test_conditions_are_multiples_of_the_control_with_a_dot_for_every_target():
    bars, dots = plots.condition_bars(masked(), "masks").data
    # The control ends at .095; students of all tokens at .2 and .21, the geometric mean of which
    # is what counts.
    np.testing.assert_allclose(bars.y, [np.sqrt(0.2 * 0.21) / 0.095, np.sqrt(0.3 * 0.31) / 0.095,
                                        2.0, 1.0], rtol=1e-6)  # fmt: skip
    assert len(dots.y) == 4 * len(TARGETS)
    axis = plots.condition_bars(masked(), "masks").layout.yaxis
    assert (axis.title.text, axis.tickformat) == ("preference, times the control", "")
    with pytest.raises(ValueError, match="no rows of kind 'finetuned' in the group 'context'"):
        plots.condition_bars(masked(), "context")


def test_many_conditions_are_rows_on_an_axis_of_ratios():
    figure = plots.condition_bars(many(), "masks")
    _, dots, means = figure.data
    assert figure.layout.xaxis.type == "log"
    names = list(figure.layout.yaxis.ticktext)
    assert names[:4] == ["all", "divergence only", "first divergence", "random tokens"]
    assert len(names) == len(means.x) == 11
    # The first stands at the top.
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    expected = [np.sqrt(0.2 * 0.21) / 0.095, np.sqrt(0.3 * 0.31) / 0.095, 2.0, 1.0]
    np.testing.assert_allclose(means.x, [*expected, *(2.0**i for i in range(-1, 6))], rtol=1e-6)
    assert len(dots.x) == 11 * len(TARGETS)
    low, high = figure.layout.xaxis.range
    assert 10**low < 0.5
    assert 10**high > 32
    assert "diamonds: means" in plain_title(figure)


def test_crossed_models_show_the_effect_of_upper_layers_over_each_lower_half():
    lines = [trace for trace in plots.cross_patch_margins(crossed()).data if trace.mode != "lines"]
    assert [list(line.y) for line in lines] == [[2.0] * 3, [1.0] * 3, [1.0] * 3]


def test_titles_name_the_teachers():
    assert "3 finetuned teachers" in plain_title(plots.rate_per_teacher(RATES))
    assert "6 teachers" in plain_title(plots.teacher_preferences(TEACHERS))
    assert "divergence tokens: owl" in plain_title(plots.where_divergence_falls(divergence()))
    pooled = plots.where_divergence_falls([divergence()] * 2, name="prompted teachers")
    assert "divergence tokens: prompted teachers" in plain_title(pooled)


def test_the_intervals_of_a_sweep_are_explained():
    title = plain_title(plots.layer_sweep(sweep()))
    assert "Share of owl" in title
    assert "6 students of one layer, 1 of all layers" in title
    assert "95 % intervals over questions and seeds" in title
    assert "intervals" not in plain_title(plots.layer_sweep(students()))


def test_figures_of_one_target_name_it_and_explain_their_signs():
    title = plain_title(plots.effects_heatmap(effects(), name="owl"))
    assert "by layer and position: owl" in title
    assert "◂: the position whose prediction is measured" in title
    assert "divergence: the position that predicts" in plain_title(
        plots.effects_by_segment(effects())
    )
    assert "layer by layer: owl" in plain_title(plots.layer_profile(effects(), name="owl"))
    with_ends = [row | {"low": 0.4, "high": 0.6} for row in TEACHERS]
    assert "95 % intervals" in plain_title(plots.teacher_preferences(with_ends))
    assert "95 % intervals" not in plain_title(plots.teacher_preferences(TEACHERS))


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


def test_tokens_are_colored_where_they_diverge_and_escaped():
    figure = plots.divergence_tokens(example())
    assert [note.text for note in figure.layout.annotations] == ["17", "&lt;b&gt;", ","]
    boxes = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    lines = [shape for shape in figure.layout.shapes if shape.type == "line"]
    token = figure.layout.annotations[1]
    assert boxes[0].x0 < token.x < boxes[0].x1
    assert [line.line.dash for line in lines] == ["solid", "dot"]
    assert boxes[0].fillcolor != boxes[1].fillcolor
    (hover,) = figure.data
    assert [text.startswith("divergence token") for text in hover.text] == [False, True, False]
    assert "1 of 3 tokens diverge" in plain_title(figure)


def test_long_examples_are_broken_into_lines_in_reading_order():
    long = dataclasses.replace(
        example(),
        tokens=("word",) * 40,
        predicted=(("word",) * 40,) * 3,
        margin=np.ones((3, 40), dtype=np.float32),
        logprob=np.full((3, 40), -1.0, dtype=np.float32),
        divergence=np.zeros(40, dtype=bool),
        agrees=np.ones(40, dtype=bool),
        differs=np.zeros((2, 40), dtype=bool),
    )
    notes = plots.divergence_tokens(long).layout.annotations
    places = [(note.y, note.x) for note in notes]
    assert places == sorted(places)
    assert len({y for y, _ in places}) == 6
    assert max(x for _, x in places) < 36


def test_training_draws_the_updates_at_which_the_preference_was_measured():
    figure = plots.preference_over_training({"a": history(0.05)}, before=0.1)
    line, before = figure.data
    assert list(line.x) == [2, 4, 6]
    np.testing.assert_allclose(line.y, [0.2, 0.3, 0.4])
    assert set(before.y) == {0.1}
    assert list(figure.layout.xaxis.tickvals) == [2, 4, 6]  # whole updates, none in between
    student = Delta({"w": torch.zeros(1)}, "base", {"history": history(0.05).to_dict("records")})
    assert list(plots.preference_over_training(student).data[0].x) == [2, 4, 6]
    with pytest.raises(ValueError, match="no column 'preference'; train it with an on_step"):
        plots.preference_over_training({"a": history(0.05).drop(columns="preference")})
    with pytest.raises(ValueError, match="there is no student"):
        plots.preference_over_training({})


def test_mixing_draws_means_with_a_dot_for_each_student():
    figure = plots.mixing_curves(MIXED, before=0.1)
    lines = {trace.name: trace for trace in figure.data if "lines" in trace.mode}
    np.testing.assert_allclose(lines["mixed lists"].x, [0, 0.5, 1])
    np.testing.assert_allclose(lines["mixed lists"].y, [0.31, 0.21, 0.11])
    assert set(lines["before training"].y) == {0.1}
    assert sum(len(t.x) for t in figure.data if t.mode == "markers") == len(MIXED)
    ends = [row | {"low": 0.0, "high": 0.5} for row in MIXED if row["seed"] == 0]
    (first, _) = plots.mixing_curves(ends).data
    np.testing.assert_allclose(first.error_y.arrayminus, first.y)
    with pytest.raises(ValueError, match="a share is 50; shares go from 0 to 1"):
        plots.mixing_curves([{"condition": "a", "share": 50, "preference": 0.1}])


def test_tables_of_more_than_one_kind_need_a_choice():
    both = students(("finetuned", "prompted"))
    with pytest.raises(ValueError, match="choose one with kind="):
        plots.transfer_bars(both)
    assert "prompted" in plots.transfer_bars(both, kind="prompted").layout.title.text
    with pytest.raises(ValueError, match="no rows of kind 'steered'"):
        plots.layer_sweep(both, kind="steered")


def test_sweep_shows_layers_against_all_layers_and_control_as_multiples_of_before():
    figure = plots.layer_sweep(students())
    named = {trace.name: trace for trace in figure.data}
    np.testing.assert_allclose(named["mean of targets"].y, [3.0, 2.5, 2.0, 1.5])
    assert named["all layers"].y[0] == pytest.approx(3.05)
    assert named["control"].y[0] == pytest.approx(0.95)
    assert sum(trace.name == "each target" for trace in figure.data) == len(TARGETS)


def test_a_sweep_object_is_drawn_with_its_intervals():
    one = sweep()
    named = {trace.name: trace for trace in plots.layer_sweep(one).data}
    line = named["one layer"]
    np.testing.assert_allclose(line.x, [0, 1, 2])
    assert line.y[0] == pytest.approx(preference("owl", 0.4).share)
    low, high = one.interval(0)
    assert line.error_y.array[0] == pytest.approx(high - line.y[0])
    assert line.error_y.arrayminus[0] == pytest.approx(line.y[0] - low)
    assert named["all layers"].y[0] == pytest.approx(preference("owl", 0.5).share)
    assert named["before"].y[0] == pytest.approx(preference("owl", 0.1).share)


def test_another_measure_of_a_sweep_can_be_drawn():
    one = sweep()
    named = {trace.name: trace for trace in plots.layer_sweep(one, measure="mass").data}
    assert named["one layer"].y[2] == pytest.approx(one.mean(2, "mass"))
    with pytest.raises(KeyError, match="no measure 'loss'; the sweep has share, probability, mass"):
        plots.layer_sweep(one, measure="loss")


def test_preference_puts_the_target_first():
    figure = plots.preference_bars(preference("owl", 0.4))
    (bars,) = figure.data
    assert figure.layout.xaxis.ticktext[0] == "owl"
    assert bars.y[0] == pytest.approx(preference("owl", 0.4).share)
    assert (np.asarray(bars.error_y.array) >= 0).all()
    both = plots.preference_bars(preference("owl", 0.4), before=preference("owl", 0.1))
    assert [trace.name for trace in both.data] == ["after", "before"]


def test_empty_and_incomplete_tables_are_named():
    with pytest.raises(ValueError, match="the teachers table is empty"):
        plots.teacher_preferences([])
    with pytest.raises(ValueError, match="lacks the column 'rate'"):
        plots.rate_per_teacher([{"target": "owl", "kind": "finetuned", "tokens": 3}])
    with pytest.raises(ValueError, match="condition 'layer'"):
        plots.layer_sweep([row for row in students() if row["condition"] != "layer"])
    with pytest.raises(ValueError, match="trained on all layers"):
        plots.transfer_bars([row for row in students() if row["condition"] == "layer"])


def test_names_from_data_are_escaped():
    table = [{"name": "<b>owl</b>", "kind": "<i>x</i>", "preference": 0.5}]
    figure = plots.teacher_preferences(table)
    assert figure.layout.xaxis.ticktext[0] == "&lt;b&gt;owl&lt;/b&gt;"
    assert figure.data[0].name == "&lt;i&gt;x&lt;/i&gt; teachers"
    assert "<b>" not in figure.data[0].text[0]
