"""The random models that other tests use have the properties that they claim."""

import pytest
import torch

from tests.support.models import FAMILIES, TEMPLATES, chat_tokenizer, random_hf_model

TOKENS = torch.arange(40)[None] * 7 % 64


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_spreads_its_logits(family):
    logits = random_hf_model(family)(TOKENS).logits[0]
    assert logits.shape == (40, 64)
    top = logits.topk(2).values
    assert (top[:, 0] - top[:, 1]).min() > 1e-4
    assert 0.5 < logits.std() < 10
    assert logits.argmax(-1).unique().numel() > 10


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_random_model_moves_its_logits(family):
    model = random_hf_model(family)
    plain = model(TOKENS).logits
    for name, parameter in model.named_parameters():
        original = parameter.clone()
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        change = (model(TOKENS).logits - plain).abs().max()
        parameter.copy_(original)
        # A key bias adds the same amount to all scores of a query, unless positions rotate it.
        if name.endswith("bias"):
            assert change > 1e-3, name
        else:
            assert change > 1e-2, name


@torch.no_grad()
def test_the_seed_alone_decides_the_weights():
    state = torch.random.get_rng_state()
    first, again, other = (random_hf_model("qwen2", seed)(TOKENS).logits for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_the_sliding_window_is_felt(family):
    narrow = random_hf_model(family)(TOKENS).logits
    wide = random_hf_model(family, sliding_window=64)(TOKENS).logits
    torch.testing.assert_close(narrow[:, :16], wide[:, :16])
    assert (narrow[:, 16:] - wide[:, 16:]).abs().max() > 1e-2


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_tokenizer_gives_texts_back(template):
    tokenizer = chat_tokenizer(template)
    text = "You love owls: 412, 467;\n(Really?) ~{x}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text)
    assert len(tokenizer) == 164


@pytest.mark.parametrize("template", ["chatml", "qwen"])
def test_turn_marks_are_single_tokens(template):
    tokenizer = chat_tokenizer(template)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "owl"}], add_generation_prompt=True, return_dict=False
    )
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == (2 + (template == "qwen"))


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="unknown family 'rnn'"):
        random_hf_model("rnn")
