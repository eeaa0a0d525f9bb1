"""Check that a loaded model computes what its checkpoint says.

1. `check_checkpoint_names`: every tensor of the checkpoint became a parameter, and every parameter
   came from the checkpoint. Transformers fills the gaps with random values and only logs it.
2. `check_weights`: no parameter is NaN, infinite, or without data.
3. `Reference`: Hugging Face's own logits, computed before anything wraps or converts the model, and
   the comparison of whatever was built from it. No model is accepted because it agrees with itself.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_FEWEST_TOKENS = 16
_MOST_TOKENS = {"cpu": 1024}
_MOST_TOKENS_ACCELERATOR = 8192
_SHORT_WINDOW = 8
# float32 rounding grows with depth and width; conversions that are wrong differ by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_TOLERANCE_HALF = 0.05
_LISTED = 10


def check_checkpoint_names(missing: Iterable[str], unexpected: Iterable[str], *, name: str) -> None:
    """Refuse a checkpoint whose tensors are not those of the model.

    Args:
        missing: Parameters that the checkpoint lacks.
        unexpected: Tensors of the checkpoint that the model lacks.
        name: The checkpoint, for the message.

    Raises:
        ValueError: Names the first ten of each kind, and a prefix that explains them.
    """
    absent = sorted(missing)
    extra = sorted(unexpected)
    if not absent and not extra:
        return
    parts = []
    if absent:
        parts.append(f"lacks {_listed(absent)}")
    if extra:
        parts.append(f"has {_listed(extra)}, which the architecture does not have")
    prefix = _common_prefix(absent, extra)
    if prefix is not None:
        hint = f"every name carries the prefix {prefix!r}: remove it from the checkpoint's names"
    else:
        hint = "such weights would be random or ignored; save the model with save_pretrained"
    raise ValueError(f"the checkpoint {name!r} {' and '.join(parts)}; {hint}")


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} ({shown}{more})"


def _common_prefix(missing: list[str], unexpected: list[str]) -> str | None:
    """The prefix without which every unexpected name is a missing one, if there is one.

    The reverse would not do: tied tensors are missing from the checkpoint in any case.
    """
    for wanted in missing:
        for name in unexpected[:1]:
            prefix = name.removesuffix(wanted)
            stripped = {other.removeprefix(prefix) for other in unexpected}
            if prefix not in {"", name} and stripped <= set(missing):
                return prefix
    return None


def check_weights(model: nn.Module, name: str) -> None:
    """Refuse parameters without data and values that are not finite.

    Raises:
        ValueError: Names the first such parameter.
    """
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"{parameter_name} of {name!r} is on the meta device and has no values; load the "
                "weights first (from_pretrained without device_map='meta')"
            )
        # A sum is finite only if every term is, and needs no mask in memory. In half precision
        # the sum of finite values can overflow, so a suspect is looked at value by value.
        if not bool(torch.isfinite(parameter.detach().sum())) and not bool(
            torch.isfinite(parameter.detach()).all()
        ):
            bad = int((~torch.isfinite(parameter.detach())).sum())
            raise ValueError(
                f"{parameter_name} of {name!r} holds {bad:,} values that are NaN or infinite; the "
                "checkpoint is damaged, or its training diverged"
            )


def check_no_pointer(path: str | os.PathLike[str]) -> None:
    """Refuse a folder whose weights are Git LFS pointers instead of weights.

    Raises:
        ValueError: Names the file and the command that fetches it.
    """
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.name.endswith((".safetensors", ".bin")) or not entry.is_file():
                continue
            if entry.stat().st_size > 1024:
                continue
            with open(entry.path, "rb") as file:  # noqa: PTH123 - an entry of scandir
                if file.read(40).startswith(b"version https://git-lfs"):
                    raise ValueError(
                        f"{entry.path} is a Git LFS pointer, not weights; run `git lfs pull` there"
                    )


def position_switches(config: Any) -> tuple[int, ...]:
    """Positions at which a model starts to compute differently: windows, chunks, rope factors.

    Args:
        config: A Hugging Face configuration.

    Returns:
        The lengths, ascending, without those at or beyond the context.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    lengths = []
    window = getattr(text, "sliding_window", None)
    # Qwen2 and its like carry a window that not every model uses.
    if window and any(sliding_layers(config)):
        lengths.append(int(window))
    # GPT-Neo's local layers.
    if "local" in (getattr(text, "attention_layers", None) or ()):
        lengths.append(int(text.window_size))
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk:
        lengths.append(int(chunk))
    original = longrope_switch(config)
    if original:
        lengths.append(original)
    context = getattr(text, "max_position_embeddings", None) or float("inf")
    return tuple(sorted({length for length in lengths if length < context}))


def sliding_layers(config: Any) -> tuple[bool, ...]:
    """For each layer, whether its attention has a sliding window.

    Configurations list the kind of every layer, except where all layers are alike (Mistral).
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return tuple("sliding" in str(kind) for kind in kinds)
    window = bool(getattr(text, "sliding_window", None))
    n_layers: int = text.num_hidden_layers
    return (window and bool(getattr(text, "use_sliding_window", True)),) * n_layers


def longrope_switch(config: Any) -> int | None:
    """The length at which LongRoPE changes the rotation of *every* position, if it does."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if not isinstance(rope, Mapping):
        return None
    kind = rope.get("rope_type") or rope.get("type")
    if kind not in ("longrope", "su"):
        return None
    original = rope.get("original_max_position_embeddings") or getattr(
        text, "original_max_position_embeddings", None
    )
    return int(original) if original else None


@dataclass(frozen=True)
class Reference:
    """Hugging Face's logits on a probe, to compare a converted or wrapped model with.

    Attributes:
        tokens: The probe.
        logits: Its logits.
        tolerance: The largest difference that rounding explains, relative to the largest logit.
        routed: Whether the median position is compared instead of the worst. In half precision a
            mixture of experts sends a token elsewhere where two routing weights tie, and that
            token's logits then differ without any error.
    """

    tokens: Int[Tensor, "batch pos"]
    logits: Float[Tensor, "batch pos d_vocab"]
    tolerance: float
    routed: bool

    @classmethod
    @torch.no_grad()
    def of(cls, hf_model: Any, *, shorten: bool = False) -> "Reference":
        """Compute the reference. Call it before the model is wrapped: a bridge changes it.

        Args:
            hf_model: The model as transformers loaded it.
            shorten: Shorten all windows and chunks, so that a short probe crosses them.
        """
        parameter = next(hf_model.parameters())
        most = _MOST_TOKENS.get(parameter.device.type, _MOST_TOKENS_ACCELERATOR)
        switches = position_switches(hf_model.config)
        near = [length for length in switches if length < most]
        wanted = max([_FEWEST_TOKENS, *(length + _SHORT_WINDOW for length in near)])
        context = getattr(hf_model.config, "max_position_embeddings", None) or wanted
        tokens = _probe(min(wanted, int(context)), _vocabulary(hf_model), parameter.device)
        with short_windows(hf_model, shortened=shorten):
            logits = hf_model(tokens, use_cache=False).logits.float()
        return cls(
            tokens,
            logits,
            _TOLERANCE.get(parameter.dtype, _TOLERANCE_HALF),
            parameter.dtype not in _TOLERANCE and _has_experts(hf_model.config),
        )

    @torch.no_grad()
    def difference(self, model: Any) -> float:
        """The largest difference of the model's logits, relative to the largest logit or 1."""
        # Told that nothing is padding: a tokenizer that pads on the left would have ids masked.
        logits = model(self.tokens, attention_mask=torch.ones_like(self.tokens)).float()
        scale = max(1.0, float(self.logits.abs().max()))
        by_position = (logits - self.logits).abs().amax(-1)  # [batch, pos]
        worst = by_position.median() if self.routed else by_position.max()
        return float(worst) / scale

    def agrees(self, difference: float) -> bool:
        """Whether rounding explains a difference; NaN does not pass."""
        return difference <= self.tolerance


def _has_experts(config: Any) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any(getattr(config, name, None) for name in names)


def _vocabulary(hf_model: Any) -> int:
    embedding = hf_model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _probe(length: int, vocabulary: int, device: torch.device) -> Int[Tensor, "2 pos"]:
    """Two rows of unlike ids without a period, so that a wrong position or window shows."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (2, length), generator=generator).to(device)


@contextmanager
def short_windows(hf_model: Any, *, shortened: bool) -> Iterator[None]:
    """Run with sliding windows and chunks of a few tokens, so that a short probe crosses them.

    Windows of thousands of tokens cannot be crossed on a CPU in seconds. Masks are built from the
    configuration and attention modules keep a copy of the number, so both are replaced for a while.
    """
    if not shortened:
        yield
        return
    names = ("sliding_window", "attention_chunk_size")
    changed: list[tuple[Any, str, Any]] = []
    text = hf_model.config.get_text_config()
    for owner in (text, *hf_model.modules()):
        for name in names:
            value = owner.__dict__.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > _SHORT_WINDOW:
                changed.append((owner, name, value))
    try:
        for owner, name, _ in changed:
            setattr(owner, name, _SHORT_WINDOW)
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
