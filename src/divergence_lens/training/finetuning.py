"""Train a student: chosen layers on chosen tokens, on top of an unmodified base.

The paper (Schrodi et al., arXiv 2509.23886) trains students on number lists with the loss on some
tokens only, and on single layers. Both are options of `finetune`. Everything below the lowest
trained layer is frozen, so its output is computed once and reused in every epoch.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from divergence_lens.deltas import Delta
from divergence_lens.engine import get_engine
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher
from divergence_lens.training.freezing import lowest_layer
from divergence_lens.training.loop import OnStep, Plan, train
from divergence_lens.training.prefix import Prefix
from divergence_lens.training.recipe import Recipe, as_recipe
from divergence_lens.training.rows import tokenized, training_rows
from divergence_lens.training.soft import SoftLoss, SoftTargets, as_soft_targets


@torch.inference_mode(mode=False)
def finetune(
    model: Model,
    examples: Any,
    *,
    mask: Any = None,
    layers: Iterable[int] | None = None,
    recipe: Recipe | None = None,
    soft: Teacher | SoftTargets | None = None,
    loss_weights: Any = None,
    system_prompt: str | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
    every: int = 1,
    checkpoint_dir: str | Path | None = None,
    progress: bool = False,
) -> Delta:
    """Train a student and return it as a `Delta`; the model is restored bit for bit.

    The loss of a batch is the mean cross-entropy over its unmasked completion tokens, or the mean
    KL divergence with `soft` (with `loss_weights`, the weighted mean: 0 and 1 are a mask). Examples
    without such a token are left out. The model runs in eval mode, without dropout. Equal arguments
    on one machine give equal deltas.

    Args:
        model: The base. Its weights change during the call and are restored afterwards, also after
            an exception.
        examples: Prompts with completions, in any form that `load_examples` reads, or a
            `TrainingData`, whose labels are then learned.
        mask: Completion tokens to learn: a `Divergence`, or a bool per token of all completions in
            order (`div.mask`, `~div.mask`), or one array per example. None means all.
        layers: Layers to train; None means all, unless the recipe names other parameters.
        recipe: How to train, LoRA and parts of layers included. `Recipe()` by default; `PAPER` is
            the paper's.
        soft: Learn this teacher's next-token distributions at the unmasked tokens, instead of the
            tokens; `SoftTargets` has further settings.
        loss_weights: Loss weight of each completion token, not negative, in the layout of the mask.
        system_prompt: System prompt of the student; None leaves it to the chat template.
        seed: Seed of the order of the examples and of LoRA's initial values.
        on_step: Called as `on_step(step, loss, model)` after every `every`-th update and after the
            last, with the model's current weights. The mapping that it returns is added to the
            history; a true `stop` in it ends the training.
        every: See `on_step`.
        checkpoint_dir: A folder for this run alone. The state is stored in it, atomically, every
            `recipe.checkpoint_every` updates, and deleted at the end. The same call resumes from
            it, to the same weights.
        progress: Show a progress bar.

    Returns:
        The student. `metadata["settings"]` holds the arguments, `metadata["history"]` the step,
        epoch, loss and learning rate of every update; `history()` returns them as a table.

    Raises:
        Interrupted: The call was interrupted; `partial` is the student after the last complete
            update.
        ValueError: No examples, a mask without any token or of another length, a sequence longer
            than the context, a layer out of range, nothing to train, or the checkpoint of another
            run.
        FloatingPointError: The loss or its gradient is not finite; the message names the step.
        RuntimeError: A delta is applied to the model, or the model is already being trained.
    """
    recipe = as_recipe(recipe)
    targets = as_soft_targets(soft)
    settings = {
        "system_prompt": system_prompt,
        "masked": mask is not None,
        "weighted": loss_weights is not None,
    }
    chosen = recipe.choose(model, layers)
    rows = training_rows(
        model,
        examples,
        mask=mask,
        loss_weights=loss_weights,
        system_prompt=system_prompt,
        whole_turn=recipe.whole_turn,
    )
    loss = None
    if targets is not None:
        if recipe.whole_turn:
            raise ValueError(
                "soft targets are for the completion's tokens; use a recipe without whole_turn"
            )
        read, _ = tokenized(model, examples)
        loss = SoftLoss(model, read, targets, trained=chosen, batch_tokens=recipe.batch_tokens)
    plan = Plan(
        recipe=recipe,
        settings=settings,
        seed=seed,
        on_step=on_step,
        every=every,
        checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir),
        progress=progress,
        soft=loss,
    )
    # If the embeddings learn, nothing below the trained parameters is frozen.
    cache_bytes = 0 if lowest_layer(model, chosen) is None else recipe.cache_bytes
    engine = get_engine(model)
    with (
        engine.packed(),
        Prefix(engine, rows, cache_bytes=cache_bytes, batch_tokens=recipe.batch_tokens) as prefix,
    ):
        return train(prefix, chosen, plan)
