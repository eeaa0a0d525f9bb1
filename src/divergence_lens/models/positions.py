"""Positions at which a model starts to compute differently, read from its configuration."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SHORT_WINDOW = 8
"""Length of the windows and chunks within `short_windows`."""


def position_switches(config: Any) -> tuple[int, ...]:
    """Return the positions at which a model starts to compute differently.

    These are lengths of windows and chunks, and the switch of LongRoPE's factors.

    Args:
        config: A Hugging Face configuration.

    Returns:
        The lengths, ascending, without those at or beyond the context.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    lengths = []
    window = getattr(text, "sliding_window", None)
    # Qwen2's configuration has a window that not every model uses.
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
    """Return for each layer whether its attention has a sliding window.

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
    """Return the length at which LongRoPE changes the rotation of every position, or None."""
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


@contextmanager
def short_windows(hf_model: Any, *, shortened: bool) -> Iterator[None]:
    """Run with sliding windows and chunks of a few tokens, so that a short probe crosses them.

    Windows of thousands of tokens cannot be crossed on a CPU in seconds. Masks are built from the
    configuration, and attention modules store a copy of the number, so both are replaced.
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
            if isinstance(value, int) and not isinstance(value, bool) and value > SHORT_WINDOW:
                changed.append((owner, name, value))
    try:
        for owner, name, _ in changed:
            setattr(owner, name, SHORT_WINDOW)
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
