"""The training loop of a student: gradients of the chosen parameters, in place, and back again."""

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
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from divergence_lens._utils.interrupts import defer_interrupts, partial_on_interrupt
from divergence_lens._utils.memory import halved
from divergence_lens.deltas import Delta, base_fingerprint, is_matrix, reserved, restore_values
from divergence_lens.models import Model
from divergence_lens.provenance import run_metadata
from divergence_lens.training.checkpoint import load_checkpoint, save_checkpoint
from divergence_lens.training.freezing import Trainable, lowest_layer
from divergence_lens.training.prefix import Prefix
from divergence_lens.training.recipe import Recipe
from divergence_lens.training.rows import batches, pieces
from divergence_lens.training.shortcuts import only_at
from divergence_lens.training.variables import FullRank, LowRank, Variables

OnStep = Callable[[int, float, Model], Mapping[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The arguments of `finetune` that are not about data or parameters; see there."""

    recipe: Recipe
    settings: Mapping[str, Any]
    seed: int = 0
    on_step: OnStep | None = None
    every: int = 1
    checkpoint: Path | None = None
    checkpoint_every: int = 100
    progress: bool = False

    def __post_init__(self) -> None:
        if self.checkpoint is not None and self.checkpoint.is_dir():
            raise ValueError(f"checkpoint {self.checkpoint} is a folder; give the name of a file")
        for name in ("every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def train(prefix: Prefix, chosen: Mapping[str, nn.Parameter], plan: Plan) -> Delta:
    """Train the chosen parameters on prepared rows.

    Args:
        prefix: The rows, and the frozen work below them, which several students may share.
        chosen: What learns, by name.
        plan: How.
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
                    # Mixed types are left to autograd.
                    direct=not recipe.autocast,
                )
            run = _Run(prefix, plan, variables, f"{base} {settings}")

            def student() -> Delta:
                header = run_metadata(model, **settings) | {"history": run.history}
                return Delta(variables.differences(), base, header)

            try:
                with partial_on_interrupt("finetune", run, run.steps, "updates", student):
                    run.go()
                return student()
            finally:
                restore_values(model, variables.parameters, variables.originals)


@contextmanager
def _training_mode(model: Model, chosen: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Only the chosen parameters learn, and nothing is dropped out; modes and flags come back."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with Trainable(model, chosen), torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _told(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `on_step` returned, as the history holds it: numbers of NumPy and torch as Python's.

    Raises:
        TypeError: It is no mapping, or holds what a file could not; said now, not after training.
    """
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        raise TypeError(
            f"on_step returned {found!r:.60}; return a mapping from name to number, or None"
        )
    told = {
        str(name): value.item()
        if isinstance(value, Tensor | np.generic) and not value.ndim
        else value
        for name, value in found.items()
    }
    odd = [name for name, value in told.items() if not isinstance(value, float | int | str | None)]
    if odd:
        raise TypeError(
            f"on_step returned {odd[0]!r} as a {type(told[odd[0]]).__name__}, which the history "
            "cannot keep; return numbers or texts"
        )
    return told


class _Run:
    """One training run: its optimizer, how far it is, its history."""

    def __init__(self, prefix: Prefix, plan: Plan, variables: Variables, identity: str) -> None:
        self.engine = prefix.engine
        self.rows = prefix.rows
        self.prefix = prefix
        self.plan = plan
        self.variables = variables
        self.optimizer = plan.recipe.build(variables.values)
        self.history: list[dict[str, Any]] = []
        self.lowest = lowest_layer(self.engine.model, variables.parameters) or 0
        self.identity = hashlib.sha256(f"{identity} {self.rows.digest()}".encode()).hexdigest()
        self.per_epoch = math.ceil(len(self.rows) / plan.recipe.batch_size)
        self.steps = plan.recipe.epochs * self.per_epoch

    def __len__(self) -> int:
        """How many updates are done."""
        return len(self.history)

    def go(self) -> None:
        """Train to the end, from the checkpoint if there is one."""
        plan, recipe, per_epoch, steps = self.plan, self.plan.recipe, self.per_epoch, self.steps
        self.prefix.move_to(self.lowest)
        self._resume()
        self.variables.write()
        bar = tqdm(
            total=steps, initial=len(self.history), desc="student", disable=not plan.progress
        )
        with bar:
            for epoch in range(len(self.history) // per_epoch, recipe.epochs):
                order = batches(self.rows.lengths, recipe.batch_size, plan.seed, epoch)
                for batch in order[len(self.history) - epoch * per_epoch :]:
                    self._update(batch, epoch, steps)
                    bar.update()
                    bar.set_postfix(loss=f"{self.history[-1]['loss']:.3f}", refresh=False)
        if plan.checkpoint is not None:
            plan.checkpoint.unlink(missing_ok=True)

    def _update(self, batch: np.ndarray, epoch: int, steps: int) -> None:
        plan, recipe, done = self.plan, self.plan.recipe, len(self.history)
        rate = recipe.rate(done, steps)
        loss = self._gradients(batch)
        norm = torch.nn.utils.get_total_norm(
            [v.grad for v in self.variables.values if v.grad is not None]
        )
        if not (math.isfinite(loss) and bool(torch.isfinite(norm))):
            what = "gradient" if math.isfinite(loss) else "loss"
            before = f"; the last loss was {self.history[-1]['loss']:.4g}" if self.history else ""
            raise FloatingPointError(
                f"the {what} is not finite at step {done + 1} of {steps}{before}; take a smaller "
                f"learning rate than {recipe.lr:g}, or more warm-up than {recipe.warmup_steps}"
                f"{self._last_checkpoint()}"
            )
        if recipe.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.variables.values, recipe.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        entry: dict[str, Any] = {"step": done + 1, "epoch": epoch + 1, "loss": loss, "lr": rate}
        with defer_interrupts():
            self.optimizer.step()
            self.variables.write()
            self.history.append(entry)
        if plan.on_step is not None and ((done + 1) % plan.every == 0 or done + 1 == steps):
            with torch.no_grad():
                entry.update(_told(plan.on_step(done + 1, loss, self.engine.model)))
        if (
            plan.checkpoint is not None
            and (done + 1) % plan.checkpoint_every == 0
            and done + 1 < steps
        ):
            save_checkpoint(
                plan.checkpoint, self.identity, self.variables.values, self.optimizer, self.history
            )

    def _last_checkpoint(self) -> str:
        """What an error says of the last good checkpoint, which stays where it is."""
        path, every = self.plan.checkpoint, self.plan.checkpoint_every
        if path is None or not path.exists():
            return ""
        return f" ({path} holds the student after step {len(self.history) // every * every})"

    def _gradients(self, batch: np.ndarray) -> float:
        """Set the variables' gradients for one batch, piece by piece, and return its loss."""
        lengths = self.prefix.lengths
        # One learned token weighs the same in whichever piece of the batch it stands.
        whole = self.rows.weights[torch.from_numpy(batch).to(self.rows.weights.device)].sum()
        total: list[Tensor | None] = [None] * len(self.variables.leaves)
        loss = 0.0

        def run(part: np.ndarray) -> tuple[float, Sequence[Tensor | None]]:
            with self.variables.attached():
                value = self._loss(part, int(lengths[part].max())) / whole
            found = torch.autograd.grad(value, self.variables.leaves, allow_unused=True)
            return float(value.detach()), found

        parts = pieces(batch, lengths, self.prefix.piece_tokens)
        for value, found in chain.from_iterable(halved(part, run) for part in parts):
            total = [
                n if t is None else t if n is None else t + n
                for t, n in zip(total, found, strict=True)
            ]
            loss += value
        self.variables.take(total)
        return loss

    def _loss(self, part: np.ndarray, length: int) -> Tensor:
        """Weighted sum of the cross-entropies of the learned tokens of some rows."""
        index = torch.from_numpy(part).to(self.rows.weights.device)
        columns = slice(self.prefix.shared, self.prefix.shared + length)
        weights = self.rows.weights[index, columns]
        where = weights > 0
        device = self.engine.device.type
        autocast = (
            torch.autocast(device, torch.bfloat16) if self.plan.recipe.autocast else nullcontext()
        )
        free = nullcontext()
        with autocast:
            resid, run = self.prefix.entering(part, length)
            last = self.engine.n_layers - 1
            for layer in range(self.lowest, last + 1):
                with only_at(self.engine.by_position(layer), where) if layer == last else free:
                    resid = self.engine.block(layer, resid, run)
            hidden = self.engine.norm(resid[where][None])
            logits = self.engine.unembed(hidden)[0]
        losses = F.cross_entropy(
            logits.float(), self.rows.targets[index, columns][where], reduction="none"
        )
        return losses @ weights[where]

    def _resume(self) -> None:
        path = self.plan.checkpoint
        if path is not None and path.exists():
            self.history = load_checkpoint(
                path, self.identity, self.variables.values, self.optimizer
            )
