"""Load a model, and describe what was loaded.

Every public call of the library takes a `HookedTransformer` or a `TransformerBridge`. This module
builds either from a name, a folder or a Hugging Face model, always without folding or centering
weights, so that logits and residuals are Hugging Face's own and trained weights can go back.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

import torch
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from divergence_lens.load_checks import (
    Reference,
    check_checkpoint_names,
    check_no_pointer,
    check_weights,
    longrope_switch,
    position_switches,
    short_windows,
    sliding_layers,
)
from divergence_lens.tiny import TINY_MODELS, tiny_folder

HookedTransformer: Any
# Importing TransformerLens sets the log level of transformers to "error" for the whole process.
_verbosity = transformers_logging.get_verbosity()
try:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        from transformer_lens import HookedTransformer
    except ImportError:  # TransformerLens 4 removed it; there, only bridges exist.
        HookedTransformer = None
finally:
    transformers_logging.set_verbosity(_verbosity)

Model: TypeAlias = nn.Module
"""A `HookedTransformer` or a `TransformerBridge`; `check_model` tells them from other modules."""


@runtime_checkable
class LensModel(Protocol):
    """The interface that a `HookedTransformer` and a `TransformerBridge` share.

    Both are `nn.Module`s; parts that only some models have are reached by attribute.
    """

    cfg: Any
    tokenizer: Any
    blocks: Any
    embed: Any
    unembed: Any
    training: bool

    def __getattr__(self, name: str) -> Any:
        """Return a submodule or an attribute of the wrapped model."""


Backend: TypeAlias = Literal["auto", "hooked", "bridge"]

_log = logging.getLogger(__name__)


def is_hooked(model: object) -> bool:
    """Whether `model` is a `HookedTransformer`."""
    return HookedTransformer is not None and isinstance(model, HookedTransformer)


def check_model(model: object) -> None:
    """Refuse anything but a `HookedTransformer` or a `TransformerBridge`.

    Raises:
        TypeError: `model` is something else, a plain Hugging Face model for instance.
    """
    if not is_hooked(model) and not isinstance(model, TransformerBridge):
        raise TypeError(
            f"expected a HookedTransformer or a TransformerBridge, got {type(model).__name__}; "
            "pass it through divergence_lens.load_model first"
        )


def lens_model(model: Model) -> LensModel:
    """Return the model itself, typed by the parts that both classes have."""
    return cast("LensModel", model)


def model_name(model: Model) -> str:
    """The name that `model` was loaded under."""
    return str(getattr(lens_model(model).cfg, "model_name", type(model).__name__))


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
        source: "tiny" or "tiny-qwen2" (shipped with the library), the name of a model on the
            Hugging Face hub, a folder in Hugging Face's layout, a loaded Hugging Face model, or a
            model of TransformerLens (returned as it is, in eval mode).
        backend: which class to build.
        device: where to put it. None leaves a loaded model where it is, and puts any other on the
            first GPU if there is one, else on the CPU.
        dtype: the parameters' type. None leaves a loaded model's as it is, and means float32 for
            any other; large models are better loaded in bfloat16.
        tokenizer: a Hugging Face tokenizer; needed with a loaded Hugging Face model that has none
            beside it, optional otherwise.
        check: compare the loaded model's logits with those of the Hugging Face model that the
            weights came from, on an input longer than any window of at most 1,024 positions on a
            CPU (8,192 on a GPU); longer windows are shortened for the comparison. False skips
            this and logs a warning.

    Returns:
        The model in eval mode. `model.tokenizer` is set. Which class it is, and whether weights
        are folded, is logged at level INFO (`describe_model`). A bridge is built around a loaded
        Hugging Face model and shares its weights, so that object is in eval mode, too.

    Raises:
        FileNotFoundError: `source` looks like a folder and is none, or lacks `config.json`.
        ValueError: the backend cannot hold this model (the message says which can); the built
            model's logits are not Hugging Face's; the checkpoint lacks tensors, or has some that
            the architecture does not have; a weight is NaN or infinite, or on the meta device.
        TypeError: `source` is of another type.
    """
    with torch.random.fork_rng(devices=[]):  # TransformerLens draws weights before it has them
        model = _load(source, backend, device, dtype, tokenizer, check=check)
    _log.info("%s", describe_model(model))
    return model


