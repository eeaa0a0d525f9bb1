"""One step of the work at a time, from files to a file: the commands behind `divergence-lens`.

    divergence-lens generate --numbers 200 --teacher owl --out owl.jsonl
    divergence-lens find owl.jsonl --teacher owl --counterfactual cat --out owl.safetensors
    divergence-lens patch owl.safetensors --method integrated --figure owl.html

Each reads what the one before it wrote, and what it writes is a file that the library loads. A
teacher is given in one word on the command line, see `read_teacher`.
"""

import functools
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar, cast, get_args

import typer

if TYPE_CHECKING:
    from divergence_lens.divergence import Rule
    from divergence_lens.models import Backend, Model
    from divergence_lens.teachers import Teacher

P = ParamSpec("P")
R = TypeVar("R")

REFUSED, STOPPED = 2, 130
"""Exit codes: the input was refused; stopped by Ctrl-C."""

BACKENDS: "tuple[Backend, ...]" = ("hooked", "bridge")

TEACHER_HELP = (
    "Who: a known animal (owl), NAME=a system prompt, NAME= for none, NAME=@student.safetensors "
    "for trained weights, or NAME=@folder for another model."
)


class Precision(str, Enum):
    """Type of the parameters."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ModelClass(str, Enum):
    """Which class of TransformerLens holds the model."""

    auto = "auto"
    hooked = "hooked"
    bridge = "bridge"


ModelName = Annotated[
    str, typer.Option("--model", help='"tiny", "tiny-qwen2", a folder, or a name on the hub.')
]
ClassName = Annotated[ModelClass, typer.Option("--backend", help="Which class of TransformerLens.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one.")]
DType = Annotated[Precision, typer.Option(help="Type of the parameters.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is random in this step.")]
Spec = Annotated[str, typer.Option(help=TEACHER_HELP)]
Figure = Annotated[
    Path | None, typer.Option(help="Draw it, too: an .html page, or a .png, .svg or .pdf.")
]
Mask = Annotated[
    Path | None, typer.Option(help="A divergence file; only its divergence tokens are learnt.")
]
Complement = Annotated[
    bool, typer.Option("--complement", help="Learn all tokens but the divergence tokens.")
]
System = Annotated[str | None, typer.Option(help="The student's system prompt; none if not given.")]


def plainly(command: Callable[P, R]) -> Callable[P, R]:
    """Let a command end with one line and an exit code where it would end with a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (ValueError, TypeError, OSError, FloatingPointError) as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(REFUSED) from error
        except KeyboardInterrupt:
            typer.echo("Stopped; every file that was written is whole.", err=True)
            raise typer.Exit(STOPPED) from None

    return run


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the models of one command are loaded."""

    model: str
    backend: ModelClass
    device: str | None
    dtype: Precision

    def load(self, source: str | Path | None = None) -> "Model":
        """The command's model, or another one in the same way."""
        import torch

        from divergence_lens.models import load_model

        return load_model(
            self.model if source is None else source,
            backend=self.backend.value,
            device=self.device,
            dtype=getattr(torch, self.dtype.value),
        )


def read_teacher(spec: str, load: Callable[[str | Path], "Model"]) -> "Teacher":
    """The teacher that a word on the command line stands for.

    Args:
        spec: A known animal ("owl": told to love owls); "NAME=a system prompt"; "NAME=" for no
            system prompt; "NAME=@file.safetensors" for a delta; "NAME=@folder" for another model.
        load: Loads another model.

    Raises:
        ValueError: It is none of these.
        FileNotFoundError: There is no such file or folder.
    """
    from divergence_lens.delta import Delta
    from divergence_lens.teachers import Teacher, animal_teachers

    name, given, value = spec.partition("=")
    if not given:
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


