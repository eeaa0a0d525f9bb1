"""RelP and the corrections of AtP*: against what each is known to get right."""

import copy

import numpy as np
import pytest
import torch

from divergence_lens.engine.factory import get_engine
from divergence_lens.pairs import Pairs
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.exact import causal_mediation
from tests.support.models import chat_tokenizer, random_hf_model
from tests.support.patching_oracles import assert_same, hand_set, random_pairs


def random_weights(model, scale=0.6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


@pytest.mark.parametrize("site", ["q", "k"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_the_qk_correction_is_exact_where_only_the_softmax_is_not_linear(site, direction):
    model = random_weights(
        hand_set(n_layers=1), scale=0.4
    )  # no norm, no MLP: logits are linear in z
    pairs = Pairs.from_tokens(
        [[1, 2, 3, 4, 5], [3, 3, 1]], [[1, 6, 3, 7, 2], [3, 2, 4]], answers=[1, 2], foils=[3, 4]
    )
    exact = causal_mediation(model, pairs, site=site, direction=direction)
    plain = attribution_patch(model, pairs, site=site, direction=direction)
    assert np.nanmax(np.abs(plain.values - exact.values)) > 0.1
    corrected = attribution_patch(model, pairs, site=site, method="qk", direction=direction)
    assert_same(corrected.values, exact.values, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen2", "gemma2"])
@pytest.mark.parametrize("site", ["q", "k"])
def test_the_qk_correction_takes_the_gradient_of_z_times_its_exact_change(model_of, family, site):
    model = model_of(family)
    engine = get_engine(model)
    pairs = random_pairs(engine.d_vocab, lengths=(6,), longer=(0,))
    effects = attribution_patch(model, pairs, site=site, method="qk")
    clean, corrupted = pairs.clean[0][None], pairs.corrupted[0][None]
    new = engine.activations(corrupted, sites=(site,))[site]
    old_z = engine.activations(clean, sites=("z",))["z"]
    for layer in range(engine.n_layers):
        leaf = old_z[layer].clone().requires_grad_()
        with engine.hooked([(layer, "z", lambda _, leaf=leaf: leaf)]):
            logits = engine.unembed(engine.final(clean))[0, -1]
        (gradient,) = torch.autograd.grad(
            logits[int(pairs.answers[0])] - logits[int(pairs.foils[0])], leaf
        )
        for position in range(6):
            for head in range(engine.site_heads(site)):

                def replace(activation, layer=layer, position=position, head=head):
                    changed = activation.clone()
                    changed[:, position, head] = new[layer][:, position, head]
                    return changed

                with engine.hooked([(layer, site, replace)]):
                    z = engine.activations(clean, sites=("z",))["z"][layer]
                expected = float((gradient * (z - old_z[layer])).sum())
                assert effects.values[0, layer, position, head] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "z"])
def test_graddrop_is_the_mean_magnitude_over_dropped_blocks(model_of, site):
    model = model_of("qwen2")
    engine = get_engine(model)
    pairs = random_pairs(engine.d_vocab, lengths=(6, 5), longer=(0, 0))
    effects = attribution_patch(model, pairs, site=site, method="graddrop")
    passes = []
    for layer in range(engine.n_layers):
        with engine.hooked([(layer, "block_out", torch.Tensor.detach)]):
            if site == "resid_post":
                passes.append(attribution_patch(model, pairs, site=site).values)
                continue
            # A detached block leaves its own sites without a gradient: they count as zero.
            found = np.zeros_like(effects.values)
            found[np.isnan(effects.values)] = np.nan
            for other in range(engine.n_layers):
                if other != layer:
                    found[:, other] = one_layer(model, pairs, site, other)
            passes.append(found)
    count = len(passes) if site == "resid_post" else len(passes) - 1
    magnitude = np.abs(passes).sum(0) / count
    assert_same(np.abs(effects.values), magnitude, atol=1e-4)
    there = magnitude > 1e-3
    np.testing.assert_array_equal(
        np.sign(effects.values)[there], np.sign(np.sum(passes, axis=0))[there]
    )


def one_layer(model, pairs, site, layer):
    """The gradient estimate of one layer's site, pair by pair."""
    engine = get_engine(model)
    longest = max(len(row) for row in pairs.clean)
    found = []
    for i in range(len(pairs)):
        clean, corrupted = pairs.clean[i][None], pairs.corrupted[i][None]
        old = engine.activations(clean, sites=(site,))[site][layer]
        new = engine.activations(corrupted, sites=(site,))[site][layer]
        leaf = old.clone().requires_grad_()
        with engine.hooked([(layer, site, lambda _, leaf=leaf: leaf)]):
            logits = engine.unembed(engine.final(clean))[0, -1]
        metric = logits[int(pairs.answers[i])] - logits[int(pairs.foils[i])]
        (gradient,) = torch.autograd.grad(metric, leaf)
        values = (gradient * (new - old)).sum(-1)[0]
        padding = torch.full((longest - len(values), *values.shape[1:]), torch.nan)
        found.append(torch.cat([values, padding]).numpy())
    return np.stack(found)


def test_graddrop_finds_what_cancels_along_two_paths():
    model = hand_set(n_layers=2)  # block 1 takes away what the token wrote, exactly
    with torch.no_grad():
        model.W_E[:, :8] = torch.eye(8)
        model.W_U[:8] = torch.eye(8)
        attention = model.blocks[1].attn
        attention.W_V[0, :8] = torch.eye(8)
        attention.W_O[0][:, :8] = -torch.eye(8)
    pairs = Pairs.from_tokens([[1]], [[2]], answers=[1], foils=[2])
    plain = attribution_patch(model, pairs, site="resid_pre")
    dropped = attribution_patch(model, pairs, site="resid_pre", method="graddrop")
    assert abs(plain.values[0, 0, 0]) < 1e-6
    assert abs(dropped.values[0, 0, 0]) == pytest.approx(1.0)  # 2 in one of two passes


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma3"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_relevance_is_conserved_where_there_are_no_biases(random_model, backend, family, site):
    if backend == "hooked" and family.startswith("gemma"):
        pytest.skip("TransformerLens cannot convert this family to a HookedTransformer")
    model = random_model(family)
    engine = get_engine(model)
    with torch.no_grad():
        for name, parameter in engine.named_parameters().items():
            if "bias" in name or ".b" in name:
                parameter.zero_()
        for norm in engine.norms():
            bias = engine.norm_kind(norm)[1]
            if bias is not None:
                bias.zero_()
        for module in model.modules():  # copies that a bridge split off
            if isinstance(getattr(module, "bias", None), torch.nn.Parameter):
                module.bias.zero_()
    pairs = random_pairs(engine.d_vocab, lengths=(6, 9), longer=(0, 2))
    effects = attribution_patch(model, pairs, site=site, method="relp", corruption="zero")
    # Taking all of a residual away takes, by the rules, all of the metric away.
    sums = np.nansum(effects.values, axis=2)
    expected = np.broadcast_to(-effects.clean_metric[:, None], sums.shape)
    assert np.abs(expected).max() > 0.05
    np.testing.assert_allclose(sums, expected, atol=1e-3)
    plain = attribution_patch(model, pairs, site=site, corruption="zero")
    assert np.abs(np.nansum(plain.values, axis=2) - expected).max() > 0.05


def test_each_branch_of_a_gated_product_gets_half(model_of):
    # By hand from Hugging Face's weights: the last MLP at the target, each rule a constant.
    model = model_of("llama")
    hf = random_hf_model("llama", vocab=len(chat_tokenizer()))
    pairs = random_pairs(len(chat_tokenizer()), lengths=(8,), longer=(0,))
    found = attribution_patch(model, pairs, site="resid_mid", method="relp").values[0, -1, -1]
    block, norm = hf.model.layers[-1], hf.model.norm
    states = []
    watch = block.post_attention_layernorm.register_forward_pre_hook(
        lambda _, inputs: states.append(inputs[0][0, -1].double())
    )
    with torch.no_grad():
        for rows in (pairs.clean, pairs.corrupted):
            hf(rows[0][None])
    watch.remove()
    hf = hf.double()
    base, source = states
    mlp = block.mlp

    def normed(layer, x, constant):  # the scale of another state, taken as a constant
        return x * layer.weight / (constant.square().mean() + layer.variance_epsilon).sqrt()

    with torch.no_grad():
        inner, change = (
            normed(block.post_attention_layernorm, x, base) for x in (base, source - base)
        )
        gate, up = mlp.gate_proj(inner), mlp.up_proj(inner)
        ratio = torch.sigmoid(gate)  # SiLU over its argument
        moved = ratio * (mlp.gate_proj(change) * up + gate * mlp.up_proj(change)) / 2
        last = base + mlp.down_proj(ratio * gate * up)
        logits = hf.lm_head(normed(norm, source - base + mlp.down_proj(moved), last))
    expected = float(logits[pairs.answers[0]] - logits[pairs.foils[0]])
    assert abs(expected) > 0.01
    assert found == pytest.approx(expected, rel=1e-3)


def test_relp_changes_no_value_on_the_way_and_leaves_nothing_behind(model_of):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab)
    plain = attribution_patch(model, pairs, site="attn_out")
    relp = attribution_patch(model, pairs, site="attn_out", method="relp")
    np.testing.assert_array_equal(relp.clean_metric, plain.clean_metric)
    assert np.nanmax(np.abs(relp.values - plain.values)) > 1e-3
    assert_same(attribution_patch(model, pairs, site="attn_out").values, plain.values, atol=0)


@pytest.mark.parametrize("method", ["relp", "graddrop"])
def test_equals_mediation_in_a_linear_model(method):
    model = random_weights(hand_set(), scale=0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("W_Q", "W_K", "b_Q", "b_K")):
                parameter.zero_()
    pairs = Pairs.from_tokens([[1, 2, 3, 4, 5]], [[1, 6, 3, 7, 5]], answers=[1], foils=[3])
    exact = causal_mediation(model, pairs, site="z")
    found = attribution_patch(model, pairs, site="z", method=method)
    if method == "relp":
        assert_same(found.values, exact.values)
    else:  # nothing lies above the last block, so that every other pass is the plain one
        assert_same(found.values[:, -1], exact.values[:, -1])


@pytest.mark.slow
def test_batch_order_and_precision_do_not_matter(model_of):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab, longer=(0, 1, 0, 2))
    half = copy.deepcopy(model).to(torch.bfloat16)
    for method, site in (("relp", "mlp_out"), ("graddrop", "z"), ("atp*", "k"), ("qk", "q")):
        whole = attribution_patch(model, pairs, site=site, method=method)
        order = [2, 0, 3, 1]
        other = attribution_patch(model, pairs[order], site=site, method=method, batch_rows=3)
        assert_same(other.values, whole.values[order], atol=5e-5)
        rough = attribution_patch(half, pairs, site=site, method=method).values
        there = np.isfinite(whole.values)
        assert np.corrcoef(rough[there], whole.values[there])[0, 1] > 0.9


def test_refuses_what_a_method_does_not_serve(model_of, unchecked):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    with pytest.raises(ValueError, match="corrects sites q and k"):
        attribution_patch(model, pairs, site="z", method="qk")
    with pytest.raises(ValueError, match="patterns as constants"):
        attribution_patch(model, pairs, site="k", method="relp")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        attribution_patch(
            model,
            pairs,
            metric=lambda logits, _: (logits[:, 0] - logits[:, 0].detach()).abs().sqrt(),
        )
