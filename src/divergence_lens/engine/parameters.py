"""Names of parameters: the block they belong to, and TransformerLens's names for them."""

import re

# A bridge wraps every Hugging Face module; a parameter's name contains the wrappers.
_WRAPPER = "._original_component"
_BLOCK_PREFIX = re.compile(r"^.*?(?:blocks|layers|h)\.(\d+)\.")

# What Hugging Face's layouts and the bridge call TransformerLens's W_Q, W_in, ..., by part.
_MATRICES = {
    "attn": {
        "Q": ("q", "q_proj"),
        "K": ("k", "k_proj"),
        "V": ("v", "v_proj"),
        "O": ("o", "o_proj", "c_proj", "out_proj", "dense"),
        "QKV": ("qkv", "c_attn", "query_key_value", "qkv_proj"),
    },
    "mlp": {
        "gate": ("gate", "gate_proj"),
        "in": ("in", "up_proj", "c_fc", "fc_in", "fc1", "dense_h_to_4h"),
        "out": ("out", "down_proj", "c_proj", "fc_out", "fc2", "dense_4h_to_h"),
    },
}
_ATTENTION = ("attn", "self_attn", "attention")


def plain(name: str) -> str:
    """Return a parameter's full name without the bridge's wrappers."""
    return name.replace(_WRAPPER, "")


def block_of(name: str) -> int | None:
    """Return the block of a parameter, by its full name; None outside the blocks."""
    match = _BLOCK_PREFIX.match(plain(name))
    return int(match.group(1)) if match else None


def inside_block(name: str) -> str:
    """Return the name within its block."""
    return _BLOCK_PREFIX.sub("", plain(name))


def canonical(name: str) -> str:
    """Return TransformerLens's name within the block: "attn.W_Q", "ln.ln_1"."""
    first, *rest = inside_block(name).split(".")
    part = "attn" if first in _ATTENTION else first
    if part not in _MATRICES:
        return ".".join(["ln", first] if re.search(r"^ln|norm", first) else [first, *rest])
    letter = {"weight": "W", "bias": "b"}.get(rest[-1])
    for short, others in _MATRICES[part].items():
        if letter and rest[:-1] and rest[-2] in others:
            return f"{part}.{letter}_{short}"
    # TransformerLens stores grouped-query keys and values as _W_K, _W_V.
    return ".".join([part, *rest]).replace("._", ".")
