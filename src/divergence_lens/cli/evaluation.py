"""The command `evaluate`: measure the preference of a teacher or student, before and after."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from divergence_lens.cli.choices import Category
from divergence_lens.cli.files import check_outputs
from divergence_lens.cli.options import (
    Force,
    Loading,
    Seed,
    Spec,
    report_errors,
    split_names,
)
from divergence_lens.cli.teachers import check_target, read_teacher

if TYPE_CHECKING:
    from divergence_lens.evaluation import Preference


@report_errors
def evaluate(
    target: Annotated[str, typer.Option(help="The candidate of interest.")],
    teacher: Spec = "base=",
    category: Annotated[Category, typer.Option(help="Category of the candidates.")] = "animal",
    candidates: Annotated[
        str | None, typer.Option(help="All candidates, separated by commas.")
    ] = None,
    prefix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<text>", help="Beginning of the answer; repeat it to average over several."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Sample this many answers per question instead of exact probabilities.", min=1
        ),
    ] = None,
    anywhere: Annotated[
        bool,
        typer.Option("--anywhere", help="Count mentions anywhere in a sampled answer."),
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum tokens of a sampled answer.", min=1)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write the teacher's preference to a file.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    *,
    loading: Loading,
) -> None:
    """Measure the preference: the probability of each candidate as the favorite.

    A teacher is measured after the model without its system prompt or training, and the difference
    is shown.

    Example: divergence-lens evaluate --target owl --teacher student=@student.safetensors
    """
    names = None if candidates is None else split_names(candidates)
    check_target(target, category=category, candidates=names)
    if samples is None and (anywhere or max_new_tokens is not None):
        raise ValueError(
            "--anywhere and --max-new-tokens are for sampled answers; give --samples N"
        )
    check_outputs(out, force=force)
    from divergence_lens.evaluation import SampledAnswers, preference

    sampled = None
    if samples is not None:
        sampled = SampledAnswers(
            samples=samples,
            mention="anywhere" if anywhere else "start",
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
    options: dict[str, Any] = {
        "target": target,
        "category": category,
        "candidates": None if names is None else list(names),
        "prefix": prefix or "",
        "sampled": sampled,
        "progress": True,
    }
    model = loading.load()
    measured = read_teacher(teacher, loading.load)
    base = (None, None, None)
    changed = (measured.system_prompt, measured.delta, measured.model) != base
    before = preference(model, **options) if changed else None
    after = preference(model, teacher=measured, **options)
    if out is not None:
        after.save(out)
    if before is not None:
        typer.echo(f"before: {before}")
    typer.echo(f"after:  {after}" if before else str(after))
    _print_candidates(before, after)


def _print_candidates(before: "Preference | None", after: "Preference") -> None:
    """Print one line per candidate, the largest probability first."""
    if before is not None:
        typer.echo(f"\n  {'':12} {'before':>7} {'after':>7} {'change':>8}")
    for name, share in sorted(after.distribution.items(), key=lambda item: -item[1]):
        if before is None:
            typer.echo(f"  {name:12} {share:.4f}")
        else:
            earlier = before.distribution[name]
            typer.echo(f"  {name:12} {earlier:7.4f} {share:7.4f} {share - earlier:+8.4f}")
