"""Compute the memory and time that a run on a large model would take; nothing is measured.

    python benchmarks/plan.py
    python benchmarks/plan.py --shape llama-70b --devices 8 --teachers 15 --prompts 30000
    python benchmarks/plan.py --tokenizer FOLDER          # counts the tokens with this tokenizer
    python benchmarks/plan.py --rate 300                  # the rate that your card reaches, TFLOP/s
    python benchmarks/plan.py --paper                     # the whole of StudyConfig.paper

Parameters, tokens and the arithmetic of every step are counted as this library does them. The time
of a step is its arithmetic divided by a rate, or its bytes divided by a bandwidth if that takes
longer (writing one token reads all weights once). The rate is a guess until you measure it: the
default is 40 % of the card's stated peak. `python benchmarks/divergence.py --device cuda --shape
qwen2.5-7b` measures the card's rate for a large matrix product and the share of it that reading
reaches. The plan excludes model loading, tokenization, disk access and idle time of the card.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

GIB = 2**30
BYTES = 2  # per bfloat16 value


@dataclass(frozen=True)
class Shape:
    """A decoder with gated MLPs and grouped keys and values."""

    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def block(self) -> int:
        """The number of parameters in the matrices of one layer."""
        head = self.width // self.heads
        attention = 2 * self.width * self.width + 2 * self.width * self.kv_heads * head
        return attention + 3 * self.width * self.mlp

    @property
    def unembedding(self) -> int:
        """The number of parameters in the unembedding; the embedding has as many."""
        return self.width * self.vocab

    @property
    def parameters(self) -> int:
        """The number of all parameters except biases and norms."""
        return self.layers * self.block + 2 * self.unembedding

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * (self.width // self.heads) * BYTES


SHAPES = {
    "qwen2.5-7b": Shape(28, 3584, 18944, 28, 4, 152_064),
    "llama-70b": Shape(80, 8192, 28672, 64, 8, 128_256),
}


@dataclass(frozen=True)
class Card:
    """A device's stated specification: bfloat16 without sparsity, memory, bandwidth."""

    tflops: float
    gib: float
    bandwidth: float  # bytes per second


CARDS = {
    "h100": Card(989, 80, 3.35e12),
    "h200": Card(989, 141, 4.8e12),
    "a100": Card(312, 80, 2.0e12),
    "rtx4090": Card(165, 24, 1.0e12),
}


