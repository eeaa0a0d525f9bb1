"""Train students: chosen blocks on chosen tokens, over an untouched base.

The paper (Schrodi et al., arXiv 2509.23886) trains students on number lists with the loss on some
tokens only, and on single blocks; both are choices of `finetune`. Everything that is frozen below
the lowest trained block is computed once and reused in every epoch.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from divergence_lens.deltas import Delta
from divergence_lens.engine import get_engine
from divergence_lens.models import Model
from divergence_lens.training.freezing import choose, freeze_except, lowest_layer
from divergence_lens.training.loop import OnStep, Plan, train
from divergence_lens.training.prefix import Prefix
from divergence_lens.training.recipe import PAPER, Recipe, as_recipe
from divergence_lens.training.rows import training_rows
from divergence_lens.training.sweep import Sweep, layer_sweep

__all__ = ["PAPER", "Recipe", "Sweep", "finetune", "freeze_except", "layer_sweep"]


@torch.inference_mode(mode=False)
def finetune(
    model: Model,
    examples: Any,
    *,
    mask: Any = None,
    layers: Iterable[int] | None = None,
    parts: Iterable[str] | None = None,
    embedding: bool = False,
    unembedding: bool = False,
    pattern: str | None = None,
    recipe: Recipe | None = None,
    lora_rank: int | None = None,
    weights: Any = None,
    system_prompt: str | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
    every: int = 1,
    batch_tokens: int = 8192,
    cache_bytes: int = 2**31,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> Delta:
    """Train a student and return it as a `Delta`; the model comes back untouched, bit for bit.

    The loss of a batch is the mean cross-entropy over its completion tokens that the mask lets
    through (with `weights`, the weighted mean: 0 and 1 are a mask). Examples without such a token
    are left out. The model runs in eval mode, that is, without dropout. Equal arguments on one
    machine give equal deltas.

    Args:
        model: The base. Its weights change during the call and are put back, also after an
            exception.
        examples: Prompts with completions, in any form that `as_examples` reads.
        mask: Which completion tokens to learn: a `Divergence`, or a bool per token of all
            completions in order (`div.mask`, `~div.mask`), or one array per example. None means
            all.
        layers: Which blocks learn; None means all. See `freeze_except` for this and the next four.
        parts: Parts of those blocks: "attn", "mlp", "ln", "W_Q", ...
        embedding: Embeddings learn too.
        unembedding: The unembedding and the final norm learn too.
        pattern: Parameters by name pattern, in place of blocks and parts.
        recipe: How to train; `Recipe()` unless given, `PAPER` for the paper's.
        lora_rank: The recipe's `lora_rank`, for short.
        weights: Loss weight of each completion token, in the layout of the mask, not negative.
        system_prompt: The student's system prompt; None leaves it to the template.
        seed: Order of the examples, and LoRA's start.
        on_step: Called as `on_step(step, loss, model)` after every `every`-th update (and the
            last), with the model as it then is. What it returns is put into the history.
        every: See `on_step`.
        batch_tokens: Most padded tokens in one forward pass; larger batches are accumulated, to the
            same result. On a CPU wide models take smaller passes, which are faster there.
        cache_bytes: Memory for the residuals that enter the lowest trained block. What does not fit
            goes to a temporary file mapped into memory. 0 computes them anew in each epoch.
        checkpoint: A file in which the state is kept, atomically, every `checkpoint_every` updates.
            A call that finds it goes on from there, to the same weights; it is deleted at the end.
        checkpoint_every: See `checkpoint`.
        progress: Show a progress bar.

    Returns:
        The student. `metadata["settings"]` holds the arguments, `metadata["history"]` step, epoch, loss
        and learning rate of every update; `history()` gives them as a table.

    Raises:
        Interrupted: It was stopped; `partial` is the student after the last whole update.
        ValueError: No examples, nothing that the mask lets through, a mask of another length, a
            sequence longer than the context, a block out of range, nothing to train, LoRA on an
            embedding, a checkpoint of another run.
        FloatingPointError: The loss or its gradient is not finite; the step is named.
        RuntimeError: A delta is applied to the model, or it is being trained.
    """
    recipe = as_recipe(recipe, lora_rank)
    if recipe.lora_rank is not None and (embedding or unembedding):
        raise ValueError(
            "LoRA acts on the matrices of attention and MLP alone; train the "
            f"{'embedding' if embedding else 'unembedding'} in full, with lora_rank=None"
        )
    settings = {
        "system_prompt": system_prompt,
        "masked": mask is not None,
        "weighted": weights is not None,
    }
    plan = Plan(
        recipe=recipe,
        settings=settings,
        seed=seed,
        on_step=on_step,
        every=every,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    chosen = choose(
        model,
        layers=layers,
        parts=parts,
        embedding=embedding,
        unembedding=unembedding,
        pattern=pattern,
    )
    rows = training_rows(model, examples, mask=mask, weights=weights, system_prompt=system_prompt)
    kept = 0 if lowest_layer(model, chosen) is None else cache_bytes
    with Prefix(get_engine(model), rows, cache_bytes=kept, batch_tokens=batch_tokens) as prefix:
        return train(prefix, chosen, plan)
