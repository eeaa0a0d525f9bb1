"""The command `evaluate`: measure the preference of a teacher or student."""

from pathlib import Path
from typing import Annotated

import typer

from divergence_lens.cli.files import read_teacher
from divergence_lens.cli.options import (
    Loading,
    Seed,
    Spec,
    report_errors,
    split_names,
)


@report_errors
def evaluate(
    target: Annotated[str, typer.Option(help="The candidate of interest.")],
    teacher: Spec = "base=",
    category: Annotated[
        str, typer.Option(help="Category of the candidates: animal or tree.")
    ] = "animal",
    candidates: Annotated[
        str | None, typer.Option(help="All candidates, separated by commas.")
    ] = None,
    prefix: Annotated[
        list[str] | None,
        typer.Option(help="Beginning of the answer; repeat it to average over several."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Sample this many answers per question instead of exact probabilities."),
    ] = None,
    anywhere: Annotated[
        bool,
        typer.Option("--anywhere", help="Count mentions anywhere in a sampled answer."),
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum tokens of a sampled answer.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the preference to a file.")] = None,
    seed: Seed = 0,
    *,
    loading: Loading,
) -> None:
    """Measure the preference: the probability of each candidate as the favorite.

    Example: divergence-lens evaluate --target owl --teacher student=@student.safetensors
    """
    from divergence_lens.evaluation import SampledAnswers, preference

    if samples is None and (anywhere or max_new_tokens is not None):
        raise ValueError(
            "--anywhere and --max-new-tokens are for sampled answers; give --samples N"
        )
    sampled = None
    if samples is not None:
        sampled = SampledAnswers(
            samples=samples,
            mention="anywhere" if anywhere else "start",
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
    result = preference(
        loading.load(),
        target=target,
        category=category,
        candidates=None if candidates is None else list(split_names(candidates)),
        prefix=prefix or "",
        teacher=read_teacher(teacher, loading.load),
        sampled=sampled,
        progress=True,
    )
    if out is not None:
        result.save(out)
    typer.echo(str(result))
    for name, share in sorted(result.distribution.items(), key=lambda item: -item[1]):
        typer.echo(f"  {name:12} {share:.4f}")
