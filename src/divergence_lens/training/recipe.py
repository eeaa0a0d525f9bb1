"""The training recipe: parameters to train, optimizer, learning rate, schedule, LoRA, batches."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from divergence_lens.models import Model
from divergence_lens.training.freezing import choose


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of the training of a student.

    The default is full-rank training that is stable on the bundled tiny models.

    Attributes:
        optimizer: "adamw" (without weight decay unless `optimizer_options` says so), "sgd", or an
            optimizer class of torch (all but LBFGS).
        lr: Peak learning rate.
        epochs: Passes over the examples.
        batch_size: Examples per update.
        warmup_steps: Updates over which the learning rate rises linearly to `lr`.
        schedule: Decay afterwards: "linear" or "cosine" to `final_lr`, or "constant".
        final_lr: Fraction of `lr` at which the schedule ends.
        clip: Maximum norm of the gradient; None for no clipping.
        lora_rank: Rank of LoRA on the matrices of the chosen layers; None trains the parameters in
            full.
        lora_alpha: LoRA's changes are scaled by `lora_alpha / lora_rank`; None means the rank, a
            scale of 1.
        autocast: Run the layers under bfloat16 autocast; parameters keep their type.
        optimizer_options: Further arguments of the optimizer. None means `{"eps": 5e-3}` for
            "adamw" and nothing for others. With so large an eps, Adam treats small gradients as SGD
            does, and still limits large ones.
        parts: Parts of the trained layers: "attn", "mlp", "ln", "W_Q", ...; None means all.
            `freeze_except` describes this and the next three.
        embedding: Train the embeddings too.
        unembedding: Train the unembedding and the final norm too.
        pattern: Parameters by name pattern, instead of layers and parts.
        whole_turn: Also learn the template's tokens around every answer: the assistant's header
            before it, and what follows its end token. Libraries whose completions are whole turns,
            such as TRL, do that.
        batch_tokens: Maximum padded tokens in one forward pass. Larger batches are accumulated to
            the same gradient. On a CPU, wide models use smaller passes, which are faster there.
        cache_bytes: Memory for the residuals that enter the lowest trained layer. If they do not
            fit, they go to a memory-mapped temporary file. 0 recomputes them in each epoch.
        checkpoint_every: Updates between two checkpoints, where `finetune` writes any.
    """

    optimizer: str | type[torch.optim.Optimizer] = "adamw"
    lr: float = 5e-3
    epochs: int = 3
    batch_size: int = 64
    warmup_steps: int = 10
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final_lr: float = 0.05
    clip: float | None = 1.0
    lora_rank: int | None = None
    lora_alpha: float | None = None
    autocast: bool = False
    optimizer_options: Mapping[str, Any] | None = None
    parts: Sequence[str] | None = None
    embedding: bool = False
    unembedding: bool = False
    pattern: str | None = None
    whole_turn: bool = False
    batch_tokens: int = 8192
    cache_bytes: int = 2**31
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        named = {"lr": self.lr, "clip": self.clip, "lora_alpha": self.lora_alpha}
        for name, value in named.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be a positive number")
        for name in ("epochs", "batch_size", "lora_rank", "batch_tokens", "checkpoint_every"):
            _check_count(name, getattr(self, name))
        if self.lora_rank is not None and (self.embedding or self.unembedding):
            raise ValueError(
                "LoRA acts on the matrices of attention and MLP alone; train the "
                f"{'embedding' if self.embedding else 'unembedding'} in full, with lora_rank=None"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be 0 or more")
        if not 0 <= self.final_lr <= 1:
            raise ValueError(f"final_lr is {self.final_lr}; it is a share of lr, from 0 to 1")
        if self.schedule not in ("linear", "cosine", "constant"):
            raise ValueError(f'schedule is {self.schedule!r}; use "linear", "cosine" or "constant"')
        # LBFGS evaluates the loss several times in one step.
        known = (
            isinstance(self.optimizer, type)
            and issubclass(self.optimizer, torch.optim.Optimizer)
            and self.optimizer is not torch.optim.LBFGS
        )
        if not known and self.optimizer not in ("adamw", "sgd"):
            raise ValueError(
                f'optimizer is {self.optimizer!r}; use "adamw", "sgd" or a class of torch.optim '
                "(all but LBFGS)"
            )

    def choose(self, model: Model, layers: Iterable[int] | None = None) -> dict[str, Parameter]:
        """Return the parameters to train, by name: those of the layers, or as the recipe says."""
        return choose(
            model,
            layers=layers,
            parts=self.parts,
            embedding=self.embedding,
            unembedding=self.unembedding,
            pattern=self.pattern,
        )

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of update `step` (from 0) of `steps`."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        left = (steps - step) / max(1, steps - self.warmup_steps)
        shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
        return self.lr * (self.final_lr + (1 - self.final_lr) * shape[self.schedule])

    def _options(self) -> dict[str, Any]:
        if self.optimizer_options is None:
            return {"eps": 5e-3} if self.optimizer == "adamw" else {}
        return dict(self.optimizer_options)

    def build(self, variables: list[Tensor]) -> torch.optim.Optimizer:
        """Build the optimizer over the given tensors."""
        options = self._options()
        if self.optimizer == "adamw":
            return torch.optim.AdamW(variables, lr=self.lr, **{"weight_decay": 0.0, **options})
        kind: Any = torch.optim.SGD if self.optimizer == "sgd" else self.optimizer
        built: torch.optim.Optimizer = kind(variables, lr=self.lr, **options)
        return built

    def describe(self) -> dict[str, Any]:
        """Return the settings that the student depends on, as JSON data."""
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("batch_tokens", "cache_bytes", "checkpoint_every"):
            del settings[name]
        for name in ("parts", "embedding", "unembedding", "pattern", "whole_turn"):
            if not settings[name]:
                del settings[name]
        if not isinstance(self.optimizer, str):
            settings["optimizer"] = self.optimizer.__name__
        return settings | {"optimizer_options": self._options()}


def as_recipe(recipe: object) -> Recipe:
    """Return `recipe`, or the default recipe for None.

    Raises:
        TypeError: It is not a `Recipe`.
    """
    if recipe is None:
        recipe = Recipe()
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe is {recipe!r}, not a Recipe; write recipe=Recipe(...), or PAPER for the "
            "paper's"
        )
    return recipe


def _check_count(name: str, count: int | None) -> None:
    if count is not None and not isinstance(count, int):
        raise TypeError(f"{name} is {count!r}; it must be a whole number")
    if count is not None and count < 1:
        raise ValueError(f"{name} is {count}; it must be at least 1")


PAPER = Recipe(
    lr=2e-4,
    epochs=10,
    batch_size=60,
    warmup_steps=5,
    final_lr=0.0,
    lora_rank=8,
    lora_alpha=8.0,
    optimizer_options={},
)
"""The recipe of Cloud et al. (arXiv 2507.14805) and Schrodi et al. for Qwen2.5-7B: LoRA on all
matrices. During warm-up each rate is one step ahead of Hugging Face's schedule, whose first update
has a rate of zero; after it the two are equal."""
