"""Fused blocks: they agree with the model's own, and run only where nothing observes a block."""

import dataclasses

import pytest
import torch

from divergence_lens.engine.equivalence import OwnPass, fused_tolerance, probe_tokens
from divergence_lens.engine.factory import get_engine
from divergence_lens.engine.fused import FusedBlocks
from divergence_lens.engine.fused_classes import fused_blocks
from divergence_lens.models import load_model
from tests.support.models import BACKENDS, FAMILIES, chat_tokenizer, random_hf_model

FUSED = ("gpt2", "llama", "qwen2")
TOKENS = torch.arange(2 * 9).reshape(2, 9) * 7 % 60


def build(family, backend, **config):
    tokenizer = chat_tokenizer()
    hf = random_hf_model(family, 2, vocab=len(tokenizer), **config)
    chosen = "auto" if backend == "hooked" else backend
    return hf, load_model(hf, backend=chosen, tokenizer=tokenizer)


@pytest.fixture
def calls(monkeypatch):
    """The blocks that were computed in the fast form."""
    layers = []
    block = FusedBlocks.block

    def counted(self, layer, resid, run, since=0):
        layers.append(layer)
        return block(self, layer, resid, run, since)

    monkeypatch.setattr(FusedBlocks, "block", counted)
    return layers


@pytest.mark.parametrize("family", FUSED)
def test_known_families_are_fused_and_give_hugging_faces_logits(family, backend, calls):
    hf, model = build(family, backend)
    engine = get_engine(model)
    calls.clear()
    with torch.no_grad():
        logits = engine.unembed(engine.final(TOKENS))
        assert calls == [0, 1, 2]
        torch.testing.assert_close(logits, hf(TOKENS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif("hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize(
    ("change", "fast"),
    [
        ({}, True),
        ({"positional_embedding_type": "rotary", "rotary_dim": 8, "gated_mlp": True}, True),
        ({"n_key_value_heads": 2, "normalization_type": "RMS"}, True),
        ({"normalization_type": None}, False),
        ({"attn_only": True}, False),
        ({"attention_dir": "bidirectional"}, False),
        ({"use_local_attn": True, "window_size": 3, "attn_types": ["local"] * 3}, False),
    ],
)
def test_models_built_from_a_configuration_are_fused_where_they_are_plain(change, fast, calls):
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 3, "d_model": 32, "n_ctx": 16, "d_head": 8, "n_heads": 4, "d_vocab": 60}
    plain = {"act_fn": "gelu_new", "d_mlp": 64, "seed": 1}
    model = HookedTransformer(HookedTransformerConfig(**{**sizes, **plain, **change})).eval()
    engine = get_engine(model, causal=False)
    calls.clear()
    with torch.no_grad():
        logits = engine.unembed(engine.final(TOKENS))
        torch.testing.assert_close(logits, model(TOKENS), atol=1e-5, rtol=1e-4)
    assert calls == ([0, 1, 2] if fast else [])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in FUSED])
