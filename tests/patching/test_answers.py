"""Answers of several tokens: against Hugging Face with forward hooks, and known answers."""

import numpy as np
import pytest
import torch

from divergence_lens.engine.factory import get_engine
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.exact import causal_mediation
from tests.support.answers import (
    hf_gradient_values,
    hf_grid,
    hf_metric,
    mixed_pairs,
)
from tests.support.models import chat_tokenizer, random_hf_model, slow_except
from tests.support.patching_oracles import assert_same

VOCAB = len(chat_tokenizer())
SITES = ("resid_pre", "resid_post", "mlp_out", "z")


@pytest.fixture(scope="module")
def hf():
    """The weights of `model_of(family)`, in a Hugging Face model."""
    built = {}

    def get(family):
        if family not in built:
            built[family] = random_hf_model(family, vocab=VOCAB)
        return built[family]

    return get


@pytest.mark.parametrize("family", slow_except("qwen2", ("gpt2", "qwen2", "gemma2")))
@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("site", SITES)
def test_the_exact_grid_is_hugging_faces_with_summed_log_probabilities(
    model_of, hf, family, site, direction
):
    model, pairs = model_of(family), mixed_pairs(VOCAB)
    effects = causal_mediation(model, pairs, site=site, direction=direction)
    heads = get_engine(model).site_heads(site)
    noising = direction == "noising"
    expected = hf_grid(hf(family), pairs, site, noising=noising, heads=heads)
    assert np.nanmax(np.abs(expected)) > 0.1
    assert_same(effects.values, expected, atol=2e-4)
    for i in range(len(pairs)):
        with torch.no_grad():
            clean, corrupted = (
                float(hf_metric(hf(family), row[i], pairs, i))
                for row in (pairs.clean, pairs.corrupted)
            )
        assert effects.clean_metric[i] == pytest.approx(clean, abs=2e-4)
        assert effects.corrupted_metric[i] == pytest.approx(corrupted, abs=2e-4)
    assert effects.metric == "log_probability_difference"


@pytest.mark.parametrize("family", slow_except("qwen2", ("gpt2", "qwen2")))
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_gradient_attribution_is_autograd_on_hugging_face(model_of, hf, family, site):
    pairs = mixed_pairs(VOCAB)
    effects = attribution_patch(model_of(family), pairs, site=site)
    for i in range(len(pairs)):
        expected = np.array(hf_gradient_values(hf(family), pairs, i, site))
        np.testing.assert_allclose(effects.values[i, :, : expected.shape[1]], expected, atol=2e-4)
        assert np.abs(expected).max() > 0.05
