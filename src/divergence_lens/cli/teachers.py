"""Teachers on the command line: checked while options are parsed, and loaded by the commands."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from divergence_lens.cli.choices import CANDIDATES

if TYPE_CHECKING:
    from divergence_lens.models import Model
    from divergence_lens.teachers import Teacher

Value = TypeVar("Value", str, list[str], None)

TEACHER_HELP = (
    "A teacher: a known animal (owl), NAME=a system prompt, NAME= for no system prompt, "
    "NAME=@FILE for a trained student, or NAME=@FOLDER for another model."
)


def check_teachers(value: Value) -> Value:
    """Check an option that names a teacher, or several; a callback of typer."""
    try:
        specs: Sequence[str] = [value] if isinstance(value, str) else value or ()
        for spec in specs:
            _parts(spec)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return value


def read_teacher(spec: str, load: Callable[[str | Path], "Model"]) -> "Teacher":
    """Load a teacher given on the command line.

    Args:
        spec: A known animal ("owl": a system prompt to love owls); "NAME=a system prompt"; "NAME="
            for no system prompt; "NAME=@file.safetensors" for a delta; "NAME=@folder" for another
            model.
        load: Loads another model.

    Raises:
        ValueError: If `spec` has none of these forms, or there is no such file or folder.
    """
    name, prompt, path = _parts(spec)
    from divergence_lens.data import animal_teachers
    from divergence_lens.deltas import Delta
    from divergence_lens.teachers import Teacher

    if path is not None:
        if path.is_dir():
            return Teacher(name, model=load(path))
        return Teacher(name, delta=Delta.load(path))
    if prompt is None:
        return animal_teachers([name])[0]
    return Teacher(name, system_prompt=prompt or None)


def check_target(target: str, *, category: str, candidates: tuple[str, ...] | None = None) -> None:
    """Refuse a target that is no candidate.

    Raises:
        ValueError: Names the candidates and the nearest ones.
    """
    known = CANDIDATES[category] if candidates is None else candidates
    if target.strip().casefold() not in {name.casefold() for name in known}:
        raise ValueError(
            f"{target!r} is no {category} among the candidates{_nearest(target, known)}; they are "
            f"{', '.join(known)}; name others with --candidates"
        )


def _parts(spec: str) -> tuple[str, str | None, Path | None]:
    """Split a teacher into its name, its system prompt and its file or folder.

    An animal has neither of the last two.
    """
    name, equals, value = spec.partition("=")
    if not equals:
        animals = CANDIDATES["animal"]
        if name.strip().casefold() not in animals:
            raise ValueError(
                f"teacher {spec!r} is not a known animal{_nearest(name, animals)}; write "
                f'"{name}=a system prompt" or "{name}=@student.safetensors"'
            )
        return name, None, None
    if not value.startswith("@"):
        return name, value, None
    path = Path(value[1:]).expanduser()
    if not path.exists():
        raise ValueError(f"teacher {name!r}: there is no file or folder {value[1:]!r}")
    return name, None, path


def _nearest(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name.strip().casefold(), known, n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
