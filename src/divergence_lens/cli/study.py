"""Commands for the full experiment: `demo`, `study` and `report`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from divergence_lens.cli.choices import Backend, DataType, listed
from divergence_lens.cli.options import (
    FAILED,
    MODEL_HELP,
    Device,
    DType,
    Force,
    ModelName,
    check_device_exists,
    check_model,
    report_errors,
    split_names,
    split_numbers,
)

if TYPE_CHECKING:
    from divergence_lens.study import StudyConfig

OptionalModel = Annotated[
    str | None, typer.Option("--model", callback=check_model, help=MODEL_HELP)
]
Targets = Annotated[
    str | None, typer.Option(help="Animals whose bias is transferred, separated by commas.")
]
Seeds = Annotated[str | None, typer.Option(help="Seeds of the students, separated by commas.")]
Kinds = Annotated[
    str | None, typer.Option(help='Kinds of teachers: "finetuned", "prompted", or both.')
]
Prompts = Annotated[int | None, typer.Option(help="Number prompts per teacher.")]


@report_errors(stopped="Stopped. Every file in the folder is complete; a new run starts over.")
def demo(
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/demo"),
    model: ModelName = "tiny",
    targets: Targets = None,
    seeds: Seeds = None,
    kinds: Kinds = None,
    prompts: Prompts = None,
    device: Device = None,
    dtype: DType = "float32",
    workers: Annotated[int, typer.Option(help="Number of parallel processes.", min=1)] = 2,
    force: Force = False,
) -> None:
    """Run the whole experiment on a tiny model and write a report.

    Teachers that love an animal write number lists; the command finds the divergence tokens,
    locates their causes, trains students on parts of the data, and tests every claim of the paper.
    Each run starts over, and deletes earlier results only with --force; `study` covers more
    conditions and resumes.

    Example: divergence-lens demo --out runs/demo --targets wolf,lion,eagle,panda
    """
    if (out / "results.json").exists() and not force:
        raise ValueError(f"{out} holds a study; name another folder, or overwrite it with --force")
    options: dict[str, Any] = {
        "model": model,
        "device": device,
        "dtype": dtype,
        "workers": workers,
    }
    if targets is not None:
        options["targets"] = split_names(targets)
    if prompts is not None:
        options["prompts"] = prompts
    if kinds is not None:
        options["kinds"] = split_names(kinds)
    if seeds is not None:
        options["seeds"] = options["layer_seeds"] = split_numbers(seeds, "seeds")
    check_device_exists(device)
    from divergence_lens.study import StudyConfig

    _run(StudyConfig(**options), out, resume=False)


@report_errors(stopped="Stopped. Run the same command again to resume.")
def study(
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of settings, as printed by --print-config; other options override "
            "it.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings as YAML and exit.")
    ] = False,
    model: OptionalModel = None,
    targets: Targets = None,
    seeds: Seeds = None,
    kinds: Kinds = None,
    conditions: Annotated[
        str | None,
        typer.Option(
            help='Names, groups or patterns ("masks,layer*"); "prompted:all" for one kind only.'
        ),
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train all students with LoRA of this rank.")
    ] = None,
    prompts: Prompts = None,
    pairs: Annotated[
        int | None, typer.Option(help="First divergences to patch per target; 0 for none.")
    ] = None,
    other_model: Annotated[
        str | None, typer.Option(help="A second base model with the same tokenizer.")
    ] = None,
    backend: Annotated[
        Backend | None,
        typer.Option(
            metavar="<class>", help=f"TransformerLens class of the model: {listed(Backend)}."
        ),
    ] = None,
    device: Device = None,
    dtype: Annotated[
        DataType | None,
        typer.Option(
            metavar="<dtype>",
            help=f"Data type of the parameters: {listed(DataType)}; by default bfloat16 for a "
            "large model on a GPU, float32 otherwise.",
        ),
    ] = None,
    keep_students: Annotated[
        bool | None,
        typer.Option(help="Save the weights of the students; by default only for tiny models."),
    ] = None,
    mechanism: Annotated[
        bool | None,
        typer.Option(
            help="Compare steering vectors and gradients; by default only for tiny models."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Number of parallel processes; by default 2 for tiny models, else 1."),
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(
            help='Conditions of a paired study: "core" (the default), "further" or "all".'
        ),
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(
            help='Bias of a paired study: "animal" (the default), or the trait "risk", whose '
            "targets are reckless and careful."
        ),
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the small tables of a paired study; rows that it already has are not "
            "computed again."
        ),
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Validate `audit` instead; takes --model and --targets.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete earlier results and start over.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/study"),
) -> None:
    """Run every experiment of the paper; the study can be stopped, resumed and extended.

    A cell (target, kind of teacher, condition, seed) is computed once and stored. The same command
    resumes a stopped study; a command with more seeds, targets or conditions computes only the new
    cells. Writes study.csv, study.parquet, results.json and report.html. With --audit, it writes
    tables on data of known bias: detection, false alarms, mixtures, transfer and remedies.

    With --model smollm2, or --tier or --category and any chat model, the study is paired: every
    student is compared with a twin whose lists are by another target's teacher.

    Example: divergence-lens study --model tiny --seeds 0,1,2 --conditions data,masks --out runs/s
    """
    if audit:
        from divergence_lens.study import AuditStudyConfig, run_audit_study

        given = {} if targets is None else {"targets": split_names(targets)}
        validation = AuditStudyConfig.for_model(model or "tiny", **given)
        written = run_audit_study(validation, out, progress=_timed_progress())
        typer.echo(f"{', '.join(written)} written to {out}")
        return
    settings = {
        "model": model,
        "tier": tier,
        "category": category,
        "lora_rank": lora_rank,
        "targets": targets and split_names(targets),
        "kinds": kinds and split_names(kinds),
        "conditions": conditions and split_names(conditions),
        "seeds": None if seeds is None else split_numbers(seeds, "seeds"),
        "prompts": prompts,
        "pairs": pairs,
        "other_model": other_model,
        "backend": backend,
        "device": device,
        "dtype": dtype,
        "keep_students": keep_students,
        "mechanism": mechanism,
        "workers": workers,
    }
    options: dict[str, Any] = {k: v for k, v in settings.items() if v is not None}
    if not print_config:
        check_device_exists(device)
    from divergence_lens.study import config_to_yaml, read_config

    chosen = read_config(config, **options)
    if print_config:
        typer.echo(config_to_yaml(chosen, tier=tier), nl=False)
        return
    _run(chosen, out, resume=not fresh, tables=tables)


@report_errors
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a `demo` or `study`.")] = Path(
        "runs/demo"
    ),
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report; by default that of the study.")
    ] = None,
) -> None:
    """Write the report and figures of a finished study again.

    Reads results.json and the cells beside it; loads no model and computes nothing. The findings
    are those of the study: to judge its claims again, run the command of the study.

    Example: divergence-lens report runs/demo --out page
    """
    from divergence_lens.study import Study, findings_table, write_study_report

    progress = _timed_progress()
    loaded = Study.load(folder)
    progress(f"{len(loaded.results['students'])} student rows, {len(loaded.findings)} findings")
    try:
        written = write_study_report(loaded, folder if out is None else out)
    except KeyError as error:
        raise ValueError(
            f"{folder} lacks {error}, so it was written by another version of the library; run "
            "the command of the study again, which computes only what is missing"
        ) from error
    typer.echo("")
    typer.echo(findings_table(loaded.findings))
    typer.echo(f"\nReport written to {written}")


def _timed_progress() -> Callable[[str], None]:
    """Return a function that prints a line with the seconds elapsed."""
    started = time.perf_counter()

    def progress(line: str) -> None:
        typer.echo(f"{time.perf_counter() - started:6.1f} s  {line}")

    return progress


def _run(config: "StudyConfig", out: Path, *, resume: bool, tables: Path | None = None) -> None:
    """Run a study, write its report, and print the findings."""
    from divergence_lens.study import findings_table, run_study, write_study_report

    started, progress = time.perf_counter(), _timed_progress()
    if config.paired is not None:
        tables = out / "tables" if tables is None else tables
    finished = run_study(config, out, resume=resume, tables=tables, progress=progress)
    progress("report and figures")
    written = write_study_report(finished, out)
    typer.echo("")
    typer.echo(findings_table(finished.findings))
    result = f"Report written to {written}"
    if tables is not None:
        result += f", tables to {tables}"
    typer.echo(f"\n{result} ({time.perf_counter() - started:.0f} s)")
    if finished.failures:
        typer.echo(
            f"{len(finished.failures)} cells failed; results.json in {out} names them.",
            err=True,
        )
        raise typer.Exit(FAILED)
