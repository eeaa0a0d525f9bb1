"""Compare finding divergence tokens with a plain Hugging Face loop on the same model and inputs.

    python benchmarks/divergence.py                    # tiny, 30m, and the memory of 30m-wide
    python benchmarks/divergence.py --shape 30m --backend bridge --examples 64
    python benchmarks/divergence.py --shape FOLDER --teachers 5 --threads 1 --no-memory
    python benchmarks/divergence.py --device cuda --shape qwen2.5-7b --json gpu.json

The baseline processes one example at a time through Hugging Face, with all teachers as one padded
batch and full logits. Both sides start from text, use the same weights and threads, and alternate;
the best of `--repeats` counts. Their predictions must be equal wherever our margin exceeds 1e-4,
and so must their divergence masks.

"x bare" is our time divided by that of the matrix products that cannot be avoided: every distinct
prefix of (teacher, prompt, completion) once through the layers, except for the last layer, which
needs only keys and values where no completion token is predicted, and the unembedding at the
predicting positions. Each product is timed on its own in a batch of 2,048 rows. "arithmetic" is
the baseline's arithmetic divided by this minimum.

Memory is the peak above that of the process with the model loaded; each side runs in a separate
process. On a GPU, the model is random in bfloat16, the margin for near-ties is 0.1 instead of 1e-4,
and "share" is relative to the card's measured rate of a large matrix product.
"""

import argparse
import copy
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import divergence_lens as dl
from divergence_lens.chat import encode_prompts
from divergence_lens.engine import get_engine
from divergence_lens.models import is_hooked
from divergence_lens.tiny import tiny_folder

BARE_ROWS = 2048


@dataclass(frozen=True)
class Shape:
    """The sizes of a random Qwen2 model."""

    vocab: int
    width: int = 512
    layers: int = 7
    heads: int = 8
    kv_heads: int = 2
    mlp: int = 1408
    tied: bool = True


SHAPES = {
    "30m": Shape(20_000),
    "30m-wide": Shape(151_936),
    "qwen2.5-7b": Shape(152_064, 3584, 28, 28, 4, 18944, tied=False),
}
EXAMPLES = {"tiny": 256, "tiny-qwen2": 256, "30m": 24, "30m-wide": 6, "qwen2.5-7b": 512}


def build(name: str, device: str) -> Any:
    """Build a Hugging Face model in eval mode."""
    if name in dl.tiny.TINY_MODELS:
        return AutoModelForCausalLM.from_pretrained(tiny_folder(name)).to(device).eval()
    if name not in SHAPES:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()
    shape = SHAPES[name]
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def wrap(hf: Any, backend: str, tokenizer: Any) -> Any:
    """Load the same weights into a TransformerLens model."""
    dtype = next(hf.parameters()).dtype
    device = next(hf.parameters()).device
    source = copy.deepcopy(hf)
    return dl.load_model(source, backend=backend, device=device, dtype=dtype, tokenizer=tokenizer)


def inputs(name: str, examples: int | None, teachers: int) -> tuple[Any, list[Any], list[Any]]:
    """The tokenizer, the teachers, and number lists that the first teacher wrote.

    The tiny model writes them, and random models have its tokenizer.
    """
    examples = examples or EXAMPLES.get(name, 16)
    writer = dl.load_model("tiny")
    conditions = [*dl.animal_teachers(dl.ANIMALS)[: teachers - 1], dl.Teacher("nobody")]
    data = dl.generate(writer, dl.number_prompts(examples, seed=0), teacher=conditions[0])
    if name in EXAMPLES:
        return writer.tokenizer, conditions, data
    tokenizer = AutoTokenizer.from_pretrained(name)
    written = [
        (*tokenizer.encode(row.completion, add_special_tokens=False), tokenizer.eos_token_id)
        for row in data
    ]
    lists = [
        dl.Example(row.prompt, row.completion, completion_ids=ids)
        for row, ids in zip(data, written, strict=True)
    ]
    return tokenizer, conditions, lists


