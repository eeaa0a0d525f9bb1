"""Files that commands read and write: prompts, masks, results, figures and checkpoints."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from divergence_lens.chat import Prompt
    from divergence_lens.divergence import Divergence

IMAGES = (".png", ".svg", ".pdf")


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

        for part in (*folder.glob("rows-*"), folder):
            delete_shards(part)


def check_outputs(*paths: Path | None, figure: Path | None = None, force: bool) -> None:
    """Refuse outputs that exist or cannot be written, before anything is computed.

    Args:
        paths: Files that the command will write; None for none.
        figure: The figure that it will draw.
        force: Whether files that exist may be overwritten.

    Raises:
        ValueError: Names the file and the remedy.
    """
    outputs = [path for path in paths if path is not None]
    if figure is not None:
        suffix = figure.suffix.lower()
        if suffix not in {*IMAGES, ".html", ""}:
            raise ValueError(f"the figure is {figure}; its name ends in .html, .png, .svg or .pdf")
        if suffix in IMAGES and not (find_spec("kaleido") or find_spec("matplotlib")):
            raise ValueError(
                f"{figure} needs kaleido or matplotlib, and neither is installed; run pip install "
                "'divergence-lens[images]', or write .html"
            )
        outputs.append(figure if suffix in IMAGES else figure.with_suffix(".html"))
    for path in outputs:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
        if path.exists() and not force:
            raise ValueError(f"{path} exists; name another file, or overwrite it with --force")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ValueError(f"{path} cannot be written, because {folder} cannot be written to")


def result_kind(path: Path) -> str:
    """Return the kind of a saved result: effects, divergence, preference, sweep, delta, ...

    Reads the header alone, without torch.

    Raises:
        ValueError: The file was not written by this library.
    """
    with path.open("rb") as file:
        # A safetensors file begins with the length of its JSON header, in 8 bytes.
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size < path.stat().st_size else b""
    try:
        label = json.loads(json.loads(text)["__metadata__"]["divergence-lens"])
        return str(label["kind"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a result saved by divergence-lens, or is damaged"
        ) from error


def check_kind(path: Path, kind: str, *, option: str) -> None:
    """Refuse a result of another kind.

    Raises:
        ValueError: Names the option and both kinds.
    """
    stored = result_kind(path)
    if stored != kind:
        raise ValueError(f"{option} {path} holds {stored}, not {kind}")


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
    if mask is None and (complement or top is not None):
        option = "--complement" if complement else "--top"
        raise ValueError(f"{option} needs --mask, a divergence file")
    if mask is not None:
        check_kind(mask, "divergence", option="--mask")
    from divergence_lens.divergence import Divergence
    from divergence_lens.examples import load_examples

    examples = load_examples(data)
    if mask is None:
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


def column_width(panels: int) -> float:
    """Return the width in mm that suits a number of panels: that of a column, or of a page."""
    return 80 if panels == 1 else 180


def write_figure(figure: "go.Figure", path: Path, **options: Any) -> None:
    """Write a figure to a file and print its path.

    Args:
        figure: The figure.
        path: Where to write it.
        options: Of `plots.save_figure`: theme, width and resolution.

    Raises:
        RuntimeError: The figure cannot be drawn on this machine.
    """
    from divergence_lens import plots

    written = plots.save_figure(figure, path, **options)
    if not written.is_file():
        raise RuntimeError(f"the figure {written} was not written")
    typer.echo(f"Figure written to {written}")
