"""Measure how time and memory grow with layers, positions, examples, teachers and vocabulary.

    python benchmarks/scaling.py                       # for docs/speed-peers.md: --write
    python benchmarks/scaling.py --tasks divergence --axes teachers vocabulary

Random Llama models (d_model 128) of four sizes along each axis, one process each, on one thread. A
slope is that of a straight line through the logarithms: 1 is proportional growth, 2 quadratic.

- time: CPU seconds, the best of `--rounds`
- memory: the peak above the loaded model (Linux only)
- ours: operations of the matrix products that ran
- plain: operations of plain Hugging Face passes for the same results: one pass per example and
  teacher, one per cell of a grid, two forward passes and a backward pass for a gradient, and one
  pass with a key/value cache for generation. A backward pass to the embeddings counts as one more
  forward pass.
"""

import argparse
import dataclasses
import math
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from products import Products
from tables import FIGURES, PAGE, merge_figures, table, timed, write_section
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import divergence_lens as dl
from divergence_lens.engine import get_engine
from divergence_lens.tiny import tiny_folder

STEPS = (1, 2, 4, 8)  # multiples of a size along an axis
AXES = ("layers", "positions", "examples", "teachers", "vocabulary")


@dataclass(frozen=True)
class Size:
    """A model and its inputs: layers, tokens per row or completion, rows, teachers, vocabulary."""

    layers: int = 4
    positions: int = 64
    examples: int = 16
    teachers: int = 2
    vocabulary: int = 4096


def random_llama(size: Size) -> LlamaForCausalLM:
    """Build a random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def divergence(model: Any, size: Size) -> tuple[Callable[[], Any], int]:
    """Completions of random tokens under several system prompts."""
    random = np.random.default_rng(0)
    factual, *others = dl.animal_teachers(dl.ANIMALS)[: size.teachers]
    examples = [
        dl.Example(prompt, completion_ids=tuple(random.integers(100, 200, size.positions).tolist()))
        for prompt in dl.number_prompts(size.examples, seed=0)
    ]

    def run() -> Any:
        return dl.find_divergence(model, examples, teacher=factual, counterfactuals=others)

    return run, size.examples * size.teachers


def pairs_of(size: Size) -> dl.Pairs:
    """Pairs of rows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(100, 200, (2, size.examples, size.positions), generator=generator)
    count = size.examples
    return dl.Pairs.from_tokens(rows[0], rows[1], answers=[1] * count, foils=[2] * count)


def grid(model: Any, size: Size) -> tuple[Callable[[], Any], int]:
    """The exact grid of resid_post."""
    pairs = pairs_of(size)
    passes = size.examples * size.layers * size.positions
    return lambda: dl.causal_mediation(model, pairs, site="resid_post"), passes


def gradient(model: Any, size: Size) -> tuple[Callable[[], Any], int]:
    """Gradient attribution of resid_post."""
    pairs = pairs_of(size)
    return lambda: dl.attribution_patch(model, pairs, site="resid_post"), 3 * size.examples


def generation(model: Any, size: Size) -> tuple[Callable[[], Any], int]:
    """Greedy completions of number prompts."""
    prompts = dl.number_prompts(size.examples, seed=0)
    return lambda: dl.generate(model, prompts, max_new_tokens=size.positions), size.examples


@dataclass(frozen=True)
class Task:
    """A call, and the smallest size along each axis; the other sizes are `base`."""

    prepare: Callable[[Any, Size], tuple[Callable[[], Any], int]]
    base: Size
    axes: dict[str, int]


_COMMON = {"layers": 2, "positions": 32, "examples": 4, "vocabulary": 4096}
TASKS = {
    "divergence": Task(divergence, Size(), _COMMON | {"teachers": 2}),
    "exact grid": Task(
        grid, Size(positions=32, examples=2), _COMMON | {"positions": 16, "examples": 1}
    ),
    "gradient": Task(gradient, Size(positions=128), _COMMON),
    "generation": Task(generation, Size(positions=32), _COMMON),
}


def memory() -> tuple[float, float]:
    """The memory of this process and its peak since `reset_peak`, in MiB; NaN if not Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan, math.nan
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / 1024, int(lines["VmHWM"].split()[0]) / 1024


def reset_peak() -> None:
    """Start a new peak of the memory of this process."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def point(name: str, size: Size, options: argparse.Namespace, queue: Any) -> None:
    """Measure one size; runs in a process of its own."""
    torch.set_num_threads(1)
    hf = random_llama(size)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("tiny"))
    model = dl.load_model(hf, backend=options.backend, tokenizer=tokenizer)
    get_engine(model)
    run, passes = TASKS[name].prepare(model, size)
    reset_peak()
    before, _ = memory()
    with Products() as ours:
        run()
    peak = memory()[1] - before
    times = [timed(run)[1] for _ in range(options.rounds)]
    with Products() as plain, torch.no_grad():
        # All positions of one row, through the plain model.
        hf(torch.zeros(1, size.positions, dtype=torch.long))
    figures = {
        "time": min(times),
        "memory": peak,
        "ours": ours.flops,
        "plain": plain.flops * passes,
    }
    queue.put(figures)


def measure(name: str, axis: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the sizes along one axis and return their figures and slopes."""
    task = TASKS[name]
    sizes = [task.axes[axis] * step for step in STEPS]
    context = multiprocessing.get_context("fork")
    figures = []
    for value in sizes:
        queue = context.SimpleQueue()
        size = dataclasses.replace(task.base, **{axis: value})
        process = context.Process(target=point, args=(name, size, options, queue))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"{name} with {axis} = {value} failed")
        figures.append(queue.get())
    columns = {key: [one[key] for one in figures] for key in figures[0]}
    x = np.log(sizes)
    slopes = {
        key: float(np.polyfit(x, np.log(np.maximum(values, 1e-9)), 1)[0])
        for key, values in columns.items()
    }
    return {"task": name, "axis": axis, "sizes": sizes, "figures": columns, "slopes": slopes}


def show(rows: dict[str, Any]) -> str:
    """Format the slopes, with the smallest and largest time and memory."""
    lines = []
    for row in rows.values():
        time, peak = row["figures"]["time"], row["figures"]["memory"]
        lines.append(
            [
                *(row["task"], row["axis"], f"{row['sizes'][0]:,} to {row['sizes'][-1]:,}"),
                f"{time[0]:.2g} to {time[-1]:.2g}",
                f"{peak[0]:.0f} to {peak[-1]:.0f}",
                *(f"{row['slopes'][key]:.2f}" for key in ("time", "ours", "plain", "memory")),
            ]
        )
    head = ("task", "axis", "sizes", "CPU s", "MiB", "time", "ours", "plain", "memory")
    return table(head, lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure the chosen tasks and axes, print the table, and return the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES))
    parser.add_argument("--backend", default="bridge", choices=["hooked", "bridge"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="update the figures of the docs")
    options = parser.parse_args(arguments)
    # Imports whatever loading needs once, before the processes fork.
    torch.set_num_threads(1)
    dl.load_model("tiny", backend=options.backend)
    rows = {}
    for name in options.tasks:
        for axis in options.axes:
            if axis in TASKS[name].axes:
                key = f"{name}, {axis}"
                rows[key] = measure(name, axis, options)
                print(show({key: rows[key]}).splitlines()[-1], flush=True)
                if options.write:  # after each row: the whole takes minutes
                    figures = merge_figures(FIGURES / "scaling.json", {"random Llama": rows})
                    write_section(PAGE, "scaling", show(figures["random Llama"]))
    return rows


if __name__ == "__main__":
    main()