@torch.no_grad()
def baseline(hf: Any, tokenizer: Any, data: Sequence[Any], teachers: Sequence[Any]) -> np.ndarray:
    """Compute each teacher's choice at each completion token, [teachers, tokens]."""
    device = next(hf.parameters()).device
    choices = []
    for example in data:
        answer = list(example.completion_ids)
        prompts = []
        for teacher in teachers:
            system = [{"role": "system", "content": teacher.system_prompt}]
            turns = [{"role": "user", "content": example.prompt}]
            prompts.append(
                tokenizer.apply_chat_template(
                    (system if teacher.system_prompt else []) + turns,
                    add_generation_prompt=True,
                    return_dict=False,
                )
            )
        width = max(map(len, prompts)) + len(answer)
        rows = [[*p, *answer, *[0] * (width - len(p) - len(answer))] for p in prompts]
        mask = [
            [1] * (len(p) + len(answer)) + [0] * (width - len(p) - len(answer)) for p in prompts
        ]
        logits = hf(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
        ).logits
        best = logits.argmax(-1).cpu().numpy()
        starts = [len(p) - 1 for p in prompts]
        choices.append([row[s : s + len(answer)] for row, s in zip(best, starts, strict=True)])
    return np.concatenate([np.stack(rows) for rows in choices], axis=1)


def ours(model: Any, data: Sequence[Any], teachers: Sequence[Any], **options: Any) -> Any:
    """Find divergence tokens with the library."""
    return dl.find_divergence(
        model, data, teacher=teachers[0], counterfactuals=teachers[1:], **options
    )


def products(
    config: Any, tokenizer: Any, data: Sequence[Any], teachers: Sequence[Any]
) -> list[tuple[float, int, int]]:
    """List (rows, inner, columns) of every matrix product that cannot be avoided."""
    rows = asked = 0
    context = 0
    for teacher in teachers:
        prompts = encode_prompts(
            tokenizer, [e.prompt for e in data], system_prompt=teacher.system_prompt
        )
        nodes, leaves = set(), set()
        for prompt, example in zip(prompts, data, strict=True):
            whole = (*prompt.ids, *example.completion_ids[:-1])
            nodes.update(whole[:end] for end in range(1, len(whole) + 1))
            leaves.update(whole[:end] for end in range(len(prompt.ids), len(whole) + 1))
        rows, asked = rows + len(nodes), asked + len(leaves)
        context += sum(map(len, nodes))
    (keys, *others), _ = sizes(config)
    width, layers = config.hidden_size, config.num_hidden_layers
    whole = layers - 1 + asked / rows
    return [
        (layers * rows, *keys),
        *((whole * rows, k, m) for k, m in others),
        # Attention scores and weighted values: one row per pair of positions.
        (whole * context, width, 2),
        (asked, width, config.vocab_size),
    ]


def padded_flops(
    config: Any, tokenizer: Any, data: Sequence[Any], teachers: Sequence[Any]
) -> float:
    """Floating-point operations of the baseline: every position of its padded batches."""
    lengths = np.array(
        [
            [len(row) for row in encode_prompts(tokenizer, texts, system_prompt=t.system_prompt)]
            for t in teachers
            for texts in [[e.prompt for e in data]]
        ]
    )
    answers = np.array([len(example.completion_ids) for example in data])
    widths = lengths.max(0) + answers
    rows = float(widths.sum() * len(teachers))
    pairs = float((widths**2).sum() * len(teachers))
    block, unembedding = sizes(config)
    layers = config.num_hidden_layers
    inner = sum(k * m for k, m in block)
    return 2.0 * (layers * (rows * inner + pairs * 2 * block[1][0]) + rows * unembedding)


def sizes(config: Any) -> tuple[list[tuple[int, int]], int]:
    """The matrices of a layer, keys and values first, and the size of the unembedding."""
    width = config.hidden_size
    if config.model_type == "gpt2":
        kv, hidden, fan = width, config.n_inner or 4 * width, 1
    else:
        kv = width // config.num_attention_heads * config.num_key_value_heads
        hidden, fan = config.intermediate_size, 2
    block = [(width, 2 * kv), (width, width), (width, width), (width, fan * hidden)]
    return [*block, (hidden, width)], width * config.vocab_size


