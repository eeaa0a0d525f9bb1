"""Answers of several tokens: against Hugging Face with forward hooks, and known answers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_lens.engine.factory import get_engine
from divergence_lens.pairs import Pairs
from divergence_lens.patching import metrics
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.corruption import EmbeddingNoise
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.patching.readings import Reading, readings_of
from tests.support.answers import (
    MIXED,
    hf_gradient_values,
    hf_grid,
    hf_log_probability,
    hf_metric,
    hf_states,
    mixed_pairs,
    tokens_of,
)
from tests.support.models import chat_tokenizer, random_hf_model, slow_except
from tests.support.patching_oracles import assert_same, hand_set

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


@pytest.mark.parametrize("corruption", ["zero", "mean"])
def test_ablated_states_do_not_depend_on_the_answers(model_of, hf, corruption):
    pairs = mixed_pairs(VOCAB)
    effects = causal_mediation(
        model_of("qwen2"), pairs, site="mlp_out", corruption=corruption, metric="logit_difference"
    )
    with torch.no_grad():
        states = [hf_states(hf("qwen2"), row, "mlp_out") for row in pairs.clean]
    slots = [[(name, row[:i].count(name)) for i, name in enumerate(row)] for row in pairs.segments]

    def replaced(i):
        layers = range(len(states[0]))
        if corruption == "zero":
            return [torch.zeros_like(states[i][layer]) for layer in layers]
        members = [
            [(j, q) for j, row in enumerate(slots) for q, other in enumerate(row) if other == slot]
            for slot in slots[i]
        ]
        return [
            torch.stack([torch.stack([states[j][layer][q] for j, q in m]).mean(0) for m in members])
            for layer in layers
        ]

    assert_same(effects.values, hf_grid(hf("qwen2"), pairs, "mlp_out", states=replaced), atol=2e-4)


@pytest.mark.parametrize("metric", ["log_probability", "probability_difference", "kl"])
def test_other_metrics_read_whole_answers(model_of, hf, metric):
    pairs = mixed_pairs(VOCAB)
    effects = causal_mediation(model_of("qwen2"), pairs, metric=metric)
    for i in range(len(pairs)):
        with torch.no_grad():
            logs = [
                hf_log_probability(hf("qwen2"), pairs.clean[i], tokens_of(side[i])).double()
                for side in (pairs.answers, pairs.foils)
            ]
        expected = {
            "log_probability": logs[0],
            "probability_difference": logs[0].exp() - logs[1].exp(),
            "kl": torch.zeros(()),  # of the clean run against itself, at the target position
        }
        assert effects.clean_metric[i] == pytest.approx(float(expected[metric]), abs=2e-4)
    everything = causal_mediation(
        model_of("qwen2"), pairs, metric=metric, site="resid_pre", span="all"
    )
    np.testing.assert_allclose(everything.values[:, 0, 0], everything.total, atol=2e-4)


CALLS = {
    "exact": causal_mediation,
    "window": lambda model, pairs, **options: causal_mediation(model, pairs, window=2, **options),
    "segment": lambda model, pairs, **options: causal_mediation(
        model, pairs, span="segment", **options
    ),
    "noise": lambda model, pairs, **options: causal_mediation(
        model, pairs, corruption=EmbeddingNoise(segment="bias", scale=1.0), **options
    ),
    **{
        method: lambda model, pairs, method=method, **options: attribution_patch(
            model, pairs, method=method, steps=3, **options
        )
        for method in ("gradient", "integrated", "integrated-inputs", "graddrop", "relp")
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_one_row_for_both_sides_equals_a_row_for_each(model_of, monkeypatch, call, direction):
    pairs, options = mixed_pairs(VOCAB), {"site": "attn_out", "direction": direction}
    together = CALLS[call](model_of("qwen2"), pairs, **options)
    monkeypatch.setattr(
        metrics, "readings_of", lambda a, b: (Reading(answer=tuple(a)), Reading(foil=tuple(b)))
    )
    apart = CALLS[call](model_of("qwen2"), pairs, **options)
    assert np.nanmax(np.abs(together.values)) > 1e-3
    assert_same(together.values, apart.values, atol=2e-4)
    np.testing.assert_allclose(together.clean_metric, apart.clean_metric, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["q", "k"])
@pytest.mark.parametrize("method", ["qk", "atp*"])
def test_corrected_queries_and_keys_of_two_rows_equal_those_of_one(
    model_of, monkeypatch, site, method
):
    pairs, options = mixed_pairs(VOCAB), {"site": site, "method": method}
    together = attribution_patch(model_of("qwen2"), pairs, **options)
    monkeypatch.setattr(
        metrics, "readings_of", lambda a, b: (Reading(answer=tuple(a)), Reading(foil=tuple(b)))
    )
    apart = attribution_patch(model_of("qwen2"), pairs, **options)
    assert np.nanmax(np.abs(together.values)) > 1e-3
    assert_same(together.values, apart.values, atol=2e-4)


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_values_do_not_depend_on_order_batches_or_neighbors(model_of, data):
    model, pairs = model_of("qwen2"), mixed_pairs(VOCAB)
    chosen = data.draw(st.lists(st.integers(0, 3), min_size=1, unique=True))
    rows = data.draw(st.sampled_from([1, 7, 128]))
    site = data.draw(st.sampled_from(["resid_pre", "attn_out", "v"]))
    whole = causal_mediation(model, pairs, site=site)
    assert whole.answer_labels == tuple(tuple(map(str, answer)) for answer, _ in MIXED)
    part = causal_mediation(model, pairs[chosen], site=site, batch_rows=rows)
    assert_same(part.values, whole[chosen].values, atol=2e-4)
    assert part.answer_labels == whole[chosen].answer_labels
    np.testing.assert_allclose(part.total, whole[chosen].total, atol=2e-4)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_patching_all_positions_of_the_lowest_layer_is_the_total_effect(model_of, direction):
    pairs = mixed_pairs(VOCAB)
    options = {"site": "resid_pre", "direction": direction}
    effects = causal_mediation(model_of("qwen2"), pairs, span="all", **options)
    np.testing.assert_allclose(effects.values[:, 0, 0], effects.total, atol=2e-4)
    path = attribution_patch(
        model_of("qwen2"), pairs, method="integrated", steps=50, span="all", **options
    )
    np.testing.assert_allclose(path.values[:, 0, 0], effects.total, atol=5e-3)


def test_a_certain_second_token_adds_nothing():
    model = hand_set()
    position, token = slice(8, 16), slice(0, 8)
    with torch.no_grad():
        model.W_E[:, token] = torch.eye(8)
        model.W_pos[:, position] = 0.1 * torch.randn(
            8, 8, generator=torch.Generator().manual_seed(0)
        )
        model.W_U[token] = 2 * torch.eye(8).roll(1, 1)  # each token predicts the next one
        model.W_U[position] = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
        model.W_U[5, 6] = 60.0  # token 5 is followed by 6 with probability 1
    rows = [[1, 2, 3]], [[1, 2, 4]]
    one = Pairs.from_tokens(*rows, answers=[5], foils=[7])
    two = Pairs.from_tokens(*rows, answers=[[5, 6]], foils=[7])
    effects = [causal_mediation(model, pairs, site="resid_pre") for pairs in (one, two)]
    assert np.abs(effects[0].values).max() > 0.5
    assert_same(effects[0].values, effects[1].values, atol=1e-5)
    assert [e.metric for e in effects] == ["logit_difference", "log_probability_difference"]


def test_chosen_cells_and_verified_estimates_are_those_of_the_whole_grid(model_of):
    model, pairs = model_of("qwen2"), mixed_pairs(VOCAB)
    whole = causal_mediation(model, pairs, site="z")
    some = causal_mediation(model, pairs, site="z", cells=whole.top(9))
    assert np.isfinite(some.values).sum() == 9
    here = np.isfinite(some.values)
    np.testing.assert_allclose(some.values[here], whole.values[here], atol=2e-4)
    estimate = attribution_patch(model, pairs, site="z", verify=3)
    assert estimate.verified is not None
    assert estimate.verified.cells == 6


def test_answers_share_a_row_if_one_continues_the_other():
    assert readings_of([5, 6], [5, 7, 8]) == (Reading((5, 6), (5, 7, 8)),)
    assert readings_of([5, 6], [7]) == (Reading((5, 6), (7,)),)
    assert readings_of([5, 6], []) == (Reading((5, 6)),)
    assert readings_of([1, 2], [3, 4]) == (Reading(answer=(1, 2)), Reading(foil=(3, 4)))
    assert readings_of([1, 2, 3], [1, 4, 3]) == (
        Reading(answer=(1, 2, 3)),
        Reading(foil=(1, 4, 3)),
    )


def test_answers_that_do_not_fit_are_refused(model_of):
    model = model_of("qwen2")
    row = torch.ones(255, dtype=torch.int64)
    other = row.clone()
    other[3] = 2
    fits = Pairs.from_tokens([row], [other], answers=[[1, 2]], foils=[3])
    causal_mediation(model, fits, cells=np.zeros((1, 3, 255), dtype=bool))
    long = Pairs.from_tokens([row], [other], answers=[[1, 2, 3]], foils=[3])
    with pytest.raises(ValueError, match="255 tokens and its answer 2 more, but"):
        causal_mediation(model, long)
    unknown = Pairs.from_tokens([[1, 2]], [[3, 2]], answers=[[1, VOCAB]], foils=[3])
    with pytest.raises(ValueError, match=f"answer of pair 0 is token id {VOCAB}"):
        causal_mediation(model, unknown)
    both_ways = hand_set(attention_dir="bidirectional")
    pairs = Pairs.from_tokens([[1, 2]], [[3, 2]], answers=[[1, 2]], foils=[3])
    with pytest.raises(ValueError, match="attends in both directions"):
        causal_mediation(both_ways, pairs)
