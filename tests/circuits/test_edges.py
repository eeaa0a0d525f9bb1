"""Edge attribution: against node attribution, autograd, exact values, and a known circuit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import divergence_lens as dl
from divergence_lens.pairs import Pairs
from tests.support.models import BACKENDS
from tests.support.patching_oracles import (
    hand_set,
    induction_model,
    logit_difference,
    random_pairs,
)

METHODS = ("gradient", "integrated-inputs")


def by_sender(scores):
    """The sum over the edges of each sender, `[pairs, columns, senders]`."""
    graph = scores.graph
    return np.stack(
        [scores.values[..., graph.edge_sender == i].sum(-1) for i in range(len(graph.senders))], -1
    )


def assert_edges_of_a_sender_are_its_attribution(model, pairs, method, **options):
    scores = dl.edge_scores(model, pairs, method=method, steps=3, span="position", **options)
    sums, graph = by_sender(scores), scores.graph
    sites = ["z", "mlp_out", "resid_pre"]
    nodes = dl.attribution_patch(model, pairs, site=sites, method=method, steps=3, **options)
    for layer in range(graph.n_layers):
        first = graph.heads_from(layer)
        heads = sums[..., first : first + graph.n_heads]
        np.testing.assert_allclose(heads, nodes["z"].values[:, layer], atol=1e-4)
        mlp = sums[..., graph.mlp_sender(layer)]
        np.testing.assert_allclose(mlp, nodes["mlp_out"].values[:, layer], atol=1e-4)
    np.testing.assert_allclose(sums[..., 0], nodes["resid_pre"].values[:, 0], atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_edges_of_a_sender_add_up_to_its_attribution(model, pairs, method):
    assert_edges_of_a_sender_are_its_attribution(model, pairs, method)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "qwen3", "mixtral"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_edges_add_up_in_other_families(model_of, family, backend):
    if family == "qwen3" and backend == "hooked":
        backend = "bridge"
    pairs = random_pairs(64, longer=(0, 2, 1, 0))
    model = model_of(family, backend)
    assert_edges_of_a_sender_are_its_attribution(model, pairs, "integrated-inputs")
    assert_edges_of_a_sender_are_its_attribution(model, pairs, "gradient", direction="denoising")


def test_edges_into_an_mlp_add_up_to_the_gradient_of_its_input(model, hf_of, pairs):
    """Oracle: autograd through the norm that only the MLP reads, in Hugging Face's model."""
    hf, scores = hf_of("llama"), dl.edge_scores(model, pairs, method="gradient")
    sums = scores.by_receiver()
    for layer in range(2):
        expected = []
        for i in range(len(pairs)):
            states = []

            def read(_module, args, states=states):
                view = args[0].view_as(args[0])
                view.retain_grad()
                states.append(view)
                return (view, *args[1:])

            norm = hf.base_model.layers[layer].post_attention_layernorm
            handle = norm.register_forward_pre_hook(read)
            try:
                metric = logit_difference(hf(pairs.clean[i][None]).logits[0, -1], pairs, i)
                (gradient,) = torch.autograd.grad(metric, states[0])
                hf(pairs.corrupted[i][None])
            finally:
                handle.remove()
            expected.append(float(((states[1] - states[0]).detach() * gradient).sum()))
        assert sums[f"m{layer}"] == pytest.approx(np.mean(expected), abs=1e-4)


def test_segments_and_all_positions_are_sums_of_positions(model):
    pairs = random_pairs(64, longer=(0, 1, 2, 0))
    every = dl.edge_scores(model, pairs, span="position")
    total = dl.edge_scores(model, pairs, span="all")
    segments = dl.edge_scores(model, pairs, span="segment")
    np.testing.assert_allclose(np.nansum(every.values, 1), total.values[:, 0], atol=1e-4)
    np.testing.assert_allclose(np.nansum(segments.values, 1), total.values[:, 0], atol=1e-4)
    for i, row in enumerate(segments.labels):
        for column, name in enumerate(row):
            own = [c for c, segment in enumerate(every.segments[i]) if segment == name]
            np.testing.assert_allclose(
                np.nansum(every.values[i, own], 0), segments.values[i, column], atol=1e-4
            )
    table = segments.by_segment()
    assert list(table.columns) == ["bias", "text", "divergence"]
    np.testing.assert_allclose(table.sum(axis=1), total.by_receiver(), atol=1e-4)


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), batch_rows=st.integers(1, 9))
def test_batch_size_and_order_do_not_matter(model_of, seed, batch_rows):
    model, pairs = model_of("llama", "bridge"), random_pairs(64, seed=seed)
    expected = dl.edge_scores(model, pairs, steps=2, batch_rows=32)
    order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
    scores = dl.edge_scores(model, pairs[order], steps=2, batch_rows=batch_rows)
    np.testing.assert_allclose(scores.values, expected.values[order], atol=1e-4)