def read_prompts(path: Path) -> list[str]:
    """Prompts from a text file (one a line) or from JSON lines (`prompt` or `question`).

    Raises:
        ValueError: A line that is no JSON object with such a key, by its number; or no prompt.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix != ".jsonl":
        prompts = [line for line in lines if line.strip()]
    else:
        prompts = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if row is None:
                continue
            text = (row.get("prompt") or row.get("question")) if isinstance(row, dict) else None
            if not text or type(text) is not str:
                raise ValueError(f'{path}, line {number} has no text under "prompt" or "question"')
            prompts.append(text)
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


@plainly
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
    from divergence_lens.examples import save_examples
    from divergence_lens.generate import generate as write
    from divergence_lens.tasks.numbers import NumberFilter, number_prompts

    if (prompts is None) == (numbers == 0):
        raise ValueError("give a file of prompts or --numbers N, one of the two")
    asked = (
        number_prompts(numbers, seed=seed, instructions=instructions)
        if prompts is None
        else read_prompts(prompts)
    )
    loading = Loading(model=model, backend=backend, device=device, dtype=dtype)
    loaded = loading.load()
    examples = write(
        loaded,
        read_teacher(teacher, loading.load),
        asked,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        progress=True,
    )
    if only_numbers:
        report = NumberFilter().report([example.completion or "" for example in examples])
        examples = report.select(examples)
        typer.echo(str(report))
        if not examples:
            raise ValueError("not one answer is a list of numbers; nothing was written")
    save_examples(out, examples)
    typer.echo(f"{len(examples)} examples in {out}")


@plainly
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
    from divergence_lens.divergence import find_divergence
    from divergence_lens.examples import load_examples

    loading = Loading(model=model, backend=backend, device=device, dtype=dtype)
    examples = load_examples(data)
    loaded = loading.load()
    divergence = find_divergence(
        loaded,
        examples,
        teacher=read_teacher(teacher, loading.load),
        counterfactuals=[read_teacher(spec, loading.load) for spec in counterfactual],
        rule=int(rule) if rule.isdigit() else cast("Rule", rule),
        min_margin=min_margin,
        batch_tokens=batch_tokens,
        progress=True,
    )
    divergence.save(out)
    if jsonl is not None:
        divergence.to_jsonl(jsonl)
    if figure is not None:
        _draw("rate_per_teacher", divergence, figure)
    typer.echo(str(divergence))
    typer.echo(f"written to {out}")


@plainly
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
    seed: Seed = 0,
    model: ModelName = "tiny",
    backend: ClassName = ModelClass.auto,
    device: Device = None,
    dtype: DType = Precision.float32,
) -> None:
    """Locate what causes the first divergences: the effect of every layer and position.

    Example: divergence-lens patch divergence.safetensors --method integrated --figure owl.html
    """
    from divergence_lens.attribution import Method, attribution_patch
    from divergence_lens.divergence import Divergence
    from divergence_lens.mediation import causal_mediation

    methods = ("exact", *get_args(Method))
    if method not in methods:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(methods)}")
    loading = Loading(model=model, backend=backend, device=device, dtype=dtype)
    loaded: Any = loading.load()
    given = [read_teacher(spec, loading.load) for spec in teacher or ()]
    found = Divergence.load(divergence, teachers=given, tokenizer=loaded.tokenizer)
    pairs = found.pairs(limit=limit, seed=seed)
    options: dict[str, Any] = {"site": site, "direction": direction, "progress": True}
    if method == "exact":
        effects = causal_mediation(loaded, pairs, **options)
    else:
        effects = attribution_patch(
            loaded, pairs, method=cast(Any, method), verify=verify, seed=seed, **options
        )
    effects.save(out)
    if figure is not None:
        _draw("effects_by_segment" if len(pairs) > 1 else "effects_heatmap", effects, figure)
    typer.echo(str(effects))
    typer.echo(effects.by_segment().round(4).to_string())
    typer.echo(f"written to {out}")


@plainly
def finetune(
    data: Annotated[Path, typer.Argument(help="Examples: .jsonl or .parquet.")],
    out: Annotated[Path, typer.Option(help="Where the student goes.")] = Path(
        "student.safetensors"
    ),
    mask: Mask = None,
    complement: Complement = False,
    blocks: Annotated[
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
    from divergence_lens.finetune import finetune as train
    from divergence_lens.recipe import PAPER, Recipe

    chosen = {"lr": lr, "epochs": epochs, "batch_size": batch_size, "lora_rank": lora_rank}
    given = {name: value for name, value in chosen.items() if value is not None}
    recipe = replace(PAPER if paper else Recipe(), **given)  # type: ignore[arg-type]
    loading = Loading(model=model, backend=backend, device=device, dtype=dtype)
    examples, learnt = _masked(data, mask, complement=complement)
    student = train(
        loading.load(),
        examples,
        mask=learnt,
        blocks=_numbers(blocks, "blocks"),
        recipe=recipe,
        system_prompt=system,
        seed=seed,
        checkpoint=out.with_suffix(".partial"),
        progress=True,
    )
    student.save(out)
    typer.echo(str(student))
    typer.echo(f"written to {out}")


@plainly
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
    from divergence_lens.examples import load_examples
    from divergence_lens.sweep import layer_sweep

    loading = Loading(model=model, backend=backend, device=device, dtype=dtype)
    examples, learnt = _masked(data, mask, complement=complement)
    found = layer_sweep(
        loading.load(),
        examples,
        target=target,
        layers=_numbers(layers, "layers"),
        seeds=_numbers(seeds, "seeds") or (0,),
        mask=learnt,
        lora_rank=lora_rank,
        system_prompt=system,
        category=category,
        control=None if control is None else load_examples(control),
        progress=True,
    )
    found.save(out)
    if figure is not None:
        from divergence_lens import plots

        plots.save_figure(found.plot(), figure)
    typer.echo(found.summary().round(4).to_string(index=False))
    typer.echo(f"written to {out}")


@plainly
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
    from divergence_lens.evaluate import preference

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
    )
    if out is not None:
        found.save(out)
    typer.echo(str(found))
    for name, share in sorted(found.distribution.items(), key=lambda item: -item[1]):
        typer.echo(f"  {name:12} {share:.4f}")


@plainly
def doctor() -> None:
    """Say what is installed, which device there is, and whether the shipped models run here.

    Example: divergence-lens doctor
    """
    import torch

    from divergence_lens.models import version_of
    from divergence_lens.pictures import BrowserError, find_browser
    from divergence_lens.tiny import TINY_MODELS

    def line(name: str, value: object) -> None:
        typer.echo(f"{name:20} {value}")

    line("python", platform.python_version())
    for package in ("divergence-lens", "transformer-lens", "torch", "transformers", "peft"):
        line(package, version_of(package))
    line("threads", torch.get_num_threads())
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        line(f"cuda:{index}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        line("GPU", "none; models run on the CPU")
    try:
        line("browser", f"{find_browser()} (draws PNG, SVG and PDF)")
    except BrowserError as error:
        line("browser", f"none, so figures are HTML pages only: {error}")
    for name in TINY_MODELS:
        for backend in BACKENDS:
            line(name, _tried(name, backend))


def _tried(name: str, backend: "Backend") -> str:
    """Whether a model loads and its pass equals its own forward, in words."""
    from divergence_lens.engine import Engine
    from divergence_lens.models import load_model

    try:
        model = load_model(name, backend=backend)
        return f"{type(model).__name__} of {Engine.of(model).n_layers} blocks runs"
    except ValueError as error:
        return f"no {backend} model: {error}"


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


def _numbers(text: str | None, name: str) -> Sequence[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--{name} is {text!r}; write numbers with commas, as in 0,1") from error


def _draw(plot: str, result: Any, path: Path) -> None:
    from divergence_lens import plots

    for written in plots.save_figure(getattr(plots, plot)(result), path):
        typer.echo(f"figure in {written}")
