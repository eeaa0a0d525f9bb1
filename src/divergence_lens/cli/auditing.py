"""The command `audit`: which hidden bias a data set would transfer, with an exit code."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from divergence_lens.cli.choices import CANDIDATES
from divergence_lens.cli.files import check_outputs, checkpoint_folder
from divergence_lens.cli.options import (
    BIASED,
    INCONCLUSIVE,
    Force,
    Loading,
    Seed,
    report_errors,
    split_names,
)

_OPTIONS = "alpha|category|share|temperature"


@report_errors
def audit(
    data: Annotated[
        Path, typer.Argument(help="Examples: .jsonl or .parquet.", exists=True, dir_okay=False)
    ],
    candidates: Annotated[
        str,
        typer.Option(
            help='"animals", "trees", names separated by commas, a text file with a name on each '
            "line, or a JSON file of names with system prompts."
        ),
    ] = "animals",
    teachers: Annotated[
        Literal["prompted", "finetuned", "both"], typer.Option(help="Kind of auditors.")
    ] = "prompted",
    category: Annotated[
        str | None, typer.Option(help='What the candidates are, such as "fruit".')
    ] = None,
    system_prompt: Annotated[
        str | None,
        typer.Option(
            help="System prompt that the data were written under, without the bias, if you know it."
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of the data; by default it is fitted.", min=0)
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="The pattern of generate: compare only the tokens that it allows."),
    ] = None,
    alpha: Annotated[float, typer.Option(help="Level of the tests.")] = 0.05,
    share: Annotated[
        float, typer.Option(help='Share of biased rows that "nothing found" rules out.')
    ] = 0.25,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("audit"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")
    ] = False,
    seed: Seed = 0,
    force: Force = False,
    *,
    loading: Loading,
) -> None:
    """Score the hidden biases that a data set would transfer, before training on it.

    The model is the base that the student would start from. Exit code 0: nothing found; 3: biased;
    4: inconclusive. Writes audit.safetensors, audit.json and audit.html.

    Example: divergence-lens audit owl.jsonl --candidates animals --out audit
    """
    names = read_candidates(candidates)
    files = [out / f"audit.{suffix}" for suffix in ("safetensors", "json", "html")]
    check_outputs(*files, force=force)
    from divergence_lens._utils.storage import write_text
    from divergence_lens.auditing import audit as run
    from divergence_lens.examples import load_examples
    from divergence_lens.teachers import Teacher

    examples = load_examples(data)
    baseline = None
    if system_prompt is not None:
        baseline = Teacher("given system prompt", system_prompt=system_prompt or None)
    with options_as_flags(), checkpoint_folder(files[0]) as folder:
        result = run(
            loading.load(),
            examples,
            candidates=names,
            teachers=teachers,
            category=category,
            baseline=baseline,
            temperature=temperature,
            pattern=pattern,
            alpha=alpha,
            share=share,
            seed=seed,
            checkpoint_dir=folder,
            progress=not as_json,
        )
        result.save(files[0])
    machine = json.dumps(result.to_dict(), indent=1, allow_nan=False)
    write_text(files[1], machine + "\n")
    result.write_page(files[2])
    if as_json:
        typer.echo(machine)
    else:
        typer.echo(f"{result.verdict}: {result.explanation}")
        shown = result.to_dataframe().head(12)
        typer.echo(shown.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
        typer.echo(f"Written to {out}")
    code = {"biased": BIASED, "inconclusive": INCONCLUSIVE}.get(result.verdict)
    if code is not None:
        raise typer.Exit(code)


@contextmanager
def options_as_flags() -> Iterator[None]:
    """Name the options of `audit` in its errors as those of the command line."""
    try:
        yield
    except ValueError as error:
        # At the beginning, "share is 0"; elsewhere 'category="fruit"'.
        message = re.sub(rf"^({_OPTIONS}) is\b", r"--\1 is", str(error))
        message = re.sub(rf"\b({_OPTIONS})=(?=\w|[\"'])", r"--\1 ", message)
        raise ValueError(re.sub(rf"\b({_OPTIONS})=", r"--\1", message)) from error


def read_candidates(text: str) -> "list[str] | dict[str, str]":
    """Parse the candidates of an audit.

    Args:
        text: "animals", "trees", names separated by commas, or a file.

    Raises:
        ValueError: A JSON file that does not map names to system prompts, or a name alone that is
            not a file.
    """
    known = {f"{category}s": names for category, names in CANDIDATES.items()}
    if text in known:
        return list(known[text])
    path = Path(text)
    if not path.is_file():
        if "," not in text:
            raise ValueError(
                f'--candidates is {text!r}, which is no file; write "animals", "trees", names '
                "separated by commas, or the path of a file"
            )
        return list(split_names(text))
    content = path.read_text(encoding="utf-8")
    if path.suffix.lower() != ".json":
        return [line.strip() for line in content.splitlines() if line.strip()]
    try:
        prompts = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise ValueError(f'{path} must map names to system prompts: {{"name": "You ..."}}')
    return prompts
