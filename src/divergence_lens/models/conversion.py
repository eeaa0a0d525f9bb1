"""Build a `HookedTransformer` or a `TransformerBridge` from a loaded Hugging Face model."""

import copy
import json
import logging
import tempfile
import warnings
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from divergence_lens.models.classes import Model, lens_classes
from divergence_lens.models.positions import longrope_switch
from divergence_lens.models.pretrained import first_line
from divergence_lens.models.reference import ConversionError

_log = logging.getLogger(__name__)


def structural_copy(
    hf_model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Module:
    """Copy a model's modules and configuration, but share its parameters where nothing changes.

    A bridge replaces modules of the model that it wraps, and conversion to another device or type
    would replace the tensors of the caller's parameters; both then happen to the copy.

    Args:
        hf_model: The caller's model, which is left as it is.
        device: The device of the copy; None for the same.
        dtype: The type of the copy's parameters; None for the same. Buffers that are not saved
            with the model (rotary frequencies) keep their own type, as in `from_pretrained`.
    """
    unsaved = {
        id(module._buffers[name])  # noqa: SLF001 - no public access
        for module in hf_model.modules()
        for name in module._non_persistent_buffers_set  # noqa: SLF001
    }
    shared: dict[int, Any] = {}  # by identity: the tensors that deepcopy takes as they are
    for tensor in chain(hf_model.parameters(), hf_model.buffers()):
        kind = dtype if tensor.is_floating_point() and id(tensor) not in unsaved else None
        moved = tensor.detach().to(device=device, dtype=kind)
        same = moved.device == tensor.device and moved.dtype == tensor.dtype
        if isinstance(tensor, nn.Parameter) and not same:
            moved = nn.Parameter(moved, requires_grad=tensor.requires_grad)
        shared[id(tensor)] = tensor if same else moved
    return copy.deepcopy(hf_model, shared)


def build_bridge(hf_model: Any, name: str) -> Model:
    """Wrap `hf_model` in a bridge, which replaces some of its modules.

    Raises:
        ValueError: TransformerLens has no bridge for the architecture.
    """
    lens_classes()  # keeps the log level that the next import changes
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    try:
        bridge: Model = build_bridge_from_module(
            hf_model, type(hf_model).__name__, hf_config=hf_model.config, model_name=name
        )
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name!r} cannot be a bridge: {first_line(error)}") from error
    return bridge.eval()


def build_hooked(hf_model: Any, name: str, *, shared: bool) -> Model:
    """Build a HookedTransformer with `hf_model`'s weights, by TransformerLens's own converters.

    Its loader takes a name or a folder and branches on substrings of it ("llama", "gemma"), so
    only the configuration is written, to a folder of a neutral name, and the weights are passed.

    Args:
        hf_model: The model as transformers loaded it, or a copy of the caller's.
        name: The name of the built model.
        shared: Use the memory of `hf_model`'s weights, for a model that nothing else uses.

    Raises:
        ConversionError: TransformerLens cannot convert the architecture.
    """
    hooked = lens_classes().hooked
    if hooked is None:
        raise ConversionError("this version of TransformerLens has no HookedTransformer")
    from transformer_lens.loading_from_pretrained import (
        get_pretrained_model_config,
        get_pretrained_state_dict,
    )

    parameter = next(hf_model.parameters())
    device, dtype = parameter.device, parameter.dtype
    with tempfile.TemporaryDirectory(prefix="dl-config-") as folder:
        config = hf_model.config.to_dict() | {"architectures": [type(hf_model).__name__]}
        if "n_positions" in config:
            # GPT-2's converter reads the old name of the context length.
            config["n_ctx"] = config["n_positions"]
        (Path(folder) / "config.json").write_text(json.dumps(config, default=str))
        try:
            cfg = get_pretrained_model_config(
                folder, hf_cfg=config, dtype=dtype, device=device, default_prepend_bos=False
            )
            weights = get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
        # TransformerLens has no error of its own for an architecture that it cannot convert: a
        # converter fails at the first field or module that it does not find.
        except (KeyError, ValueError, AttributeError, NotImplementedError, TypeError) as error:
            raise ConversionError(first_line(error)) from error
    cfg.model_name = name
    # Without a tokenizer of its own the class would ask the hub for one.
    cfg.tokenizer_name = None
    # Some converters write the sizes of the released models instead of this model's.
    cfg.n_ctx = config.get("max_position_embeddings") or config.get("n_positions") or cfg.n_ctx
    cfg.d_mlp = config.get("n_inner") or config.get("intermediate_size") or cfg.d_mlp
    with warnings.catch_warnings():
        # The class is deprecated in favor of bridges; the caller chose it.
        warnings.simplefilter("ignore", DeprecationWarning)
        model: Any = hooked(cfg, move_to_device=False)
    _assign_weights(model, weights, [] if shared else list(hf_model.parameters()))
    model.cfg.dtype = dtype
    model.cfg.device = device.type
    # Not the class's own `to`, which builds a state dict for each tensor of the model.
    built: Model = nn.Module.to(model, device=device, dtype=dtype).eval()
    return built


