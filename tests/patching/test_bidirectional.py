"""Models that attend in both directions, at any target position, against `run_with_hooks`."""

import numpy as np
import pytest
import torch

import divergence_lens as dl
from divergence_lens.patching import inner_cells
from tests.support.custom_models import custom_model, patched_by_hand, random_rows
from tests.support.models import BACKENDS, random_hf_model

pytestmark = pytest.mark.skipif(
    "hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer"
)
LENGTH = 6


@pytest.fixture(scope="module")
def model():
    return custom_model(attention_dir="bidirectional")


@pytest.fixture(scope="module")
def sides(model):
    return random_rows(model, 2, LENGTH, seed=3)


def pairs_at(sides, target, **options):
    return dl.Pairs.from_tokens(
        sides[:1],
        sides[1:],
        answers=[7],
        foils=[11],
        target_position=[target],
        whole_rows=True,
        **options,
    )


@pytest.mark.parametrize("target", range(LENGTH))
def test_the_grid_at_every_target_is_that_of_hooks(model, sides, target):
    pairs = pairs_at(sides, target)
    assert pairs.target_position.tolist() == [target]
    assert pairs.segments[0][target] == "divergence"
    effects = dl.causal_mediation(model, pairs, site="resid_post")
    expected = patched_by_hand(model, *sides, target, (7, 11))
    assert effects.values.shape == (1, 2, LENGTH)
    np.testing.assert_allclose(effects.values[0], expected, atol=1e-5)
    with torch.no_grad():
        clean = model(sides[:1])[0, target]
    np.testing.assert_allclose(effects.clean_metric[0], float(clean[7] - clean[11]), rtol=1e-5)


def test_figures_and_agreement_know_a_target_before_the_end(model, sides):
    pairs = pairs_at(sides, 2)
    effects = dl.causal_mediation(model, pairs)
    for figure in (effects.plot(), effects.plot("mean")):
        (frame,) = [shape for shape in figure.layout.shapes if shape.type == "rect"]
        assert (frame.x0, frame.x1) == (1.5, 2.5)
    assert inner_cells(effects).sum((0, 1)).tolist() == [1, 1, 0, 1, 1, 1]
    same = sides[:1].clone()
    same[0, 0] = (same[0, 0] + 1) % model.cfg.d_vocab
    underlined = pairs_at(torch.cat([sides[:1], same]), 2)._repr_html_().split("<span ")[1:]
    marks = ["underline" in span for span in underlined[:LENGTH]]
    assert marks == [True, False, True, False, False, False]


@pytest.mark.parametrize("site", ["k", "v", "z", "mlp_out"])
@pytest.mark.parametrize("target", [0, 2])
def test_other_sites_are_those_of_hooks(model, sides, site, target):
    values = dl.causal_mediation(model, pairs_at(sides, target), site=site).values[0]
    name = {"mlp_out": "hook_mlp_out"}.get(site, f"attn.hook_{site}")
    _, cache = model.run_with_cache(sides[1:])
    for layer, position in ((0, 5), (1, 0), (1, target), (0, 1)):
        point = f"blocks.{layer}.{name}"

        def patch(state, hook, point=point, at=position):
            part = (slice(None), at) if site == "mlp_out" else (slice(None), at, 2)
            state[part] = cache[point][part]
            return state

        with torch.no_grad():
            base = model(sides[:1])[0, target]
            logits = model.run_with_hooks(sides[:1], fwd_hooks=[(point, patch)])[0, target]
        expected = float((logits[7] - logits[11]) - (base[7] - base[11]))
        own = values[layer, position] if site == "mlp_out" else values[layer, position, 2]
        np.testing.assert_allclose(own, expected, atol=1e-5)


def test_all_positions_at_the_first_layer_give_the_total_effect(model, sides):
    effects = dl.causal_mediation(model, pairs_at(sides, 1), site="resid_pre", span="all")
    total = effects.corrupted_metric - effects.clean_metric
    np.testing.assert_allclose(effects.values[0, 0, 0], total[0], rtol=1e-4)


@pytest.mark.parametrize("target", [0, 3])
def test_integrated_attribution_adds_up_to_the_total_effect(model, sides, target):
    effects = dl.attribution_patch(
        model, pairs_at(sides, target), site="resid_pre", method="integrated", steps=64
    )
    total = effects.corrupted_metric - effects.clean_metric
    np.testing.assert_allclose(effects.values[0].sum(-1), np.repeat(total, 2), atol=0.03)


def test_ablations_cover_the_whole_row(model, sides):
    rows = random_rows(model, 4, LENGTH, seed=9)
    pairs = dl.Pairs.from_tokens(
        rows[:2], rows[2:], answers=[7, 7], foils=[11, 11], target_position=[1, 1], whole_rows=True
    )
    effects = dl.causal_mediation(model, pairs, site="resid_pre", corruption="zero")
    name = "blocks.1.hook_resid_pre"

    def zero(state, hook):
        state[:, 4] = 0
        return state

    with torch.no_grad():
        base = model(rows[:1])[0, 1]
        logits = model.run_with_hooks(rows[:1], fwd_hooks=[(name, zero)])[0, 1]
    expected = float((logits[7] - logits[11]) - (base[7] - base[11]))
    np.testing.assert_allclose(effects.values[0, 1, 4], expected, atol=1e-5)
    mean = dl.causal_mediation(model, pairs, site="resid_pre", corruption="mean")
    assert np.isfinite(mean.values).all()


def test_cut_rows_are_refused(model, sides):
    options = {"answers": [7], "foils": [11], "target_position": [2]}
    cut = dl.Pairs.from_tokens(sides[:1], sides[1:], **options)
    with pytest.raises(ValueError, match="build the pairs with whole_rows=True"):
        dl.causal_mediation(model, cut)
    with pytest.raises(ValueError, match="whole_rows=True"):
        dl.attribution_patch(model, cut[:1])


def test_whole_rows_are_refused_where_they_do_not_fit(model, sides):
    causal = dl.load_model(random_hf_model("gpt2"))
    with pytest.raises(ValueError, match="build them without whole_rows"):
        dl.causal_mediation(causal, pairs_at(sides, 2))
    with pytest.raises(ValueError, match="rows of one length with one target"):
        dl.Pairs.from_tokens(
            [sides[0]],
            [sides[1, :4]],
            answers=[7],
            foils=[11],
            target_position=[2],
            whole_rows=True,
        )
