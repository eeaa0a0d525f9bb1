"""The command `patch`: which layers and positions make a model choose one token over another."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from divergence_lens.cli.choices import Direction, Method, Metric, Site, Span
from divergence_lens.cli.files import check_kind, check_outputs, checkpoint_folder, write_figure
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
            "--clean and --corrupted."
        ),
    ] = None,
    method: Annotated[
        Method, typer.Option(help="exact, or an approximation from gradients.")
    ] = "exact",
    site: Annotated[Site, typer.Option(help="What is patched.")] = "resid_post",
    direction: Annotated[
        Direction, typer.Option(help="noising patches the clean run, denoising the corrupted one.")
    ] = "noising",
    metric: Annotated[
        Metric, typer.Option(help="What is measured after the prompt.")
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

    The pairs are the first divergence tokens of a divergence file, a file of prompts, or two
    prompts: --clean "The capital of France is" --corrupted "The capital of Italy is" --answer
    " Paris" --foil " Rome". Without --figure, a heatmap is shown in the terminal.

    Example: divergence-lens patch divergence.safetensors --method integrated --figure owl.html
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
    check_outputs(out, figure=figure, force=force)

    model: Any = loading.load()
    if prompts is not None:
        try:
            pairs = encode_prompt_pairs(model, prompts, chat=chat, system=system)
        except ValueError as error:
            if not loading.model.startswith("tiny") or "vocabulary" not in str(error):
                raise
            raise ValueError(
                f"{error}; the bundled model {loading.model!r} knows few words: choose another "
                "with --model"
            ) from error
    else:
        pairs = _divergence_pairs(model, source, teacher or (), loading, limit=limit, seed=seed)
        _check_pair(pair, len(pairs))
    options: dict[str, Any] = {
        "site": site,
        "direction": direction,
        "metric": metric,
        "span": span,
        "progress": True,
    }
    if method != "exact":
        options |= {"method": method, "verify": verify, "seed": seed}
    effects = _patched(model, pairs, options, out)
    shown = pair if pair is not None or len(pairs) > 1 else 0
    _show(effects, shown, figure)
    if out is not None:
        typer.echo(f"Written to {out}")


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


def _patched(model: Any, pairs: "Pairs", options: dict[str, Any], out: Path | None) -> "Effects":
    """Compute the effects, and save them if there is an output file."""
    from divergence_lens.patching import attribution_patch, causal_mediation

    function: Any = attribution_patch if "method" in options else causal_mediation
    effects: Effects
    if out is None:
        effects = function(model, pairs, **options)
        return effects
    with checkpoint_folder(out) as folder:
        effects = function(model, pairs, checkpoint_dir=folder, **options)
        effects.save(out)
    return effects


def _show(effects: "Effects", pair: int | None, figure: Path | None) -> None:
    """Print a heatmap and the strongest cells, or write a figure."""
    typer.echo(str(effects))
    if figure is None:
        from divergence_lens.cli.terminal import print_heatmap

        print_heatmap(effects, pair)
    else:
        from divergence_lens import plots

        write_figure(
            plots.effects_by_segment(effects)
            if pair is None
            else plots.effects_heatmap(effects, pair=pair),
            figure,
        )
    if effects.verified is not None:
        typer.echo(str(effects.verified))