def _assign_weights(model: Any, weights: dict[str, Tensor], used: list[nn.Parameter]) -> None:
    """Make converted weights the model's parameters, each with values of its own.

    `load_and_process_state_dict` would load the tensors one by one, with a search through all
    modules for each (8 s for 30 layers), and cast them to float32 on the way.

    Most converted weights are views of Hugging Face's, transposed or cut. They stay views: nothing
    is copied, and TransformerLens transposes them back without a copy in each of its products.

    Args:
        model: The HookedTransformer.
        weights: The converted weights.
        used: Parameters whose memory the model must not share.

    Raises:
        ConversionError: A weight is missing, or has another shape.
    """
    blocked = {parameter.untyped_storage().data_ptr() for parameter in used}
    taken: set[int] = set()
    try:
        weights = model.fill_missing_keys(weights)
        for name in list(weights):
            tensor = weights[name].detach()
            # Tied weights start at the same entry; parts of one matrix (GPT-2) do not overlap.
            # Entries of an expanded tensor (stride 0) would share one value.
            repeated = any(
                n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
            )
            shared = tensor.untyped_storage().data_ptr() in blocked or tensor.data_ptr() in taken
            weights[name] = tensor.clone() if repeated or shared else tensor
            taken.add(weights[name].data_ptr())
        model.load_state_dict(weights, strict=False, assign=True)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ConversionError(first_line(error)) from error


def set_tokenizer(model: Any, tokenizer: Any) -> None:
    """Set the tokenizer as it is, except for a pad token if it has none.

    TransformerLens would reload it with a BOS token before every text, which a chat template
    already writes, and set pad tokens on the caller's object.
    """
    from transformer_lens.model_bridge.sources import detect_tokenizer_bos_eos

    model.tokenizer = tokenizer = _with_pad_token(tokenizer)
    cfg = model.cfg
    cfg.default_prepend_bos = False
    if tokenizer is not None:
        cfg.tokenizer_prepends_bos, cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)


def _with_pad_token(tokenizer: Any) -> Any:
    """Return the tokenizer, or a copy with a pad token: `model.to_tokens` pads every batch.

    The pad token is one of the vocabulary, because the model has no embedding for another: the
    unknown token, or else the end of text. TransformerLens hides pad tokens at the ends of a row
    from attention, and an end of text may be part of the text.
    """
    if tokenizer is None or getattr(tokenizer, "pad_token", "") is not None:
        return tokenizer
    named = (tokenizer.unk_token, tokenizer.eos_token, tokenizer.bos_token)
    pad = next((token for token in named if token is not None), None)
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = tokenizer.convert_ids_to_tokens(0) if pad is None else pad
    return padded


def set_generation_defaults(model: Any, hf_model: Any) -> None:
    """Store what TransformerLens drops of the generation configuration: end tokens, sampling."""
    generation = getattr(hf_model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else ends or []
    model.cfg.end_token_ids = tuple(int(end) for end in ends)
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    values = {name: getattr(generation, name, None) for name in names}
    # transformers writes 0 where no tokens are cut off.
    model.cfg.sampling_defaults = {name: value for name, value in values.items() if value}


def limit_context(model: Any, config: Any, name: str) -> None:
    """End the context where LongRoPE changes the rotation of every position of a batch.

    Hugging Face chooses the factors by the longest row of a batch, so a row would depend on its
    neighbors, and keys stored before the switch would carry the wrong rotation after it.
    """
    switch = longrope_switch(config)
    if switch is not None and model.cfg.n_ctx > switch:
        _log.warning(
            "%s: the context ends at %d positions here, where LongRoPE changes its factors; longer "
            "rows are refused",
            name,
            switch,
        )
        model.cfg.n_ctx = switch
