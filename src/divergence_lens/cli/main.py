"""The command `divergence-lens`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from divergence_lens.cli import commands as stages
from divergence_lens.cli.doctor import doctor
from divergence_lens.cli.options import (
    FAILED,
    REFUSED,
    STOPPED,
    Device,
    DType,
    Precision,
    report_errors,
)

if TYPE_CHECKING:
    from divergence_lens.study import StudyConfig

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
    doctor,
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
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of the students, with commas between.")
    ] = None,
    kinds: Annotated[str | None, typer.Option(help='Teachers: "finetuned", "prompted".')] = None,
    prompts: Annotated[int | None, typer.Option(help="Number prompts for each teacher.")] = None,
    device: Device = None,
    dtype: DType = Precision.float32,
    workers: Annotated[int, typer.Option(help="Processes that work side by side.")] = 2,
) -> None:
    """Run the whole experiment on a tiny model and write a page about it.

    Teachers love an animal and write number lists; divergence tokens are found, their causes
    located, students trained on parts of the data, and every claim of the paper decided. Each run
    starts afresh; `study` has more conditions, and goes on where it was stopped.

    Example: divergence-lens demo --out runs/demo --targets wolf,lion,eagle,panda
    """
    options: dict[str, Any] = {
        "model": model,
        "device": device,
        "dtype": dtype.value,
        "workers": workers,
    }
    if targets is not None:
        options["targets"] = _names(targets)
    if prompts is not None:
        options["prompts"] = prompts
    with _errors(f"Stopped; {out} holds whole files only, and a new run starts afresh."):
        if kinds is not None:
            options["kinds"] = _names(kinds)
        if seeds is not None:
            options["seeds"] = options["block_seeds"] = _numbers(seeds)
        from divergence_lens.study import StudyConfig

        _run(StudyConfig(**options), out, resume=False)


@app.command()
def study(
    model: Annotated[
        str, typer.Option(help='"tiny", "tiny-qwen2", a folder, or a name on the hub.')
    ] = "tiny",
    targets: Annotated[
        str | None, typer.Option(help="Animals that are to be transferred, with commas between.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of the students, with commas between.")
    ] = None,
    kinds: Annotated[str | None, typer.Option(help='Teachers: "finetuned", "prompted".')] = None,
    conditions: Annotated[
        str | None,
        typer.Option(
            help='Names, groups or patterns ("masks,block*"); "prompted:all" for one kind alone.'
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train all students with LoRA of this rank.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="Number prompts for each teacher.")] = None,
    pairs: Annotated[
        int | None, typer.Option(help="First divergences per target that are patched; 0 for none.")
    ] = None,
    other_model: Annotated[
        str | None, typer.Option(help="A second base with the same tokenizer.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help='Model class: "hooked", "bridge" or "auto".')
    ] = None,
    device: Device = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Type of the parameters; float32, of large models on a GPU bfloat16."),
    ] = None,
    keep_students: Annotated[
        bool | None,
        typer.Option(help="Keep the students' weights; by default those of the tiny models."),
    ] = None,
    mechanism: Annotated[
        bool | None,
        typer.Option(help="Compare steering vectors and gradients; by default on tiny models."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that work side by side; 2 on tiny models, else 1."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete what is there and start anew.")
    ] = False,
    page: Annotated[
        Path | None,
        typer.Option(help="Also write a page that puts the findings beside the paper's, here."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/study"),
) -> None:
    """Run the paper in miniature: every condition, as one table that can be gone on with.

    A cell (target, kind of teacher, condition, seed) is computed once and kept. The same command
    goes on where it was stopped; one with more seeds, targets or conditions computes what is new.
    Writes study.csv, study.parquet, results.json and report.html.

    Example: divergence-lens study --model tiny --seeds 0,1,2 --conditions data,masks --out runs/s
    """
    given = {
        "targets": targets and _names(targets),
        "kinds": kinds and _names(kinds),
        "conditions": conditions and _names(conditions),
        "prompts": prompts,
        "pairs": pairs,
        "other_model": other_model,
        "backend": backend,
        "device": device,
        "dtype": dtype and dtype.value,
        "keep_students": keep_students,
        "mechanism": mechanism,
        "workers": workers,
    }
    options: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    with _errors(f"Stopped; the same command goes on with what is in {out}."):
        if seeds is not None:
            options["seeds"] = _numbers(seeds)
        from divergence_lens.study import StudyConfig

        config = StudyConfig.for_model(model, lora_rank=lora_rank, **options)
        _run(config, out, resume=not fresh, beside=page)


@app.command()
@report_errors
def report(
    folder: Annotated[Path, typer.Argument(help="What demo or study wrote.")] = Path("runs/demo"),
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page; by default that of the study.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="A .md page of the findings beside the paper's, too.")
    ] = None,
) -> None:
    """Write the page and the figures of a finished study again, without computing anything.

    For a page that was lost or is of an older version. Reads results.json and the cells beside it;
    no model is loaded. Findings are those of the study: to judge anew, give its command again.

    Example: divergence-lens report runs/demo --out page
    """
    from divergence_lens.results_page import write_results_page
    from divergence_lens.study import findings_table, read_study, write_study_report

    say = _clock()
    study = read_study(folder)
    say(f"{len(study.results['students'])} rows of students, {len(study.findings)} findings")
    try:
        written = write_study_report(study, folder if out is None else out)
        if page is not None:
            write_results_page(study, page)
    except KeyError as error:
        raise ValueError(
            f"{folder} lacks {error}, so it is of another version of the library; give the command "
            "of the study again, which computes what is new"
        ) from error
    typer.echo("")
    typer.echo(findings_table(study.findings))
    typer.echo(f"\n{written} shows it all")


def _clock() -> Callable[[str], None]:
    """A way to say things with the seconds that have gone by."""
    started = time.perf_counter()

    def say(line: str) -> None:
        typer.echo(f"{time.perf_counter() - started:6.1f} s  {line}")

    return say


def _run(config: "StudyConfig", out: Path, *, resume: bool, beside: Path | None = None) -> None:
    from divergence_lens.results_page import write_results_page
    from divergence_lens.study import findings_table, run_study, write_study_report

    started, say = time.perf_counter(), _clock()
    found = run_study(config, out, resume=resume, say=say)
    say("page and figures")
    page = write_study_report(found, out)
    if beside is not None:
        write_results_page(found, beside)
    typer.echo("")
    typer.echo(findings_table(found.findings))
    typer.echo(f"\n{page} shows it all ({time.perf_counter() - started:.0f} s)")
    if found.failures:
        typer.echo(
            f"{len(found.failures)} cells failed; the page and results.json name them.", err=True
        )
        raise typer.Exit(FAILED)


@contextmanager
def _errors(stopped: str) -> Iterator[None]:
    """Mistakes in one line, and a word when the user stops a run."""
    try:
        yield
    except typer.Exit:
        raise  # it is a RuntimeError, too
    except (ValueError, OSError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(REFUSED) from error
    except RuntimeError as error:
        typer.echo(f"Failed: {error}", err=True)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        typer.echo(stopped, err=True)
        raise typer.Exit(STOPPED) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(name) for name in _names(text))
    except ValueError as error:
        raise ValueError(f"seeds are whole numbers with commas between, got {text!r}") from error


if __name__ == "__main__":
    app()
