"""What all commands share: options, model loading, exit codes and error reporting."""

import functools
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, overload

import typer

from divergence_lens.cli.choices import Backend, DataType, Score, listed
from divergence_lens.cli.interrupts import STOPPED, Running
from divergence_lens.cli.teachers import TEACHER_HELP, check_teachers

if TYPE_CHECKING:
    from divergence_lens.models import Model

P = ParamSpec("P")
R = TypeVar("R")

FAILED, REFUSED = 1, 2
"""Exit codes: the command failed; the input was refused. (Ctrl-C: `STOPPED`.)"""

BIASED, INCONCLUSIVE = 3, 4
"""Further exit codes of `audit`; 0 means that nothing was found."""

RESUME_HINT = (
    "Stopped. Every file written so far is complete. If there is a folder named *.partial beside "
    "the output, run the same command again to resume."
)


def check_model(name: str | None) -> str | None:
    """Refuse a folder or a file that does not exist; a name on the hub is looked up later."""
    if name is None or Path(name).expanduser().exists():
        return name
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not name.endswith(".gguf"):
        return name
    raise typer.BadParameter(f"there is no file or folder {name!r}, and it is no name of a model")


def _check_device(name: str | None) -> str | None:
    """Refuse the name of no device; whether the machine has it is checked with torch."""
    if name is None or re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        return name
    raise typer.BadParameter(f"{name!r} is no device; write cpu, cuda, cuda:1 or mps")


MODEL_HELP = '"tiny", "tiny-qwen2", "smollm2", a folder, a .gguf file, or a Hugging Face name.'
ModelName = Annotated[str, typer.Option("--model", callback=check_model, help=MODEL_HELP)]
ClassName = Annotated[
    Backend,
    typer.Option(
        "--backend",
        metavar="<class>",
        help=f"TransformerLens class of the model: {listed(Backend)}.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        callback=_check_device,
        help="cpu, cuda, cuda:1, ...; by default a GPU if there is one.",
    ),
]
DType = Annotated[
    DataType,
    typer.Option(metavar="<dtype>", help=f"Data type of the parameters: {listed(DataType)}."),
]
Seed = Annotated[int, typer.Option(help="Random seed.", min=0)]
Spec = Annotated[str, typer.Option(callback=check_teachers, help=TEACHER_HELP)]
Figure = Annotated[Path | None, typer.Option(help="Also draw a figure: .html, .png, .svg or .pdf.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]
Mask = Annotated[
    Path | None,
    typer.Option(
        help="A divergence file; train on its divergence tokens only.", exists=True, dir_okay=False
    ),
]
Complement = Annotated[
    bool, typer.Option("--complement", help="Train on all tokens except those of the mask.")
]
Top = Annotated[
    float | None,
    typer.Option(
        help="Use this fraction of all tokens, by score, instead of divergence tokens.",
        min=0,
        max=1,
    ),
]
By = Annotated[Score, typer.Option(help="Score of --top; for kl see find --kl.")]
System = Annotated[str | None, typer.Option(help="System prompt of the student; none by default.")]
ExamplesFile = Annotated[
    Path, typer.Argument(help="Examples: .jsonl or .parquet.", exists=True, dir_okay=False)
]


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Options of every command that loads a model, as one parameter called `loading`."""

    model: ModelName = "tiny"
    backend: ClassName = "auto"
    device: Device = None
    dtype: DType = "float32"

    def load(self, source: str | Path | None = None) -> "Model":
        """Load the command's model, or the model at `source` with the same settings."""
        import torch

        from divergence_lens.models import load_model

        return load_model(
            self.model if source is None else source,
            backend=self.backend,
            device=self.device,
            dtype=getattr(torch, self.dtype),
        )


def check_device_exists(device: str | None) -> None:
    """Refuse a GPU that PyTorch does not see, before TransformerLens is imported.

    Raises:
        ValueError: Names the devices of this machine.
    """
    if device is None or device == "cpu":
        return
    import torch

    kind, _, index = device.partition(":")
    if kind == "mps":
        available = torch.backends.mps.is_available()
    else:
        available = int(index or 0) < torch.cuda.device_count()
    if not available:
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ValueError(
            f"--device is {device!r}, which PyTorch {torch.__version__} does not see on this "
            f"machine; it has {', '.join(['cpu', *gpus])}"
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
            with Running(stopped), warnings.catch_warnings():
                warnings.showwarning = _echo_warning
                if options:  # before the command imports more than torch
                    check_device_exists(kwargs["loading"].device)
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