def describe_model(model: Model) -> str:
    """In a line: which class it is, where, in which precision, and whether weights are folded."""
    check_model(model)
    parameter = next(model.parameters())
    precision = str(parameter.dtype).removeprefix("torch.")
    norm = str(getattr(lens_model(model).cfg, "normalization_type", ""))
    folded = norm.endswith("Pre")
    return (
        f"{model_name(model)}: {type(model).__name__}, {precision} on {parameter.device.type}, "
        f"{'norms folded into the weights' if folded else 'weights as they were trained'}"
    )


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
    if is_hooked(source) or isinstance(source, TransformerBridge):
        return _loaded(source, backend, device, dtype)
    if isinstance(source, nn.Module):
        _refuse_adapters_around(source)
        _refuse_several_devices(source)
        hf_model, name = source, str(getattr(source.config, "name_or_path", "") or "model")
    elif isinstance(source, str | Path):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        hf_model, tokenizer, name = from_pretrained(source, dtype or torch.float32, tokenizer)
    else:
        raise TypeError(
            f"source is a {type(source).__name__}; pass a name, a folder or a loaded model"
        )
    check_weights(hf_model, name)
    hf_model = hf_model.to(device=device, dtype=dtype).eval()
    dtype = next(hf_model.parameters()).dtype
    # Before anything is built: a bridge wraps the modules of `hf_model` and changes them.
    references = _References.of(hf_model) if check else None
    if not check:
        _log.warning("%s was loaded without comparing its logits with Hugging Face's", name)
    if backend == "bridge":
        return _bridge(hf_model, tokenizer, name, references)
    try:
        return _hooked(hf_model, tokenizer, name, dtype, references)
    except _ConversionError as error:
        if backend == "hooked":
            raise ValueError(
                f'{name!r} cannot be a HookedTransformer: {error}; use backend="bridge"'
            ) from error
        return _bridge(hf_model, tokenizer, name, references)


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


class _ConversionError(Exception):
    """TransformerLens has no faithful HookedTransformer for this architecture."""


def _loaded(
    model: Any, backend: Backend, device: str | torch.device | None, dtype: torch.dtype | None
) -> Model:
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


def from_pretrained(
    source: str | Path, dtype: torch.dtype, tokenizer: Any = None
) -> tuple[Any, Any, str]:
    """The Hugging Face model of a name or folder, its tokenizer, and the name.

    Args:
        source: As in `load_model`, but not a model.
        dtype: The parameters' type.
        tokenizer: Taken instead of the one that lies beside the model.

    Raises:
        FileNotFoundError: `source` looks like a folder and is none, or lacks `config.json`.
        ValueError: There is no such model, or its files are damaged.
    """
    from transformers import AutoModelForCausalLM

    name = str(source)
    location: str | Path = tiny_folder(name) if name in TINY_MODELS else source
    path = Path(location)
    looks_local = isinstance(source, Path) or name.startswith((".", "/", "~")) or path.is_dir()
    if looks_local and name not in TINY_MODELS:
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
                location, dtype=dtype, output_loading_info=True
            )
            model, loading = loaded
        if tokenizer is None:
            tokenizer = _tokenizer(location)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"cannot load {name!r} (a shipped name is one of {', '.join(TINY_MODELS)}; otherwise "
            f"a hub name or a folder in Hugging Face's layout): {_first_line(error)}"
        ) from error
    check_checkpoint_names(loading["missing_keys"], loading["unexpected_keys"], name=name)
    return model, tokenizer, name


def _tokenizer(location: str | Path) -> Any:
    """The tokenizer that lies in a folder or on the hub, read as its own file says.

    `AutoTokenizer` of transformers 5 goes by the model's type, and takes any tokenizer beside a
    Qwen2 model for Qwen2's byte pairs, whatever `tokenizer.json` holds. A folder that names the
    general class is read by that class.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = Path(location) / "tokenizer_config.json"
    if config.is_file() and (Path(location) / "tokenizer.json").is_file():
        named = json.loads(config.read_text()).get("tokenizer_class")
        if named in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast.from_pretrained(location)
    return AutoTokenizer.from_pretrained(location)


@contextmanager
def no_bar(*, hidden: bool) -> Iterator[None]:
    """Without Hugging Face's progress bar, where there is nothing to wait for."""
    from transformers.utils import logging

    hidden = hidden and logging.is_progress_bar_enabled()
    if hidden:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hidden:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _architecture(hf_model: Any) -> str:
    return type(hf_model).__name__


def _bridge(
    hf_model: Any, tokenizer: Any, name: str, references: "_References | None" = None
) -> Model:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    try:
        bridge: Model = build_bridge_from_module(
            hf_model, _architecture(hf_model), hf_config=hf_model.config, model_name=name
        )
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name!r} cannot be a bridge: {_first_line(error)}") from error
    bridge = bridge.eval()
    if references is not None:
        references.check_bridge(bridge, hf_model, name)
    _give_tokenizer(bridge, tokenizer)
    _limit_context(bridge, hf_model.config, name)
    return bridge


