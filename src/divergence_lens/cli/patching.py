"""The command `patch`: which layers and positions make a model choose one token over another."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from divergence_lens.cli.choices import Direction, Method, Metric, Site, Span, listed
from divergence_lens.cli.files import (
    check_kind,
    check_outputs,
    checkpoint_folder,
    column_width,
    write_figure,
)
from divergence_lens.cli.options import Force, Loading, Seed, report_errors
from divergence_lens.cli.prompt_pairs import (
    PromptPair,
    check_prompt_pairs,
    encode_prompt_pairs,
    read_prompt_pairs,
)
from divergence_lens.cli.teachers import check_teachers, read_teacher

if TYPE_CHECKING:
    from divergence_lens.pairs import Pairs
    from divergence_lens.patching import Effects

_DEFAULT_OUT = Path("effects.safetensors")
_DEFAULT_SITES = [Site.RESID_POST]


@report_errors
def patch(
    source: Annotated[
        Path | None,
        typer.Argument(
            help="A divergence file, written by `find`; or pairs of prompts (.jsonl) with the keys "
            "clean, corrupted, answer and foil.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    clean: Annotated[str | None, typer.Option(help="The clean prompt of a single pair.")] = None,
    corrupted: Annotated[str | None, typer.Option(help="The corrupted prompt.")] = None,
    answer: Annotated[
        str | None, typer.Option(help='The clean run\'s continuation, such as " Paris".')
    ] = None,
    foil: Annotated[str | None, typer.Option(help="The corrupted run's continuation.")] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Prompts are user messages, in the model's chat template; by default the model "
            "continues their text.",
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(help="System prompt; needs --chat.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output file; by default effects.safetensors for a file of pairs, and none for "
            "--clean and --corrupted. With several sites, each has its own file, such as "
            "effects-z.safetensors."
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            metavar="<method>",
            help=f"exact, or an approximation: {listed(get_args(Method)[1:])}.",
        ),
    ] = "exact",
    site: Annotated[
        list[Site],
        typer.Option(
            metavar="<site>",
            help="The states that are patched; may be repeated, for heatmaps side by side: "
            f"{listed(site.value for site in Site)}.",
        ),
    ] = _DEFAULT_SITES,
    direction: Annotated[
        Direction, typer.Option(help="noising patches the clean run, denoising the corrupted one.")
    ] = "noising",
    metric: Annotated[
        Metric,
        typer.Option(
            metavar="<metric>", help=f"The measure of the next token: {listed(get_args(Metric))}."
        ),
    ] = "logit_difference",
    span: Annotated[Span, typer.Option(help="The positions of one cell.")] = "position",
    limit: Annotated[
        int | None,
        typer.Option(help="Maximum number of pairs; by default 32 of a divergence file.", min=1),
    ] = None,
    verify: Annotated[
        int, typer.Option(help="Also compute this many cells of an approximation exactly.", min=0)
    ] = 0,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<teacher>",
            callback=check_teachers,
            help="A teacher with its own weights, as given to `find`, because a divergence file "
            "stores no weights; may be repeated.",
        ),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="Draw a figure (.html, .png, .svg or .pdf) instead of a heatmap in the terminal."
        ),
    ] = None,
    pair: Annotated[
        int | None,
        typer.Option(
            help="Draw this pair (from 0) by position; by default the mean by segment is drawn if "
            "there are several.",
            min=0,
        ),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    *,
    loading: Loading,
) -> None:
    """Compute the effect of every layer and position on the choice between two tokens.

    The pairs are two prompts, a file of prompts, or the first divergence tokens of a divergence
    file. Without --figure, a heatmap is shown in the terminal.

    Example: divergence-lens patch divergence.safetensors --method integrated --figure owl.html

    Example: divergence-lens patch --clean "The capital of France is" --corrupted "The capital of
    Italy is" --answer " Paris" --foil " Rome" --model gpt2 --figure france.svg
    """
    texts = {"clean": clean, "corrupted": corrupted, "answer": answer, "foil": foil}
    prompts = _prompts(source, texts, metric)
    if prompts is None and (chat or system is not None):
        raise ValueError("--chat and --system belong to prompts; a divergence file has its own")
    if prompts is not None:
        _check_prompt_options(prompts, pair, chat=chat, system=system, teacher=teacher)
        prompts = prompts[:limit]
    if verify and method == "exact":
        raise ValueError("--verify checks an approximation; choose another --method than exact")
    if source is not None and out is None:
        out = _DEFAULT_OUT
    files = _site_files(out, [name.value for name in site])
    check_outputs(*files.values(), figure=figure, force=force)

    model: Any = loading.load()
    if prompts is not None:
        pairs = _encoded(model, prompts, loading.model, chat=chat, system=system)
    else:
        pairs = _divergence_pairs(model, source, teacher or (), loading, limit=limit, seed=seed)
        _check_pair(pair, len(pairs))
    options: dict[str, Any] = {
        "direction": direction,
        "metric": metric,
        "span": span,
        "progress": True,
    }
    if method != "exact":
        options |= {"method": method, "verify": verify, "seed": seed}
    results = _patched(model, pairs, options, out, files)
    _show(results, pair if pair is not None or len(pairs) > 1 else 0, figure)
    for file in files.values():
        if file is not None:
            typer.echo(f"Written to {file}")


def _site_files(out: Path | None, sites: Sequence[str]) -> dict[str, Path | None]:
    """The output file of each site: `out` itself, or with the site in its name if there are more.

    A site that is given twice is patched once.
    """
    names = dict.fromkeys(sites)
    if out is None or len(names) == 1:
        return dict.fromkeys(names, out)
    return {name: out.with_name(f"{out.stem}-{name}{out.suffix}") for name in names}


def _prompts(
    source: Path | None, texts: dict[str, str | None], metric: str
) -> list[PromptPair] | None:
    """The prompts given as options or as a file; None for a divergence file."""
    given = [f"--{name}" for name, text in texts.items() if text is not None]
    if source is not None and given:
        raise ValueError(f"give either the file {source} or {' and '.join(given)}, not both")
    if source is not None and source.suffix.lower() not in (".jsonl", ".ndjson"):
        check_kind(source, "divergence", option="the file")
        return None
    if source is not None:
        prompts = read_prompt_pairs(source)
    else:
        clean, corrupted = texts["clean"], texts["corrupted"]
        if clean is None or corrupted is None:
            raise ValueError("give --clean and --corrupted, or a file of pairs")
        prompts = [PromptPair(clean, corrupted, texts["answer"], texts["foil"])]
    check_prompt_pairs(prompts, metric)
    return prompts


def _check_prompt_options(
    prompts: Sequence[PromptPair],
    pair: int | None,
    *,
    chat: bool,
    system: str | None,
    teacher: Sequence[str] | None,
) -> None:
    """Refuse options that do not fit prompts."""
    if teacher:
        raise ValueError("--teacher belongs to a divergence file; prompts have no teachers")
    if system is not None and not chat:
        raise ValueError("--system needs --chat: a system prompt is part of a chat template")
    _check_pair(pair, len(prompts))


def _check_pair(pair: int | None, count: int) -> None:
    if pair is not None and not 0 <= pair < count:
        raise ValueError(f"there is no pair {pair}; the pairs are numbered 0 to {count - 1}")


def _encoded(
    model: Any, prompts: list[PromptPair], name: str, *, chat: bool, system: str | None
) -> "Pairs":
    """The pairs of the prompts; an unknown word names the remedy if the model is a bundled one."""
    try:
        return encode_prompt_pairs(model, prompts, chat=chat, system=system)
    except ValueError as error:
        if not name.startswith("tiny") or "vocabulary" not in str(error):
            raise
        raise ValueError(
            f"{error}; the bundled model {name!r} knows few words: choose another with --model"
        ) from error


def _divergence_pairs(
    model: Any,
    path: Path | None,
    teachers: Sequence[str],
    loading: Loading,
    *,
    limit: int | None,
    seed: int,
) -> "Pairs":
    """The first divergences of a divergence file."""
    from divergence_lens.divergence import Divergence

    assert path is not None
    loaded = [read_teacher(spec, loading.load) for spec in teachers]
    divergence = Divergence.load(path, teachers=loaded, tokenizer=model.tokenizer)
    return divergence.pairs(limit=32 if limit is None else limit, seed=seed)


def _patched(
    model: Any,
    pairs: "Pairs",
    options: dict[str, Any],
    out: Path | None,
    files: Mapping[str, Path | None],
) -> "dict[str, Effects]":
    """Compute the effects of each site, and save them if there are output files."""
    from divergence_lens.patching import attribution_patch, causal_mediation

    function: Any = attribution_patch if "method" in options else causal_mediation
    results: dict[str, Effects]
    with nullcontext() if out is None else checkpoint_folder(out) as folder:
        results = function(model, pairs, site=list(files), checkpoint_dir=folder, **options)
        for name, file in files.items():
            if file is not None:
                results[name].save(file)
    return results


def _show(results: Mapping[str, "Effects"], pair: int | None, figure: Path | None) -> None:
    """Print heatmaps and the strongest cells, or write a figure with a panel per site."""
    for effects in results.values():
        typer.echo(str(effects))
    if figure is None:
        from divergence_lens.cli.terminal import print_heatmaps

        print_heatmaps(list(results.values()), pair)
    else:
        from divergence_lens import plots

        drawn: Any = results if len(results) > 1 else next(iter(results.values()))
        write_figure(
            plots.effects_by_segment(drawn)
            if pair is None
            else plots.effects_heatmap(drawn, pair=pair),
            figure,
            width_mm=column_width(len(results)),
        )
    for effects in results.values():
        if effects.verified is not None:
            typer.echo(str(effects.verified))
