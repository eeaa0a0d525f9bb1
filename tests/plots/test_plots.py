"""Figures of teachers, students and data: contents, words and numbers, and the common style."""

import dataclasses

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
from divergence_lens.teachers import Teacher
from tests.support.figures import (
    FIGURES,
    MIXED,
    RATES,
    TARGETS,
    TEACHERS,
    divergence,
    effects,
    example,
    history,
    many,
    masked,
    plain,
    plain_title,
    preference,
    students,
    sweep,
)


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
    # The first is at the top.
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    expected = [np.sqrt(0.2 * 0.21) / 0.095, np.sqrt(0.3 * 0.31) / 0.095, 2.0, 1.0]
    np.testing.assert_allclose(means.x, [*expected, *(2.0**i for i in range(-1, 6))], rtol=1e-6)
    assert len(dots.x) == 11 * len(TARGETS)
    low, high = figure.layout.xaxis.range
    assert 10**low < 0.5
    assert 10**high > 32
    assert "diamonds: means" in plain_title(figure)


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
    assert "framed: the position whose prediction is measured" in title
    assert "divergence: the position that predicts" in plain_title(
        plots.effects_by_segment(effects())
    )
    assert "layer by layer: owl" in plain_title(plots.layer_profile(effects(), name="owl"))
    with_ends = [row | {"low": 0.4, "high": 0.6} for row in TEACHERS]
    assert "95 % intervals" in plain_title(plots.teacher_preferences(with_ends))
    assert "95 % intervals" not in plain_title(plots.teacher_preferences(TEACHERS))


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
    figure = plots.training_curves({"a": history(0.05)}, before=0.1)
    line, before = figure.data
    assert list(line.x) == [2, 4, 6]
    np.testing.assert_allclose(line.y, [0.2, 0.3, 0.4])
    assert set(before.y) == {0.1}
    assert list(figure.layout.xaxis.tickvals) == [2, 4, 6]  # whole updates, none in between
    student = Delta({"w": torch.zeros(1)}, "base", {"history": history(0.05).to_dict("records")})
    assert list(plots.training_curves(student).data[0].x) == [2, 4, 6]
    with pytest.raises(ValueError, match="no column 'preference'; train it with an on_step"):
        plots.training_curves({"a": history(0.05).drop(columns="preference")})
    with pytest.raises(ValueError, match="there is no student"):
        plots.training_curves({})


def test_training_draws_the_loss_of_every_update():
    table = history(0.05)
    figure = plots.training_curves({"a": table, "b": table}, column="loss")
    for line in figure.data:
        assert list(line.x) == table["step"].to_list()
        np.testing.assert_allclose(line.y, table["loss"])
    assert figure.layout.yaxis.title.text == "loss (nats per token)"
    assert figure.layout.yaxis.tickformat is None
    assert "Loss over training" in plain_title(figure)
    assert plots.training_curves(table.assign(kl=table["step"]), column="kl").data[0].y[-1] > 1


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
