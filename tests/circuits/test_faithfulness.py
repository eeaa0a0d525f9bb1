"""Faithfulness against whole forward passes of Hugging Face's model with rewired receivers."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import divergence_lens as dl
from divergence_lens.circuits import Faithfulness
from tests.support.circuit_oracles import Rewired, circuit_logits
from tests.support.patching_oracles import logit_difference, random_pairs


def random_circuit(graph, share, seed=0):
    chosen = np.random.default_rng(seed).random(len(graph)) < share
    return dl.Circuit(graph, chosen, np.zeros(len(graph), dtype=np.float32))


@pytest.fixture(scope="module")
def graph(model_of, pairs):
    return dl.edge_scores(model_of("llama", "bridge"), pairs, method="gradient").graph


def ablated_outputs(hf, pairs, i, ablation):
    live = [Rewired(hf).run(row)[0] for row in pairs.clean]
    if ablation == "counterfactual":
        return Rewired(hf).run(pairs.corrupted[i])[0]
    if ablation == "zero":
        return {name: torch.zeros_like(out) for name, out in live[i].items()}
    # Slots: the bias span, the text by position, and the last position of each row.
    result = {name: out.clone() for name, out in live[i].items()}
    for position, (segment, number) in enumerate(slots(pairs, i)):
        same = [
            (j, p)
            for j in range(len(pairs))
            for p, slot in enumerate(slots(pairs, j))
            if slot == (segment, number)
        ]
        for name, out in result.items():
            out[position] = torch.stack([live[j][name][p] for j, p in same]).mean(0)
    return result


def slots(pairs, i):
    seen: dict[str, int] = {}
    result = []
    for name in pairs.segments[i]:
        result.append((name, seen.get(name, 0)))
        seen[name] = seen.get(name, 0) + 1
    return result


@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
def test_a_circuit_equals_a_rewired_forward_pass(model, hf_of, graph, pairs, ablation):
    circuit = random_circuit(graph, 0.6)
    result = dl.faithfulness(model, pairs, circuit, ablation=ablation, completeness=True)
    names = {graph.names(int(edge)) for edge in np.flatnonzero(circuit.chosen)}
    every = {graph.names(edge) for edge in range(len(graph))}
    for i in range(len(pairs)):
        ablated = ablated_outputs(hf_of("llama"), pairs, i, ablation)
        for edges, value in (
            (names, result.metric[0, i]),
            (every - names, result.complement[0, i]),
            (set(), result.empty[i]),
        ):
            logits = circuit_logits(hf_of("llama"), pairs.clean[i], ablated, edges)
            assert value == pytest.approx(float(logit_difference(logits, pairs, i)), abs=1e-3)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), batch_rows=st.integers(1, 5))
def test_everything_is_faithful_and_nothing_is_not(model_of, graph, seed, batch_rows):
    model, pairs = model_of("llama", "bridge"), random_pairs(64, seed=seed)
    whole, none = random_circuit(graph, 2.0), random_circuit(graph, -1.0)
    half = random_circuit(graph, 0.5, seed)
    result = dl.faithfulness(model, pairs, [whole, none, half], batch_rows=batch_rows)
    np.testing.assert_allclose(result.values[:2], [1, 0], atol=1e-4)
    # With counterfactual ablation of rows of equal length, no edge at all is the corrupted run.
    exact = dl.causal_mediation(model, pairs, span="all")
    np.testing.assert_allclose(result.empty, exact.corrupted_metric, atol=1e-3)
    np.testing.assert_allclose(result.full, exact.clean_metric, atol=1e-3)
    again = dl.faithfulness(model, pairs, half, batch_rows=16)
    np.testing.assert_allclose(again.metric[0], result.metric[2], atol=1e-3)


def test_minimality_removes_each_edge(model, graph, pairs):
    circuit = dl.edge_scores(model, pairs).circuit(greedy=6)
    result = dl.faithfulness(model, pairs, circuit, minimality=True)
    (table,) = result.dropped
    assert len(table) == 6
    for row in table.itertuples():
        cut = circuit.without(graph.edge(row.sender, row.receiver))
        expected = dl.faithfulness(model, pairs, cut).values[0] - result.values[0]
        assert row.change == pytest.approx(expected, abs=1e-4)


def test_curves_have_mibs_shares_and_areas(model, graph, pairs):
    scores = dl.edge_scores(model, pairs)
    curve = dl.faithfulness_curve(model, pairs, scores)
    shares = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    assert curve.shares == shares
    assert curve.edges == tuple(int(share * len(graph)) for share in shares)
    below = beyond = 0.0
    for (x0, f0), (x1, f1) in zip(
        zip(shares, curve.values, strict=True),
        list(zip(shares, curve.values, strict=True))[1:],
        strict=False,
    ):
        below += (x1 - x0) * (f0 + f1) / 2
        beyond += (x1 - x0) * (abs(1 - f0) + abs(1 - f1)) / 2
    assert curve.cpr == pytest.approx(below)
    assert curve.cmd == pytest.approx(beyond)
    assert curve.values[-1] == pytest.approx(1, abs=1e-4)


def test_node_curves_keep_all_edges_between_the_kept_nodes(model, graph, pairs):
    scores = dl.edge_scores(model, pairs)
    curve = dl.faithfulness_curve(model, pairs, scores, level="nodes", shares=(0.5, 1.0))
    order = scores.by_sender().abs().sort_values(ascending=False).index
    count = int(0.5 * len(graph.senders))
    circuit = dl.Circuit.from_nodes(graph, [*order[:count]])
    if "embed" in order[:count]:
        assert curve.edges[0] == len(circuit)
        expected = dl.faithfulness(model, pairs, circuit).metric[0]
        np.testing.assert_allclose(curve.metric[0], expected, atol=1e-4)
    assert curve.values[-1] == pytest.approx(1, abs=1e-4)


def test_no_effect_is_nan_with_its_reason_and_not_zero():
    same = np.ones(3)
    result = Faithfulness(
        np.ones((2, 3)), same, same, edges=(1, 2), shares=(0.1, 1.0), complement=np.ones((2, 3)),
        metadata={"settings": {"level": "edges"}},
    )  # fmt: skip
    numbers = [*result.values, *result.completeness, result.cpr, result.cmd]
    assert np.isnan(numbers).all()
    reason = "undefined: the mean metric of the model, 1, is that of the run with all edges ablated"
    assert result.undefined == reason
    assert reason in repr(result)
    assert "nan" not in repr(result)
    assert result.plot().data[0].name == "edges (undefined: no effect)"


def test_results_survive_a_file(model_of, graph, pairs, tmp_path):
    path, model = tmp_path / "faithfulness.safetensors", model_of("llama", "bridge")
    circuit = dl.edge_scores(model, pairs).circuit(greedy=3)
    result = dl.faithfulness(model, pairs, circuit, completeness=True, minimality=True)
    result.save(path)
    loaded = Faithfulness.load(path)
    np.testing.assert_array_equal(loaded.values, result.values)
    np.testing.assert_array_equal(loaded.completeness, result.completeness)
    pd.testing.assert_frame_equal(loaded.dropped[0], result.dropped[0])
    assert (loaded.edges, loaded.metadata) == (result.edges, result.metadata)
    curve = dl.faithfulness_curve(model, pairs, np.arange(len(graph)), shares=(0.5, 1.0))
    curve.save(path)
    loaded = Faithfulness.load(path)
    assert repr(loaded) == repr(curve)
    assert loaded.shares == (0.5, 1.0)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_signed_curves_begin_with_edges_that_support_the_answer(model_of, pairs, direction):
    model = model_of("llama", "bridge")
    scores = dl.edge_scores(model, pairs, direction=direction)
    mean = scores.values[:, 0].mean(0)
    # A clean state raises the metric of the corrupted run, if the clean run has the larger metric.
    sign = np.sign((scores.clean_metric - scores.corrupted_metric).mean())
    support = sign * (mean if direction == "denoising" else -mean)
    signed = dl.faithfulness_curve(model, pairs, scores, shares=(0.3,), absolute=False)
    best = np.argsort(-support)[: int(0.3 * len(mean))]
    names = [scores.graph.names(int(edge)) for edge in best]
    expected = dl.faithfulness(model, pairs, dl.Circuit.from_edges(scores.graph, names))
    np.testing.assert_allclose(signed.metric, expected.metric, atol=1e-4)
    chosen = scores.circuit(top=len(best), absolute=False)
    assert set(np.flatnonzero(chosen.chosen)) == set(best)
    np.testing.assert_allclose(chosen.scores, mean, rtol=1e-4, atol=1e-7)
