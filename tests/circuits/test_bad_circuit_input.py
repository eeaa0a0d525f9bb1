"""Errors of edges, path patching and circuits name the value and the fix."""

import copy

import numpy as np
import pytest

import divergence_lens as dl
from divergence_lens.circuits import Graph
from tests.support.architectures import build
from tests.support.patching_oracles import random_pairs


@pytest.fixture(scope="module")
def model(model_of):
    return model_of("llama", "bridge")


@pytest.mark.parametrize(
    ("edge", "message"),
    [
        (("m1", "a0.h0.q"), "'m1' -> 'a0.h0.q' runs backward"),
        (("m0", "m0"), "runs backward"),
        (("a0.h9", "logits"), "no node 'a0.h9'"),
        (("embed", "a0.h1.k"), "no node 'a0.h1.k'"),
        (("logits", "m1"), "no node 'logits'"),
    ],
)
def test_edges_that_do_not_exist(model, pairs, edge, message):
    with pytest.raises(ValueError, match=message):
        dl.path_patch(model, pairs, edges=[edge])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("edges", ["m0", ("m0", "logits"), [("m0", "a1.h0", "q")], [3]])
def test_edges_that_are_no_pairs_of_names(model, pairs, edges):
    with pytest.raises(ValueError, match=r"give a list of \(sender, receiver\)"):
        dl.path_patch(model, pairs, edges=edges)


def test_edges_without_a_score_are_never_chosen(model, pairs):
    exact = dl.path_patch(model, pairs, edges=[("m0", "logits"), ("m1", "logits")])
    for options in ({"top": 2}, {"threshold": 0.0}, {"greedy": 2}):
        chosen = exact.circuit(**options).table()
        assert set(chosen["sender"]) == {"m0", "m1"}, options
        assert set(chosen["receiver"]) == {"logits"}, options
    assert len(exact.circuit(greedy=1)) == 1
    with pytest.raises(ValueError, match=r"top is 3; it is a number of edges, 0 to 2"):
        exact.circuit(top=3)


def test_a_model_whose_mlp_is_no_module_is_refused(pairs):
    opt = dl.load_model(build("OPT"), backend="bridge")
    with pytest.raises(ValueError, match="its MLP is not called as one module"):
        dl.edge_scores(opt, pairs)


def test_a_circuit_of_another_model(model, pairs):
    circuit = dl.Circuit.from_edges(Graph(3, 4, 4), [("embed", "logits")])
    with pytest.raises(ValueError, match="of another model: Graph"):
        dl.faithfulness(model, pairs, circuit)
    with pytest.raises(ValueError, match="of another model: Graph"):
        dl.path_patch(model, pairs, edges=circuit)


def test_pairs_without_a_counterfactual(model):
    row = [1, 2, 3, 4]
    with pytest.raises(ValueError, match="the two runs of pair 0 are identical"):
        dl.edge_scores(model, dl.Pairs.from_tokens([row], [row], answers=[1], foils=[2]))


def test_teachers_of_two_weights(model):
    rows = random_pairs(64)
    other = dl.Teacher("other", model=copy.deepcopy(model))
    pairs = dl.Pairs.from_tokens(
        rows.clean, rows.corrupted, answers=[1] * 4, foils=[2] * 4, corrupted_teacher=other
    )
    with pytest.raises(ValueError, match="pair 0 differ in weights"):
        dl.edge_scores(model, pairs)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_blocks_with_a_norm_after_the_heads_are_refused(model_of, pairs, family):
    with pytest.raises(ValueError, match=r"cannot be (divided|separated)"):
        dl.edge_scores(model_of(family, "bridge"), pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "integrated"}, "method is 'integrated'"),
        ({"steps": 0}, "steps is 0"),
        ({"verify": -1}, "verify is -1"),
        ({"span": "word"}, "span is 'word'"),
        ({"method": "gradient", "metric": "kl"}, "no slope"),
        ({"corruption": "mean"}, "no run of its own"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_options_of_edge_scores(model, pairs, options, message):
    with pytest.raises(ValueError, match=message):
        dl.edge_scores(model, pairs, **options)


@pytest.mark.usefixtures("unchecked")
def test_bad_options_of_circuits(model, pairs):
    scores = dl.edge_scores(model, pairs)
    with pytest.raises(ValueError, match="give one of top, threshold and greedy, got none"):
        scores.circuit()
    with pytest.raises(ValueError, match="got top and greedy"):
        scores.circuit(top=1, greedy=2)
    with pytest.raises(ValueError, match="top is 999"):
        scores.circuit(top=999)
    with pytest.raises(ValueError, match=r"no node 'a7\.h0'"):
        dl.Circuit.from_nodes(scores.graph, ["a7.h0"])
    with pytest.raises(ValueError, match="summed over positions"):
        scores.by_segment()
    with pytest.raises(ValueError, match="summed over positions"):
        scores.plot()
    with pytest.raises(ValueError, match="ablation is 'noise'"):
        dl.faithfulness(model, pairs, scores.circuit(top=1), ablation="noise")
    with pytest.raises(ValueError, match=r"top is 2\.5"):
        scores.circuit(top=2.5)
    with pytest.raises(ValueError, match=r"k is -1 and of is 'edges'"):
        scores.top(-1)
    with pytest.raises(ValueError, match="ends is 'head'"):
        dl.edge_scores(model, pairs, span="segment").by_segment("head")
    with pytest.raises(TypeError, match="circuit contains EdgeScores"):
        dl.faithfulness(model, pairs, [scores])
    with pytest.raises(TypeError, match="circuit is EdgeScores"):
        dl.faithfulness(model, pairs, scores)
    with pytest.raises(ValueError, match="circuit is empty"):
        dl.faithfulness(model, pairs, [])
    with pytest.raises(ValueError, match="increasing shares"):
        dl.faithfulness_curve(model, pairs, scores, shares=(0.5, 0.1))
    with pytest.raises(ValueError, match="one number for each of the"):
        dl.faithfulness_curve(model, pairs, np.zeros(3))
    one = dl.faithfulness(model, pairs, scores.circuit(top=1))
    with pytest.raises(ValueError, match="completeness was not computed"):
        _ = one.completeness
    with pytest.raises(ValueError, match="two sizes or more"):
        _ = one.cpr


def test_scores_of_other_calls_do_not_compare(model, pairs):
    noising = dl.edge_scores(model, pairs)
    denoising = dl.edge_scores(model, pairs, direction="denoising")
    with pytest.raises(ValueError, match="differ in direction"):
        noising.agreement(denoising)


def test_a_table_of_another_span(model, pairs):
    table = dl.edge_scores(model, pairs, span="position").top(40, "cells")
    with pytest.raises(ValueError, match="contains column"):
        dl.path_patch(model, pairs, edges=table)