def test_other_families_go_without(family, backend, calls):
    hf, model = build(family, backend)
    engine = get_engine(model)
    calls.clear()
    with torch.no_grad():
        logits = engine.unembed(engine.final(TOKENS))
        torch.testing.assert_close(logits, hf(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert calls == []


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("since", [0, 3, 5])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_pass_behind_a_past_gives_the_last_positions(family, since, rows, backend):
    """A past of one row serves all; only what is asked for is computed in the last block."""
    hf, model = build(family, backend)
    engine = get_engine(model)
    start = TOKENS[:1, :3] if rows == 1 else TOKENS[:, :3]
    whole = torch.cat([start.expand(2, -1), TOKENS[:, 3:]], 1)
    with torch.no_grad():
        _, past = engine.prefill(start)
        logits = engine.unembed(engine.final(TOKENS[:, 3:], past, since=since))
        expected = hf(whole).logits[:, 3 + since :]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FUSED)
def test_a_tree_is_one_fused_pass(family, backend, calls):
    """Each node once, whatever the number of branches."""
    engine = get_engine(build(family, backend)[1])
    _, past = engine.prefill(TOKENS)
    calls.clear()
    before = dataclasses.replace(engine.work)
    engine.branch(torch.tensor([[1, 2, 3], [4, 5, 6]]), (-1, 0, 0), past)
    assert calls == [0, 1, 2]
    added = engine.work.positions - before.positions, engine.work.fused - before.fused
    assert added == (3 * 2 * 3, 3 * 2 * 3)


def test_keys_and_values_go_on_where_a_pass_ended(backend):
    hf, model = build("qwen2", backend)
    engine = get_engine(model)
    with torch.no_grad():
        _, past = engine.prefill(TOKENS[:, :2])
        _, past = engine.extend(TOKENS[:, 2:5], past)
        logits = engine.unembed(engine.final(TOKENS[:, 5:], past))
        expected = hf(TOKENS).logits[:, 5:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_whoever_looks_gets_the_models_own_blocks(backend, calls):
    _, model = build("llama", backend)
    engine = get_engine(model)
    calls.clear()
    engine.final(TOKENS)  # all parameters could learn
    assert calls == []
    seen = []
    with torch.no_grad(), engine.hooked([(1, "attn_out", lambda x: seen.append(x.shape))]):
        engine.final(TOKENS)
    assert calls == [0, 2]
    assert seen == [(2, 9, 32)]


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.parametrize("past", [False, True])
def test_gradients_that_pass_are_hugging_faces(family, past, backend, calls):
    hf, model = build(family, backend)
    engine, first = get_engine(model), 4 if past else 0
    shape = (*TOKENS.shape, hf.get_input_embeddings().weight.shape[1])
    nudge = torch.zeros(shape, requires_grad=True)
    handle = hf.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out + nudge)
    (expected,) = torch.autograd.grad(hf(TOKENS).logits[:, first:].square().sum(), nudge)
    handle.remove()

    before = None
    if past:  # it takes no part in the graph
        with torch.no_grad():
            _, before = engine.prefill(TOKENS[:, :first])
    with engine.frozen():
        calls.clear()
        run = engine.begin(TOKENS[:, first:], before)
        felt = resid = run.resid.detach().requires_grad_()
        for layer in range(engine.n_layers):
            resid = engine.block(layer, resid, run)
        assert calls == [0, 1, 2]
        logits = engine.unembed(engine.norm(resid))
        (gradient,) = torch.autograd.grad(logits.square().sum(), felt)
    torch.testing.assert_close(gradient, expected[:, first:], atol=1e-3, rtol=1e-3)


def test_a_block_that_learns_or_whose_gradients_are_watched_is_the_models_own(backend, calls):
    _, model = build("llama", backend)
    engine = get_engine(model)
    with engine.frozen():
        next(iter(engine.block_parameters(1).values())).requires_grad_(True)
        handle = model.blocks[2].mlp.register_full_backward_hook(lambda *_: None)
        calls.clear()
        engine.final(TOKENS)
        handle.remove()
    assert calls == [0]


@pytest.mark.parametrize("layer", [0, 2])
def test_a_hook_of_ones_own_is_called_and_felt(layer, backend, calls):
    _, model = build("qwen2", backend)
    engine = get_engine(model)
    with torch.no_grad():
        plain = engine.final(TOKENS, since=4)
        calls.clear()
        handle = model.blocks[layer].mlp.register_forward_hook(lambda _m, _i, out: out * 2)
        changed = engine.final(TOKENS, since=4)
        handle.remove()
        assert layer not in calls
        assert changed.shape == plain.shape
        assert not torch.allclose(changed, plain)
        torch.testing.assert_close(engine.final(TOKENS, since=4), plain)


def test_sites_of_the_last_block_are_seen_at_every_position(backend):
    _, model = build("gpt2", backend)
    engine = get_engine(model)
    seen = []
    with torch.no_grad(), engine.hooked([(2, "resid_post", lambda x: seen.append(x.shape))]):
        hidden = engine.final(TOKENS, since=6)
    assert seen == [(2, 9, 32)]
    assert hidden.shape == (2, 3, 32)


def test_weights_are_read_as_they_are_now(backend):
    _hf, model = build("qwen2", backend)
    engine = get_engine(model)
    name, parameter = next(iter(engine.block_parameters(1).items()))
    with torch.no_grad():
        before = engine.final(TOKENS)
        original = parameter.clone()
        parameter.add_(0.5)
        assert not torch.allclose(engine.final(TOKENS), before), name
        parameter.copy_(original)
        torch.testing.assert_close(engine.final(TOKENS), before, atol=0, rtol=0)


def test_unequal_blocks_are_not_used_and_that_is_said_once(backend, monkeypatch, caplog):
    monkeypatch.setattr(FusedBlocks, "_norm", lambda self, x, affine: x)
    hf, model = build("llama", backend)
    engine = get_engine(model)
    assert get_engine(model) is engine
    with torch.no_grad():
        logits = engine.unembed(engine.final(TOKENS))
        torch.testing.assert_close(logits, hf(TOKENS).logits, atol=1e-4, rtol=1e-4)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "runs through its own blocks, which is slower" in said


@pytest.mark.parametrize("family", FUSED)
def test_a_deep_model_is_fused_although_rounding_accumulates(family, backend, calls):
    hf, model = build(family, backend, n_layers=30, d_model=64, d_head=16)
    engine = get_engine(model)
    calls.clear()
    with torch.no_grad():
        logits = engine.unembed(engine.final(TOKENS))
        expected = hf(TOKENS).logits
    assert calls == list(range(30))
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


def test_one_wrong_block_of_a_deep_model_is_rejected(backend, monkeypatch, calls):
    for kind in FusedBlocks.__subclasses__():
        weights_of = kind.weights_of

        def wrong(self, layer, weights_of=weights_of):
            weights = weights_of(self, layer)
            if layer != 17:
                return weights
            matrix, bias = weights.down
            return dataclasses.replace(weights, down=(matrix * 1.002, bias))

        monkeypatch.setattr(kind, "weights_of", wrong)
    _, model = build("llama", backend, n_layers=30)
    engine = get_engine(model)
    calls.clear()
    engine.final(TOKENS)
    assert calls == []


def test_a_sliding_window_is_not_fused(backend, calls):
    hf, model = build(
        "qwen2", backend, use_sliding_window=True, sliding_window=4, max_window_layers=0
    )
    engine = get_engine(model)
    calls.clear()
    with torch.no_grad():
        logits = engine.unembed(engine.final(TOKENS))
        if not torch.allclose(model(TOKENS), hf(TOKENS).logits, atol=1e-4):
            pytest.skip("this class does not know the window itself")
        torch.testing.assert_close(logits, hf(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["tiny", "tiny-qwen2"])
def test_trained_models_are_fused_in_every_precision(name, dtype, backend, calls):
    model = load_model(name, backend=backend, dtype=dtype)
    engine = get_engine(model)
    calls.clear()
    with torch.no_grad():
        engine.final(TOKENS)
    assert calls == list(range(engine.n_layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fault", ["norm", "rotation", "gate"])
def test_a_wrong_fused_block_is_rejected_in_every_precision(fault, dtype, backend):
    model = load_model("tiny-qwen2", backend=backend, dtype=dtype)
    engine = get_engine(model)
    own = OwnPass.run(engine, probe_tokens(model))
    fused = fused_blocks(engine, model, hooked=backend == "hooked")
    weights_of, angles = fused.weights_of, fused._angles
    if fault == "rotation":
        fused._angles = lambda *args: tuple(part.roll(1, 0) for part in angles(*args))
    else:

        def wrong(layer):
            weights = weights_of(layer)
            if layer != 2:
                return weights
            if fault == "norm":
                return dataclasses.replace(weights, norm_2=(None, None))
            return dataclasses.replace(weights, gate=(weights.gate[0].roll(1, 1), None))

        fused.weights_of = wrong
    assert not own.fused_difference(fused) <= fused_tolerance(dtype)
