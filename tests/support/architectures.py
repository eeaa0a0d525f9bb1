"""Tiny models of many transformers architectures, with random weights that hide nothing."""

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 512
_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_LIKE = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEADS = {"head_dim": 16}
_WINDOW = {"sliding_window": 8}
_LONGROPE = {
    "original_max_position_embeddings": 128,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
    },
}
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2}
_QWEN_WINDOW = {"use_sliding_window": True, "max_window_layers": 1, **_WINDOW}
_MULTIPLIERS = {
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2", _GPT2_LIKE),
    "GPT-2, unscaled attention": ("GPT2", {**_GPT2_LIKE, "scale_attn_weights": False}),
    "GPT-Neo, local attention": (
        "GPTNeo",
        {
            **_SMALL,
            "num_layers": 4,
            "num_heads": 4,
            "max_position_embeddings": 256,
            "window_size": 8,
            "attention_types": [[["global", "local"], 2]],
        },
    ),
    "GPT-NeoX, Pythia": (
        "GPTNeoX",
        {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"},
    ),
    "GPT-J": ("GPTJ", {**_GPT2_LIKE, "rotary_dim": 8}),
    "CodeGen": ("CodeGen", {**_GPT2_LIKE, "rotary_dim": 8}),
    "GPT-BigCode": ("GPTBigCode", _GPT2_LIKE),
    "OPT": (
        "OPT",
        {
            **_SMALL,
            "ffn_dim": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 64,
        },
    ),
    "Bloom": ("Bloom", {**_SMALL, "n_layer": 3, "n_head": 4}),
    "Falcon": ("Falcon", {**_SMALL, "num_hidden_layers": 3, "num_attention_heads": 4}),
    "Falcon, ALiBi": (
        "Falcon",
        {**_SMALL, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": True},
    ),
    "MPT": (
        "Mpt",
        {"vocab_size": VOCABULARY, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 256},
    ),
    "Llama": ("Llama", _LLAMA_LIKE),
    "Mistral, sliding window": ("Mistral", {**_LLAMA_LIKE, **_WINDOW}),
    "Mixtral": ("Mixtral", {**_LLAMA_LIKE, "num_local_experts": 4}),
    "Qwen2": ("Qwen2", _LLAMA_LIKE),
    "Qwen2, sliding window": ("Qwen2", {**_LLAMA_LIKE, **_QWEN_WINDOW}),
    "Qwen2-MoE": ("Qwen2Moe", {**_LLAMA_LIKE, **_EXPERTS}),
    "Qwen3": ("Qwen3", {**_LLAMA_LIKE, **_HEADS}),
    "Qwen3, sliding window": ("Qwen3", {**_LLAMA_LIKE, **_HEADS, **_QWEN_WINDOW}),
    "Qwen3-MoE": ("Qwen3Moe", {**_LLAMA_LIKE, **_HEADS, **_EXPERTS}),
    "Gemma": ("Gemma", {**_LLAMA_LIKE, **_HEADS}),
    "Gemma 2": ("Gemma2", {**_LLAMA_LIKE, **_HEADS, **_WINDOW}),
    "Gemma 3": ("Gemma3", {**_LLAMA_LIKE, **_HEADS, **_WINDOW}),
    "Phi 1, 2": ("Phi", {k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}),
    "Phi 3": ("Phi3", _LLAMA_LIKE),
    "Phi 3, LongRoPE": ("Phi3", {**_LLAMA_LIKE, **_LONGROPE}),
    "OLMo 1": ("Olmo", _LLAMA_LIKE),
    "OLMo 2": ("Olmo2", _LLAMA_LIKE),
    "OLMo 3": ("Olmo3", {**_LLAMA_LIKE, **_WINDOW}),
    "Granite": ("Granite", {**_LLAMA_LIKE, **_MULTIPLIERS}),
    "Granite-MoE": ("GraniteMoe", {**_LLAMA_LIKE, **_MULTIPLIERS, "num_local_experts": 4}),
    "StableLM": ("StableLm", _LLAMA_LIKE),
    "StarCoder2": ("Starcoder2", _LLAMA_LIKE),
    "Cohere": ("Cohere", {**_LLAMA_LIKE, "logit_scale": 0.25}),
    "Cohere 2": ("Cohere2", {**_LLAMA_LIKE, **_WINDOW, "logit_scale": 0.25}),
    "SmolLM3": ("SmolLM3", _LLAMA_LIKE),
    "GLM": ("Glm", {**_LLAMA_LIKE, **_HEADS}),
    "GLM-4": ("Glm4", {**_LLAMA_LIKE, **_HEADS}),
    "EXAONE 4": ("Exaone4", {**_LLAMA_LIKE, **_HEADS, **_WINDOW}),
    "Nemotron": ("Nemotron", _LLAMA_LIKE),
    "Apertus": ("Apertus", _LLAMA_LIKE),
    "Arcee": ("Arcee", _LLAMA_LIKE),
    "ERNIE 4.5": ("Ernie4_5", _LLAMA_LIKE),
    "Seed-OSS": ("SeedOss", {**_LLAMA_LIKE, **_HEADS}),
    "HunYuan": ("HunYuanDenseV1", {**_LLAMA_LIKE, **_HEADS}),
    "GPT-OSS": (
        "GptOss",
        {
            **_LLAMA_LIKE,
            **_HEADS,
            **_WINDOW,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "Helium": ("Helium", {**_LLAMA_LIKE, **_HEADS}),
    "Mamba": ("Mamba", {**_SMALL, "num_hidden_layers": 3}),
}
"""Title -> transformers class prefix and configuration; sizes differ so that no two axes agree."""


def build(title: str, seed: int = 0) -> nn.Module:
    """Build a model whose norms are not ones and whose biases are not zeros."""
    prefix, options = ARCHITECTURES[title]
    config_name = "Gemma3TextConfig" if prefix == "Gemma3" else f"{prefix}Config"
    config = getattr(transformers, config_name)(**options)
    suffix = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    model: nn.Module = getattr(transformers, prefix + suffix)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.12 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def decoder_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The list of decoder layers, whatever the architecture calls it."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise AssertionError(f"{type(model).__name__} has no list of {n_layers} layers")
