"""Figures of effects by layer, of crossed models, and of approximate against exact effects."""

import dataclasses

import numpy as np
import plotly.graph_objects as go
import pytest

from divergence_lens import plots
from divergence_lens.patching.effects import Effects
from divergence_lens.patching.inner_agreements import inner_agreement
from tests.support.figures import LAYERS, crossed, effects, plain, plain_title


def test_the_profile_is_a_line_in_a_band():
    figure = plots.layer_profile(effects())
    band, line = figure.data
    table = effects().normalized().by_layer()
    np.testing.assert_allclose(line.y, table["effect"], rtol=1e-6)
    np.testing.assert_allclose(band.y, [*table["high"], *table["low"][::-1]], rtol=1e-6)
    assert "band: 95 % interval" in plain_title(figure)
    with pytest.raises(ValueError, match="at least one"):
        plots.layer_profile({})
    depth = effects().n_layers
    shallow = dataclasses.replace(effects(), values=effects().values[:, 1:])
    with pytest.raises(ValueError, match=rf"'deep' has {depth}, 'shallow' has {depth - 1}"):
        plots.layer_profile({"deep": effects(), "shallow": shallow})


def test_a_single_pair_has_no_band():
    figure = plots.layer_profile(effects()[0])
    (line,) = figure.data
    assert "band" not in plain_title(figure)
    assert "interval" not in plain(line.text[0])
    one = crossed()
    one = dataclasses.replace(one, margins=one.margins[:1])
    figure = plots.cross_patch_margins(one)
    assert len(figure.data) == 3
    assert "band" not in plain_title(figure)


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
