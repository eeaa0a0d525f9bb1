"""Circuits: which edges are chosen, tables and graphs of them, files, and the graph of a model."""

import heapq
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import divergence_lens as dl
from divergence_lens import plots
from divergence_lens.circuits import Graph
from divergence_lens.plots.fitting import fitted

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


@pytest.mark.parametrize("width", [302, 453, 720])
def test_names_of_nodes_do_not_overlap_and_the_strongest_has_one(width):
    graph = Graph(30, 9, 3)
    circuit = dl.Circuit.from_scores(graph, random_scores(graph=graph), greedy=200)
    figure = fitted(plots.circuit_graph(circuit), width)
    named = [note for note in figure.layout.annotations if note.visible is not False]
    margin, (left, right), (bottom, top) = (
        figure.layout.margin, figure.layout.xaxis.range, figure.layout.yaxis.range
    )  # fmt: skip
    across = (width - margin.l - margin.r) / (right - left)
    down = (figure.layout.height - margin.t - margin.b) / (bottom - top)
    for i, one in enumerate(named):
        for other in named[:i]:
            # A letter of 9 pixels of type is about 5 wide.
            beside = abs(one.x - other.x) * across >= 2.5 * len(one.text + other.text)
            assert beside or abs(one.y - other.y) * down >= 10, (one.text, other.text)
    strongest = circuit.table().iloc[0]["sender"]
    assert strongest in {note.text for note in named}
    # Every node but the embeddings and the logits has a name, or states it under the pointer.
    hovers = {text for trace in figure.data if trace.text is not None for text in trace.text}
    nodes = set(circuit.nodes) - {"embed", "logits"}
    assert nodes <= hovers
    assert {note.text for note in figure.layout.annotations} == nodes
    assert len(named) >= len(nodes) * (0.4 if width == 302 else 0.9)


def test_scores_without_a_total_effect_support_nothing(model_of, pairs):
    scores = dl.edge_scores(model_of("llama", "bridge"), pairs, method="gradient")
    none = replace(scores, corrupted_metric=scores.clean_metric)
    assert np.isnan(none.support()).all()
    np.testing.assert_array_equal(none.circuit(top=5).chosen, scores.circuit(top=5).chosen)
    message = "the mean total effect is 0, so that no edge supports the answer"
    with pytest.raises(ValueError, match=message):
        none.circuit(top=5, absolute=False)
    with pytest.raises(ValueError, match=message):
        dl.faithfulness_curve(model_of("llama", "bridge"), pairs, none, absolute=False)


def test_edges_that_were_not_patched_are_nan_in_sums(model_of, pairs):
    model = model_of("llama", "bridge")
    exact = dl.path_patch(model, pairs, edges=[("m0", "logits"), ("m1", "logits")], span="segment")
    assert exact.by_segment().isna().all(axis=None)  # no receiver has all of its edges
    senders = exact.by_sender()
    assert senders["m1"] == pytest.approx(exact.mean()[-1])  # its only edge
    assert senders.drop("m1").isna().all()
    with pytest.raises(ValueError, match="only 1 have a score for each of their edges"):
        dl.faithfulness_curve(model, pairs, exact, level="nodes", shares=(0.5,))
