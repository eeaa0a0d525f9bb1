"""Commands for data: `generate` completions and `find` their divergence tokens."""

from pathlib import Path
from typing import Annotated, cast

import typer

from divergence_lens.cli.files import check_outputs, checkpoint_folder, read_prompts, write_figure
from divergence_lens.cli.options import (
    By,
    ExamplesFile,
    Figure,
    Force,
    Loading,
    Seed,
    Spec,
    Top,
    report_errors,
)
from divergence_lens.cli.teachers import check_teachers, read_teacher


@report_errors
def generate(
    prompts: Annotated[
        Path | None,
        typer.Argument(
            help='File of prompts: one per line, or .jsonl with the key "prompt".',
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Output file (.jsonl).")] = Path("data.jsonl"),
    teacher: Spec = "base=",
    numbers: Annotated[
        int, typer.Option(help="Use this many number prompts instead of a file of prompts.", min=0)
    ] = 0,
    instructions: Annotated[
        bool,
        typer.Option(help="State in the number prompts how many numbers to give, and the format."),
    ] = False,
    only_numbers: Annotated[
        bool, typer.Option("--only-numbers", help="Drop completions that are not number lists.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 is greedy.", min=0)
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Probability mass to sample from.", min=0, max=1)
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Maximum tokens per completion.", min=1)] = 64,
    pattern: Annotated[
        str | None,
        typer.Option(help="Regular expression that each completion must match as a whole."),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    *,
    loading: Loading,
) -> None:
    """Generate completions with a teacher.

    Example: divergence-lens generate --numbers 200 --teacher owl --only-numbers --out owl.jsonl
    """
    if (prompts is None) == (numbers == 0):
        raise ValueError("give either a file of prompts or --numbers N")
    check_outputs(out, force=force)
    from divergence_lens.data import NumberFilter, number_prompts
    from divergence_lens.examples import save_examples
    from divergence_lens.generation import generate as generate_examples

    texts = (
        number_prompts(numbers, seed=seed, instructions=instructions)
        if prompts is None
        else read_prompts(prompts)
    )
    loaded = loading.load()
    with checkpoint_folder(out) as folder:
        examples = generate_examples(
            loaded,
            texts,
            teacher=read_teacher(teacher, loading.load),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            pattern=pattern,
            seed=seed,
            checkpoint_dir=folder,
            progress=True,
        )
        if only_numbers:
            report = NumberFilter().report([example.completion or "" for example in examples])
            examples = report.select(examples)
            typer.echo(str(report))
            if not examples:
                raise ValueError("no completion is a list of numbers; nothing was written")
        save_examples(out, examples)
    typer.echo(f"{len(examples)} examples written to {out}")


@report_errors
def find(
    data: ExamplesFile,
    teacher: Spec,
    counterfactual: Annotated[
        list[str],
        typer.Option(
            metavar="<teacher>",
            callback=check_teachers,
            help="A teacher to compare with, written like --teacher; may be repeated.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Output file.")] = Path("divergence.safetensors"),
    rule: Annotated[
        str,
        typer.Option(
            help='How many counterfactual teachers must differ: "any", "all", or a number.'
        ),
    ] = "any",
    min_margin: Annotated[
        float,
        typer.Option(help="Ignore differences whose argmax has a smaller margin than this.", min=0),
    ] = 0.0,
    pattern: Annotated[
        str | None,
        typer.Option(help="The pattern of generate: compare only the tokens that it allows."),
    ] = None,
    kl: Annotated[
        bool, typer.Option("--kl", help="Also compute the KL divergence at every token.")
    ] = False,
    top: Top = None,
    by: By = "advantage",
    jsonl: Annotated[
        Path | None,
        typer.Option(help="Also write prompt, completion and decision_points as JSON lines."),
    ] = None,
    figure: Figure = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens per forward pass; by default few on a CPU, many on a GPU.", min=1
        ),
    ] = None,
    force: Force = False,
    *,
    loading: Loading,
) -> None:
    """Find the divergence tokens of examples.

    Example: divergence-lens find owl.jsonl --teacher owl --counterfactual cat --counterfactual wolf
    """
    names = [spec.partition("=")[0] for spec in (teacher, *counterfactual)]
    if len(set(names)) < len(names):
        raise ValueError(f"the teachers are {', '.join(names)}; give each another name")
    if rule not in ("any", "all") and not (rule.isdigit() and 1 <= int(rule) < len(names)):
        raise ValueError(
            f'--rule is {rule!r}; write "any", "all", or a number of counterfactual teachers, 1 to '
            f"{len(names) - 1}"
        )
    check_outputs(out, jsonl, figure=figure, force=force)
    from divergence_lens.divergence import Rule, find_divergence
    from divergence_lens.examples import load_examples

    examples = load_examples(data)
    loaded = loading.load()
    with checkpoint_folder(out) as folder:
        divergence = find_divergence(
            loaded,
            examples,
            teacher=read_teacher(teacher, loading.load),
            counterfactuals=[read_teacher(spec, loading.load) for spec in counterfactual],
            rule=int(rule) if rule.isdigit() else cast("Rule", rule),
            min_margin=min_margin,
            kl=kl or by == "kl",
            pattern=pattern,
            batch_tokens=batch_tokens,
            checkpoint_dir=folder,
            progress=True,
        )
        if top is not None:
            divergence = divergence.with_mask(divergence.top(top, by=by))
        divergence.save(out)
    if jsonl is not None:
        divergence.to_jsonl(jsonl)
    if figure is not None:
        from divergence_lens import plots

        write_figure(plots.rate_per_teacher(divergence), figure)
    typer.echo(str(divergence))
    typer.echo(f"Written to {out}")
