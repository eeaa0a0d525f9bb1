"""The Hugging Face model that a caller passes is left as it was."""

import copy
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

import divergence_lens as dl
from divergence_lens.models import load_model
from tests.support.models import FAMILIES, chat_tokenizer, random_hf_model, slow_except

TOKENS = torch.randint(0, 64, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", slow_except("gpt2", FAMILIES))
def test_the_callers_model_is_left_as_it_was(family, backend, tmp_path):
    hf_model = random_hf_model(family).train()
    before = copy.deepcopy(hf_model.state_dict())
    config = hf_model.config.to_dict()
    modules = {name: type(module) for name, module in hf_model.named_modules()}
    model = load_model(hf_model, backend="bridge" if backend == "bridge" else "auto")

    assert hf_model.training
    assert not model.training
    assert hf_model.config.to_dict() == config
    assert {name: type(module) for name, module in hf_model.named_modules()} == modules
    after = hf_model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)

    hf_model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = again(TOKENS).logits
        torch.testing.assert_close(hf_model(TOKENS).logits, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(model(TOKENS), expected, atol=2e-5, rtol=1e-4)


def test_a_bridge_shares_the_callers_parameters():
    hf_model = random_hf_model("llama")
    model = load_model(hf_model, backend="bridge")
    with torch.no_grad():
        hf_model.model.norm.weight.mul_(1.5)
        torch.testing.assert_close(model(TOKENS), hf_model(TOKENS).logits, atol=2e-5, rtol=1e-4)


def test_another_precision_is_that_of_the_copy_alone(backend):
    hf_model = random_hf_model("llama")
    model = load_model(hf_model, backend=backend, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in hf_model.parameters()} == {torch.float32}


def test_rotary_frequencies_keep_their_precision_as_in_from_pretrained():
    hf_model = random_hf_model("llama", n_ctx=4096)
    model = load_model(hf_model, backend="bridge", dtype=torch.bfloat16)
    frequencies = [b for name, b in model.named_buffers() if name.endswith("inv_freq")]
    assert {buffer.dtype for buffer in frequencies} == {torch.float32}


def test_float64_is_not_rounded_on_the_way(backend):
    hf_model = random_hf_model("gpt2")
    hf_model.double()
    with torch.no_grad():
        for parameter in hf_model.parameters():  # digits that float32 does not have
            parameter.add_(torch.randn_like(parameter), alpha=1e-10)
        expected = hf_model(TOKENS).logits
        model = load_model(hf_model, backend=backend)
        torch.testing.assert_close(model(TOKENS), expected, atol=1e-12, rtol=1e-12)


def test_the_cost_of_the_comparison_is_logged(backend, caplog):
    with caplog.at_level(logging.INFO, logger="divergence_lens.models"):
        load_model(random_hf_model("gpt2"), backend=backend)
    assert "comparing model with Hugging Face took 0." in caplog.text


def test_a_student_of_a_bridge_leaves_the_callers_weights():
    tokenizer = chat_tokenizer()
    hf_model = random_hf_model("gpt2", vocab=len(tokenizer))
    before = copy.deepcopy(hf_model.state_dict())
    model = load_model(hf_model, backend="bridge", tokenizer=tokenizer)
    example = dl.Example("Continue: 412", completion_ids=(5, 6, 7))
    dl.finetune(model, [example], layers=[1], recipe=dl.Recipe(epochs=1, batch_size=1))
    assert all(torch.equal(v, before[k]) for k, v in hf_model.state_dict().items())
    assert all(p.requires_grad for p in hf_model.parameters())
