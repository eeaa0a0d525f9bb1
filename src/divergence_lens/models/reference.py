"""Compare a built model with the Hugging Face model that its weights came from.

`References.of` runs a probe through the Hugging Face model before anything wraps or converts it.
`check_hooked` and `check_bridge` run the same probe through the built model. No model is accepted
because it agrees with itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from divergence_lens.models.positions import (
    SHORT_WINDOW,
    position_switches,
    short_windows,
    sliding_layers,
)
from divergence_lens.models.pretrained import first_line

_FEWEST_TOKENS = 16
_MOST_TOKENS = {"cpu": 1024}
_MOST_TOKENS_ACCELERATOR = 8192
# A forward pass takes about 2 operations per parameter and token. A probe takes at most this many:
# a minute on a CPU that does 70 billion a second, half a second on a GPU that does 200 trillion.
_MOST_OPERATIONS = {"cpu": 4e12}
_MOST_OPERATIONS_ACCELERATOR = 1e14
# Logits are compared at this many positions at most; at a vocabulary of 256,000 and 4,096 tokens
# all of them would take 4 GB.
_COMPARED = 64
# Measured on SmolLM2-135M (30 layers), stories260K and the bundled models, in both classes: at most
# 1.7e-6 in float32, 6e-7 in float64 (Hugging Face's RMSNorm rounds to float32), 0.003 in float16
# and 0.021 in bfloat16. Architectures that are converted wrongly differ by 0.1 or more. float32
# has the widest margin, because a GPU may round its products to 10 bits (TF32).
_TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-5,
    torch.float16: 0.01,
    torch.bfloat16: 0.05,
}
_OWN_LOGITS = "_divergence_lens_own_logits"
# Logits are remembered at the first positions, which under a causal mask do not depend on others.
_REMEMBERED = 6
_HALF = (torch.float16, torch.bfloat16)


class ConversionError(Exception):
    """TransformerLens has no faithful HookedTransformer for this architecture."""


@dataclass(frozen=True)
class Reference:
    """Hugging Face's logits on a probe.

    Attributes:
        tokens: The probe.
        positions: The positions at which logits are compared.
        logits: Hugging Face's logits there.
        tolerance: The largest difference that rounding explains, relative to the largest logit.
        routed: Whether the median position is compared instead of the worst. In half precision a
            mixture of experts sends a token elsewhere where two routing weights tie, and that
            token's logits then differ without any error.
    """

    tokens: Int[Tensor, "batch pos"]
    positions: Int[Tensor, " compared"]
    logits: Float[Tensor, "batch compared d_vocab"]
    tolerance: float
    routed: bool

    @classmethod
    @torch.no_grad()
    def of(cls, hf_model: Any, *, shorten: bool = False) -> "Reference":
        """Compute the reference. Call it before the model is wrapped: a bridge changes it.

        Args:
            hf_model: The model as transformers loaded it.
            shorten: Shorten all windows and chunks, so that a short probe crosses them.

        Raises:
            ValueError: The model does not return logits for token ids.
        """
        parameter = next(hf_model.parameters())
        tokens = _probe(_probe_length(hf_model), _vocabulary(hf_model), parameter.device)
        length = tokens.shape[1]
        positions = torch.linspace(0, length - 1, min(_COMPARED, length)).round().long().unique()
        positions = positions.to(parameter.device)
        with short_windows(hf_model, shortened=shorten):
            try:
                logits = hf_model(tokens, use_cache=False).logits[:, positions].float()
            # Out of memory is no property of the model.
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise ValueError(
                    f"the {type(hf_model).__name__} does not return logits for token ids: "
                    f"{first_line(error)}; give a causal language model, in one dtype"
                ) from error
        return cls(
            tokens,
            positions,
            logits,
            _TOLERANCE[parameter.dtype],
            parameter.dtype in _HALF and _has_experts(hf_model.config),
        )

    @torch.no_grad()
    def difference(self, model: Any) -> float:
        """Return the largest difference of the model's logits, relative to the largest or 1."""
        # The mask says that nothing is padding: a tokenizer that pads on the left would have ids
        # equal to the pad id masked.
        logits = model(self.tokens, attention_mask=torch.ones_like(self.tokens))
        if len(self.tokens) > 1:
            _remember(model, self.tokens, logits)
        logits = logits[:, self.positions].float()  # [batch, compared, d_vocab]
        scale = max(1.0, float(self.logits.abs().max()))
        by_position = (logits - self.logits).abs().amax(-1)  # [batch, compared]
        worst = by_position.median() if self.routed else by_position.max()
        return float(worst) / scale

    def agrees(self, difference: float) -> bool:
        """Return whether rounding explains a difference; NaN does not pass."""
        return difference <= self.tolerance


def _probe_length(hf_model: Any) -> int:
    """Return a length beyond every window, chunk and rotation switch that can be afforded."""
    device = next(hf_model.parameters()).device.type
    operations = _MOST_OPERATIONS.get(device, _MOST_OPERATIONS_ACCELERATOR)
    per_token = 2 * sum(parameter.numel() for parameter in hf_model.parameters())
    most = min(
        _MOST_TOKENS.get(device, _MOST_TOKENS_ACCELERATOR), int(operations / max(1, per_token))
    )
    near = [length for length in position_switches(hf_model.config) if length < most]
    longest = max([_FEWEST_TOKENS, *(length + SHORT_WINDOW for length in near)])
    context = getattr(hf_model.config, "max_position_embeddings", None) or longest
    return min(longest, int(context))


def _has_experts(config: Any) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any(getattr(config, name, None) for name in names)


def _vocabulary(hf_model: Any) -> int:
    embedding = hf_model.get_input_embeddings()
    return int(embedding.weight.shape[0])


def _probe(length: int, vocabulary: int, device: torch.device) -> Int[Tensor, "batch pos"]:
    """Draw rows of different ids without a period, so that a wrong position or window shows.

    Two rows show results that depend on a neighbor; a long probe has one, which takes half as long.
    """
    generator = torch.Generator().manual_seed(0)
    rows = 2 if length <= _COMPARED else 1
    return torch.randint(0, vocabulary, (rows, length), generator=generator).to(device)


@dataclass
class References:
    """Hugging Face's logits before conversion, with and without shortened windows.

    Attributes:
        plain: The reference with windows as they are.
        short: The reference with windows of a few positions; None where the plain probe crosses
            the real ones.
        windows: Real lengths of the windows that the plain probe does not cross.
        sliding: For each layer, whether its attention has a sliding window.
        seconds: Time taken by the probes so far.
    """

    plain: Reference
    short: Reference | None
    windows: tuple[int, ...]
    sliding: tuple[bool, ...]
    seconds: float = 0.0

    @classmethod
    def of(cls, hf_model: Any) -> "References":
        """Run the probes through the Hugging Face model."""
        start = perf_counter()
        plain = Reference.of(hf_model)
        length = plain.tokens.shape[1]
        windows = tuple(n for n in position_switches(hf_model.config) if n >= length)
        short = Reference.of(hf_model, shorten=True) if windows else None
        references = cls(plain, short, windows, sliding_layers(hf_model.config))
        references.seconds = perf_counter() - start
        return references

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - start

    def check_hooked(self, model: Any) -> None:
        """Refuse a HookedTransformer that computes something else, so that a bridge is tried.

        Raises:
            ConversionError: Says what differs.
        """
        with self._timed():
            difference = self.plain.difference(model)
        if not self.plain.agrees(difference):
            raise ConversionError(
                f"its logits would differ from Hugging Face's by {difference:.3g} of the largest "
                f"on {self.plain.tokens.shape[1]} tokens"
            )
        # The probe crosses none of these, and the class cannot run with shorter ones. It has
        # windows for some families only, and some converters hard-code the released sizes' layers.
        local = bool(getattr(model.cfg, "use_local_attn", False))
        own = model.cfg.window_size if local else None
        if any(window != own for window in self.windows):
            raise ConversionError(
                f"its attention changes at {', '.join(map(str, self.windows))} positions, which "
                "the conversion does not have"
            )
        if self.windows and _local_layers(model.cfg) != self.sliding:
            raise ConversionError("the conversion puts its sliding windows into other layers")

    def check_bridge(self, bridge: Any, hf_model: Any, name: str) -> None:
        """Refuse a bridge that computes something else.

        Raises:
            ValueError: Names the model and the difference.
        """
        for reference in (self.plain, self.short):
            if reference is None:
                continue
            shortened = reference is self.short
            with self._timed(), short_windows(hf_model, shortened=shortened):
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


def _remember(model: Any, tokens: Tensor, logits: Float[Tensor, "batch pos d_vocab"]) -> None:
    """Store a model's own logits on it for `take_own_logits`, so that they are computed once."""
    first = slice(None), slice(_REMEMBERED)
    object.__setattr__(model, _OWN_LOGITS, (tokens[first].clone(), logits[first].clone()))


def take_own_logits(
    model: Any,
) -> tuple[Int[Tensor, "2 pos"], Float[Tensor, "2 pos d_vocab"]] | None:
    """Return tokens and the logits that the model gave for them at loading, and forget them.

    None if there are none. The model's weights may have changed since.
    """
    remembered: tuple[Tensor, Tensor] | None = model.__dict__.pop(_OWN_LOGITS, None)
    return remembered


def _local_layers(cfg: Any) -> tuple[bool, ...]:
    """Return for each layer of a HookedTransformer whether its attention is local."""
    return tuple(kind == "local" for kind in cfg.attn_types or ["global"] * cfg.n_layers)
