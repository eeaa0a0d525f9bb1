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
    method: Annotated[
        str, typer.Option(help='"exact" for probabilities, "sampled" for sampled answers.')
    ] = "exact",
    samples: Annotated[int, typer.Option(help="Samples per question.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Also write the preference to a file.")] = None,
    seed: Seed = 0,
    *,
    loading: Loading,
) -> None:
    """Measure the preference: the probability of each candidate as the favorite.

    Example: divergence-lens evaluate --target owl --teacher student=@student.safetensors
    """
    from divergence_lens.evaluation import preference

    result = preference(
        loading.load(),
        target=target,
        category=category,
        candidates=None if candidates is None else list(split_names(candidates)),
        prefix=prefix or "",
        teacher=read_teacher(teacher, loading.load),
        method=method,
        samples=samples,
        seed=seed,
        progress=True,
    )
    if out is not None:
        result.save(out)
    typer.echo(str(result))
    for name, share in sorted(result.distribution.items(), key=lambda item: -item[1]):
        typer.echo(f"  {name:12} {share:.4f}")
