"""The training loop of a student.

1. Take the residuals that enter the lowest trained layer from the `Prefix`.
2. Run the layers above, and unembed only the positions whose next token is learned.
3. Differentiate by the leaves of the `Variables`, and let the optimizer update their values.
4. Write the values into the model's own parameters.
5. At the end, return the differences as a `Delta` and restore the parameters bit for bit.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from divergence_lens._utils.interrupts import defer_interrupts, partial_on_interrupt
from divergence_lens._utils.memory import halved
from divergence_lens.deltas import Delta, base_fingerprint, is_matrix, reserved, restore_values
from divergence_lens.models import Model
from divergence_lens.provenance import run_metadata
from divergence_lens.training.checkpoint import TrainingCheckpoint
from divergence_lens.training.cross_entropy import (
    chunked_cross_entropy,
    weighted_cross_entropy,
)
from divergence_lens.training.freezing import Trainable, lowest_layer
from divergence_lens.training.prefix import Prefix
from divergence_lens.training.recipe import Recipe
from divergence_lens.training.rows import batches, pieces
from divergence_lens.training.shortcuts import only_at
from divergence_lens.training.soft import SoftLoss
from divergence_lens.training.variables import FullRank, LowRank, Variables

# Logits of one piece that are computed at once: 128 MiB in float32.
_MOST_LOGITS = 1 << 25

OnStep = Callable[[int, float, Model], Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The options of `finetune` that concern neither data nor parameters; see there."""

    recipe: Recipe
    settings: Mapping[str, Any]
    seed: int = 0
    on_step: OnStep | None = None
    every: int = 1
    checkpoint_dir: Path | None = None
    progress: bool = False
    soft: SoftLoss | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is {self.every}; it must be at least 1")


def train(prefix: Prefix, chosen: Mapping[str, nn.Parameter], plan: Plan) -> Delta:
    """Train the chosen parameters on prepared rows.

    Args:
        prefix: The rows, and the frozen computation below the trained layers. Several students can
            share it.
        chosen: The parameters to train, by name.
        plan: Recipe, seed, checkpoints and callbacks.
    """
    model, rows, recipe = prefix.engine.model, prefix.rows, plan.recipe
    if recipe.lora_rank is not None:
        chosen = {n: p for n, p in chosen.items() if is_matrix(n, p)}
        if not chosen:
            raise ValueError("LoRA acts on the matrices of attention and MLP, and none is chosen")
    settings = {
        "trained": sorted(chosen),
        "recipe": recipe.describe(),
        "seed": plan.seed,
        "examples": len(rows),
        "tokens": rows.tokens_learned,
        **plan.settings,
    }
    if plan.soft is not None:
        settings["soft"] = plan.soft.describe()
    with reserved(model, "it is being trained"):
        base = base_fingerprint(model)
        with _training_mode(model, chosen):
            if recipe.lora_rank is None:
                variables: Variables = FullRank(chosen)
            else:
                alpha = float(recipe.lora_alpha or recipe.lora_rank)
                variables = LowRank(
                    model,
                    chosen,
                    rank=recipe.lora_rank,
                    alpha=alpha,
                    seed=plan.seed,
                    # Under autocast, autograd itself must convert between the types.
                    direct=not recipe.autocast,
                )
            run = _Run(prefix, plan, variables, f"{base} {settings}")

            def student() -> Delta:
                metadata = run_metadata(model, **settings) | {"history": run.history}
                return Delta(variables.differences(), base, metadata)

            try:
                with partial_on_interrupt("finetune", run, run.steps, "updates", student):
                    run.train()
                return student()
            finally:
                restore_values(model, variables.parameters, variables.originals)


