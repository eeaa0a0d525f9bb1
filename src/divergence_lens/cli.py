"""The command `divergence-lens`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from divergence_lens import stages

app = typer.Typer(
    help="Find divergence tokens, the layers that cause them, and the block that carries a bias.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


for stage in (
    stages.generate,
    stages.find,
    stages.patch,
    stages.finetune,
    stages.sweep,
    stages.evaluate,
    stages.doctor,
):
    app.command()(stage)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/demo"),
    model: Annotated[
        str, typer.Option(help='"tiny", "tiny-qwen2", a folder, or a name on the hub.')
    ] = "tiny",
    targets: Annotated[
        str | None, typer.Option(help="Animals that are to be transferred, with commas between.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Number prompts for each teacher.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that work side by side.")] = 2,
) -> None:
    """Run the whole experiment on a tiny model and write a page about it.

    Teachers love an animal and write number lists; divergence tokens are found, their causes
    located, students trained on parts of the data, and every claim of the paper decided.

    Example: divergence-lens demo --out runs/demo --targets wolf,lion,eagle,panda
    """
    from divergence_lens.study import StudyConfig, run_study
    from divergence_lens.study_report import findings_table, write_study_report

    started = time.perf_counter()

    def say(line: str) -> None:
        typer.echo(f"{time.perf_counter() - started:6.1f} s  {line}")

    options: dict[str, object] = {"model": model, "workers": workers}
    if targets is not None:
        options["targets"] = tuple(name.strip() for name in targets.split(","))
    if prompts is not None:
        options["prompts"] = prompts
    try:
        config = StudyConfig(**options)  # type: ignore[arg-type]
        study = run_study(config, out, say=say)
        say("page and figures")
        page = write_study_report(study, out)
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        typer.echo(f"Stopped; {out} holds whole files only, and a new run starts afresh.", err=True)
        raise typer.Exit(130) from None
    typer.echo("")
    typer.echo(findings_table(study.findings))
    typer.echo(f"\n{page} shows it all ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    app()
