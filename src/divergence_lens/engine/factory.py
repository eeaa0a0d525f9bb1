"""Build the engine that fits a model's class, and check it before its first use."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from divergence_lens._utils.memory import is_out_of_memory
from divergence_lens.engine.base import Engine
from divergence_lens.engine.bridge import BridgeEngine
from divergence_lens.engine.equivalence import OwnPass, pass_tolerance, probe_tokens
from divergence_lens.engine.hooked import HookedEngine
from divergence_lens.models import (
    Model,
    check_model,
    is_hooked,
    lens_model,
    model_name,
    take_own_logits,
)

_ENGINE = "_divergence_lens_engine"


def get_engine(model: Model, *, causal: bool = True) -> Engine:
    """Return the engine of `model`, built and checked against a plain forward on the first call.

    Args:
        model: A `HookedTransformer` or a `TransformerBridge`.
        causal: Refuse a model that attends in both directions. The passes of such a model must
            start at the first position and have rows of one length.

    Raises:
        TypeError: `model` is of another class.
        ValueError: The model is not causal, cannot run in its precision, or its pass block by
            block fails or differs from its own forward.
    """
    engine = model.__dict__.get(_ENGINE) if isinstance(model, nn.Module) else None
    if isinstance(engine, Engine) and engine.model is model and (engine.causal or not causal):
        return engine
    check_model(model)
    if causal and getattr(lens_model(model).cfg, "attention_dir", "causal") != "causal":
        raise ValueError(
            "the model attends in both directions; this needs a causal language model "
            "(only patching takes others)"
        )
    dtype = next(model.parameters()).dtype
    wide = dtype in (torch.float32, torch.float64)
    remembered = take_own_logits(model) if causal else None
    try:
        engine = HookedEngine(model) if is_hooked(model) else BridgeEngine(model)
        tokens = probe_tokens(model) if remembered is None else remembered[0].to(engine.device)
        own_pass = OwnPass.run(engine, tokens)
        difference = math.inf
        if remembered is not None:
            difference = own_pass.difference(remembered[1].to(engine.device))
        # Without remembered logits, or with those of weights that have changed since.
        if not difference <= pass_tolerance(dtype):
            difference = own_pass.difference(_own_logits(model, tokens))
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        if isinstance(error, RuntimeError) and not wide:
            # OLMo 2 in bfloat16, whose bridge mixes types, for instance.
            raise ValueError(
                f"{model_name(model)!r} cannot run in {dtype}: {error}; "
                "try load_model(..., dtype=torch.float32)"
            ) from error
        raise _not_supported(model, f"its blocks cannot be run one by one ({error})") from error
    # A broken pass may give NaN, which is not greater than anything.
    if not difference <= pass_tolerance(dtype):
        raise _not_supported(
            model,
            "its blocks, run one by one, give other logits than its own forward (relative "
            f"difference {difference:.2g})",
        )
    engine.use_fused_blocks(own_pass)
    object.__setattr__(model, _ENGINE, engine)
    return engine


@torch.no_grad()
def _own_logits(model: Model, tokens: Int[Tensor, "2 pos"]) -> Float[Tensor, "2 pos d_vocab"]:
    # The mask says that nothing is padding: a bridge would otherwise mask ids equal to the pad id.
    logits: Tensor = model(tokens, attention_mask=torch.ones_like(tokens))
    return logits


def _not_supported(model: Model, why: str) -> ValueError:
    name = f"{type(model).__name__} {model_name(model)!r}"
    return ValueError(f"the architecture of {name} is not supported: {' '.join(why.split())}")
