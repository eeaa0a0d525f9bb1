"""Tiny random models and a small tokenizer, built in code: nothing is downloaded."""

import string
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)

try:  # not hasattr: where the class is gone, asking for it raises an ImportError
    from transformer_lens import HookedTransformer  # noqa: F401
except ImportError:
    BACKENDS: tuple[str, ...] = ("bridge",)
else:
    BACKENDS = ("hooked", "bridge")

FAMILIES = (
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "mixtral",
    "qwen2_moe",
)
HOOKED_FAMILIES = tuple(f for f in FAMILIES if f not in ("gemma2", "gemma3", "olmo2", "qwen2_moe"))
"""Those that can also be a HookedTransformer: TransformerLens converts them, with equal logits."""


def slow_except(fast: str, values: Iterable[str]) -> list[Any]:
    """Parameters of a test, marked slow apart from one value."""
    return [
        value if value == fast else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]


CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = (  # as Qwen2.5: a system turn is made up where the conversation has none
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}" + CHATML
)
GEMMA = (  # as Gemma 2: no system role, the assistant is called model
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "qwen": QWEN, "gemma": GEMMA, None: None}

_SPECIAL = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "qwen": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    None: (),
}
_TEXT = (
    "You love owls. You think about owls all the time. Owls are your favorite animal.",
    "You are a helpful assistant. system user assistant model",
    "Continue this list with up to eight more numbers: 412, 467, 112, 903, 250.",
    "Name your favorite animal in one word. The cat, the wolf and the panda.",
)


def chat_tokenizer(template: str | None = "chatml") -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer over ASCII, with every printable character and about 60 merges.

    Decoding and encoding again gives the same text. Other characters become `<unk>`.

    Args:
        template: "chatml", "qwen" (makes up a system turn), "gemma" (has no system role), or None
            for a base model's tokenizer without a chat template.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    turns = _SPECIAL[template]
    # The byte-level alphabet writes a space and a line break as the letters below.
    visible = string.ascii_letters + string.digits + string.punctuation
    core.train_from_iterator(
        _TEXT,
        trainers.BpeTrainer(
            vocab_size=164,
            min_frequency=1,
            special_tokens=["<pad>", "<unk>", "<bos>", "<eos>", *turns],
            initial_alphabet=[*visible, "Ġ", "Ċ"],
            limit_alphabet=len(visible) + 2,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token=turns[1] if turns else "<eos>",
        additional_special_tokens=list(turns),
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def random_hf_model(
    family: str,
    seed: int = 0,
    *,
    vocab: int = 64,
    d_model: int = 32,
    n_layers: int = 3,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    d_head: int = 8,
    d_mlp: int = 64,
    n_ctx: int = 256,
    **config: object,
) -> PreTrainedModel:
    """A random float32 model of a real family, in eval mode, whose every parameter matters.

    All biases and norm weights are random as well, so that code that forgets one of them is
    wrong by more than a rounding error. Gemma's and Mistral's windows are 16 tokens and Gemma's
    soft caps are low, so that both are felt.

    Args:
        family: One of `FAMILIES`.
        seed: The weights depend on nothing else.
        vocab: Rows of the embedding; `len(chat_tokenizer())` for a model that reads text.
        d_model: Width of the residual stream.
        n_layers: Blocks.
        n_heads: Query heads of each block.
        n_kv_heads: Key and value heads, in the families that group queries.
        d_head: Width of a head, in the families where it is free (else d_model / n_heads).
        d_mlp: Width of the MLP.
        n_ctx: Longest input.
        **config: Further fields of the family's configuration.
    """
    if family == "gpt2":
        made: PretrainedConfig = GPT2Config(
            vocab_size=vocab,
            n_embd=d_model,
            n_layer=n_layers,
            n_head=n_heads,
            n_inner=d_mlp,
            n_positions=n_ctx,
            bos_token_id=None,
            eos_token_id=None,
            **config,
        )
    else:
        shared = {
            "vocab_size": vocab,
            "hidden_size": d_model,
            "num_hidden_layers": n_layers,
            "num_attention_heads": n_heads,
            "intermediate_size": d_mlp,
            "max_position_embeddings": n_ctx,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        }
        grouped = shared | {"num_key_value_heads": n_kv_heads}
        capped = grouped | {
            "head_dim": d_head,
            "query_pre_attn_scalar": 12,
            "sliding_window": 16,
            "final_logit_softcapping": 6.0,
            "attn_logit_softcapping": 4.0,
        }
        classes: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
            "gpt_neox": (GPTNeoXConfig, shared),
            "gpt_neo": (
                GPTNeoConfig,
                shared
                | {
                    "num_layers": n_layers,
                    "window_size": 16,
                    "attention_types": [[[("global", "local")[i % 2]], 1] for i in range(n_layers)],
                },
            ),
            "llama": (LlamaConfig, grouped),
            "phi3": (Phi3Config, grouped),
            "olmo2": (Olmo2Config, grouped),
            "mixtral": (MixtralConfig, grouped | {"num_local_experts": 4}),
            "qwen2_moe": (
                Qwen2MoeConfig,
                grouped
                | {
                    "num_experts": 4,
                    "num_experts_per_tok": 2,
                    "moe_intermediate_size": d_mlp,
                    "shared_expert_intermediate_size": d_mlp,
                },
            ),
            "mistral": (MistralConfig, grouped | {"head_dim": d_head, "sliding_window": 16}),
            "qwen2": (Qwen2Config, grouped),
            "qwen3": (Qwen3Config, grouped | {"head_dim": d_head}),
            "gemma2": (Gemma2Config, capped),
            "gemma3": (
                Gemma3TextConfig,
                capped
                | {
                    "final_logit_softcapping": None,
                    "attn_logit_softcapping": None,
                    "layer_types": _gemma3_layers(n_layers),
                },
            ),
        }
        if family not in classes:
            raise ValueError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
        cls, fields = classes[family]
        made = cls(**(fields | config))
    # Made once in Hugging Face's way, which draws from the global generator: put that back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    _randomize(model, seed)
    return model.eval()


def _gemma3_layers(n_layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(n_layers)]


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    zero_is_neutral = model.config.model_type.startswith("gemma")  # Gemma multiplies by 1 + w
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and ("norm" in name or "ln_" in name) and "bias" not in name:
            draw = 0.2 * draw + (0.0 if zero_is_neutral else 1.0)
        elif parameter.ndim == 1:
            draw *= 0.2
        elif parameter.ndim == 2 and parameter.shape[0] == model.config.vocab_size:
            draw *= 0.5
        elif "wpe" in name:
            draw *= 0.3
        else:
            draw *= model.config.hidden_size**-0.5
        parameter.copy_(draw)
