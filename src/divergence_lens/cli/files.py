"""Files that commands read and write: prompts, teachers, masks, figures and checkpoints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from divergence_lens.chat import Prompt
    from divergence_lens.divergence import Divergence
    from divergence_lens.models import Model
    from divergence_lens.teachers import Teacher


@contextmanager
def checkpoint_folder(out: Path) -> Iterator[Path]:
    """Yield the folder `<out>.partial`, and delete its checkpoints once the output is written.

    If the command is stopped or fails, the folder remains, and the same command resumes from it.
    The library refuses checkpoints written with other data or settings. Other files in the folder
    are left alone.

    Args:
        out: The file that the command writes.
    """
    folder = out.with_name(f"{out.name}.partial")
    if folder.is_dir() and any(folder.iterdir()):
        typer.echo(f"Resuming from {folder}")
    yield folder
    if folder.is_dir():
        from divergence_lens._utils.checkpoints import delete_shards

        delete_shards(folder)


def read_teacher(spec: str, load: Callable[[str | Path], "Model"]) -> "Teacher":
    """Parse a teacher given on the command line.

    Args:
        spec: A known animal ("owl": a system prompt to love owls); "NAME=a system prompt"; "NAME="
            for no system prompt; "NAME=@file.safetensors" for a delta; "NAME=@folder" for another
            model.
        load: Loads another model.

    Raises:
        ValueError: If `spec` has none of these forms.
        FileNotFoundError: If there is no such file or folder.
    """
    from divergence_lens.data import animal_teachers
    from divergence_lens.deltas import Delta
    from divergence_lens.teachers import Teacher

    name, equals, value = spec.partition("=")
    if not equals:
        try:
            return animal_teachers([name])[0]
        except ValueError as error:
            raise ValueError(
                f'teacher {spec!r} is not a known animal ({error}); write "{name}=a system prompt" '
                f'or "{name}=@student.safetensors"'
            ) from error
    if not value.startswith("@"):
        return Teacher(name, system_prompt=value or None)
    path = Path(value[1:]).expanduser()
    if path.is_dir():
        return Teacher(name, model=load(path))
    if not path.is_file():
        raise FileNotFoundError(f"teacher {name!r}: there is no file or folder {value[1:]!r}")
    return Teacher(name, delta=Delta.load(path))


def read_prompts(path: Path) -> "list[Prompt]":
    """Read prompts from a text file (one per line) or from a file of examples.

    Raises:
        ValueError: If a row is not an example (see `load_examples`), or there is no prompt.
    """
    from divergence_lens.examples import load_examples

    prompts: list[Prompt]
    if path.suffix.lower() in (".jsonl", ".ndjson", ".parquet"):
        prompts = [example.prompt for example in load_examples(path)]
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} contains no prompts")
    return prompts


def read_masked_examples(
    data: Path, mask: Path | None, *, complement: bool, top: float | None, by: str
) -> tuple[Any, Any, "Divergence | None"]:
    """Read examples and the mask of the tokens to train on.

    Args:
        data: File of examples.
        mask: A divergence file, or None to train on all tokens.
        complement: Train on all tokens except those of the mask.
        top: Fraction of all tokens with the highest score, instead of the divergence tokens.
        by: The score.

    Returns:
        The examples, their mask, and the divergence, whose model is to be checked once one is
        loaded.

    Raises:
        ValueError: If `complement` or `top` has no mask, or the mask belongs to other examples.
    """
    from divergence_lens.divergence import Divergence
    from divergence_lens.examples import load_examples

    examples = load_examples(data)
    if mask is None:
        if complement or top is not None:
            option = "--complement" if complement else "--top"
            raise ValueError(f"{option} needs --mask, a divergence file")
        return examples, None, None
    divergence = Divergence.load(mask)
    # Compare prompts as text: only tokenized examples record whether their template adds thinking.
    if [str(e.prompt) for e in divergence.examples] != [str(e.prompt) for e in examples]:
        raise ValueError(f"{mask} was computed from other examples than those in {data}")
    if top is not None:
        divergence = divergence.with_mask(divergence.top(top, by=by))
    # The examples of the divergence file carry the token ids that the mask refers to.
    tokens = ~divergence.mask if complement else divergence.mask
    return divergence.examples, tokens, divergence


def write_figure(figure: "go.Figure", path: Path) -> None:
    """Write a figure to a file and print its path."""
    from divergence_lens import plots

    typer.echo(f"Figure written to {plots.save_figure(figure, path)}")