def bare_seconds(wanted: list[tuple[float, int, int]], device: str) -> float:
    """Measure the time of these products alone."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    total = 0.0
    slowest = 0.0
    for rows, inner, columns in wanted:
        if columns == 2:
            total += rows * inner * slowest  # attention, at the rate of the slowest other product
            continue
        x = torch.randn(BARE_ROWS, inner, device=device, dtype=dtype)
        w = torch.randn(inner, columns, device=device, dtype=dtype)
        seconds = min(timed(lambda x=x, w=w: torch.mm(x, w), device)[1] for _ in range(5))
        total += rows / BARE_ROWS * seconds
        slowest = max(slowest, 2 * seconds / (BARE_ROWS * inner * columns))
    return total


def flops(wanted: list[tuple[float, int, int]]) -> float:
    """Floating-point operations of these products."""
    return sum(2.0 * rows * inner * columns for rows, inner, columns in wanted)


def timed(run: Callable[[], Any], device: str = "cpu") -> tuple[Any, float, float]:
    """Return the result of `run`, the wall-clock seconds, and the CPU seconds of all threads."""
    if device != "cpu":
        torch.cuda.synchronize()
    start, busy = time.perf_counter(), time.process_time()
    result = run()
    if device != "cpu":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start, time.process_time() - busy


def compare(name: str, backend: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time both sides on one model."""
    device = options.device
    tokenizer, teachers, data = inputs(name, options.examples, options.teachers)
    hf = build(name, device)
    model = wrap(hf, backend, tokenizer)
    ours(model, data[:2], teachers)
    baseline(hf, tokenizer, data[:2], teachers)
    own, other = [], []
    for _ in range(options.repeats):
        div, *spent = timed(lambda: ours(model, data, teachers, kl=options.kl), device)
        own.append(spent)
        expected, *spent = timed(lambda: baseline(hf, tokenizer, data, teachers), device)
        other.append(spent)
    clear = div.margin > (1e-4 if device == "cpu" else 0.1)
    if not (div.predicted == expected)[clear].all():
        raise SystemExit(f"{name}: predictions differ although the margin is large")
    agrees, differs = expected[0] == div.tokens, (expected[1:] != div.tokens).any(0)
    sure = clear.all(0)
    if not (div.mask == (agrees & differs))[sure].all():
        raise SystemExit(f"{name}: the divergence masks differ although all margins are large")
    (wall, busy), (wall_other, busy_other) = (np.min(times, axis=0) for times in (own, other))
    wanted = products(hf.config, tokenizer, data, teachers)
    tokens = div.predicted.size
    row = {
        "shape": name,
        "model": "HookedTransformer" if is_hooked(model) else "TransformerBridge",
        "examples": len(data),
        "teachers": len(teachers),
        "tokens": tokens,
        "clear": float(sure.mean()),
        "divergence_rate": div.rate,
        "tokens_per_second": tokens / wall,
        "baseline_tokens_per_second": tokens / wall_other,
        "ratio": wall_other / wall,
        "cpu_ratio": busy_other / busy,
        "over_bare_products": wall / bare_seconds(wanted, device),
        "needed_gflop": flops(wanted) / 1e9,
        "baseline_gflop": padded_flops(hf.config, tokenizer, data, teachers) / 1e9,
    }
    if device != "cpu":
        row["matrix_tflops"] = rate(device)
        row["share"] = flops(wanted) / wall / row["matrix_tflops"] / 1e12
        row["card"] = torch.cuda.get_device_name()
    return row