@dataclass(frozen=True)
class Tokens:
    """Token counts of a row: the shared prefix of the prompts, the rest of the prompt, the answer.

    The defaults are means over 2,000 number prompts with instructions, with the persona prompt and
    the template of Qwen2.5, and over lists that Qwen2.5-7B-Instruct wrote for such prompts.
    """

    shared: float = 31
    prompt: float = 64.5
    completion: float = 40


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        name: Description of the step.
        flops: Floating-point operations of the matrix products.
        moved: Bytes of weights that are read, if that may take longer.
        memory: Bytes in addition to the weights.
    """

    name: str
    flops: float
    moved: float = 0.0
    memory: float = 0.0


def attention(shape: Shape, tokens: float, context: float) -> float:
    """Operations of attention, where each token attends to half of `context` on average."""
    return 4 * shape.layers * shape.width * tokens * context / 2


def steps(
    shape: Shape, tokens: Tokens, *, teachers: int, prompts: int, pairs: int, epochs: int
) -> Iterator[Step]:
    """The steps of a study of one target, with the memory that each needs."""
    row = tokens.shared + tokens.prompt + tokens.completion
    body = 2 * shape.layers * shape.block
    batch = 16_384
    logits = 4 * 2_048 * shape.vocab * 4  # chunks of float32 logits and intermediate results
    rows = max(1.0, 8_192 // row)
    read = prompts * (tokens.prompt + tokens.completion)
    written = prompts * tokens.completion
    yield Step(
        "generate: one teacher writes",
        read * body + attention(shape, read, row) + 2 * shape.unembedding * written,
        moved=written / rows * BYTES * (shape.parameters - shape.unembedding),
        memory=rows * row * shape.kv_bytes + logits,
    )
    yield Step(
        f"find_divergence: {teachers} teachers read",
        teachers * (read * body + attention(shape, read, row) + 2 * shape.unembedding * written),
        memory=batch * shape.width * BYTES * 12 + logits,
    )
    # A forward pass over a row; the gradient with respect to activations costs as much again.
    forward = row * body + attention(shape, row, row)
    yield Step(
        f"attribution_patch, gradient: {pairs} pairs",
        pairs * 3 * forward,
        memory=32 * row * shape.layers * (6 * shape.width + 3 * shape.mlp) * BYTES,
    )
    # Each layer's path of ten steps starts at that layer: half of the layers on average.
    yield Step(
        f"attribution_patch, integrated: {pairs} pairs",
        pairs * (2 * forward + 10 * 2 * forward * (shape.layers + 1) / 2),
        memory=32 * row * shape.layers * (6 * shape.width + 3 * shape.mlp) * BYTES,
    )
    # A patch at position p affects positions from p on in the layers above it.
    positions = row * (row + 1) / 2 * (shape.layers + 1) / 2
    grid = positions * body + attention(shape, positions, row)
    cells = row * shape.layers
    yield Step(
        f"causal_mediation, resid_post: {pairs} pairs",
        pairs * (2 * forward + grid + cells * 2 * shape.unembedding),
        memory=128 * row * 12 * shape.width * BYTES + 128 * shape.vocab * 4 * 2,
    )
    learned = prompts * row
    train = 2 * body * learned + 4 * shape.unembedding * written
    adapter = 16 * (shape.width + shape.mlp) * 8 * shape.layers
    yield Step(
        f"finetune, LoRA on all blocks: {epochs} epochs",
        epochs * (train + 2 * attention(shape, learned, row)),
        memory=60 * row * shape.layers * (8 * shape.width + 4 * shape.mlp) * BYTES + adapter * 16,
    )
    # Last layer only: the layers below run in the first epoch only, and their output is cached.
    one = train / shape.layers + 4 * shape.unembedding * written * (1 - 1 / shape.layers)
    yield Step(
        f"finetune, LoRA on the last block: {epochs} epochs",
        learned * body + epochs * one,
        memory=min(learned * shape.width * BYTES, 2**31) + logits,
    )


def paper_steps(shape: Shape, tokens: Tokens) -> Iterator[Step]:
    """The steps of `StudyConfig.paper`: all targets, conditions and seeds."""
    from divergence_lens.study import StudyConfig

    config = StudyConfig.paper(n_layers=shape.layers)
    design, targets, seeds = config.paper_design, len(config.targets), len(config.seeds)
    assert design is not None
    options = {"teachers": len(config.animals), "pairs": 0, "epochs": config.prompted_recipe.epochs}
    # Every teacher and the base model write sampled and greedy lists, and all teachers read both.
    write, read, *_ = steps(shape, tokens, prompts=config.prompts, **options)
    *_, whole, last = steps(shape, tokens, prompts=design.lists, **options)
    conditions = [c for c in config.conditions if not c.shared]
    alone = sum(c.layers is not None for c in conditions)
    students = seeds * (targets * len(conditions) + 1)
    single = seeds * targets * alone
    yield _times(write, 2 * (targets + 1), f"{2 * (targets + 1)} sets of lists")
    yield _times(read, 2 * targets, f"{2 * targets} divergences, {options['teachers']} teachers")
    yield _times(whole, students - single, f"{students - single:,} students of all layers")
    # The last layer's backward pass is the shortest: twice its time is about that of the middle.
    yield _times(last, 2 * single, f"{single:,} students of one layer")
    asked = Tokens(shared=tokens.shared, prompt=15, completion=design.answer_tokens)
    answers, *_ = steps(shape, asked, prompts=50 * design.samples, **options)
    yield _times(answers, students, f"{students:,} evaluations of {50 * design.samples:,} answers")


def _times(step: Step, n: int, name: str) -> Step:
    return Step(name, n * step.flops, n * step.moved, step.memory)


def counted(folder: str) -> Tokens:
    """Count mean tokens of number prompts with a tokenizer; completions keep the default."""
    from transformers import PreTrainedTokenizerFast

    import divergence_lens as dl
    from divergence_lens.chat import encode_prompts

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    prompts = dl.number_prompts(2_000, seed=0, instructions=True)
    rows = [
        encoded.ids
        for encoded in encode_prompts(tokenizer, prompts, system_prompt=dl.persona_prompt("owl"))
    ]
    same = zip(*rows, strict=False)
    shared = next(place for place, ids in enumerate(same) if len(set(ids)) > 1)
    mean = sum(map(len, rows)) / len(rows)
    return Tokens(shared=shared, prompt=round(mean - shared, 1))


def table(args: argparse.Namespace) -> list[str]:
    """The lines of the plan."""
    shape, card = SHAPES[args.shape], CARDS[args.card]
    rate = args.rate or 0.4 * card.tflops
    tokens = counted(args.tokenizer) if args.tokenizer else Tokens()
    prompts = 30_000 if args.paper else args.prompts
    weights = shape.parameters * BYTES
    held = weights / args.devices if args.split else weights
    lines = [
        f"{args.shape}: {shape.parameters / 1e9:.2f} billion parameters, {weights / GIB:.0f} GiB",
        f"{args.devices} x {args.card}: {rate:.0f} TFLOP/s, {card.bandwidth / 1e12:.2f} TB/s",
        f"{prompts:,} prompts of {tokens.shared:g} shared and {tokens.prompt:g} other tokens",
        f"{tokens.completion:g} tokens of completion",
        "",
        f"{'step':48}{'PFLOP':>9}{'hours':>9}{'GiB':>7}",
    ]
    total = 0.0
    planned = (
        paper_steps(shape, tokens)
        if args.paper
        else steps(
            shape,
            tokens,
            teachers=args.teachers,
            prompts=args.prompts,
            pairs=args.pairs,
            epochs=args.epochs,
        )
    )
    for step in planned:
        # A model split across devices runs on one of them at a time.
        at_once = 1 if args.split else args.devices
        seconds = max(step.flops / (rate * 1e12), step.moved / card.bandwidth) / at_once
        total += seconds
        memory = (held + step.memory) / GIB
        over = "" if memory * GIB / 1e9 < card.gib else "  exceeds the card's memory"
        lines.append(
            f"{step.name:48}{step.flops / 1e15:9,.0f}{seconds / 3600:9.2f}{memory:7.0f}{over}"
        )
    lines.append(f"{'all':48}{'':9}{total / 3600:9.2f}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Print the plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--card", choices=CARDS, default="h100")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--split", action="store_true", help="split one model across all devices")
    parser.add_argument("--rate", type=float, help="measured TFLOP/s of a device")
    parser.add_argument("--teachers", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=30_000)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--paper", action="store_true", help="the whole of StudyConfig.paper")
    parser.add_argument("--tokenizer", help="folder of the tokenizer used to count tokens")
    print("\n".join(table(parser.parse_args(arguments))))


if __name__ == "__main__":
    main()
