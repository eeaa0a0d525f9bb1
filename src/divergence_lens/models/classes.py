"""The two model classes of TransformerLens: type checks, names and typed access."""

import sys
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

from torch import nn

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


class LensClasses(NamedTuple):
    """The model classes of the installed TransformerLens."""

    hooked: Any
    """`HookedTransformer`; None in TransformerLens 4, which removed it."""
    bridge: Any
    """`TransformerBridge`."""


@cache
def lens_classes() -> LensClasses:
    """Import TransformerLens, and return its model classes.

    The import takes seconds, so results are read, drawn and pickled without it. It also sets the
    log level of transformers to "error" for the whole process, which is undone here.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    try:
        import transformer_lens
        from transformer_lens.model_bridge import TransformerBridge
    finally:
        logging.set_verbosity(verbosity)
    hooked: Any = None
    with suppress(AttributeError, ImportError):  # TransformerLens 4 raises the second
        hooked = transformer_lens.HookedTransformer
    return LensClasses(hooked, TransformerBridge)


def is_hooked(model: object) -> bool:
    """Return whether `model` is a `HookedTransformer`."""
    # Before TransformerLens is imported, there is no object of its classes.
    if "transformer_lens" not in sys.modules or (hooked := lens_classes().hooked) is None:
        return False
    return isinstance(model, hooked)


def is_lens_model(model: object) -> bool:
    """Return whether `model` is a `HookedTransformer` or a `TransformerBridge`."""
    if "transformer_lens" not in sys.modules:
        return False
    return is_hooked(model) or isinstance(model, lens_classes().bridge)


def check_model(model: object) -> None:
    """Refuse anything but a `HookedTransformer` or a `TransformerBridge`.

    Raises:
        TypeError: `model` is something else, a plain Hugging Face model for instance.
    """
    if not is_lens_model(model):
        raise TypeError(
            f"expected a HookedTransformer or a TransformerBridge, got {type(model).__name__}; "
            "pass it through divergence_lens.load_model first"
        )


def lens_model(model: Model) -> LensModel:
    """Return the model itself, typed by the parts that both classes have."""
    return cast("LensModel", model)


def model_name(model: Model) -> str:
    """Return the name that `model` was loaded under."""
    return str(getattr(lens_model(model).cfg, "model_name", type(model).__name__))


def end_token_ids(model: Model) -> frozenset[int]:
    """Return the end tokens of the generation configuration that `model` was loaded with.

    A chat model may have more than one, such as an end of turn and an end of message.
    """
    return frozenset(getattr(lens_model(model).cfg, "end_token_ids", ()))


def sampling_defaults(model: Model) -> dict[str, Any]:
    """Return the sampling of the generation configuration that `model` was loaded with.

    The names are those of `generate`: `temperature`, `top_p`, `top_k` and `repetition_penalty`, as
    far as the configuration has them. They are how Hugging Face samples unless told otherwise:

        generate(model, prompts, **sampling_defaults(model) | {"temperature": 1.0})
    """
    check_model(model)
    return dict(getattr(lens_model(model).cfg, "sampling_defaults", {}))


def describe_model(model: Model) -> str:
    """Describe a model in one line: its class, device and precision, and whether norms are folded.

    Raises:
        TypeError: `model` is not a TransformerLens model.
    """
    check_model(model)
    parameter = next(model.parameters())
    precision = str(parameter.dtype).removeprefix("torch.")
    norm = str(getattr(lens_model(model).cfg, "normalization_type", ""))
    folded = norm.endswith("Pre")
    return (
        f"{model_name(model)}: {type(model).__name__}, {precision} on {parameter.device.type}, "
        f"{'norms folded into the weights' if folded else 'weights as they were trained'}"
    )
