"""Commands that train students: `finetune` one, or `sweep` over the layers."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from divergence_lens.cli.choices import Category
from divergence_lens.cli.files import (
    check_outputs,
    checkpoint_folder,
    read_masked_examples,
    write_figure,
)
from divergence_lens.cli.options import (
    By,
    Complement,
    ExamplesFile,
    Figure,
    Force,
    Loading,
    Mask,
    Seed,
    System,
    Top,
    report_errors,
    split_numbers,
)
from divergence_lens.cli.teachers import check_target


@report_errors
def finetune(
    data: ExamplesFile,
    out: Annotated[Path, typer.Option(help="Output file.")] = Path("student.safetensors"),
    mask: Mask = None,
    complement: Complement = False,
    top: Top = None,
    by: By = "advantage",
    layers: Annotated[
        str | None, typer.Option(help='Layers to train, such as "0" or "0,1"; by default all.')
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Train LoRA of this rank.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", min=0)] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per update.", min=1)] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The recipe of the paper (LoRA on Qwen2.5-7B).")
    ] = False,
    system: System = None,
    seed: Seed = 0,
    force: Force = False,
    *,
    loading: Loading,
) -> None:
    """Train a student; everything except the chosen layers stays frozen.

    If the command is stopped, run it again to resume.

    Example: divergence-lens finetune owl.jsonl --mask divergence.safetensors --layers 0
    """
    numbers = None if layers is None else split_numbers(layers, "layers")
    check_outputs(out, force=force)
    examples, tokens, divergence = read_masked_examples(
        data, mask, complement=complement, top=top, by=by
    )
    from divergence_lens.training import PAPER, Recipe
    from divergence_lens.training import finetune as train

    settings = {"lr": lr, "epochs": epochs, "batch_size": batch_size, "lora_rank": lora_rank}
    changes = {name: value for name, value in settings.items() if value is not None}
    recipe = replace(PAPER if paper else Recipe(), **changes)  # type: ignore[arg-type]
    loaded = loading.load()
    if divergence is not None:
        divergence.check_model(loaded, source=str(mask))
    with checkpoint_folder(out) as folder:
        student = train(
            loaded,
            examples,
            mask=tokens,
            layers=numbers,
            recipe=recipe,
            system_prompt=system,
            seed=seed,
            checkpoint_dir=folder,
            progress=True,
        )
        student.save(out)
    typer.echo(str(student))
    typer.echo(f"Written to {out}")


@report_errors
def sweep(
    data: ExamplesFile,
    target: Annotated[str, typer.Option(help="The candidate whose preference is measured.")],
    out: Annotated[Path, typer.Option(help="Output file.")] = Path("sweep.safetensors"),
    mask: Mask = None,
    complement: Complement = False,
    top: Top = None,
    by: By = "advantage",
    control: Annotated[
        Path | None,
        typer.Option(
            help="Examples written by a teacher without the bias, for a control student.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help='Layers to train, such as "0,1,5"; by default each.')
    ] = None,
    seeds: Annotated[
        str, typer.Option(help='Seeds, such as "0,1"; one student per layer and seed.')
    ] = "0",
    lora_rank: Annotated[int | None, typer.Option(help="Train LoRA of this rank.", min=1)] = None,
    category: Annotated[Category, typer.Option(help="Category of the candidates.")] = "animal",
    system: System = None,
    figure: Figure = None,
    force: Force = False,
    *,
    loading: Loading,
) -> None:
    """Train one student per layer, and measure the preference of each.

    Example: divergence-lens sweep owl.jsonl --target owl --mask divergence.safetensors
    """
    numbers = None if layers is None else split_numbers(layers, "layers")
    seed_numbers = split_numbers(seeds, "seeds") or (0,)
    check_target(target, category=category)
    check_outputs(out, figure=figure, force=force)
    examples, tokens, divergence = read_masked_examples(
        data, mask, complement=complement, top=top, by=by
    )
    from divergence_lens.evaluation import preference
    from divergence_lens.examples import load_examples
    from divergence_lens.training import Recipe, layer_sweep

    loaded = loading.load()
    if divergence is not None:
        divergence.check_model(loaded, source=str(mask))
    with checkpoint_folder(out) as folder:
        students = layer_sweep(
            loaded,
            examples,
            measure=lambda student: preference(
                student, target=target, category=category, system_prompt=system
            ),
            layers=numbers,
            seeds=seed_numbers,
            mask=tokens,
            recipe=Recipe(lora_rank=lora_rank),
            system_prompt=system,
            control=None if control is None else load_examples(control),
            checkpoint_dir=folder,
            progress=True,
        )
        students.save(out)
    if figure is not None:
        write_figure(students.plot(), figure)
    typer.echo(students.summary().round(4).to_string(index=False))
    typer.echo(f"Written to {out}")
