"""Decoders: which one a model gets, and that each row's hidden states are those of a full pass."""

import pytest
import torch

from divergence_lens.engine import get_engine, static
from divergence_lens.engine.decoding import LockstepDecoder
from divergence_lens.engine.static import StaticDecoder
from divergence_lens.models import load_model
from tests.support.models import chat_tokenizer, random_hf_model

LENGTHS = (3, 4, 4, 9, 15)
STEPS = 7
# Rows that end after a step: the first, two at once, the last.
ENDED = {1: {0}, 3: {2, 4}}


def prompts_of(vocab: int, shared: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(shared)
    rows = [torch.randint(vocab, (n,), generator=draw).tolist() for n in LENGTHS]
    return [rows[-1][:shared] + row[shared:] for row in rows]


def decoded(decoder, prompts) -> dict[int, list[torch.Tensor]]:
    """Extend rows by ids that depend on the row and step; the hidden states of each row."""
    states = {row: [] for row in range(len(prompts))}
    rows, hidden = decoder.start(prompts, STEPS)
    while rows:
        for row, state in zip(rows, hidden, strict=True):
            states[row].append(state)
        ended = {row for row in rows if len(states[row]) == STEPS}
        ended |= {row for row in rows if row in ENDED.get(len(states[row]), ())}
        tokens = torch.tensor([token_of(row, len(states[row])) for row in rows])
        rows, hidden = decoder.step(tokens, ended)
    return states


def token_of(row: int, step: int) -> int:
    return (7 * row + 11 * step) % 50


def check(model, decoder, shared: int) -> None:
    """Compare with the model's own forward pass over each whole row."""
    engine = get_engine(model)
    prompts = prompts_of(engine.d_vocab, shared)
    with torch.no_grad():
        states = decoded(decoder(engine), prompts)
        for row, prompt in enumerate(prompts):
            written = [token_of(row, step) for step in range(1, len(states[row]))]
            tokens = torch.tensor([prompt + written])
            expected = model(tokens, attention_mask=torch.ones_like(tokens))[0, len(prompt) - 1 :]
            logits = engine.unembed(torch.stack(states[row]))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    lengths = [len(state) for state in states.values()]
    assert lengths == [1, STEPS, 3, STEPS, 3]


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_a_static_decoder_gives_the_models_own_logits(family, shared, random_model):
    def decoder(engine):
        made = engine.decoder()
        assert isinstance(made, StaticDecoder)
        return made

    check(random_model(family), decoder, shared)


def test_prompts_are_read_in_groups_where_masks_are_large(random_model, monkeypatch):
    monkeypatch.setattr(static, "_MASK_ELEMENTS", 60)
    sizes = list(LENGTHS)
    pads = [15 - size for size in sizes]
    groups = static._groups(sizes, 0, pads, torch.device("cpu"))
    assert [(group.rows.start, group.rows.stop) for group in groups] == [(0, 3), (3, 4), (4, 5)]
    check(random_model("llama"), lambda engine: engine.decoder(), 0)


@pytest.mark.parametrize("shared", [0, 2])
def test_a_lockstep_decoder_gives_the_models_own_logits(shared, random_model):
    check(random_model("llama"), LockstepDecoder, shared)


def test_models_without_fused_blocks_decode_in_lockstep(backend):
    model = load_model(
        random_hf_model("gpt_neox", vocab=len(chat_tokenizer())),
        backend=backend,
        tokenizer=chat_tokenizer(),
    )
    with torch.no_grad():
        assert isinstance(get_engine(model).decoder(), LockstepDecoder)


def test_hooked_models_decode_in_lockstep(random_model):
    model = random_model("llama")
    engine = get_engine(model)
    with torch.no_grad():
        with engine.hooked([(0, "attn_out", lambda _: None)]):
            assert isinstance(engine.decoder(), LockstepDecoder)
        with engine.hooked([(0, "resid_post", lambda _: None)]):
            assert isinstance(engine.decoder(), LockstepDecoder)
        watch = model.hook_dict["hook_embed"].register_forward_hook(lambda *_: None)
        assert isinstance(engine.decoder(), LockstepDecoder)
        watch.remove()
        assert isinstance(engine.decoder(), StaticDecoder)


def test_angles_that_depend_on_the_length_decode_in_lockstep():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    hf_model = random_hf_model("llama", vocab=len(chat_tokenizer()), rope_parameters=rope)
    model = load_model(hf_model, backend="bridge", tokenizer=chat_tokenizer())
    with torch.no_grad():
        assert isinstance(get_engine(model).decoder(), LockstepDecoder)