def _hooked(
    hf_model: Any,
    tokenizer: Any,
    name: str,
    dtype: torch.dtype,
    references: "_References | None" = None,
) -> Model:
    """A HookedTransformer with `hf_model`'s weights, converted by TransformerLens's own code.

    Its loader takes a name or a folder and branches on substrings of it ("llama", "gemma"), so
    the configuration alone goes to a folder of a neutral name, and the weights are handed over.
    """
    if HookedTransformer is None:
        raise _ConversionError("this version of TransformerLens has no HookedTransformer")
    from transformer_lens.loading_from_pretrained import (
        get_pretrained_model_config,
        get_pretrained_state_dict,
    )

    device = next(hf_model.parameters()).device
    with tempfile.TemporaryDirectory(prefix="dl-config-") as folder:
        config = hf_model.config.to_dict() | {"architectures": [_architecture(hf_model)]}
        if "n_positions" in config:
            # GPT-2's converter reads the old name of the context length.
            config["n_ctx"] = config["n_positions"]
        (Path(folder) / "config.json").write_text(json.dumps(config, default=str))
        try:
            cfg = get_pretrained_model_config(
                folder, hf_cfg=config, dtype=dtype, device=device, default_prepend_bos=False
            )
            weights = get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
        except (KeyError, ValueError, AttributeError, NotImplementedError, TypeError) as error:
            raise _ConversionError(_first_line(error)) from error
    cfg.model_name = name
    # Without a tokenizer of its own the class would ask the hub for one.
    cfg.tokenizer_name = None
    # Some converters write the sizes of the released models instead of this model's.
    cfg.n_ctx = config.get("max_position_embeddings") or config.get("n_positions") or cfg.n_ctx
    cfg.d_mlp = config.get("n_inner") or config.get("intermediate_size") or cfg.d_mlp
    with warnings.catch_warnings():
        # Announced as gone in version 4; which class to build is chosen knowingly here.
        warnings.simplefilter("ignore", DeprecationWarning)
        model: Any = HookedTransformer(cfg, move_to_device=False)
    try:
        model.load_and_process_state_dict(
            weights,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    except (RuntimeError, KeyError) as error:
        raise _ConversionError(_first_line(error)) from error
    model = model.to(device, print_details=False).to(dtype, print_details=False).eval()
    if references is not None:
        references.check_hooked(model)
    _give_tokenizer(model, tokenizer)
    _limit_context(model, hf_model.config, name)
    loaded: Model = model
    return loaded


@dataclass(frozen=True)
class _References:
    """Hugging Face's logits before conversion, with and without shortened windows.

    Attributes:
        plain: Windows as they are.
        short: Windows of a few positions; None where the probe crosses the real ones.
        windows: Real lengths of the windows that the plain probe does not cross.
        sliding: For each layer, whether its attention slides.
    """

    plain: Reference
    short: Reference | None
    windows: tuple[int, ...]
    sliding: tuple[bool, ...]

    @classmethod
    def of(cls, hf_model: Any) -> "_References":
        plain = Reference.of(hf_model)
        length = plain.tokens.shape[1]
        windows = tuple(n for n in position_switches(hf_model.config) if n >= length)
        short = Reference.of(hf_model, shorten=True) if windows else None
        return cls(plain, short, windows, sliding_layers(hf_model.config))

    def check_hooked(self, model: Any) -> None:
        """Refuse a HookedTransformer that computes something else, so that a bridge is tried."""
        difference = self.plain.difference(model)
        if not self.plain.agrees(difference):
            raise _ConversionError(
                f"its logits would differ from Hugging Face's by {difference:.3g} of the largest "
                f"on {self.plain.tokens.shape[1]} tokens"
            )
        # The probe crosses none of these, and the class cannot run with shorter ones. It has
        # windows for some families only, and some converters hard-code the released sizes' layers.
        local = bool(getattr(model.cfg, "use_local_attn", False))
        own = model.cfg.window_size if local else None
        if any(window != own for window in self.windows):
            raise _ConversionError(
                f"its attention changes at {', '.join(map(str, self.windows))} positions, which "
                "the conversion does not have"
            )
        if self.windows and _local_layers(model.cfg) != self.sliding:
            raise _ConversionError("the conversion puts its sliding windows into other layers")

    def check_bridge(self, bridge: Any, hf_model: Any, name: str) -> None:
        """Refuse a bridge that computes something else."""
        for reference in (self.plain, self.short):
            if reference is None:
                continue
            with short_windows(hf_model, shortened=reference is self.short):
                difference = reference.difference(bridge)
            if not reference.agrees(difference):
                adapters = getattr(hf_model, "_hf_peft_config_loaded", False)
                raise ValueError(
                    f"{name!r} cannot be a bridge: its logits differ from Hugging Face's by "
                    f"{difference:.3g} of the largest on {reference.tokens.shape[1]} tokens, where "
                    f"{reference.tolerance:.3g} is rounding; "
                    + (
                        "its adapters are not converted: merge them into the weights first"
                        if adapters
                        else "TransformerLens does not convert this architecture faithfully"
                    )
                )


def _local_layers(cfg: Any) -> tuple[bool, ...]:
    """For each layer of a HookedTransformer, whether its attention is local."""
    return tuple(kind == "local" for kind in cfg.attn_types or ["global"] * cfg.n_layers)


def _limit_context(model: Any, config: Any, name: str) -> None:
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


def _give_tokenizer(model: Any, tokenizer: Any) -> None:
    """Set the tokenizer as it is.

    TransformerLens would reload it with a BOS token before every text, which a chat template
    already writes, and set pad tokens on the caller's object.
    """
    from transformer_lens.model_bridge.sources import detect_tokenizer_bos_eos

    model.tokenizer = tokenizer
    cfg = model.cfg
    cfg.default_prepend_bos = False
    if tokenizer is not None:
        cfg.tokenizer_prepends_bos, cfg.tokenizer_appends_eos = detect_tokenizer_bos_eos(tokenizer)
