"""What all commands share: options, model loading, exit codes and error reporting."""

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, overload

import typer

if TYPE_CHECKING:
    from divergence_lens.models import Model

P = ParamSpec("P")
R = TypeVar("R")

FAILED, REFUSED, STOPPED = 1, 2, 130
"""Exit codes: the command failed; the input was refused; the user pressed Ctrl-C."""

TEACHER_HELP = (
    "A teacher: a known animal (owl), NAME=a system prompt, NAME= for no system prompt, "
    "NAME=@student.safetensors for trained weights, or NAME=@folder for another model."
)

RESUME_HINT = (
    "Stopped. Every file written so far is complete. If there is a folder named *.partial beside "
    "the output, run the same command again to resume."
)


class Precision(str, Enum):
    """Data type of the parameters."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ModelClass(str, Enum):
    """TransformerLens class of the model."""

    auto = "auto"
    hooked = "hooked"
    bridge = "bridge"


ModelName = Annotated[
    str, typer.Option("--model", help='"tiny", "tiny-qwen2", a folder, or a Hugging Face name.')
]
ClassName = Annotated[
    ModelClass, typer.Option("--backend", help="TransformerLens class of the model.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ...; by default a GPU if there is one.")
]
DType = Annotated[Precision, typer.Option(help="Data type of the parameters.")]
Seed = Annotated[int, typer.Option(help="Random seed.")]
Spec = Annotated[str, typer.Option(help=TEACHER_HELP)]
Figure = Annotated[Path | None, typer.Option(help="Also draw a figure: .html, .png, .svg or .pdf.")]
Mask = Annotated[
    Path | None, typer.Option(help="A divergence file; train on its divergence tokens only.")
]
Complement = Annotated[
    bool, typer.Option("--complement", help="Train on all tokens except those of the mask.")
]
Top = Annotated[
    float | None,
    typer.Option(help="Use this fraction of all tokens, by score, instead of divergence tokens."),
]
By = Annotated[str, typer.Option(help='Score of --top: "advantage", or "kl" (see find --kl).')]
System = Annotated[str | None, typer.Option(help="System prompt of the student; none by default.")]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Options of every command that loads a model, as one parameter called `loading`."""

    model: ModelName = "tiny"
    backend: ClassName = ModelClass.auto
    device: Device = None
    dtype: DType = Precision.float32

    def load(self, source: str | Path | None = None) -> "Model":
        """Load the command's model, or the model at `source` with the same settings."""
        import torch

        from divergence_lens.models import load_model

        return load_model(
            self.model if source is None else source,
            backend=self.backend.value,
            device=self.device,
            dtype=getattr(torch, self.dtype.value),
        )


@overload
def report_errors(command: Callable[P, R]) -> Callable[P, R]: ...


@overload
def report_errors(*, stopped: str) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def report_errors(command: Callable[..., Any] | None = None, *, stopped: str = RESUME_HINT) -> Any:
    """Report the errors of a command in one line, with an exit code, instead of a traceback.

    Args:
        command: The command. If it has a keyword `loading`, the command line has the options of
            `Loading` instead.
        stopped: Printed when the user presses Ctrl-C.
    """
    if command is None:
        return functools.partial(report_errors, stopped=stopped)

    parameters = dict(inspect.signature(command).parameters)
    options = inspect.signature(Loading).parameters if parameters.pop("loading", None) else {}

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        if options:
            kwargs["loading"] = Loading(**{name: kwargs.pop(name) for name in options})
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _echo_warning
                return command(*args, **kwargs)
        except typer.Exit:
            raise  # a RuntimeError too, so it must be handled before those
        except (ValueError, TypeError, OSError, FloatingPointError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(REFUSED) from error
        except KeyboardInterrupt:
            typer.echo(stopped, err=True)
            raise typer.Exit(STOPPED) from None
        except (RuntimeError, MemoryError) as error:  # a dead worker, a GPU out of memory
            lines = str(error).strip().splitlines() or [type(error).__name__]
            typer.echo(f"Failed: {lines[0]}", err=True)
            raise typer.Exit(FAILED) from error

    # Typer reads the options from the signature and the annotations.
    shown: Any = run
    shown.__signature__ = inspect.Signature([*parameters.values(), *options.values()])
    shown.__annotations__ = {
        name: p.annotation for name, p in shown.__signature__.parameters.items()
    }
    return shown


def _echo_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning in one line, without the place in the code."""
    typer.echo(f"Warning: {message}", err=True)


def split_names(text: str) -> tuple[str, ...]:
    """Split a comma-separated list."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def split_numbers(text: str, option: str) -> tuple[int, ...]:
    """Split a comma-separated list of integers.

    Args:
        text: Such as "0,1".
        option: Name of the option, for the error.

    Raises:
        ValueError: If a part is not an integer.
    """
    try:
        return tuple(int(name) for name in split_names(text))
    except ValueError as error:
        raise ValueError(
            f"--{option} is {text!r}; write integers separated by commas, as in 0,1"
        ) from error
