"""Load a model, and describe it.

Every public call of the library takes a `HookedTransformer` or a `TransformerBridge`. This package
builds either from a name, a folder or a Hugging Face model, always without folding or centering
weights, so that logits and residuals are Hugging Face's own and trained weights can be exported.
"""

from divergence_lens.models.classes import (
    LensClasses,
    LensModel,
    Model,
    check_model,
    describe_model,
    end_token_ids,
    is_hooked,
    lens_classes,
    lens_model,
    model_name,
    sampling_defaults,
)
from divergence_lens.models.loading import Backend, load_model
from divergence_lens.models.pretrained import from_pretrained, no_bar
from divergence_lens.models.reference import take_own_logits

__all__ = [
    "Backend",
    "LensClasses",
    "LensModel",
    "Model",
    "check_model",
    "describe_model",
    "end_token_ids",
    "from_pretrained",
    "is_hooked",
    "lens_classes",
    "lens_model",
    "load_model",
    "model_name",
    "no_bar",
    "sampling_defaults",
    "take_own_logits",
]
