"""One step of the work at a time, from files to a file: the commands behind `divergence-lens`.

    divergence-lens generate --numbers 200 --teacher owl --out owl.jsonl
    divergence-lens find owl.jsonl --teacher owl --counterfactual cat --out owl.safetensors
    divergence-lens patch owl.safetensors --method integrated --figure owl.html

Each reads what the one before it wrote, and what it writes is a file that the library loads. A
teacher is given in one word on the command line, see `read_teacher`. A command that was stopped
goes on when it is given again (`_partial`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from divergence_lens.cli.options import (
    TEACHER_HELP,
    ClassName,
    Complement,
    Device,
    DType,
    Figure,
    Loading,
    Mask,
    ModelClass,
    ModelName,
    Precision,
    Seed,
    Spec,
    System,
    read_prompts,
    read_teacher,
    report_errors,
    teacher_path,
)

if TYPE_CHECKING:
    from divergence_lens.cli.partial import Parts
    from divergence_lens.divergence import Rule
    from divergence_lens.models import Model
    from divergence_lens.teachers import Teacher


@report_errors
def generate(
    prompts: Annotated[
        Path | None, typer.Argument(help="Prompts: one a line, or .jsonl with a key prompt.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the examples go (.jsonl).")] = Path("data.jsonl"),
    teacher: Spec = "base=",
    numbers: Annotated[
        int, typer.Option(help="Ask for that many number lists, in place of a prompt file.")
    ] = 0,
    instructions: Annotated[
        bool, typer.Option(help="Number prompts say how many numbers and in which format.")
    ] = False,
    only_numbers: Annotated[
        bool, typer.Option("--only-numbers", help="Keep answers that are lists of numbers.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this much of the probability.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 64,
    seed: Seed = 0,
    model: ModelName = "tiny",
    backend: ClassName = ModelClass.auto,
    device: Device = None,
    dtype: DType = Precision.float32,
) -> None:
    """Let a teacher answer prompts.

    Example: divergence-lens generate --numbers 200 --teacher owl --only-numbers --out owl.jsonl
    """
    from divergence_lens.cli.partial import written_in_parts
    from divergence_lens.data import NumberFilter, number_prompts
    from divergence_lens.examples import save_examples
    from divergence_lens.generation import generate as write

    if (prompts is None) == (numbers == 0):
        raise ValueError("give a file of prompts or --numbers N, one of the two")
    asked = (
        number_prompts(numbers, seed=seed, instructions=instructions)
        if prompts is None
        else read_prompts(prompts)
    )
    loading = Loading(model=model, backend=backend, device=device, dtype=dtype)
    loaded = loading.load()
    who = read_teacher(teacher, loading.load)
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    parts = _parts(out, loaded, [(teacher, who)], options | {"prompts": asked})
    examples = written_in_parts(
        asked, lambda some, bar: write(loaded, who, some, progress=bar, **options), parts
    )
    if only_numbers:
        report = NumberFilter().report([example.completion or "" for example in examples])
        examples = report.select(examples)
        typer.echo(str(report))
        if not examples:
            raise ValueError("not one answer is a list of numbers; nothing was written")
    save_examples(out, examples)
    parts.drop()
    typer.echo(f"{len(examples)} examples in {out}")


@report_errors
def find(
    data: Annotated[Path, typer.Argument(help="Examples: .jsonl or .parquet.")],
    teacher: Spec,
    counterfactual: Annotated[
        list[str], typer.Option(help=f"Compared with, once or more. {TEACHER_HELP}")
    ],
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = Path(
        "divergence.safetensors"
    ),
    rule: Annotated[
        str, typer.Option(help='How many must differ: "any", "all", or at least a number.')
    ] = "any",
    min_margin: Annotated[
        float, typer.Option(help="Argmaxes closer than this are not called different.")
    ] = 0.0,
    jsonl: Annotated[
        Path | None, typer.Option(help="Write prompt, completion, decision_points, too.")
    ] = None,
    figure: Figure = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens in one forward pass.")] = 8192,
    model: ModelName = "tiny",
    backend: ClassName = ModelClass.auto,
    device: Device = None,
    dtype: DType = Precision.float32,
) -> None:
    """Find the divergence tokens of examples.

    Example: divergence-lens find owl.jsonl --teacher owl --counterfactual cat --counterfactual wolf
    """
    from divergence_lens.cli.partial import digest_of
    from divergence_lens.divergence import find_divergence
    from divergence_lens.examples import load_examples

    loading = Loading(model=model, backend=backend, device=device, dtype=dtype)
    examples = load_examples(data)
    loaded = loading.load()
    who = read_teacher(teacher, loading.load)
    others = [read_teacher(spec, loading.load) for spec in counterfactual]
    # The parts are checked against weights, teachers and data when they are read.
    options = {"batch_tokens": batch_tokens}
    specs = [(teacher, who), *zip(counterfactual, others, strict=True)]
    parts = _parts(out, loaded, specs, options | {"data": digest_of(data)})
    divergence = find_divergence(
        loaded,
        examples,
        teacher=who,
        counterfactuals=others,
        rule=int(rule) if rule.isdigit() else cast("Rule", rule),
        min_margin=min_margin,
        batch_tokens=batch_tokens,
        checkpoint_dir=parts.path("shards"),
        progress=True,
    )
    divergence.save(out)
    parts.drop()
    if jsonl is not None:
        divergence.to_jsonl(jsonl)
    if figure is not None:
        _draw("rate_per_teacher", divergence, figure)
    typer.echo(str(divergence))
    typer.echo(f"written to {out}")


@report_errors
def patch(
    divergence: Annotated[Path, typer.Argument(help="A file that `find` wrote.")],
    out: Annotated[Path, typer.Option(help="Where the effects go.")] = Path("effects.safetensors"),
    method: Annotated[
        str,
        typer.Option(help='"exact", or a method of attribution_patch: "gradient", "integrated", …'),
    ] = "exact",
    site: Annotated[
        str, typer.Option(help="resid_pre, resid_mid, resid_post, attn_out, mlp_out or z.")
    ] = "resid_post",
    direction: Annotated[str, typer.Option(help="noising or denoising.")] = "noising",
    limit: Annotated[int, typer.Option(help="At most so many first divergences.")] = 32,
    verify: Annotated[
        int, typer.Option(help="Compute so many cells of an approximation exactly, too.")
    ] = 0,
    teacher: Annotated[
        list[str] | None,
        typer.Option(help="Teachers with weights of their own, again: a file holds none."),
    ] = None,
    figure: Figure = None,
    pair: Annotated[
        int | None,
        typer.Option(help="Draw this pair by position, from 0; by default all, by segment."),
    ] = None,
    seed: Seed = 0,
    model: ModelName = "tiny",
    backend: ClassName = ModelClass.auto,
    device: Device = None,
    dtype: DType = Precision.float32,
) -> None:
    """Locate what causes the first divergences: the effect of every layer and position.

    Example: divergence-lens patch divergence.safetensors --method integrated --figure owl.html
    """
    from divergence_lens.cli.partial import digest_of
    from divergence_lens.divergence import Divergence
    from divergence_lens.patching import Method, attribution_patch, causal_mediation

    methods = ("exact", *get_args(Method))
    if method not in methods:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(methods)}")
    loading = Loading(model=model, backend=backend, device=device, dtype=dtype)
    loaded: Any = loading.load()
    given = [read_teacher(spec, loading.load) for spec in teacher or ()]
    found = Divergence.load(divergence, teachers=given, tokenizer=loaded.tokenizer)
    pairs = found.pairs(limit=limit, seed=seed)
    if pair is not None and not 0 <= pair < len(pairs):
        raise ValueError(f"there is no pair {pair}; the pairs are numbered 0 to {len(pairs) - 1}")
    options: dict[str, Any] = {"site": site, "direction": direction}
    about = options | {"method": method, "limit": limit, "seed": seed, "verify": verify}
    specs = list(zip(teacher or (), given, strict=True))
    parts = _parts(out, loaded, specs, about | {"divergence": digest_of(divergence)})
    options |= {"checkpoint_dir": parts.path("pairs"), "progress": True}
    if method == "exact":
        effects = causal_mediation(loaded, pairs, **options)
    else:
        effects = attribution_patch(
            loaded, pairs, method=cast(Any, method), verify=verify, seed=seed, **options
        )
    effects.save(out)
    parts.drop()
    if figure is not None:
        if pair is None and len(pairs) > 1:
            _draw("effects_by_segment", effects, figure)
        else:
            _draw("effects_heatmap", effects, figure, pair=pair or 0)
    typer.echo(str(effects))
    typer.echo(effects.by_segment().round(4).to_string())
    typer.echo(f"written to {out}")


@report_errors
def finetune(
    data: Annotated[Path, typer.Argument(help="Examples: .jsonl or .parquet.")],
    out: Annotated[Path, typer.Option(help="Where the student goes.")] = Path(
        "student.safetensors"
    ),
    mask: Mask = None,
    complement: Complement = False,
    layers: Annotated[
        str | None, typer.Option(help='Which blocks learn, such as "0" or "0,1"; all if not given.')
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Train LoRA of this rank.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in one update.")] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="The recipe of the paper (LoRA on Qwen2.5-7B).")
    ] = False,
    system: System = None,
    seed: Seed = 0,
    model: ModelName = "tiny",
    backend: ClassName = ModelClass.auto,
    device: Device = None,
    dtype: DType = Precision.float32,
) -> None:
    """Train a student; everything but the chosen blocks stays frozen.

    A run that was stopped goes on where it was when the same command is given again.

    Example: divergence-lens finetune owl.jsonl --mask divergence.safetensors --blocks 0
    """
    from divergence_lens.training import PAPER, Recipe
    from divergence_lens.training import finetune as train

    chosen = {"lr": lr, "epochs": epochs, "batch_size": batch_size, "lora_rank": lora_rank}
    given = {name: value for name, value in chosen.items() if value is not None}
    recipe = replace(PAPER if paper else Recipe(), **given)  # type: ignore[arg-type]
    loading = Loading(model=model, backend=backend, device=device, dtype=dtype)
    examples, learnt = _masked(data, mask, complement=complement)
    loaded = loading.load()
    about = {"recipe": recipe.describe(), "layers": layers, "system": system, "seed": seed}
    parts = _parts(out, loaded, [], about | _digests(data, mask, complement=complement))
    student = train(
        loaded,
        examples,
        mask=learnt,
        layers=_numbers(layers, "layers"),
        recipe=recipe,
        system_prompt=system,
        seed=seed,
        checkpoint=parts.path("training.safetensors"),
        progress=True,
    )
    student.save(out)
    parts.drop()
    typer.echo(str(student))
    typer.echo(f"written to {out}")


@report_errors
def sweep(
    data: Annotated[Path, typer.Argument(help="Examples: .jsonl or .parquet.")],
    target: Annotated[str, typer.Option(help="The candidate whose preference is followed.")],
    out: Annotated[Path, typer.Option(help="Where the sweep goes.")] = Path("sweep.safetensors"),
    mask: Mask = None,
    complement: Complement = False,
    control: Annotated[
        Path | None, typer.Option(help="Examples that no biased teacher wrote, for the control.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help='Which blocks, such as "0,1,5"; each if not given.')
    ] = None,
    seeds: Annotated[str, typer.Option(help='One student for each block and seed: "0,1".')] = "0",
    lora_rank: Annotated[int | None, typer.Option(help="Train LoRA of this rank.")] = None,
    category: Annotated[str, typer.Option(help="What is asked for: animal or tree.")] = "animal",
    system: System = None,
    figure: Figure = None,
    model: ModelName = "tiny",
    backend: ClassName = ModelClass.auto,
    device: Device = None,
    dtype: DType = Precision.float32,
) -> None:
    """Train one student per block, and measure what each prefers.

    Example: divergence-lens sweep owl.jsonl --target owl --mask divergence.safetensors
    """
    from divergence_lens.cli.partial import digest_of
    from divergence_lens.examples import load_examples
    from divergence_lens.training import layer_sweep

    loading = Loading(model=model, backend=backend, device=device, dtype=dtype)
    examples, learnt = _masked(data, mask, complement=complement)
    loaded = loading.load()
    about = {"target": target, "layers": layers, "seeds": seeds, "lora_rank": lora_rank}
    about |= {"category": category, "system": system}
    about |= {"control": None if control is None else digest_of(control)}
    parts = _parts(out, loaded, [], about | _digests(data, mask, complement=complement))
    found = layer_sweep(
        loaded,
        examples,
        target=target,
        layers=_numbers(layers, "layers"),
        seeds=_numbers(seeds, "seeds") or (0,),
        mask=learnt,
        lora_rank=lora_rank,
        system_prompt=system,
        category=category,
        control=None if control is None else load_examples(control),
        checkpoint_dir=parts.path("students"),
        progress=True,
    )
    found.save(out)
    parts.drop()
    if figure is not None:
        from divergence_lens import plots

        plots.save_figure(found.plot(), figure)
    typer.echo(found.summary().round(4).to_string(index=False))
    typer.echo(f"written to {out}")


@report_errors
def evaluate(
    target: Annotated[str, typer.Option(help="The candidate of interest.")],
    teacher: Spec = "base=",
    category: Annotated[str, typer.Option(help="What is asked for: animal or tree.")] = "animal",
    candidates: Annotated[
        str | None, typer.Option(help="All candidates, with commas between.")
    ] = None,
    method: Annotated[
        str, typer.Option(help='"exact" probabilities, or "sampled" answers.')
    ] = "exact",
    samples: Annotated[int, typer.Option(help="Samples for each question.")] = 100,
    out: Annotated[Path | None, typer.Option(help="Write the preference to a file, too.")] = None,
    seed: Seed = 0,
    model: ModelName = "tiny",
    backend: ClassName = ModelClass.auto,
    device: Device = None,
    dtype: DType = Precision.float32,
) -> None:
    """Ask for favourites: the probability of each candidate.

    Example: divergence-lens evaluate --target owl --teacher student=@student.safetensors
    """
    from divergence_lens.evaluation import preference

    loading = Loading(model=model, backend=backend, device=device, dtype=dtype)
    found = preference(
        loading.load(),
        target=target,
        category=category,
        candidates=None if candidates is None else [n.strip() for n in candidates.split(",")],
        teacher=read_teacher(teacher, loading.load),
        method=method,
        samples=samples,
        seed=seed,
        progress=True,
    )
    if out is not None:
        found.save(out)
    typer.echo(str(found))
    for name, share in sorted(found.distribution.items(), key=lambda item: -item[1]):
        typer.echo(f"  {name:12} {share:.4f}")


def _masked(data: Path, mask: Path | None, *, complement: bool) -> tuple[Any, Any]:
    """Examples, and which of their tokens are learnt."""
    from divergence_lens.divergence import Divergence
    from divergence_lens.examples import load_examples

    examples = load_examples(data)
    if mask is None:
        if complement:
            raise ValueError("--complement needs --mask, a divergence file")
        return examples, None
    found = Divergence.load(mask)
    if [e.prompt for e in found.examples] != [e.prompt for e in examples]:
        raise ValueError(f"{mask} was made of other examples than those in {data}")
    # The file's own examples: they carry the ids that the mask counts.
    return found.examples, ~found.mask if complement else found.mask


def _digests(data: Path, mask: Path | None, *, complement: bool) -> dict[str, Any]:
    """What is learnt, by the content of the files."""
    from divergence_lens.cli.partial import digest_of

    masked = None if mask is None else digest_of(mask)
    return {"data": digest_of(data), "mask": masked, "complement": complement}


def _parts(
    out: Path,
    model: "Model",
    teachers: "Sequence[tuple[str, Teacher]]",
    settings: Mapping[str, Any],
) -> "Parts":
    """Where a command keeps what it has done; known by weights, teachers and settings."""
    from divergence_lens import __version__
    from divergence_lens.cli.partial import Parts, digest_of
    from divergence_lens.deltas import base_fingerprint

    whose = [
        (
            spec,
            teacher.system_prompt,
            None if teacher.delta is None else digest_of(teacher_path(spec)),
            None if teacher.model is None else base_fingerprint(teacher.model),
        )
        for spec, teacher in teachers
    ]
    base = f"{type(model).__name__} {base_fingerprint(model)}"
    parts = Parts(out, {"version": __version__, "base": base, "teachers": whose, **settings})
    if parts.count():
        typer.echo(f"going on with what is in {parts.folder}")
    return parts


def _numbers(text: str | None, name: str) -> Sequence[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--{name} is {text!r}; write numbers with commas, as in 0,1") from error


def _draw(plot: str, result: Any, path: Path, **options: Any) -> None:
    from divergence_lens import plots

    for written in plots.save_figure(getattr(plots, plot)(result, **options), path):
        typer.echo(f"figure in {written}")
