"""Attribution patching: against mediation where the model is linear, else against plain loops."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from divergence_lens.engine.factory import get_engine
from divergence_lens.engine.sites import SITES
from divergence_lens.pairs import Pairs
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.patching.request import PatchingRequest
from divergence_lens.patching.verification import sampled_agreement
from divergence_lens.teachers import Teacher
from tests.support.models import slow_except
from tests.support.patching_oracles import assert_same, hand_set, logit_difference, random_pairs

METHODS = ("gradient", "integrated", "integrated-inputs")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "z"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_equals_mediation_in_a_linear_model(method, site, direction):
    model = hand_set()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # queries and keys stay zero: attention is an even mean, all is linear
        for name, parameter in model.named_parameters():
            if not any(part in name for part in ("W_Q", "W_K", "b_Q", "b_K")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    pairs = Pairs.from_tokens(
        [[1, 2, 3, 4, 5], [3, 3, 1]], [[1, 6, 3, 7, 5], [3, 2, 1]], answers=[1, 2], foils=[3, 4]
    )
    exact = causal_mediation(model, pairs, site=site, direction=direction)
    linear = attribution_patch(model, pairs, site=site, direction=direction, method=method, steps=3)
    assert np.nanmax(np.abs(exact.values)) > 0.01
    assert_same(linear.values, exact.values)
    assert linear.agreement(exact).slope == pytest.approx(1, abs=1e-3)


def site_gradient(model, pairs, i, *, site, layer, state):
    """The gradient of the metric of clean row `i` when the site of one layer holds `state`."""
    engine = get_engine(model)
    leaf = state.clone().requires_grad_()
    with engine.hooked([(layer, site, lambda _: leaf)]):
        logits = engine.unembed(engine.final(pairs.clean[i][None]))[0, -1]
    return torch.autograd.grad(logit_difference(logits, pairs, i), leaf)[0]


@pytest.mark.parametrize("family", slow_except("qwen2", ["gpt_neox", "qwen2", "gemma2"]))
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("steps", [0, 3])
def test_equals_a_backward_pass_per_layer_and_step(model_of, family, site, steps):
    model = model_of(family)
    engine = get_engine(model)
    if site not in engine.sites:
        pytest.skip(f"{family} has no {site}")
    # Patterns are patched only between rows whose positions correspond.
    longer = (0, 0 if site == "pattern" else 2)
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6, 8), longer=longer)
    method = "integrated" if steps else "gradient"
    effects = attribution_patch(model, pairs, site=site, method=method, steps=max(steps, 1))
    for i in range(len(pairs)):
        base = engine.activations(pairs.clean[i][None], sites=(site,))[site]
        source = engine.activations(pairs.corrupted[i][None], sites=(site,))[site]
        # In a unit, the last position of each side counts, and the others keep the base state.
        columns = pairs.columns(i)
        here, there = (
            [getattr(column, side)[-1] for column in columns] for side in ("clean", "corrupted")
        )
        for layer in range(engine.n_layers):
            change = torch.zeros_like(base[layer])
            change[:, here] = source[layer][:, there] - base[layer][:, here]
            alphas = [(j + 0.5) / steps for j in range(steps)] or [0.0]
            gradients = [
                site_gradient(
                    model, pairs, i, site=site, layer=layer, state=base[layer] + a * change
                )
                for a in alphas
            ]
            expected = (torch.stack(gradients).mean(0) * change).sum(-1)[0]
            assert_same(effects.values[i, layer, : len(here)], expected[here].detach().numpy())


@pytest.mark.parametrize("site", ["resid_mid", "mlp_out", "z"])
def test_the_gradient_is_the_limit_of_small_exact_patches(model_of, site):
    model = copy.deepcopy(model_of("qwen2")).to(torch.float64)
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6,), longer=(0,))
    effects = attribution_patch(model, pairs, site=site)
    engine = get_engine(model)
    base = engine.activations(pairs.clean[0][None], sites=(site,))[site]
    source = engine.activations(pairs.corrupted[0][None], sites=(site,))[site]
    step = 1e-3  # Hugging Face norms in float32 whatever the model; smaller ones drown in that

    def shifted(layer, position, amount):
        def shift(activation):
            changed = activation.clone()
            change = source[layer][:, position] - base[layer][:, position]
            changed[:, position] += amount * change
            return changed

        with torch.no_grad(), engine.hooked([(layer, site, shift)]):
            logits = engine.unembed(engine.final(pairs.clean[0][None]))[0, -1]
        return float(logit_difference(logits, pairs, 0))

    for layer in range(engine.n_layers):
        for position in range(2, 6):
            slope = (shifted(layer, position, step) - shifted(layer, position, -step)) / (2 * step)
            summed = effects.values[0, layer, position].sum()
            assert summed == pytest.approx(slope, rel=1e-2, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_integrated_residuals_add_up_to_the_total_effect(model_of, direction):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    for method in ("integrated", "integrated-inputs"):
        effects = attribution_patch(
            model, pairs, site="resid_pre", method=method, steps=200, direction=direction
        )
        sums = np.nansum(effects.values, axis=2)
        if method == "integrated-inputs":
            sums = sums[:, :1]  # only the first layer's state lies on the path
        expected = np.broadcast_to(effects.total[:, None], sums.shape)
        np.testing.assert_allclose(sums, expected, atol=2e-2)


def test_midpoints_come_nearer_to_the_total_than_left_endpoints_could(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    errors = []
    for steps in (1, 4, 16):
        effects = attribution_patch(
            model, pairs, site="resid_pre", method="integrated", steps=steps
        )
        errors.append(np.abs(np.nansum(effects.values, axis=2) - effects.total[:, None]).mean())
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_batch_size_and_order_of_pairs_do_not_matter(model_of, method):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab, longer=(0, 1, 0, 2))
    whole = attribution_patch(model, pairs, method=method, steps=4)
    for rows in (1, 3, 9):
        order = [2, 0, 3, 1]
        other = attribution_patch(model, pairs[order], method=method, steps=4, batch_rows=rows)
        assert_same(other.values, whole.values[order], atol=2e-5)


@pytest.mark.parametrize("method", ["gradient", "integrated", "integrated-left"])
def test_other_weights_give_the_source_states_and_nothing_else(model_of, method):
    model, other = model_of("qwen2"), model_of("qwen2", 1)
    rows = random_pairs(model.cfg.d_vocab)
    pairs = Pairs.from_tokens(
        rows.clean,
        rows.clean,
        answers=rows.answers,
        foils=rows.foils,
        corrupted_teacher=Teacher("other", model=other),
    )
    effects = attribution_patch(model, pairs, site="mlp_out", method=method, steps=2)
    base = get_engine(model).activations(pairs.clean[0][None], sites=("mlp_out",))["mlp_out"]
    source = get_engine(other).activations(pairs.clean[0][None], sites=("mlp_out",))["mlp_out"]
    change = source - base
    alphas = {"integrated": (0.25, 0.75), "integrated-left": (0.0, 0.5)}.get(method, (0.0,))
    for layer in range(model.cfg.n_layers):
        gradients = [
            site_gradient(
                model, pairs, 0, site="mlp_out", layer=layer, state=base[layer] + a * change[layer]
            )
            for a in alphas
        ]
        expected = (torch.stack(gradients).mean(0) * change[layer]).sum(-1)[0]
        assert_same(effects.values[0, layer, : len(rows.clean[0])], expected.numpy())
    with pytest.raises(ValueError, match="differ in weights"):
        attribution_patch(model, pairs, method="integrated-inputs")


def test_verify_attaches_agreement_with_exact_cells(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    effects = attribution_patch(model, pairs, method="integrated", verify=8)
    assert effects.verified is not None
    # Cells that are zero on both sides, as in the last layer, may be drawn and are not counted.
    assert 8 < effects.verified.cells <= 16
    assert effects.verified.pearson > 0.9
    exact = causal_mediation(model, pairs)
    strongest = causal_mediation(model, pairs, cells=effects.top(8))
    for row in strongest.to_dataframe().itertuples():
        assert row.effect == pytest.approx(
            exact.values[row.pair, row.layer, row.position], abs=2e-5
        )


def test_bfloat16_accumulates_in_float32(model_of):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab)
    half = copy.deepcopy(model).to(torch.bfloat16)
    for method in METHODS:
        full = attribution_patch(model, pairs, method=method, steps=3).values
        rough = attribution_patch(half, pairs, method=method, steps=3).values
        there = np.isfinite(full)
        assert rough.dtype == np.float32
        assert np.corrcoef(full[there], rough[there])[0, 1] > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_leaves_the_model_as_it_was_also_after_an_error(model_of, method):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    try:
        flags = [p.requires_grad for p in parameters]
        hooks = sum(len(module._forward_hooks) for module in model.modules())
        calls = []

        def breaks_later(logits, _):
            calls.append(logits.requires_grad)
            if logits.requires_grad:
                raise RuntimeError("stop")
            return logits[:, 0]

        with torch.no_grad():
            attribution_patch(model, pairs, method=method, site="z")
            assert not torch.is_grad_enabled()
        with pytest.raises(RuntimeError, match="stop"):
            attribution_patch(model, pairs, method=method, metric=breaks_later)
        assert calls[-1]
        assert [p.requires_grad for p in parameters] == flags
        assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
        assert all(p.grad is None for p in parameters)
    finally:
        parameters[0].requires_grad_(True)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "atp*"])
def test_several_sites_in_one_pass_equal_one_pass_each(model_of, method):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab, longer=(0, 1, 0, 2))
    sites = ("resid_pre", "mlp_out", "z", "k")
    together = attribution_patch(model, pairs, site=sites, method=method, steps=2, verify=2)
    assert tuple(together) == sites
    for site in sites:
        alone = attribution_patch(model, pairs, site=site, method=method, steps=2)
        assert_same(together[site].values, alone.values, atol=2e-5)
        assert together[site].verified is not None
    with pytest.raises(ValueError, match="each once"):
        attribution_patch(model, pairs, site=("z", "z"))


def test_refuses_what_cannot_be_attributed(model_of, unchecked):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    with pytest.raises(ValueError, match="method is 'magic'"):
        attribution_patch(model, pairs, method="magic")
    with pytest.raises(ValueError, match="steps is 0"):
        attribution_patch(model, pairs, steps=0)
    with pytest.raises(ValueError, match="verify is -1"):
        attribution_patch(model, pairs, verify=-1)
    with pytest.raises(ValueError, match="no slope"):  # it would be a map of rounding errors
        attribution_patch(model, pairs, metric="kl")
    attribution_patch(model, pairs, metric="kl", direction="denoising")
    with pytest.raises(ValueError, match="without a gradient"):
        attribution_patch(model, pairs, metric=lambda logits, _: logits[:, 0].detach())
    with pytest.raises(ValueError, match="no site"):
        attribution_patch(model_of("gpt_neox"), pairs, site="resid_mid")


def test_verify_meets_cells_that_the_approximation_gives_as_zero(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    effects = attribution_patch(model, pairs, method="integrated")
    wrong = effects.values.copy()
    wrong[:, 1:] *= 0
    request = PatchingRequest(
        pairs=pairs,
        sites=(effects.site,),
        direction="noising",
        metric="logit_difference",
        corruption="counterfactual",
        span="position",
    )
    everything = effects.values.size
    accurate, inaccurate = (
        sampled_agreement(model, request, e, k=everything, seed=0, batch_rows=64, accelerator=None)
        for e in (effects, replace(effects, values=wrong))
    )
    assert accurate.cells == inaccurate.cells
    assert inaccurate.pearson < accurate.pearson - 0.1
