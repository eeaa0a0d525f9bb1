"""Send the history of a training run to an experiment tracker."""

from collections.abc import Callable, Mapping
from typing import Any

from divergence_lens.models import Model
from divergence_lens.training.loop import OnStep


def log_to(
    log: Callable[..., Any],
    *,
    prefix: str = "",
    measure: Callable[[Model], Mapping[str, Any]] | None = None,
) -> OnStep:
    """Return an `on_step` for `finetune` that passes every loss on to an experiment tracker.

        run = wandb.init(project="owls")
        finetune(model, examples, on_step=log_to(run.log))

    Args:
        log: Called as `log({"loss": ...}, step=...)`: the `log` of a wandb run, of trackio, or a
            function of your own.
        prefix: Added to each name, such as "layer 3/", so that students have separate curves.
        measure: Called with the model and its current weights; the mapping that it returns is
            logged too, and added to the student's history. It runs at every logged step, so set
            `every` in `finetune` if it takes long.
    """

    def on_step(step: int, loss: float, model: Model) -> Mapping[str, Any] | None:
        measured = None if measure is None else dict(measure(model))
        values = {"loss": loss, **(measured or {})}
        log({f"{prefix}{name}": value for name, value in values.items()}, step=step)
        return measured

    return on_step