def operators(name: str, backend: str, options: argparse.Namespace) -> None:
    """Print the time of torch's own operators in our run, on one thread: a lower bound."""
    from torch.profiler import ProfilerActivity, profile

    tokenizer, teachers, data = inputs(name, options.examples, options.teachers)
    hf = build(name, options.device)
    model = wrap(hf, backend, tokenizer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours(model, data, teachers)
    baseline(hf, tokenizer, data[:2], teachers)
    _, _, busy = timed(lambda: ours(model, data, teachers))
    _, _, other = timed(lambda: baseline(hf, tokenizer, data, teachers))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        ours(model, data, teachers)
    torch.set_num_threads(threads)
    taken = sorted(
        ((event.self_cpu_time_total / 1e6, event.key) for event in profiler.key_averages()),
        reverse=True,
    )
    print(f"{name}, one thread: ours {busy:.2f} s, baseline {other:.2f} s of CPU time")
    for seconds, key in taken[:6]:
        print(f"  {key:55s} {seconds:5.2f} s")
    two = sum(seconds for seconds, key in taken if "addmm" in key or "scaled_dot" in key)
    print(f"  matrix products and attention alone: {other / two:.1f} x baseline")


def rate(device: str) -> float:
    """Measure the TFLOP/s of a large matrix product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = min(timed(lambda: torch.mm(a, b), device)[1] for _ in range(10))
    return 2 * 8192**3 / seconds / 1e12


def _memory_and_peak() -> tuple[int, int]:
    """The memory of this process in bytes, and its peak since `_reset_peak`."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the peak since the start (in bytes on macOS)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return tuple(int(lines[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def _reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak(side: str, name: str, options: argparse.Namespace, queue: Any) -> None:
    """Measure the peak bytes above the model for one side; runs in a separate process."""
    torch.set_num_threads(options.threads)
    tokenizer, conditions, data = inputs(name, None, options.teachers)
    hf = build(name, "cpu")
    if side == "baseline":
        run = lambda: baseline(hf, tokenizer, data, conditions)  # noqa: E731
    else:
        model = dl.load_model(hf, backend=side, tokenizer=tokenizer)
        del hf
        get_engine(model)  # runs the model's own forward once, as a check
        run = lambda: ours(model, data, conditions)  # noqa: E731
    _reset_peak()
    before, _ = _memory_and_peak()
    run()
    queue.put(_memory_and_peak()[1] - before)


def memory(name: str, backends: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak memory above the model for both sides."""
    context = multiprocessing.get_context("spawn")
    row: dict[str, Any] = {"shape": name, "vocabulary": SHAPES[name].vocab}
    for side in ("baseline", *backends):
        queue = context.SimpleQueue()
        process = context.Process(target=peak, args=(side, name, options, queue))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"the process that measured the memory of {side} failed")
        row[side] = queue.get() / 2**20
    return row


def main() -> None:
    """Run the selected comparisons, print a table, and optionally write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--shape",
        nargs="+",
        default=["tiny", "30m"],
        help=f"one of {', '.join(EXAMPLES)}, or the folder of a model",
    )
    parser.add_argument("--backend", nargs="+", choices=["hooked", "bridge"])
    parser.add_argument(
        "--examples", type=int, help="number of examples (default: depends on the shape)"
    )
    parser.add_argument("--teachers", type=int, default=13)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kl", action="store_true", help="also compute the soft scores")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--operators", action="store_true", help="only show where our time goes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backends = options.backend or (["bridge"] if dl.models.lens_classes().hooked is None else None)
    backends = backends or (["hooked", "bridge"] if options.device == "cpu" else ["bridge"])
    if options.operators:
        for name in options.shape:
            for backend in backends:
                operators(name, backend, options)
        return
    speed, held = [], []
    for name in options.shape:
        for backend in backends:
            row = compare(name, backend, options)
            speed.append(row)
            share = f", share of the card's rate {row['share']:.0%}" if "share" in row else ""
            print(
                f"{name:10s} {row['model']:18s} {row['tokens_per_second']:9,.0f} tokens/s, "
                f"baseline {row['baseline_tokens_per_second']:9,.0f}: "
                f"{row['ratio']:.2f} x (CPU {row['cpu_ratio']:.2f} x), "
                f"{row['over_bare_products']:.2f} x bare, "
                f"arithmetic {row['baseline_gflop'] / row['needed_gflop']:.2f} x{share}",
                flush=True,
            )
    if options.device == "cpu" and not options.no_memory:
        row = memory("30m-wide", backends, options)
        held.append(row)
        sides = ", ".join(
            f"{side} {row[side]:.0f} MiB (1/{row['baseline'] / max(row[side], 1e-9):.1f})"
            for side in backends
        )
        print(
            f"peak above the model, vocabulary {row['vocabulary']:,}: baseline "
            f"{row['baseline']:.0f} MiB, {sides}"
        )
    if options.json:
        record = {
            "threads": options.threads,
            "device": options.device,
            "machine": platform.processor() or platform.machine(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "speed": speed,
            "memory_mib": held,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
