"""Loading: what a checkpoint must hold, and that no class is accepted with other logits."""

import copy
import logging
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    MistralConfig,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from divergence_lens.models import load_model
from divergence_lens.models.positions import position_switches, sliding_layers
from divergence_lens.tiny import tiny_folder
from tests.support.models import BACKENDS, chat_tokenizer, random_hf_model

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
}


def noisy(model):
    """Random weights everywhere, so that no norm of ones and no bias of zeros hides a fault."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.12) if parameter.ndim > 1 else parameter.add_(noise * 0.1)
    return model.eval()


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(tiny_folder("tiny"), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_prefix_before_every_name_is_named(folder):
    rewrite(folder, lambda tensors: {f"module.{k}": v for k, v in tensors.items()})
    with pytest.raises(ValueError, match=r"every name carries the prefix 'module\.'"):
        load_model(folder)


def test_a_missing_tensor_is_named(folder):
    name = "transformer.h.1.mlp.c_fc.weight"
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(ValueError, match=r"lacks 1 tensor \(transformer\.h\.1\.mlp\.c_fc\.weight"):
        load_model(folder)


def test_an_unexpected_tensor_is_named(folder):
    rewrite(folder, lambda tensors: tensors | {"transformer.h.9.extra": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"has 1 tensor \(transformer\.h\.9\.extra"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    name = "transformer.wpe.weight"
    rewrite(folder, lambda tensors: tensors | {name: tensors[name][:-1].clone()})
    with pytest.raises(
        ValueError, match=r"1 tensor \(transformer\.wpe\.weight \[127, 48\] instead"
    ):
        load_model(folder)


def test_a_folder_without_a_tokenizer_gives_none(folder):
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        path.unlink()
    assert load_model(folder).tokenizer is None


@pytest.mark.parametrize("kind", ["no head", "two dtypes"])
def test_a_model_without_logits_is_refused(kind):
    model = random_hf_model("gpt2")
    model.transformer.h[0].mlp.half()
    with pytest.raises(ValueError, match="does not return logits for token ids"):
        load_model(model.transformer.float() if kind == "no head" else model)


def test_a_module_that_is_no_language_model_is_refused():
    with pytest.raises(TypeError, match="source is a Linear"):
        load_model(torch.nn.Linear(2, 2))


def test_a_git_lfs_pointer_is_named(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = random_hf_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[0] = value
    with pytest.raises(ValueError, match=r"^1 of \d+ values of transformer\.h\.1\.mlp\.c_fc\.bias"):
        load_model(model)


def test_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    with pytest.raises(ValueError, match="meta device"):
        load_model(model)


@pytest.mark.parametrize("window", [16, 2048])
@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_logits_are_right_beyond_a_sliding_window(window, backend):
    config = Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=window, max_window_layers=1
    )
    hf_model = noisy(Qwen2ForCausalLM(config))
    tokens = torch.randint(0, 512, (1, window + 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = hf_model(tokens).logits
        ours = load_model(hf_model, backend=backend)(tokens)
    torch.testing.assert_close(ours, reference, atol=1e-3, rtol=1e-4)
    assert config.sliding_window == window


@pytest.mark.skipif("hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("window", [16, 2048])
def test_a_hooked_transformer_without_the_window_is_refused(window):
    config = Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=window, max_window_layers=1
    )
    with pytest.raises(ValueError, match="cannot be a HookedTransformer"):
        load_model(noisy(Qwen2ForCausalLM(config)), backend="hooked")


def test_norms_after_rotation_are_right_or_refused():
    config = HunYuanDenseV1Config(**SIZES, head_dim=16)
    hf_model = noisy(HunYuanDenseV1ForCausalLM(config))
    tokens = torch.randint(0, 512, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = hf_model(tokens).logits
    try:
        ours = load_model(copy.deepcopy(hf_model))(tokens)
    except ValueError as error:
        assert "its logits differ from Hugging Face's by" in str(error)  # noqa: PT017 - either is right
    else:
        torch.testing.assert_close(ours, reference, atol=1e-3, rtol=1e-4)


def lora(**options):
    return LoraConfig(
        r=4, lora_alpha=32, target_modules=["c_attn"], init_lora_weights=False, **options
    )


def test_an_adapter_counts_or_is_refused():
    hf_model = noisy(random_hf_model("gpt2"))
    hf_model.add_adapter(lora(fan_in_fan_out=True))
    tokens = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reference = hf_model(tokens).logits
    try:
        ours = load_model(copy.deepcopy(hf_model))(tokens)
    except ValueError as error:
        assert "its adapters are not converted: merge them" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(ours, reference, atol=1e-3, rtol=1e-4)


# peft asks transformers for a name that transformers deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_model_is_refused_with_the_way_out():
    wrapped = get_peft_model(random_hf_model("gpt2"), lora(fan_in_fan_out=True))
    with pytest.raises(ValueError, match="merge_and_unload"):
        load_model(wrapped)


def test_the_context_ends_where_longrope_changes_its_factors(caplog):
    config = Phi3Config(
        **SIZES | {"max_position_embeddings": 512},
        original_max_position_embeddings=128,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + i for i in range(8)],
        },
    )
    hf_model = noisy(Phi3ForCausalLM(config))
    assert position_switches(config) == (128,)
    with caplog.at_level(logging.WARNING, logger="divergence_lens.models"):
        model = load_model(hf_model, tokenizer=chat_tokenizer())
    assert model.cfg.n_ctx == 128
    assert "LongRoPE changes its factors" in caplog.text


def test_check_can_be_skipped_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, logger="divergence_lens.models"):
        load_model(random_hf_model("gpt2"), check=False)
    assert "without comparing its logits" in caplog.text


@pytest.mark.skipif("hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
def test_windows_in_other_layers_are_refused_where_no_probe_can_cross_them(monkeypatch):
    config = Olmo3Config(**SIZES, sliding_window=2048)
    model = noisy(Olmo3ForCausalLM(config))
    assert type(load_model(copy.deepcopy(model), backend="hooked")).__name__ == "HookedTransformer"
    shifted = tuple(not sliding for sliding in sliding_layers(config))
    monkeypatch.setattr("divergence_lens.models.reference._local_layers", lambda _cfg: shifted)
    with pytest.raises(ValueError, match="sliding windows into other layers"):
        load_model(model, backend="hooked")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MistralConfig(num_hidden_layers=2, sliding_window=64), (True, True)),
        (MistralConfig(num_hidden_layers=2, sliding_window=None), (False, False)),
        (Qwen2Config(num_hidden_layers=2, sliding_window=64), (False, False)),
        (
            Qwen2Config(
                num_hidden_layers=2, sliding_window=64, use_sliding_window=True, max_window_layers=1
            ),
            (False, True),
        ),
    ],
)
def test_the_sliding_layers_are_those_of_the_configuration(config, expected):
    assert sliding_layers(config) == expected
