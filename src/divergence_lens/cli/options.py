"""What the commands have in common: options, teachers in a word, exit codes."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    from divergence_lens.models import Model
    from divergence_lens.teachers import Teacher

P = ParamSpec("P")
R = TypeVar("R")

FAILED, REFUSED, STOPPED = 1, 2, 130
"""Exit codes: something did not work; the input was refused; stopped by Ctrl-C."""

TEACHER_HELP = (
    "Who: a known animal (owl), NAME=a system prompt, NAME= for none, NAME=@student.safetensors "
    "for trained weights, or NAME=@folder for another model."
)


class Precision(str, Enum):
    """Type of the parameters."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ModelClass(str, Enum):
    """Which class of TransformerLens holds the model."""

    auto = "auto"
    hooked = "hooked"
    bridge = "bridge"


ModelName = Annotated[
    str, typer.Option("--model", help='"tiny", "tiny-qwen2", a folder, or a name on the hub.')
]
ClassName = Annotated[ModelClass, typer.Option("--backend", help="Which class of TransformerLens.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")]
DType = Annotated[Precision, typer.Option(help="Type of the parameters.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random in this step.")]
Spec = Annotated[str, typer.Option(help=TEACHER_HELP)]
Figure = Annotated[
    Path | None, typer.Option(help="Draw it, too: an .html page, or a .png, .svg or .pdf.")
]
Mask = Annotated[
    Path | None, typer.Option(help="A divergence file; only its divergence tokens are learnt.")
]
Complement = Annotated[
    bool, typer.Option("--complement", help="Learn all tokens but the divergence tokens.")
]
System = Annotated[str | None, typer.Option(help="The student's system prompt; none if not given.")]


def report_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Let a command end with one line and an exit code where it would end with a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except typer.Exit:
            raise  # it is a RuntimeError, too
        except (ValueError, TypeError, OSError, FloatingPointError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(REFUSED) from error
        except KeyboardInterrupt:
            typer.echo(
                "Stopped; every file that was written is whole. Where a folder .partial lies "
                "beside the output, the same command goes on from it.",
                err=True,
            )
            raise typer.Exit(STOPPED) from None
        except (RuntimeError, MemoryError) as error:  # a process that died, a device without memory
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            typer.echo(f"Failed: {first}", err=True)
            raise typer.Exit(FAILED) from error

    return run


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the models of one command are loaded."""

    model: str
    backend: ModelClass
    device: str | None
    dtype: Precision

    def load(self, source: str | Path | None = None) -> "Model":
        """The command's model, or another one in the same way."""
        import torch

        from divergence_lens.models import load_model

        return load_model(
            self.model if source is None else source,
            backend=self.backend.value,
            device=self.device,
            dtype=getattr(torch, self.dtype.value),
        )


def read_teacher(spec: str, load: Callable[[str | Path], "Model"]) -> "Teacher":
    """The teacher that a word on the command line stands for.

    Args:
        spec: A known animal ("owl": told to love owls); "NAME=a system prompt"; "NAME=" for no
            system prompt; "NAME=@file.safetensors" for a delta; "NAME=@folder" for another model.
        load: Loads another model.

    Raises:
        ValueError: It is none of these.
        FileNotFoundError: There is no such file or folder.
    """
    from divergence_lens.data import animal_teachers
    from divergence_lens.deltas import Delta
    from divergence_lens.teachers import Teacher

    name, given, value = spec.partition("=")
    if not given:
        try:
            return animal_teachers([name])[0]
        except ValueError as error:
            raise ValueError(
                f'teacher {spec!r} is not a known animal ({error}); write "{name}=a system prompt" '
                f'or "{name}=@student.safetensors"'
            ) from error
    if not value.startswith("@"):
        return Teacher(name, system_prompt=value or None)
    path = teacher_path(spec)
    if path.is_dir():
        return Teacher(name, model=load(path))
    if not path.is_file():
        raise FileNotFoundError(f"teacher {name!r}: there is no file or folder {value[1:]!r}")
    return Teacher(name, delta=Delta.load(path))


def teacher_path(spec: str) -> Path:
    """The file or folder in a teacher's word."""
    return Path(spec.partition("=@")[2]).expanduser()


def read_prompts(path: Path) -> list[str]:
    """Prompts from a text file (one a line) or from JSON lines (`prompt` or `question`).

    Raises:
        ValueError: A line that is no JSON object with such a key, by its number; or no prompt.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix != ".jsonl":
        prompts = [line for line in lines if line.strip()]
    else:
        prompts = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if row is None:
                continue
            text = (row.get("prompt") or row.get("question")) if isinstance(row, dict) else None
            if not text or type(text) is not str:
                raise ValueError(f'{path}, line {number} has no text under "prompt" or "question"')
            prompts.append(text)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts
