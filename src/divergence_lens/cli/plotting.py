"""The command `plot`: draw a saved result again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from divergence_lens.cli.choices import listed
from divergence_lens.cli.files import (
    check_kind,
    check_outputs,
    column_width,
    result_kind,
    write_figure,
)
from divergence_lens.cli.options import Force, report_errors

if TYPE_CHECKING:
    import plotly.graph_objects as go

Kind = Literal[
    "heatmap",
    "segments",
    "layers",
    "heads",
    "agreement",
    "rates",
    "positions",
    "tokens",
    "candidates",
    "students",
    "margins",
    "training",
    "edges",
    "faithfulness",
    "attention",
]

Orientation = Literal["layers_down", "layers_across"]

# The figures of each kind of result; without --kind the first is drawn.
KINDS: dict[str, tuple[Kind, ...]] = {
    "effects": ("heatmap", "segments", "layers", "heads", "agreement"),
    "divergence": ("rates", "positions", "tokens"),
    "preference": ("candidates",),
    "sweep": ("students",),
    "cross_patch": ("margins",),
    "delta": ("training",),
    "audit": ("candidates",),
    "edge scores": ("edges",),
    "circuit": ("edges",),
    "faithfulness": ("faithfulness",),
    "attention": ("attention",),
}


# The figures of effects that draw several results.
SHARED: tuple[Kind, ...] = ("heatmap", "segments", "layers")


@dataclass(frozen=True)
class Choice:
    """The figure that the user asked for.

    Attributes:
        kind: One of the figures of the result, or None for the usual one.
        item: Number of a pair or of an example; None for all, or the first example.
        other: A second result, for comparison.
        measure: A measure of a sweep, or a column of a student's history.
        orientation: Whether the layers of a heatmap go down or across.
    """

    kind: str | None
    item: int | None
    other: Path | None
    measure: str | None
    orientation: Orientation = "layers_down"


@report_errors
def plot(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="result",
            help="A saved result, or several effects of the same pairs, which are drawn in one "
            "figure.",
            exists=True,
            dir_okay=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The figure: .html, .png, .svg or .pdf.")],
    kind: Annotated[
        Kind | None,
        typer.Option(
            metavar="<kind>",
            help="Of effects: heatmap, segments, layers, heads or agreement. Of a divergence file: "
            "rates, positions or tokens. By default the first of these. Every other result has "
            "one figure.",
        ),
    ] = None,
    item: Annotated[
        int | None,
        typer.Option(
            help="Number of the pair of effects, edges or attention, or of the example whose "
            "tokens are drawn; by default the mean of the effects, or the first.",
            min=0,
        ),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(
            help="A second result: the exact effects for agreement, or the preference before "
            "training.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="A measure of a sweep, or of a student's history: loss, lr, or a name from "
            "on_step; by default the preference, or else the loss."
        ),
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(
            help="Width of an image in mm; by default 80 for one result, 180 for several.",
            min=20,
            max=1000,
        ),
    ] = None,
    dpi: Annotated[float, typer.Option(help="Dots per inch of a PNG.", min=20, max=2400)] = 300,
    theme: Annotated[Literal["light", "dark"], typer.Option(help="Colors of an image.")] = "light",
    title: Annotated[bool, typer.Option(help="Whether the figure has its title.")] = True,
    caption: Annotated[bool, typer.Option(help="Whether it has the lines below.")] = True,
    orientation: Annotated[
        Orientation,
        typer.Option(
            metavar="<orientation>",
            help=f"Whether the layers of a heatmap go down or across: {listed(Orientation)}.",
        ),
    ] = "layers_down",
    force: Force = False,
) -> None:
    """Draw any saved result; no model is loaded.

    Example: divergence-lens plot effects.safetensors heatmap.svg --item 0 --width 180
    """
    stored = _common_kind(results)
    if kind is not None and kind not in KINDS[stored]:
        raise ValueError(f"{stored} has no figure {kind!r}; choose {' or '.join(KINDS[stored])}")
    if len(results) > 1 and kind not in (None, *SHARED):
        raise ValueError(f"--kind {kind} draws one result; {', '.join(SHARED)} draw several")
    if (kind == "agreement") != (other is not None) and stored != "preference":
        raise ValueError("--kind agreement and --other, the exact effects, belong together")
    if other is not None:
        check_kind(other, stored, option="--other")
    check_outputs(figure=out, force=force)
    choice = Choice(kind=kind, item=item, other=other, measure=measure, orientation=orientation)
    try:
        # Only effects are drawn together; of every other kind there is one result.
        draw = _DRAW.get(stored)
        figure = _effects(results, choice) if draw is None else draw(results[0], choice)
    except IndexError as error:
        raise ValueError(f"--item is {item}, but {error}") from error
    width_mm = column_width(len(results)) if width is None else width
    write_figure(figure, out, theme=theme, width_mm=width_mm, dpi=dpi, title=title, caption=caption)


def _common_kind(results: Sequence[Path]) -> str:
    """The kind of the results, which is that of all of them.

    Raises:
        ValueError: A result has no figure, or several are not all effects.
    """
    kinds = {path: result_kind(path) for path in results}
    for path, stored in kinds.items():
        if stored not in KINDS:
            raise ValueError(f"{path} holds {stored}, which has no figure; {', '.join(KINDS)} do")
        if len(results) > 1 and stored != "effects":
            raise ValueError(f"{path} holds {stored}; only effects are drawn in one figure")
    return stored


def _effects(paths: Sequence[Path], choice: Choice) -> "go.Figure":
    from divergence_lens import plots
    from divergence_lens.patching import Effects

    paths = list(dict.fromkeys(paths))
    loaded = [Effects.load(path) for path in paths]
    sites = [effects.site for effects in loaded]
    # Panels are named by their sites if these differ, or else by their files.
    choices = (sites, [path.stem for path in paths], [str(path) for path in paths])
    names = next(names for names in choices if len(set(names)) == len(paths))
    named = dict(zip(names, loaded, strict=True))
    effects = next(iter(named.values()))
    turned: Any = {"orientation": choice.orientation}
    pair: Any = "mean" if choice.item is None and len(effects) > 1 else choice.item or 0
    if choice.kind in ("segments", "layers") and choice.item is not None:
        named = {label: each[choice.item] for label, each in named.items()}
    drawn: Any = named if len(named) > 1 else next(iter(named.values()))
    if choice.kind == "segments":
        return plots.effects_by_segment(drawn, **turned)
    if choice.kind == "layers":
        return plots.layer_profile(drawn)
    if choice.kind == "heads":
        return plots.head_grid(effects, pair, **turned)
    if choice.kind == "agreement":
        assert choice.other is not None
        return plots.agreement_scatter(effects, Effects.load(choice.other))
    return plots.effects_heatmap(drawn, pair, **turned)


def _divergence(path: Path, choice: Choice) -> "go.Figure":
    from divergence_lens import plots
    from divergence_lens.divergence import Divergence

    divergence = Divergence.load(path)
    if choice.kind == "tokens":
        return plots.divergence_tokens(divergence[choice.item or 0])
    if choice.kind == "positions":
        return plots.where_divergence_falls(divergence)
    return plots.rate_per_teacher(divergence)


def _preference(path: Path, choice: Choice) -> "go.Figure":
    from divergence_lens import plots
    from divergence_lens.evaluation import Preference

    before = None if choice.other is None else Preference.load(choice.other)
    return plots.preference_bars(Preference.load(path), before=before)


def _sweep(path: Path, choice: Choice) -> "go.Figure":
    from divergence_lens import plots
    from divergence_lens.training import Sweep

    return plots.layer_sweep(Sweep.load(path), measure=choice.measure)


def _cross_patch(path: Path, choice: Choice) -> "go.Figure":  # noqa: ARG001
    from divergence_lens import plots
    from divergence_lens.patching import CrossPatch

    return plots.cross_patch_margins(CrossPatch.load(path))


def _delta(path: Path, choice: Choice) -> "go.Figure":
    from divergence_lens import plots
    from divergence_lens.deltas import Delta

    student = Delta.load(path)
    usual = "preference" if "preference" in student.history().columns else "loss"
    return plots.training_curves(student, column=choice.measure or usual)


def _audit(path: Path, choice: Choice) -> "go.Figure":  # noqa: ARG001
    from divergence_lens.auditing import Audit

    return Audit.load(path).plot()


def _edge_scores(path: Path, choice: Choice) -> "go.Figure":
    from divergence_lens import plots
    from divergence_lens.circuits import EdgeScores

    return plots.edge_graph(EdgeScores.load(path), pair=choice.item or 0)


def _circuit(path: Path, choice: Choice) -> "go.Figure":  # noqa: ARG001
    from divergence_lens import plots
    from divergence_lens.circuits import Circuit

    return plots.circuit_graph(Circuit.load(path))


def _faithfulness(path: Path, choice: Choice) -> "go.Figure":  # noqa: ARG001
    from divergence_lens.circuits import Faithfulness

    return Faithfulness.load(path).plot()


def _attention(path: Path, choice: Choice) -> "go.Figure":
    from divergence_lens import plots
    from divergence_lens.patching import AttentionPatterns

    return plots.attention_from(AttentionPatterns.load(path), pair=choice.item or 0)


_DRAW = {
    "divergence": _divergence,
    "preference": _preference,
    "sweep": _sweep,
    "cross_patch": _cross_patch,
    "delta": _delta,
    "audit": _audit,
    "edge scores": _edge_scores,
    "circuit": _circuit,
    "faithfulness": _faithfulness,
    "attention": _attention,
}
