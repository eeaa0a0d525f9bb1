"""Circuits: which edges are chosen, tables and graphs of them, files, and the graph of a model."""

import heapq

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import divergence_lens as dl
from divergence_lens.circuits import Graph

GRAPH = Graph(n_layers=2, n_heads=4, n_kv_heads=2)


def random_scores(seed=0, graph=GRAPH):
    return np.random.default_rng(seed).normal(size=len(graph)).astype(np.float32)


def test_the_graph_has_every_edge_from_an_earlier_sender():
    # embed; per layer 4 heads and an MLP. Per layer 4 + 2 + 2 reads and an MLP; logits.
    assert len(GRAPH.senders) == 11
    assert len(GRAPH.receivers) == 19
    assert len(GRAPH) == 8 * 1 + 5 + 8 * 6 + 10 + 11
    assert GRAPH.senders[:6] == ("embed", "a0.h0", "a0.h1", "a0.h2", "a0.h3", "m0")
    assert GRAPH.receivers[:9] == (
        "a0.h0.q", "a0.h1.q", "a0.h2.q", "a0.h3.q", "a0.g0.k", "a0.g1.k", "a0.g0.v", "a0.g1.v", "m0"
    )  # fmt: skip
    for edge in range(len(GRAPH)):
        assert GRAPH.edge(*GRAPH.names(edge)) == edge


def test_parallel_blocks_have_no_edge_from_their_heads_to_their_mlp():
    parallel = Graph(n_layers=2, n_heads=4, n_kv_heads=4, parallel=True)
    sequential = Graph(n_layers=2, n_heads=4, n_kv_heads=4)
    assert len(sequential) - len(parallel) == 8
    with pytest.raises(ValueError, match="runs backward"):
        parallel.edge("a0.h0", "m0")
    assert sequential.names(sequential.edge("a0.h0", "m0")) == ("a0.h0", "m0")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(0, 82))
def test_top_and_threshold_choose_the_largest_magnitudes(seed, count):
    scores = random_scores(seed)
    circuit = dl.Circuit.from_scores(GRAPH, scores, top=count)
    assert len(circuit) == count
    chosen, rest = np.abs(scores[circuit.chosen]), np.abs(scores[~circuit.chosen])
    assert not count or not len(rest) or chosen.min() >= rest.max()
    if count:
        same = dl.Circuit.from_scores(GRAPH, scores, threshold=float(chosen.min()))
        np.testing.assert_array_equal(same.chosen, circuit.chosen)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 82))
def test_greedy_circuits_lead_to_the_logits(seed, count):
    scores = random_scores(seed)
    circuit = dl.Circuit.from_scores(GRAPH, scores, greedy=count)
    assert len(circuit) == count
    graph = circuit.to_networkx()
    for node in graph.nodes:
        assert nx.has_path(graph, node, "logits")
    # The first edge is the strongest into the logits.
    first = dl.Circuit.from_scores(GRAPH, scores, greedy=1)
    own = GRAPH.edge_receiver == len(GRAPH.receivers) - 1
    assert np.abs(scores[first.chosen]).item() == np.abs(scores[own]).max()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.6))
def test_connected_keeps_the_edges_on_a_path_from_the_embeddings_to_the_logits(seed, share):
    chosen = np.random.default_rng(seed).random(len(GRAPH)) < share
    circuit = dl.Circuit(GRAPH, chosen, random_scores(seed))
    kept = circuit.connected()
    # Oracle: walk the edges by name, until nothing changes.
    edges = {GRAPH.names(int(edge)) for edge in np.flatnonzero(chosen)}

    def heads(receiver):
        layer, _, rest = receiver.partition(".")
        if not rest:
            return {receiver}
        kind, number = rest[0], int(rest[1])
        return (
            {f"{layer}.h{number}"}
            if kind == "h"
            else {f"{layer}.h{2 * number}", f"{layer}.h{2 * number + 1}"}
        )

    above, below = {"embed"}, {"logits"}
    for _ in range(20):
        above |= {h for s, r in edges if s in above for h in heads(r)}
        below |= {s for s, r in edges if heads(r) & below}
    expected = {(s, r) for s, r in edges if s in above and heads(r) & below}
    assert {GRAPH.names(int(edge)) for edge in np.flatnonzero(kept.chosen)} == expected


