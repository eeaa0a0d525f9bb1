"""The command `patch`: which layers and positions cause the first divergence tokens."""

from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from divergence_lens.cli.files import checkpoint_folder, read_teacher, write_figure
from divergence_lens.cli.options import (
    Figure,
    Loading,
    Seed,
    report_errors,
)


@report_errors
def patch(
    divergence: Annotated[Path, typer.Argument(help="A divergence file, written by `find`.")],
    out: Annotated[Path, typer.Option(help="Output file.")] = Path("effects.safetensors"),
    method: Annotated[
        str,
        typer.Option(
            help='"exact", or a method of attribution_patch: "gradient", "integrated", ...'
        ),
    ] = "exact",
    site: Annotated[
        str, typer.Option(help="resid_pre, resid_mid, resid_post, attn_out, mlp_out or z.")
    ] = "resid_post",
    direction: Annotated[str, typer.Option(help="noising or denoising.")] = "noising",
    limit: Annotated[int, typer.Option(help="Maximum number of first divergences.")] = 32,
    verify: Annotated[
        int, typer.Option(help="Also compute this many cells of an approximation exactly.")
    ] = 0,
    teacher: Annotated[
        list[str] | None,
        typer.Option(
            help="A teacher with its own weights, as given to `find`, because a divergence file "
            "stores no weights; may be repeated."
        ),
    ] = None,
    figure: Figure = None,
    pair: Annotated[
        int | None,
        typer.Option(
            help="Draw this pair (from 0) by position; by default the mean by segment is drawn."
        ),
    ] = None,
    seed: Seed = 0,
    *,
    loading: Loading,
) -> None:
    """Compute the effect of every layer and position on the first divergence tokens.

    Example: divergence-lens patch divergence.safetensors --method integrated --figure owl.html
    """
    from divergence_lens.divergence import Divergence
    from divergence_lens.patching import Method, attribution_patch, causal_mediation

    methods = ("exact", *get_args(Method))
    if method not in methods:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(methods)}")
    loaded: Any = loading.load()
    teachers = [read_teacher(spec, loading.load) for spec in teacher or ()]
    result = Divergence.load(divergence, teachers=teachers, tokenizer=loaded.tokenizer)
    pairs = result.pairs(limit=limit, seed=seed)
    if pair is not None and not 0 <= pair < len(pairs):
        raise ValueError(f"there is no pair {pair}; the pairs are numbered 0 to {len(pairs) - 1}")
    with checkpoint_folder(out) as folder:
        options: dict[str, Any] = {
            "site": site,
            "direction": direction,
            "checkpoint_dir": folder,
            "progress": True,
        }
        if method == "exact":
            effects = causal_mediation(loaded, pairs, **options)
        else:
            effects = attribution_patch(
                loaded, pairs, method=cast("Any", method), verify=verify, seed=seed, **options
            )
        effects.save(out)
    if figure is not None:
        from divergence_lens import plots

        by_segment = pair is None and len(pairs) > 1
        write_figure(
            plots.effects_by_segment(effects)
            if by_segment
            else plots.effects_heatmap(effects, pair=pair or 0),
            figure,
        )
    typer.echo(str(effects))
    typer.echo(effects.by_segment().round(4).to_string())
    typer.echo(f"Written to {out}")