def linear_model():
    """Random values and outputs, and no queries: every attention pattern is uniform."""
    model = hand_set()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (model.W_E, model.W_pos, model.W_U):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for block in model.blocks:
            for parameter in (block.attn.W_V, block.attn.W_O):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_in_a_linear_model_attribution_is_path_patching():
    model = linear_model()
    pairs = Pairs.from_tokens(
        [[0, 1, 2, 3, 1], [4, 4, 2, 1]],
        [[0, 5, 2, 3, 1], [4, 3, 6, 1]],
        answers=[2, 3],
        foils=[4, 5],
    )
    for span in ("all", "position"):
        exact = dl.path_patch(model, pairs, span=span)
        for method in METHODS:
            fast = dl.edge_scores(model, pairs, method=method, span=span)
            np.testing.assert_allclose(fast.values, exact.values, atol=1e-4)
    assert np.nanmax(np.abs(exact.values)) > 0.1


def test_shows_the_edge_from_the_previous_token_head_to_the_induction_keys():
    model = induction_model()
    # After 1 2 ... 1 the model says 2. Changing the first 1 takes away what the previous-token head
    # reports at the 2, which the induction head reads with its keys.
    pairs = Pairs.from_tokens([[0, 1, 2, 3, 1]], [[0, 5, 2, 3, 1]], answers=[2], foils=[4])
    exact = dl.path_patch(model, pairs, span="position")
    shares = exact.values[0] / exact.total[0]
    lit = {
        (int(column), *exact.graph.names(int(edge)))
        for column, edge in np.argwhere(np.abs(shares) > 1e-3)
    }
    assert lit == {
        (1, "embed", "a0.h0.v"),
        (2, "a0.h0", "a1.h0.k"),
        (4, "a1.h0", "logits"),
    }
    carried = [shares[2, exact.graph.edge("a0.h0", "a1.h0.k")]]
    np.testing.assert_allclose(carried, 1, atol=1e-3)
    circuit = dl.Circuit.from_edges(
        exact.graph,
        [("embed", "a0.h0.v"), ("a0.h0", "a1.h0.k"), ("a1.h0", "logits")]
        + [("embed", f"a{layer}.h0.{read}") for layer in (0, 1) for read in "qkv"],
    )
    assert dl.faithfulness(model, pairs, circuit).values[0] == pytest.approx(1, abs=1e-3)
    cut = circuit.without(exact.graph.edge("a0.h0", "a1.h0.k"))
    assert dl.faithfulness(model, pairs, cut).values[0] == pytest.approx(0, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "mixtral"])
def test_small_changes_are_linear_in_parallel_and_other_blocks(model_of, family):
    """Noise on the embeddings so small that the first-order estimate is exact."""
    model, pairs = model_of(family, "bridge"), random_pairs(64)
    noise = dl.EmbeddingNoise(scale=1e-3)
    fast = dl.edge_scores(model, pairs, method="gradient", corruption=noise)
    exact = dl.path_patch(model, pairs, corruption=noise)
    agreement = fast.agreement(exact)
    assert agreement.pearson > 0.99
    assert agreement.slope == pytest.approx(1, abs=0.05)


def test_verify_attaches_agreement_with_exact_edges(model, pairs):
    scores = dl.edge_scores(model, pairs, verify=15, seed=1)
    exact = dl.path_patch(model, pairs)
    assert scores.verified is not None
    assert scores.verified.cells <= 30
    whole = scores.agreement(exact)
    assert scores.verified.pearson == pytest.approx(whole.pearson, abs=0.3)


def test_the_model_is_left_as_it_was(model, pairs):
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
    dl.edge_scores(model, pairs, verify=3)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert hooks == sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )
