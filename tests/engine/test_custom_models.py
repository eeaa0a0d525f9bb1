"""TransformerLens's own models, built from a configuration, against their own forward and hooks."""

import numpy as np
import pytest
import torch

import divergence_lens as dl
from divergence_lens.engine import get_engine
from tests.support.custom_models import (
    custom_model,
    patched_by_hand,
    random_rows,
    small_modular_addition,
)
from tests.support.models import BACKENDS

pytestmark = pytest.mark.skipif(
    "hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer"
)


@pytest.mark.parametrize("n_ctx", [1, 2, 3, 5])
def test_contexts_shorter_than_the_probe_work(n_ctx):
    model = dl.load_model(custom_model(n_ctx=n_ctx))
    engine = get_engine(model)
    tokens = random_rows(model, 3, n_ctx)
    with torch.no_grad():
        torch.testing.assert_close(engine.unembed(engine.final(tokens)), model(tokens))
    clean, corrupted = random_rows(model, 2, n_ctx, seed=1)
    pairs = dl.Pairs.from_tokens([clean], [corrupted], answers=[7], foils=[11])
    exact = dl.causal_mediation(model, pairs, site="resid_post")
    expected = patched_by_hand(model, clean, corrupted, n_ctx - 1, (7, 11))
    np.testing.assert_allclose(exact.values[0], expected, atol=1e-5)
    fast = dl.attribution_patch(model, pairs, site="resid_post", method="integrated", steps=64)
    # The path of `integrated` ends at the corrupted run, so each layer adds up to the total effect.
    with torch.no_grad():
        ends = model(torch.stack([clean, corrupted]))[:, -1]
    total = float((ends[1, 7] - ends[1, 11]) - (ends[0, 7] - ends[0, 11]))
    np.testing.assert_allclose(fast.values[0].sum(-1), total, atol=0.02)


def test_a_model_may_predict_other_ids_than_it_reads():
    model = small_modular_addition()
    clean, corrupted = torch.tensor([3, 5, 23]), torch.tensor([4, 5, 23])
    pairs = dl.Pairs.from_tokens([clean], [corrupted], answers=[8], foils=[9])
    effects = dl.causal_mediation(model, pairs, site="resid_post", metric="log_probability")
    with torch.no_grad():
        expected = model(clean[None]).log_softmax(-1)[0, -1, 8]
    np.testing.assert_allclose(effects.clean_metric[0], float(expected), rtol=1e-5)
    grid = dl.causal_mediation(model, pairs, site="resid_post").values[0]
    np.testing.assert_allclose(grid, patched_by_hand(model, clean, corrupted, 2, (8, 9)), atol=1e-5)
    refused = dl.Pairs.from_tokens([clean], [corrupted], answers=[23], foils=[9])
    with pytest.raises(ValueError, match="answer of pair 0 is token id 23, but the model predicts"):
        dl.causal_mediation(model, refused)


def test_ungrouped_keys_and_values_are_patched_for_each_query_head():
    model = custom_model(n_key_value_heads=2, positional_embedding_type="rotary", rotary_dim=8)
    clean, corrupted = random_rows(model, 2, 5)
    pairs = dl.Pairs.from_tokens([clean], [corrupted], answers=[7], foils=[11])
    grouped = dl.causal_mediation(model, pairs, site="v")
    model.set_ungroup_grouped_query_attention(True)
    with torch.no_grad():
        _, cache = model.run_with_cache(corrupted[None])
        base = model(clean[None])[0, -1]
    for site in ("v", "k"):
        values = dl.causal_mediation(model, pairs, site=site).values  # [1, layer, pos, head]
        assert values.shape == (1, 2, 5, 4)
        for layer, position, head in ((0, 1, 0), (0, 4, 3), (1, 2, 1), (1, 0, 2)):
            name = f"blocks.{layer}.attn.hook_{site}"

            def patch(state, hook, at=position, head=head, name=name):
                state[:, at, head] = cache[name][:, at, head]
                return state

            with torch.no_grad():
                logits = model.run_with_hooks(clean[None], fwd_hooks=[(name, patch)])[0, -1]
            expected = float((logits[7] - logits[11]) - (base[7] - base[11]))
            np.testing.assert_allclose(values[0, layer, position, head], expected, atol=1e-5)
    fast = dl.attribution_patch(model, pairs, site="v", method="gradient")
    assert fast.values.shape == (1, 2, 5, 4)
    model.set_ungroup_grouped_query_attention(False)
    again = dl.causal_mediation(model, pairs, site="v")
    np.testing.assert_array_equal(again.values, grouped.values)


@pytest.mark.parametrize("act_fn", ["solu_ln", "relu"])
def test_an_activation_with_a_norm_is_patched(act_fn):
    model = custom_model(act_fn=act_fn)
    clean, corrupted = random_rows(model, 2, 5)
    pairs = dl.Pairs.from_tokens([clean], [corrupted], answers=[7], foils=[11])
    expected = patched_by_hand(model, clean, corrupted, 4, (7, 11))
    np.testing.assert_allclose(dl.causal_mediation(model, pairs).values[0], expected, atol=1e-5)


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_result", "use_hook_mlp_in"])
def test_further_hook_points_change_no_number(flag):
    model = custom_model()
    clean, corrupted = random_rows(model, 2, 5)
    pairs = dl.Pairs.from_tokens([clean], [corrupted], answers=[7], foils=[11])
    before = dl.causal_mediation(model, pairs, site="z").values
    getattr(model, f"set_{flag}")(True)
    after = dl.causal_mediation(model, pairs, site="z").values
    np.testing.assert_allclose(after, before, atol=1e-5)