def test_a_table_a_networkx_graph_and_a_file_hold_the_same_edges(tmp_path):
    scores = random_scores()
    circuit = dl.Circuit.from_scores(GRAPH, scores, top=10)
    table = circuit.table()
    strongest = heapq.nlargest(10, np.abs(scores).tolist())
    np.testing.assert_allclose(table["score"].abs(), strongest)
    graph = circuit.to_networkx()
    named = {(s, data["receiver"]) for s, _, data in graph.edges(data=True)}
    assert named == set(zip(table["sender"], table["receiver"], strict=True))
    assert set(graph.nodes) == set(circuit.nodes)
    circuit.save(tmp_path / "circuit.safetensors")
    loaded = dl.Circuit.load(tmp_path / "circuit.safetensors")
    assert loaded.graph == circuit.graph
    np.testing.assert_array_equal(loaded.chosen, circuit.chosen)
    np.testing.assert_array_equal(loaded.scores, circuit.scores)


def test_keys_of_a_group_lead_to_each_of_its_heads():
    circuit = dl.Circuit.from_edges(
        GRAPH, [("embed", "a0.g1.k"), ("a0.h2", "logits"), ("a0.h3", "m1"), ("embed", "a0.g0.v")]
    )
    graph = circuit.to_networkx()
    assert set(graph.successors("embed")) == {"a0.h2", "a0.h3", "a0.g0"}


def test_complement_and_nodes():
    circuit = dl.Circuit.from_nodes(GRAPH, ["a0.h1", "m1"])
    senders = {GRAPH.names(int(edge))[0] for edge in np.flatnonzero(circuit.chosen)}
    assert senders == {"embed", "a0.h1", "m1"}
    receivers = {GRAPH.names(int(edge))[1] for edge in np.flatnonzero(circuit.chosen)}
    assert receivers == {"a0.h1.q", "a0.g0.k", "a0.g0.v", "m1", "logits"}
    assert len(circuit) + len(circuit.complement()) == len(GRAPH)


def test_edge_scores_survive_a_file(tmp_path, model_of, pairs):
    scores = dl.edge_scores(model_of("llama", "bridge"), pairs, span="segment", verify=5)
    scores.save(tmp_path / "scores.safetensors")
    loaded = dl.EdgeScores.load(tmp_path / "scores.safetensors")
    np.testing.assert_array_equal(loaded.values, scores.values)
    assert loaded.graph == scores.graph
    assert loaded.labels == scores.labels
    assert loaded.verified == scores.verified
    assert loaded.metadata == scores.metadata
    part = scores[[2, 0]]
    np.testing.assert_array_equal(part.values[1], scores.values[0][: part.values.shape[1]])


def test_top_lists_the_strongest_edges_of_the_mean(model_of, pairs):
    scores = dl.edge_scores(model_of("llama", "bridge"), pairs)
    table = scores.top(5)
    mean = scores.values[:, 0].mean(0)
    np.testing.assert_allclose(table["score"].abs(), np.sort(np.abs(mean))[::-1][:5], rtol=1e-4)


def test_the_figure_of_200_edges_is_small_and_states_every_edge(model_of, pairs):
    scores = dl.edge_scores(model_of("llama", "bridge"), pairs, span="position")
    figure = scores.plot(pair=1, k=200)
    assert len(figure.data) <= 25  # arcs are bundled by color and width
    hovers = [text for trace in figure.data if trace.text is not None for text in trace.text]
    plain = [text.replace("<br>", " ").replace("\xa0", " ") for text in hovers]
    stated = [text for text in plain if " at " in text]
    assert len(stated) == min(200, int(np.count_nonzero(np.nan_to_num(scores.values[1]))))
    assert figure.layout.yaxis.ticktext[0] == "embed"
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]  # layers down
