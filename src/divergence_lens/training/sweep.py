"""Train the same student once per layer, and measure each.

Schrodi et al. (arXiv 2509.23886) train each layer alone: if one early layer is enough to transfer
the bias, the bias passes through that layer.

1. Measure the base.
2. Train the reference students, which learn in all layers.
3. Train one student per layer and seed. The residuals that enter a layer are computed from those
   that enter the layer below, once for all seeds.
4. Train the control students, which learn in all layers from control data.
5. Apply each student to the model and call `measure(model)`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from divergence_lens._utils.interrupts import convert_partial, discard_partial
from divergence_lens._utils.validation import refuse_one_number
from divergence_lens.deltas import base_fingerprint
from divergence_lens.engine import get_engine
from divergence_lens.evaluation import Preference
from divergence_lens.models import Model
from divergence_lens.provenance import run_metadata
from divergence_lens.training.loop import Plan, train
from divergence_lens.training.prefix import Prefix
from divergence_lens.training.recipe import Recipe, as_recipe
from divergence_lens.training.rows import TrainingRows, training_rows
from divergence_lens.training.sweep_result import Sweep, SweepStudent, Values
from divergence_lens.training.sweep_students import Job, Students

Measure = Callable[[Model], float | Mapping[str, float] | Preference]


@torch.inference_mode(mode=False)
def layer_sweep(
    model: Model,
    examples: object,
    *,
    measure: Measure,
    layers: Iterable[int] | None = None,
    recipe: Recipe | None = None,
    seeds: Sequence[int] = (0,),
    mask: object = None,
    control: object = None,
    system_prompt: str | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    accelerator: object = None,
    progress: bool = False,
) -> Sweep:
    """Train one student per layer and seed, and measure each.

    ```python
    sweep = layer_sweep(model, examples, measure=lambda m: preference(m, target="owl"))
    ```

    Students that learn in all layers are trained as a reference.

    Args:
        model: The base. It is restored bit for bit.
        examples: Prompts with completions, in any form that `load_examples` reads.
        measure: Called with the base once, and then with each student (the same model object, with
            the student's weights). It returns a number, several named numbers, or a `Preference`,
            and must return the same for the same weights. The first name is the one that is
            plotted.
        layers: Layers to train; None means each.
        recipe: How to train; `Recipe()` by default.
        seeds: One student per layer and seed.
        mask: Completion tokens to learn, as in `finetune`.
        control: Examples that no biased teacher wrote (the base's own, for example). The control
            students learn all of their tokens, in all layers.
        system_prompt: System prompt of the students during training.
        checkpoint_dir: A folder for this sweep alone. It stores the values of each finished
            student. The same call, repeated after an interruption, trains only the remaining
            students and returns the same bits.
        accelerator: An `accelerate.Accelerator` or `accelerate.PartialState`. Its processes share
            the students, and each returns the complete sweep. Needs a `checkpoint_dir` that all
            processes see; all must make the same call.
        progress: Show a progress bar in the first process.

    Returns:
        The measured values of the base and of every student.

    Raises:
        Interrupted: The call was interrupted; `partial` is a sweep of the finished students.
        TypeError: `measure` is not callable, or returns something else.
        ValueError: No layers or seeds; an accelerator without `checkpoint_dir`; a `checkpoint_dir`
            that is damaged or belongs to another sweep; or what `finetune` refuses.
    """
    refuse_one_number(layers, "layers")
    refuse_one_number(seeds, "seeds")
    if not callable(measure):
        raise TypeError(
            f"measure is {measure!r:.60}; give a function of the model, such as "
            'measure=lambda model: preference(model, target="owl")'
        )
    engine = get_engine(model)
    chosen_layers = range(engine.n_layers) if layers is None else sorted(set(layers))
    if not chosen_layers or not seeds:
        raise ValueError("a sweep needs at least one layer and one seed")
    for layer in chosen_layers:
        engine.check_layer(layer)
    recipe = as_recipe(recipe)
    _check_recipe(recipe)
    settings = {
        "system_prompt": system_prompt,
        "masked": mask is not None,
        "weighted": False,
    }
    # The references come first, because the shared residuals then move up from layer to layer.
    jobs = [Job("all", None, seed) for seed in seeds]
    jobs += [Job("layer", layer, seed) for layer in chosen_layers for seed in seeds]
    rows = training_rows(
        model, examples, mask=mask, system_prompt=system_prompt, whole_turn=recipe.whole_turn
    )
    work = [(rows, jobs)]
    if control is not None:
        rows = training_rows(
            model, control, system_prompt=system_prompt, whole_turn=recipe.whole_turn
        )
        work.append((rows, [Job("control", None, seed) for seed in seeds]))

    with discard_partial():
        measured = measure(model)
    base = Values.of(measured)
    metadata = run_metadata(
        model,
        **settings,
        target=measured.target if isinstance(measured, Preference) else None,
        layers=list(chosen_layers),
        seeds=list(seeds),
        recipe=recipe.describe(),
    )

    def identity() -> list[object]:
        # A function has no identity of its own: two measures differ if they differ on the base.
        arrays = {name: values.tolist() for name, values in base.items()}
        every_job = [job for _, own_jobs in work for job in own_jobs]
        digests = [rows.digest() for rows, _ in work]
        return [base_fingerprint(model), digests, metadata, every_job, arrays]

    def measured_students(rows: TrainingRows, jobs: Sequence[Job]) -> Iterator[Values]:
        limits = {"cache_bytes": recipe.cache_bytes, "batch_tokens": recipe.batch_tokens}
        # Layers ascend over the jobs, so the prefix moves up and no layer below is run twice.
        with Prefix(engine, rows, **limits) as prefix:
            for job in jobs:
                chosen = recipe.choose(model, None if job.layer is None else [job.layer])
                delta = train(prefix, chosen, Plan(recipe=recipe, settings=settings, seed=job.seed))
                with delta.applied(model), discard_partial():
                    values = Values.of(measure(model))
                if values.keys() != base.keys():
                    raise ValueError(
                        f"measure returned {list(values)} for a student and {list(base)} for the "
                        "base; return the same names each time"
                    )
                yield values

    def sweep(finished: Iterable[tuple[Job, Values]]) -> Sweep:
        students = tuple(SweepStudent(*job, values) for job, values in finished)
        return Sweep(base, students, metadata)

    shared = Students(checkpoint_dir, accelerator, identity)
    with convert_partial(sweep):
        return sweep(shared.run(work, measured_students, progress=progress))


def _check_recipe(recipe: Recipe) -> None:
    if recipe.embedding or recipe.unembedding or recipe.pattern:
        raise ValueError(
            "a sweep trains one layer at a time; leave embedding, unembedding and pattern out of "
            "its recipe"
        )
