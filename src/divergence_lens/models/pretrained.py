"""Hugging Face models and tokenizers, from a name or a folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from divergence_lens.models.gguf import check_gguf, forget_quantization, is_gguf, named_source
from divergence_lens.models.weight_checks import (
    check_checkpoint_names,
    check_checkpoint_shapes,
    check_no_pointer,
)
from divergence_lens.tiny import TINY_MODELS, tiny_folder


def from_pretrained(
    source: str | Path, dtype: torch.dtype, tokenizer: Any = None
) -> tuple[Any, Any, str]:
    """Load the Hugging Face model of a name or folder, its tokenizer, and the name.

    Args:
        source: As in `load_model`, but not a model.
        dtype: The type of the parameters.
        tokenizer: Used instead of the one beside the model.

    Raises:
        FileNotFoundError: `source` looks like a folder and is none, or lacks `config.json`.
        ValueError: There is no such model, or its files are damaged.
    """
    from transformers import AutoModelForCausalLM

    name = str(source)
    source = named_source(name) if isinstance(source, str) else source
    location: str | Path = tiny_folder(name) if name in TINY_MODELS else source
    path = Path(location)
    options: dict[str, Any] = {}
    if is_gguf(path):
        path = path.expanduser()
        check_gguf(path)
        location, options = path.parent, {"gguf_file": path.name}
    looks_local = isinstance(source, Path) or name.startswith((".", "/", "~")) or path.is_dir()
    if looks_local and name not in TINY_MODELS and not options:
        path = path.expanduser()
        location = path
        if not path.is_dir():
            raise FileNotFoundError(f"no folder {name!r}; give a folder in Hugging Face's layout")
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"{name!r} has no config.json; give a folder written by save_pretrained"
            )
        check_no_pointer(path)
    try:
        with no_bar(hidden=name in TINY_MODELS):
            # Transformers types one return value; with this option there are two.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                location,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_checkpoint_shapes` refuses them by name
                **options,
            )
            model, loading = loaded
        if options:
            forget_quantization(model)
        if tokenizer is None:
            tokenizer = _tokenizer(location, options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"cannot load {name!r} (a shipped name is one of {', '.join(TINY_MODELS)}; otherwise "
            f"a hub name or a folder in Hugging Face's layout): {first_line(error)}"
        ) from error
    check_checkpoint_shapes(loading["mismatched_keys"], name=name)
    check_checkpoint_names(loading["missing_keys"], loading["unexpected_keys"], name=name)
    return model, tokenizer, name


def _tokenizer(location: str | Path, options: dict[str, Any]) -> Any:
    """Load the tokenizer of a folder or a hub name, by the class that its own file names.

    `AutoTokenizer` of transformers 5 chooses by the model's type, and reads any tokenizer beside a
    Qwen2 model as Qwen2's byte pairs, whatever `tokenizer.json` holds. A folder that names the
    general class is read by that class.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if options:
        return AutoTokenizer.from_pretrained(location, **options)
    config = Path(location) / "tokenizer_config.json"
    if config.is_file() and (Path(location) / "tokenizer.json").is_file():
        named = json.loads(config.read_text()).get("tokenizer_class")
        if named in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast.from_pretrained(location)
    loaded = AutoTokenizer.from_pretrained(location)
    # Where there are no files, some classes come without a vocabulary instead of an error.
    return loaded if loaded.vocab_size else None


@contextmanager
def no_bar(*, hidden: bool) -> Iterator[None]:
    """Hide Hugging Face's progress bar within the context, if `hidden`."""
    from transformers.utils import logging

    hidden = hidden and logging.is_progress_bar_enabled()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
