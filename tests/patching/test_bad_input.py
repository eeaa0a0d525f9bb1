"""Bad input to patching and to edges: each error names the value and the fix."""

import pytest

import divergence_lens as dl
from tests.support.patching_oracles import random_pairs

CALLS = {
    dl.causal_mediation: {},
    dl.attribution_patch: {},
    dl.attention_patterns: {"heads": [(0, 0)]},
    dl.edge_scores: {},
    dl.path_patch: {"edges": [("m0", "logits")]},
}


@pytest.fixture
def model(model_of):
    return model_of("llama")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("pairs", [["one prompt", "another"], {"clean": ["one prompt"]}, None])
def test_pairs_of_another_type_are_refused(model, call, pairs):
    with pytest.raises(TypeError, match=rf"pairs is a {type(pairs).__name__}; build them with"):
        call(model, pairs, **CALLS[call])


@pytest.mark.usefixtures("unchecked")
def test_cross_patching_prompts_is_refused(model):
    with pytest.raises(TypeError, match="pairs is a list; build them with"):
        dl.cross_patch(model, model, ["one prompt"])


@pytest.mark.parametrize("call", [dl.causal_mediation, dl.attribution_patch])
@pytest.mark.parametrize("metric", [lambda logits: logits[:, 0], lambda a, b, c: a[:, 0]])
def test_a_metric_of_other_arguments_is_refused(model, call, metric):
    pairs = random_pairs(model.cfg.d_vocab)
    with pytest.raises(TypeError, match=r"'<lambda>' takes \(.*\), but is called with two"):
        call(model, pairs, metric=metric)


def test_a_metric_may_have_further_arguments_with_defaults(model):
    pairs = random_pairs(model.cfg.d_vocab)

    def first(logits, pair, token=0):
        return logits[:, token]

    effects = dl.causal_mediation(model, pairs, metric=first)
    again = dl.causal_mediation(model, pairs, metric=lambda logits, pair: logits[:, 0])
    assert (effects.values == again.values).sum() == (effects.values == effects.values).sum()


def test_one_pair_and_one_layer_are_singular(model):
    pairs = random_pairs(model.cfg.d_vocab)
    assert repr(pairs[0]).startswith("Pairs(1 pair of up to")
    assert ": 1 pair, 3 layers," in repr(dl.causal_mediation(model, pairs[0]))
