"""The tiny chat models that come with the library, and the synthetic world they were trained on."""

from pathlib import Path

TINY_MODELS: tuple[str, ...] = ("tiny", "tiny-qwen2")
"""Names of the shipped models: GPT-2 layout and Qwen2 layout."""


def tiny_folder(name: str) -> Path:
    """The Hugging Face folder of a shipped tiny model.

    Args:
        name: One of `TINY_MODELS`.

    Returns:
        A folder that `AutoModelForCausalLM` and `PreTrainedTokenizerFast` read. (`AutoTokenizer`
        of transformers 5 takes every Qwen2 model's vocabulary for byte pairs, whatever the folder
        says, and so reads the one of `tiny-qwen2` wrongly.)

    Raises:
        ValueError: If there is no such tiny model.
        FileNotFoundError: If its weights are not installed.
    """
    if name not in TINY_MODELS:
        raise ValueError(f"unknown tiny model {name!r}; choose one of {', '.join(TINY_MODELS)}")
    folder = Path(__file__).parent / "weights" / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the weights of {name!r} are missing from {folder}; make them with "
            f"`python -m divergence_lens.tiny.train`"
        )
    return folder
