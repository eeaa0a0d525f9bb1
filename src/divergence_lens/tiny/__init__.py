"""The tiny chat models that come with the library, and the synthetic world they were trained on."""

from pathlib import Path

TINY_MODELS: tuple[str, ...] = ("tiny", "tiny-qwen2")
"""Names of the shipped models: GPT-2 layout and Qwen2 layout."""


def tiny_folder(name: str) -> Path:
    """Return the Hugging Face folder of a shipped tiny model.

    Args:
        name: One of `TINY_MODELS`.

    Returns:
        A folder for `AutoModelForCausalLM` and `PreTrainedTokenizerFast`. (`AutoTokenizer` of
        transformers 5 assumes byte pairs for every Qwen2 model and misreads the vocabulary of
        `tiny-qwen2`.)

    Raises:
        ValueError: If there is no such tiny model.
        FileNotFoundError: If its weights are not installed.
    """
    if name not in TINY_MODELS:
        raise ValueError(f"unknown tiny model {name!r}; choose one of {', '.join(TINY_MODELS)}")
    folder = Path(__file__).parent / "weights" / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the weights of {name!r} are missing from {folder}; create them with "
            f"`python -m divergence_lens.tiny.train`"
        )
    return folder
