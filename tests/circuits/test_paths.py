"""Path patching against whole forward passes of Hugging Face's model with rewired receivers."""

import numpy as np
import pytest
import torch

import divergence_lens as dl
from divergence_lens.circuits import runs
from tests.support.architectures import build
from tests.support.circuit_oracles import Rewired, path_patched
from tests.support.patching_oracles import logit_difference, random_pairs


def exact_effect(hf, pairs, i, edge, *, noising=True, positions=None):
    base, source = pairs.clean[i], pairs.corrupted[i]
    if not noising:
        base, source = source, base
    patched = path_patched(hf, base, source, *edge, positions=positions)
    before = Rewired(hf).run(base)[1]
    return float(logit_difference(patched, pairs, i) - logit_difference(before, pairs, i))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_every_kind_of_edge_equals_a_rewired_forward_pass(model, hf_of, pairs, direction):
    exact = dl.path_patch(model, pairs, direction=direction, batch_rows=7)
    edges = [
        ("embed", "a0.h3.q"),
        ("embed", "a0.g1.k"),
        ("embed", "m1"),
        ("a0.h2", "m0"),
        ("a0.h1", "a1.g0.v"),
        ("a0.h1", "logits"),
        ("m0", "a1.h2.q"),
        ("m0", "a1.g1.k"),
        ("a1.h0", "m1"),
        ("m1", "logits"),
    ]
    for edge in edges:
        for i in (0, 3):
            expected = exact_effect(hf_of("llama"), pairs, i, edge, noising=direction == "noising")
            value = exact.values[i, 0, exact.graph.edge(*edge)]
            assert value == pytest.approx(expected, abs=1e-4), edge


def test_single_positions_equal_a_rewired_forward_pass(model, hf_of, pairs):
    edges = [("embed", "a0.g0.v"), ("m0", "a1.g1.k"), ("a0.h1", "m1"), ("a1.h2", "logits")]
    exact = dl.path_patch(model, pairs, edges=edges, span="position")
    for edge in edges:
        for position in (2, 3, len(pairs.clean[2]) - 1):
            expected = exact_effect(hf_of("llama"), pairs, 2, edge, positions=[position])
            value = exact.values[2, position, exact.graph.edge(*edge)]
            assert value == pytest.approx(expected, abs=1e-4), (edge, position)
    assert (exact.values[2, 0, [exact.graph.edge(*edge) for edge in edges]] == 0).all()


def test_only_requested_edges_and_cells_are_computed(model, pairs):
    every = dl.path_patch(model, pairs, span="position")
    some = dl.path_patch(model, pairs, span="position", edges=[("m0", "logits")])
    number = every.graph.edge("m0", "logits")
    np.testing.assert_allclose(some.values[..., number], every.values[..., number], atol=1e-4)
    assert np.isnan(np.delete(some.values, number, axis=2)).all()
    table = every.top(12, "cells")
    cells = dl.path_patch(model, pairs, span="position", edges=table)
    assert np.isfinite(cells.values).sum() == 12
    again = cells.top(12, "cells")
    np.testing.assert_allclose(again["score"], table["score"], atol=1e-4)


def test_a_circuit_names_its_edges(model, pairs):
    circuit = dl.edge_scores(model, pairs).circuit(top=9)
    exact = dl.path_patch(model, pairs, edges=circuit)
    assert np.isfinite(exact.values[0, 0]).sum() == 9


def test_answers_of_several_tokens_sum_over_their_rows(model):
    rows = random_pairs(64)
    pairs = dl.Pairs.from_tokens(
        rows.clean,
        rows.corrupted,
        answers=[[1, 2], [3], [4, 5], [6]],
        foils=[[7], [8, 9], [1], [2]],
    )
    exact = dl.path_patch(model, pairs, edges=[("embed", "a0.g0.v"), ("m1", "logits")])
    one = dl.path_patch(model, pairs[0], edges=[("embed", "a0.g0.v"), ("m1", "logits")])
    np.testing.assert_allclose(exact.values[:1], one.values, atol=1e-4)
    # All of a sender's edges together, in a run of one layer's last MLP, are its exact node effect.
    node = dl.causal_mediation(model, pairs, site="mlp_out").values[:, 1]
    last = [len(row) - 1 for row in pairs.clean]
    direct = exact.values[:, 0, exact.graph.edge("m1", "logits")]
    np.testing.assert_allclose(direct, node[range(4), last], atol=1e-4)


def test_pairs_are_divided_where_their_changes_would_not_fit(model_of, pairs, monkeypatch):
    model = model_of("llama", "bridge")
    edges = [("m0", "a1.h2.q"), ("a0.h1", "a1.g0.v"), ("m1", "logits")]
    together = dl.path_patch(model, pairs, edges=edges)
    sizes, original = [], runs.sender_changes

    def counted(run, blocks, **options):
        changes = original(run, blocks, **options)
        sizes.append((len(changes), changes.numel() * changes.element_size()))
        return changes

    monkeypatch.setattr("divergence_lens.circuits.path_passes.sender_changes", counted)
    longest = max(map(len, [*pairs.clean, *pairs.corrupted]))
    senders, d_model = len(together.graph.senders), model.cfg.d_model
    monkeypatch.setattr(runs, "CHANGES_BYTES", 2 * 4 * senders * longest * d_model)
    divided = dl.path_patch(model, pairs, edges=edges)
    np.testing.assert_allclose(divided.values, together.values, atol=1e-5)
    assert 1 <= max(size for size, _ in sizes) < len(pairs)
    assert all(used <= runs.CHANGES_BYTES for _, used in sizes)


@torch.no_grad()
def test_an_mlp_that_adds_the_residual_itself(pairs):
    hf = build("Bloom")
    decoder, block = hf.transformer, hf.transformer.h[1]
    exact = dl.path_patch(
        dl.load_model(build("Bloom"), backend="bridge"), pairs, edges=[("embed", "m1")]
    )
    for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
        states = [
            decoder.word_embeddings_layernorm(decoder.word_embeddings(row[None]))
            for row in (clean, corrupted)
        ]
        change = states[1] - states[0]  # [1, pos, d_model]

        def read_more(_module, args, change=change):
            return block.post_attention_layernorm(args[1] + change), args[1]

        before = hf(clean[None]).logits[0, -1]
        handle = block.mlp.register_forward_pre_hook(read_more)
        after = hf(clean[None]).logits[0, -1]
        handle.remove()
        expected = logit_difference(after, pairs, i) - logit_difference(before, pairs, i)
        value = exact.values[i, 0, exact.graph.edge("embed", "m1")]
        assert value == pytest.approx(float(expected), abs=1e-4)
