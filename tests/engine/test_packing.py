"""Packed weights: the same results as plain ones, and never those of other weights."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import divergence_lens as dl
from divergence_lens.engine import get_engine, packing
from divergence_lens.models import load_model
from tests.support.models import chat_tokenizer, random_hf_model

TOKENS = torch.arange(2 * 9).reshape(2, 9) * 7 % 60

pytestmark = pytest.mark.skipif(
    not packing._operators_work(), reason="this build of torch has no oneDNN operators"
)


@pytest.fixture
def always(monkeypatch):
    """Pack every matrix on its first use, and count the packed ones."""
    packed = []
    reordered = packing._reordered

    def counted(weight):
        packed.append(tuple(weight.shape))
        return reordered(weight)

    monkeypatch.setattr(packing, "_FEWEST_ENTRIES", 0)
    monkeypatch.setattr(packing, "_COST", 0)
    monkeypatch.setattr(packing, "_reordered", counted)
    return packed


@pytest.fixture(params=["gpt2", "llama"])
def pair(request, backend):
    """A Hugging Face model, and the same model as loaded."""
    tokenizer = chat_tokenizer()
    hf = random_hf_model(request.param, 2, vocab=len(tokenizer))
    chosen = "auto" if backend == "hooked" else backend
    return hf, load_model(hf, backend=chosen, tokenizer=tokenizer)


@pytest.mark.parametrize("shape", [(1, 300), (7, 300), (2, 5, 300), (0, 300)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_equal_plain_ones(shape, biased):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(400, 300, generator=generator).T
    bias = torch.randn(400, generator=generator) if biased else None
    x = torch.randn(*shape[:-1], 600, generator=generator)[..., ::2]  # not contiguous
    packed = packing.packed_matrix(matrix)
    assert isinstance(packed, packing.PackedMatrix)
    expected = F.linear(x.double(), matrix.T.double(), None if bias is None else bias.double())
    torch.testing.assert_close(
        packing.affine(x, packed, bias).double(), expected, atol=1e-4, rtol=0
    )


def test_logits_are_hugging_faces_with_packed_weights(pair, always):
    hf, model = pair
    engine = get_engine(model)
    with torch.no_grad(), engine.packed():
        logits = engine.unembed(engine.final(TOKENS))
        count = len(always)
        engine.unembed(engine.final(TOKENS))
        torch.testing.assert_close(logits, hf(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert count == len(always) >= 4 * engine.n_layers + 1


def test_a_changed_weight_is_packed_again(pair, always):
    _, model = pair
    engine = get_engine(model)
    parameter = next(p for p in engine.block_parameters(1).values() if p.ndim > 1)
    with torch.no_grad(), engine.packed():
        before = engine.unembed(engine.final(TOKENS))
        parameter.mul_(1.5)
        after = engine.unembed(engine.final(TOKENS))
    with torch.no_grad():
        expected = engine.unembed(engine.final(TOKENS))
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_plain_weights(pair, always):
    _, model = pair
    engine = get_engine(model)
    gradients = []
    for context in (engine.packed, nullcontext):
        with context(), engine.frozen():
            run = engine.begin(TOKENS)
            resid = run.resid.detach().requires_grad_()
            engine.final_from(resid, 0, run).square().sum().backward()
        gradients.append(resid.grad)
    # Each packed matrix has a packed transpose.
    assert len(always) > 2 * 4 * engine.n_layers
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_students_are_those_of_plain_weights(pair, always):
    _, model = pair
    examples = [dl.Example(text, "12, 7, 300") for text in dl.number_prompts(6, seed=0)]
    recipe = dl.Recipe(epochs=2, batch_size=3)
    losses = [dl.finetune(model, examples, layers=[1], recipe=recipe).history()["loss"]]
    assert always
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("divergence_lens.engine.fused.can_pack", lambda _model: False)
        losses += [dl.finetune(model, examples, layers=[1], recipe=recipe).history()["loss"]]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-4)


def test_teachers_with_weights_of_their_own_are_told_apart(pair, always):
    """A delta is applied within the context; packed copies of the base would show no difference."""
    _, model = pair
    examples = [dl.Example(text, "12, 7, 300") for text in dl.number_prompts(2, seed=0)]
    recipe = dl.Recipe(epochs=3, lr=1e-2)
    student = dl.finetune(model, examples, layers=[0], recipe=recipe)
    teachers = [dl.Teacher("base"), dl.Teacher("student", delta=student)]
    read = dl.find_divergence(model, examples, teacher=teachers[0], counterfactuals=teachers[1:])
    assert always
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("divergence_lens.engine.fused.can_pack", lambda _model: False)
        plain = dl.find_divergence(
            model, examples, teacher=teachers[0], counterfactuals=teachers[1:]
        )
    np.testing.assert_allclose(read.logprob, plain.logprob, atol=1e-4)
    assert np.abs(read.logprob[0] - read.logprob[1]).max() > 0.01


def test_greedy_completions_are_the_same(pair, always):
    _, model = pair
    prompts = dl.number_prompts(3, seed=0)
    packed = dl.generate(model, prompts, max_new_tokens=6, temperature=0)
    assert always
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("divergence_lens.engine.fused.can_pack", lambda _model: False)
        plain = dl.generate(model, prompts, max_new_tokens=6, temperature=0)
    assert [e.completion_ids for e in packed] == [e.completion_ids for e in plain]


def test_weights_are_packed_once_that_pays_off(monkeypatch):
    monkeypatch.setattr(packing, "_COST", 100)
    packs = packing.Packs(lambda text: text.upper())
    weight = torch.zeros(3)
    uses = [packs.get("key", [weight], 40, lambda: "plain") for _ in range(4)]
    assert uses == ["plain", "plain", "PLAIN", "PLAIN"]
    weight.add_(1)
    assert packs.get("key", [weight], 40, lambda: "plain") == "plain"
    assert packs.get("key", [weight.clone()], 100, lambda: "new") == "NEW"


def test_only_float32_models_that_fit_twice_are_packed(pair, monkeypatch):
    _, model = pair
    assert packing.can_pack(model)
    assert not packing.can_pack(torch.nn.Linear(2, 2, dtype=torch.bfloat16))
    with torch.autocast("cpu"):
        assert not packing.can_pack(model)
    monkeypatch.setattr(packing, "_MOST_BYTES", 100)
    assert not packing.can_pack(model)