@contextmanager
def _training_mode(model: Model, chosen: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Train only the chosen parameters, without dropout; restore modes and flags at the end."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with Trainable(model, chosen), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _history_entry(returned: Mapping[str, Any] | None) -> dict[str, Any]:
    """Convert the return value of `on_step` for the history: scalars become Python's own.

    Raises:
        TypeError: It is not a mapping, or contains values that a file cannot store. Raised at
            once, not when the trained student is saved.
    """
    if returned is None:
        return {}
    if not isinstance(returned, Mapping):
        raise TypeError(
            f"on_step returned {returned!r:.60}; return a mapping from name to number, or None"
        )
    entry = {
        str(name): value.item()
        if isinstance(value, Tensor | np.generic) and not value.ndim
        else value
        for name, value in returned.items()
    }
    for name, value in entry.items():
        if not isinstance(value, float | int | str | None):
            raise TypeError(
                f"on_step returned {name!r} as a {type(value).__name__}, which the history cannot "
                "store; return numbers or strings"
            )
    return entry


class _Run:
    """One training run: its optimizer, its history and its checkpoint."""

    def __init__(self, prefix: Prefix, plan: Plan, variables: Variables, identity: str) -> None:
        self.engine = prefix.engine
        self.rows = prefix.rows
        self.prefix = prefix
        self.plan = plan
        self.variables = variables
        self.optimizer = plan.recipe.build(variables.values)
        self.history: list[dict[str, Any]] = []
        self.lowest = lowest_layer(self.engine.model, variables.parameters) or 0
        self.checkpoint: TrainingCheckpoint | None = None
        if plan.checkpoint_dir is not None:
            digest = hashlib.sha256(f"{identity} {self.rows.digest()}".encode()).hexdigest()
            self.checkpoint = TrainingCheckpoint(plan.checkpoint_dir, digest)
        self.per_epoch = math.ceil(len(self.rows) / plan.recipe.batch_size)
        self.steps = plan.recipe.epochs * self.per_epoch

    def __len__(self) -> int:
        """Return the number of finished updates."""
        return len(self.history)

    def train(self) -> None:
        """Train to the end, from the checkpoint if there is one."""
        plan, recipe, per_epoch, steps = self.plan, self.plan.recipe, self.per_epoch, self.steps
        self.prefix.move_to(self.lowest)
        if self.checkpoint is not None:
            stored = self.checkpoint.load(self.variables.values, self.optimizer)
            self.history = [] if stored is None else stored
        self.variables.write()
        bar = tqdm(
            total=steps, initial=len(self.history), desc="student", disable=not plan.progress
        )
        with bar:
            for epoch in range(len(self.history) // per_epoch, recipe.epochs):
                order = batches(self.rows.lengths, recipe.batch_size, plan.seed, epoch)
                for batch in order[len(self.history) - epoch * per_epoch :]:
                    if self._stopped():
                        break
                    self._update(batch, epoch, steps)
                    bar.update()
                    bar.set_postfix(loss=f"{self.history[-1]['loss']:.3f}", refresh=False)
        if self.checkpoint is not None:
            self.checkpoint.delete()

    def _stopped(self) -> bool:
        """Whether `on_step` ended the training after the last update."""
        return bool(self.history and self.history[-1].get("stop"))

    def _update(self, batch: np.ndarray, epoch: int, steps: int) -> None:
        plan, recipe, done = self.plan, self.plan.recipe, len(self.history)
        rate = recipe.rate(done, steps)
        loss = self._gradients(batch)
        # The norm before clipping: the check below must see a gradient that is not finite.
        norm = torch.nn.utils.get_total_norm(
            [v.grad for v in self.variables.values if v.grad is not None]
        )
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            quantity = "gradient" if math.isfinite(loss) else "loss"
            before = f"; the last loss was {self.history[-1]['loss']:.4g}" if self.history else ""
            raise FloatingPointError(
                f"the {quantity} is not finite at step {done + 1} of {steps}{before}; use a lower "
                f"learning rate than {recipe.lr:g}, or a longer warm-up than {recipe.warmup_steps} "
                "steps"
                f"{self._last_checkpoint()}"
            )
        if recipe.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.variables.values, recipe.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        entry: dict[str, Any] = {"step": done + 1, "epoch": epoch + 1, "loss": loss, "lr": rate}
        # Ctrl-C between the three would leave parameters that the history does not describe.
        with defer_interrupts():
            self.optimizer.step()
            self.variables.write()
            self.history.append(entry)
        if plan.on_step is not None and ((done + 1) % plan.every == 0 or done + 1 == steps):
            with torch.no_grad():
                entry.update(_history_entry(plan.on_step(done + 1, loss, self.engine.model)))
        due = (done + 1) % recipe.checkpoint_every == 0 and done + 1 < steps
        if self.checkpoint is not None and due:
            self.checkpoint.save(self.variables.values, self.optimizer, self.history)

    def _last_checkpoint(self) -> str:
        """Name the last checkpoint, for an error message."""
        folder, every = self.plan.checkpoint_dir, self.plan.recipe.checkpoint_every
        saved = len(self.history) // every * every
        if folder is None or not saved:
            return ""
        return f" ({folder} holds the student after step {saved})"

    def _gradients(self, batch: np.ndarray) -> float:
        """Set the variables' gradients for one batch, piece by piece, and return its loss."""
        lengths = self.prefix.lengths
        loss_weights = self.rows.loss_weights
        # Every piece is divided by the weight of the whole batch, so that the sum over the pieces
        # is the mean over the batch, however it is cut.
        batch_weight = loss_weights[torch.from_numpy(batch).to(loss_weights.device)].sum()
        total: list[Tensor | None] = [None] * len(self.variables.leaves)
        loss = 0.0

        def piece_gradients(piece: np.ndarray) -> tuple[float, Sequence[Tensor | None]]:
            with self.variables.attached():
                value = self._loss(piece, int(lengths[piece].max())) / batch_weight
            # Not backward(): the parameters' own .grad is left alone.
            gradients = torch.autograd.grad(value, self.variables.leaves, allow_unused=True)
            return float(value.detach()), gradients

        batch_pieces = pieces(batch, lengths, self.prefix.piece_tokens)
        for value, gradients in chain.from_iterable(
            halved(piece, piece_gradients) for piece in batch_pieces
        ):
            total = [  # None for a leaf that no piece depends on
                new if old is None else old if new is None else old + new
                for old, new in zip(total, gradients, strict=True)
            ]
            loss += value
        self.variables.take(total)
        return loss

    def _loss(self, piece: np.ndarray, length: int) -> Tensor:
        """Sum the weighted losses of the learned tokens of some rows."""
        index = torch.from_numpy(piece).to(self.rows.loss_weights.device)
        columns = slice(self.prefix.shared, self.prefix.shared + length)
        loss_weights = self.rows.loss_weights[index, columns]  # [row, pos]
        learned = loss_weights > 0  # [row, pos]
        device = self.engine.device.type
        autocast = (
            torch.autocast(device, torch.bfloat16) if self.plan.recipe.autocast else nullcontext()
        )
        with autocast:
            resid, run = self.prefix.entering(piece, length)  # [row, pos, d_model]
            last = self.engine.n_layers - 1
            for layer in range(self.lowest, last + 1):
                # Nothing reads the last layer's output at positions without a loss.
                shortcut = (
                    only_at(self.engine.by_position(layer), learned)
                    if layer == last
                    else nullcontext()
                )
                with shortcut:
                    resid = self.engine.block(layer, resid, run)
            # One row of all learned positions, whatever the lengths of the rows.
            hidden = self.engine.norm(resid[learned][None])  # [1, learned, d_model]
            if self.plan.soft is not None:
                places = self.rows.places[index, columns][learned]
                return self.plan.soft(self.engine, hidden[0], places, loss_weights[learned])
            return self._cross_entropy(
                hidden, self.rows.targets[index, columns][learned], loss_weights[learned]
            )

    def _cross_entropy(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Sum the weighted cross-entropies; for many tokens, in chunks (see `cross_entropy`)."""
        engine = self.engine
        if len(targets) * engine.d_vocab > _MOST_LOGITS and engine.unembedding_frozen():
            return chunked_cross_entropy(
                lambda part: engine.unembed(part[None])[0],
                hidden[0],
                targets,
                weights,
                d_vocab=engine.d_vocab,
            )
        return weighted_cross_entropy(engine.unembed(hidden)[0], targets, weights)
