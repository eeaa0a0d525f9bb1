"""The passes, against Hugging Face's own logits and hidden states, and against themselves."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MptConfig

from divergence_lens.engine.factory import get_engine
from divergence_lens.engine.sites import SITES
from divergence_lens.models import load_model
from tests.support.models import (
    BACKENDS,
    FAMILIES,
    HOOKED_FAMILIES,
    chat_tokenizer,
    random_hf_model,
)

N_CTX = 64


def _pairs():
    for family in FAMILIES:
        for backend in BACKENDS:
            if backend == "bridge" or family in HOOKED_FAMILIES:
                yield family, backend


@pytest.fixture(scope="module", params=list(_pairs()), ids="-".join)
def pair(request):
    """A Hugging Face model and the engine of the same weights."""
    family, backend = request.param
    model = load_model(random_hf_model(family, n_ctx=N_CTX), backend=backend)
    return random_hf_model(family, n_ctx=N_CTX), get_engine(model)


@pytest.fixture
def tokens():
    return torch.randint(0, 64, (3, 25), generator=torch.Generator().manual_seed(1))


def _close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)


def test_logits_are_hugging_faces_at_every_position(pair, tokens):
    hf_model, engine = pair
    _close(engine.unembed(engine.final(tokens)), hf_model(tokens).logits)


def test_residuals_are_hugging_faces_hidden_states(pair, tokens):
    hf_model, engine = pair
    states = hf_model(tokens, output_hidden_states=True).hidden_states
    recorded = engine.activations(tokens, sites=("resid_pre", "resid_post"))
    for layer in range(engine.n_layers):
        _close(recorded["resid_pre"][layer], states[layer])
    assert torch.equal(recorded["resid_pre"][1:], recorded["resid_post"][:-1])


def test_a_block_adds_its_attention_and_its_mlp(pair, tokens):
    _, engine = pair
    recorded = engine.activations(tokens, sites=engine.sites)
    _close(
        recorded["resid_pre"] + recorded["attn_out"] + recorded["mlp_out"], recorded["resid_post"]
    )
    if "resid_mid" in engine.sites:
        _close(recorded["resid_mid"] + recorded["mlp_out"], recorded["resid_post"])
    assert recorded["z"].shape[-2:] == (engine.n_heads, engine.d_head)


@pytest.mark.parametrize("cut", [1, 9, 24])
def test_a_pass_after_kept_keys_and_values_equals_the_whole(pair, tokens, cut):
    hf_model, engine = pair
    _, past = engine.prefill(tokens[:, :cut])
    assert (past.length, past.batch) == (cut, 3)
    hidden, past = engine.extend(tokens[:, cut:], past)
    _close(engine.unembed(hidden), hf_model(tokens).logits[:, cut:])
    assert past.length == 25


def test_one_row_of_the_past_serves_every_row(pair, tokens):
    hf_model, engine = pair
    shared = torch.cat([tokens[:1, :9].expand(3, -1), tokens[:, 9:]], 1)
    _, past = engine.prefill(tokens[:1, :9])
    _close(engine.unembed(engine.final(shared[:, 9:], past)), hf_model(shared).logits[:, 9:])
    _close(engine.final(shared[:, 9:], past), engine.final(shared[:, 9:], past.expand(3)))


def test_rows_pick_their_own_past(pair, tokens):
    hf_model, engine = pair
    _, past = engine.prefill(tokens[:, :9])
    rows = torch.tensor([2, 0, 0, 1])
    run = engine.begin(tokens[:, 9:], past.upto(9))
    resid = run.resid[rows]
    for layer in range(engine.n_layers):
        resid = engine.block(layer, resid, run, rows=rows)
    _close(engine.unembed(engine.norm(resid)), hf_model(tokens).logits[rows, 9:])
    _close(engine.final(tokens[rows, 9:], past.select(rows)), engine.norm(resid))


def test_each_branch_of_a_tree_is_a_plain_continuation(pair, tokens):
    """Hugging Face runs the path to each node as a row of its own."""
    hf_model, engine = pair
    parents = (-1, 0, 1, 0, -1, 4)
    ids = torch.tensor([[5, 9, 9, 30, 31, 2], [7, 1, 8, 8, 3, 60]])
    starts = tokens[:2, :11]
    _, past = engine.prefill(starts)
    branched = engine.unembed(engine.branch(ids, parents, past))
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
        with torch.no_grad():
            logits = hf_model(torch.cat([starts, ids[:, paths[node]]], 1)).logits
        _close(branched[:, node], logits[:, -1])


def test_a_pass_can_start_at_any_block(pair, tokens):
    _, engine = pair
    states = engine.activations(tokens)["resid_pre"]
    final = engine.final(tokens)
    for layer in range(engine.n_layers):
        _close(engine.final_from(states[layer], layer, engine.begin(tokens)), final)


def test_what_stands_on_the_right_does_not_reach_a_position(pair, tokens):
    _, engine = pair
    padded = torch.cat([tokens, torch.full((3, 8), 5)], 1)
    _close(engine.final(padded)[:, :25], engine.final(tokens))


@pytest.mark.slow
@given(rows=st.permutations([0, 1, 2]), cut=st.integers(1, 24))
def test_rows_do_not_meet(pair, rows, cut):
    _, engine = pair
    tokens = torch.randint(0, 64, (3, 25), generator=torch.Generator().manual_seed(2))
    whole = engine.final(tokens)
    _close(engine.final(tokens[list(rows), :cut]), whole[list(rows), :cut])
    _close(engine.final(tokens[rows[:1], :cut]), whole[rows[:1], :cut])


@pytest.mark.parametrize("site", SITES)
def test_replacing_a_site_by_itself_changes_nothing_and_by_noise_something(pair, tokens, site):
    _, engine = pair
    if site not in engine.sites:
        with (
            pytest.raises(ValueError, match=r"same residual|does not read the pattern back"),
            engine.hooked([(1, site, torch.abs)]),
        ):
            pass
        return
    plain = engine.final(tokens)

    def noise(activation):
        activation = activation.clone()
        # Not the same for every dimension: LayerNorm takes a constant out again.
        activation[:, 4] += torch.randn(
            activation[:, 4].shape, generator=torch.Generator().manual_seed(5)
        )
        return activation

    with engine.hooked([(1, site, torch.clone)]):
        _close(engine.final(tokens), plain)
    with engine.hooked([(1, site, noise)]):
        changed = engine.final(tokens)
    _close(changed[:, :4], plain[:, :4])
    assert (changed[:, 4:] - plain[:, 4:]).abs().max() > 1e-2
    assert torch.equal(engine.final(tokens), plain)


def test_replacing_resid_mid_changes_the_residual_itself(pair, tokens):
    _, engine = pair
    if "resid_mid" not in engine.sites:
        pytest.skip("parallel blocks have no residual between attention and MLP")
    replacement = torch.randn(3, 25, engine.d_model, generator=torch.Generator().manual_seed(3))
    recorded = {}
    watch = [
        (1, "resid_mid", lambda _: replacement),
        (1, "mlp_out", lambda out: recorded.update(mlp=out)),
        (1, "resid_post", lambda out: recorded.update(post=out)),
    ]
    with engine.hooked(watch):
        engine.final(tokens)
    _close(recorded["post"], replacement + recorded["mlp"])


def test_both_classes_answer_a_patch_alike(tokens):
    engines = [
        get_engine(load_model(random_hf_model(family, n_ctx=N_CTX), backend=backend))
        for family in ("gpt2", "qwen2", "gpt_neox")
        for backend in BACKENDS
    ]

    def patched(engine, site):
        generator = torch.Generator().manual_seed(4)
        with engine.hooked([(1, site, lambda a: torch.randn(a.shape, generator=generator))]):
            return engine.final(tokens)

    for first, other in zip(
        engines[:: len(BACKENDS)], engines[len(BACKENDS) - 1 :: len(BACKENDS)], strict=True
    ):
        for site in first.sites:
            _close(patched(first, site), patched(other, site))


def test_hooks_are_gone_after_an_exception(pair, tokens):
    _, engine = pair
    plain = engine.final(tokens)

    def broken(_):
        raise RuntimeError("broken")

    for site in engine.sites:
        with pytest.raises(RuntimeError, match="broken"), engine.hooked([(0, site, broken)]):
            engine.final(tokens)
    assert torch.equal(engine.final(tokens), plain)


def test_gradients_reach_every_parameter_that_the_engine_names_and_no_other(pair, tokens):
    _, engine = pair
    parameters = engine.named_parameters()
    engine.model.zero_grad()
    # The mean of squares, since the sum of a normed state does not depend on what was normed.
    engine.unembed(engine.final(tokens)).square().mean().backward()
    named = {id(p) for p in parameters.values()}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
    for parameter in engine.model.parameters():
        assert id(parameter) in named or parameter.grad is None
    engine.model.zero_grad()
    assert all(p.grad is None for p in engine.model.parameters())


def test_each_block_has_its_own_parameters(pair):
    _, engine = pair
    blocks = [engine.block_parameters(layer) for layer in range(engine.n_layers)]
    assert len({len(block) for block in blocks}) == 1
    assert not set(blocks[0]) & set(blocks[1])
    assert set().union(*blocks) < set(engine.named_parameters())
    assert sum(p.numel() for p in blocks[0].values()) > 32 * 32 * 4


def test_frozen_restores_every_flag(pair):
    _, engine = pair
    first = next(iter(engine.model.parameters()))
    first.requires_grad_(False)
    flags = [p.requires_grad for p in engine.model.parameters()]
    inside = []

    def look_and_fail():
        inside.extend(p.requires_grad for p in engine.model.parameters())
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), engine.frozen():
        look_and_fail()
    assert inside
    assert not any(inside)
    assert [p.requires_grad for p in engine.model.parameters()] == flags
    first.requires_grad_(True)


def test_an_engine_is_built_once_and_belongs_to_its_model(pair):
    _, engine = pair
    assert get_engine(engine.model) is engine


def test_a_copy_of_a_model_has_an_engine_of_its_own(tiny):
    get_engine(tiny)
    copied = copy.deepcopy(tiny)
    engine = get_engine(copied)
    assert engine.model is copied
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert next(get_engine(tiny).model.parameters()).abs().max() > 0


def test_a_pass_with_gradients_leaves_no_tensor_behind(tiny):
    engine = get_engine(tiny)
    engine.unembed(engine.final(torch.arange(6)[None])).sum().backward()
    tiny.zero_grad()
    held = [v for module in tiny.modules() for v in vars(module).values()]
    assert not [v for v in held if isinstance(v, torch.Tensor) and v.grad_fn is not None]


def test_too_long_a_row_is_refused(pair):
    _, engine = pair
    _, past = engine.prefill(torch.zeros(1, N_CTX, dtype=torch.long))
    with pytest.raises(ValueError, match=f"{N_CTX + 1} tokens do not fit the context of {N_CTX}"):
        engine.extend(torch.zeros(1, 1, dtype=torch.long), past)


def test_ids_of_another_vocabulary_are_refused(pair):
    _, engine = pair
    with pytest.raises(ValueError, match="another tokenizer"):
        engine.final(torch.tensor([[1, 64]]))


def test_a_layer_out_of_range_is_refused(pair):
    _, engine = pair
    with pytest.raises(ValueError, match="0 to 2"), engine.hooked([(3, "resid_pre", torch.abs)]):
        pass


def test_only_a_single_row_can_be_repeated(pair, tokens):
    _, engine = pair
    _, past = engine.prefill(tokens)
    with pytest.raises(ValueError, match="single row"):
        past.expand(4)


def test_bfloat16_passes_equal_themselves(backend, tokens):
    model = load_model(random_hf_model("llama"), backend=backend, dtype=torch.bfloat16)
    engine = get_engine(model)
    assert engine.dtype is torch.bfloat16
    _, past = engine.prefill(tokens[:, :9])
    ours = engine.unembed(engine.final(tokens[:, 9:], past)).float()
    plain = model(tokens).float()[:, 9:]
    assert (ours - plain).abs().max() < 0.05 * plain.abs().max()


# -- architectures beyond the tested families ---------------------------------------------------


def _alibi(kind):
    tokenizer = chat_tokenizer()
    configs = {
        "bloom": BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4),
        "mpt": MptConfig(vocab_size=len(tokenizer), d_model=32, n_layers=2, n_heads=4),
        "falcon": FalconConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
        ),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf_model = AutoModelForCausalLM.from_config(configs[kind], dtype=torch.float32).eval()
    model = load_model(copy.deepcopy(hf_model), backend="bridge", tokenizer=tokenizer)
    return hf_model, model


def _holds_with_other_rows(hf_model, engine):
    # As many rows as heads, too: what has an axis of heads is not to be taken for one of rows.
    tokens = torch.randint(0, 64, (4, 13), generator=torch.Generator().manual_seed(2))
    rows = torch.tensor([2, 0, 0, 1, 3, 2])
    theirs = hf_model(tokens).logits
    _, past = engine.prefill(tokens[:, :5])
    for start, before in ((0, None), (5, past)):
        run = engine.begin(tokens[:, start:], before)
        resid = run.resid[rows]
        for layer in range(engine.n_layers):
            resid = engine.block(layer, resid, run, rows=rows)
        _close(engine.unembed(engine.norm(resid)), theirs[rows, start:])


def test_other_rows_of_a_pass_are_hugging_faces(pair):
    _holds_with_other_rows(*pair)


# TransformerLens 3.9 hands over no keys and values of MPT's attention, 4 does.
HELD = ("bloom",) if "hooked" in BACKENDS else ("bloom", "mpt")


@torch.no_grad()
@pytest.mark.parametrize("kind", HELD)
def test_attention_with_linear_biases_is_hugging_faces(kind):
    # Bloom's blocks are handed a slope for each row and head, MPT's one for each head.
    hf_model, model = _alibi(kind)
    _holds_with_other_rows(hf_model, get_engine(model))


@pytest.mark.parametrize("kind", sorted({"bloom", "mpt", "falcon"} - set(HELD)))
def test_blocks_that_cannot_be_run_one_by_one_are_refused_in_one_sentence(kind):
    # The bridge of Falcon with ALiBi has other logits, so that loading refuses it already.
    start = "its blocks cannot be run one by one|its logits differ from Hugging Face's"
    with pytest.raises(ValueError, match=start) as told:
        get_engine(_alibi(kind)[1])
    assert "\n" not in str(told.value)


def test_a_model_whose_blocks_read_what_its_rows_hold_is_refused(backend):
    model = load_model(random_hf_model("gpt2", n_ctx=N_CTX), backend=backend)
    embedded = []

    def again(_module, _inputs, output):
        resid, *rest = output if isinstance(output, tuple) else (output,)
        resid = resid + embedded[-1]
        return (resid, *rest) if isinstance(output, tuple) else resid

    model.embed.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    model.blocks[1].register_forward_hook(again)
    with pytest.raises(ValueError, match="is not supported: its blocks cannot be run one by one"):
        get_engine(model)


def test_blocks_return_the_requested_positions_alone(pair, tokens):
    _, engine = pair
    run = engine.begin(tokens)
    whole = engine.block(0, run.resid, run)
    _close(engine.block(0, run.resid, run, since=20), whole[:, 20:])


def test_the_mlp_reads_a_residual_through_its_norm(tokens):
    for backend in BACKENDS:
        engine = get_engine(load_model(random_hf_model("llama", n_ctx=N_CTX), backend=backend))
        states = engine.activations(tokens, sites=("resid_mid", "mlp_out"))
        _close(engine.mlp_out(1, states["resid_mid"][1]), states["mlp_out"][1])
