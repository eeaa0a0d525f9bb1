"""The command `divergence-lens`, assembled from the groups of commands."""

from collections.abc import Callable
from typing import Annotated

import typer

from divergence_lens import __version__
from divergence_lens.cli.auditing import audit
from divergence_lens.cli.data import find, generate
from divergence_lens.cli.doctor import doctor
from divergence_lens.cli.evaluation import evaluate
from divergence_lens.cli.patching import patch
from divergence_lens.cli.plotting import plot
from divergence_lens.cli.study import demo, report, study
from divergence_lens.cli.training import finetune, sweep

COMMANDS: tuple[Callable[..., None], ...] = (
    *(generate, find, patch, finetune, sweep, evaluate, plot, audit),  # one step each, file to file
    *(demo, study, report),  # the whole experiment
    doctor,
)


def _reflowed(text: str) -> str:
    """Join the lines of each paragraph, which Typer would print as they are in the source."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


app = typer.Typer(
    help="Find divergence tokens, the layers that cause them, and the layer that carries a bias.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in COMMANDS:
    app.command(help=_reflowed(command.__doc__ or ""))(command)


def _print_version(requested: bool) -> bool:
    if requested:
        typer.echo(f"divergence-lens {__version__}")
        raise typer.Exit
    return requested


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Find divergence tokens, the layers that cause them, and the layer that carries a bias."""
