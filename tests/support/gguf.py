"""Small models written as GGUF files, by the package of llama.cpp's own project."""

from pathlib import Path

import torch
from gguf import GGUFWriter
from transformers import LlamaForCausalLM


def _permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Query and key weights in llama.cpp's order: rotary pairs are neighbors, not halves."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)  # [head, half, pair, d_model]
    return halves.transpose(1, 2).reshape(rows, columns)


def write_llama(
    model: LlamaForCausalLM, path: Path, *, tokens: list[str] | None, architecture: str = "llama"
) -> None:
    """Write a Llama model and a byte-level vocabulary without merges; None writes no tokenizer."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(tokens.index("<|im_end|>"))
        writer.add_bos_token_id(tokens.index("<|im_start|>"))
        writer.add_chat_template(
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for number, layer in enumerate(model.model.layers):
        modules = dict(layer.named_modules())
        for name, short in names.items():
            weight = modules[name].weight
            if short == "attn_q":
                weight = _permuted(weight, config.num_attention_heads)
            elif short == "attn_k":
                weight = _permuted(weight, config.num_key_value_heads)
            weights[f"blk.{number}.{short}.weight"] = weight
    for name, weight in weights.items():
        writer.add_tensor(name, weight.detach().float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
