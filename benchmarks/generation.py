"""Compare `generate` with Hugging Face's and TransformerLens's on the same model and prompts.

    python benchmarks/generation.py --model FOLDER
    python benchmarks/generation.py --model tiny --prompts 64 --repeats 3 --backends hooked
    python benchmarks/generation.py --model FOLDER --cpu --threads 1    # on a shared machine

Number prompts under a persona prompt, of unequal length. Hugging Face gets them as one batch,
padded on the left. TransformerLens gets one batch per length, because its left padding changes
results. All sides use the same weights and threads and take turns; the table has medians, with the
range in brackets.

Greedy completions must be equal token for token, unless the two most likely tokens differ by less
than 1e-3 in Hugging Face's logits. Sampled completions cannot equal those of another generator, so
each of our tokens is compared with the one that our draw selects from Hugging Face's logits.

"floor" is the share of our time that the counted arithmetic takes at the rate of a large matrix
product: every distinct prompt token once through the layers, each written token, and the
unembedding of each written token. "products" is the share that a profile finds in matrix products.
"""

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import divergence_lens as dl
from divergence_lens._utils.batching import shared_prefix
from divergence_lens.chat import encode_prompts, stop_ids
from divergence_lens.engine import get_engine
from divergence_lens.engine.static import StaticDecoder
from divergence_lens.generation.sampling import Sampler
from divergence_lens.tiny import TINY_MODELS, tiny_folder

OWL = dl.animal_teachers(["owl", "cat"])[0]
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear_pointwise")
Completions = list[tuple[int, ...]]


@dataclass
class Task:
    """Prompts and settings that every side completes."""

    prompts: list[str]
    rows: list[list[int]]
    stops: list[int]
    new_tokens: int
    temperature: float

    def cut(self, rows: Sequence[Sequence[int]]) -> Completions:
        """Cut written ids after the first that ends a completion."""
        ends = [
            next((i for i, token in enumerate(row) if token in self.stops), len(row) - 1)
            for row in rows
        ]
        return [tuple(row[: end + 1]) for row, end in zip(rows, ends, strict=True)]


def hugging_face(model: Any, task: Task) -> Completions:
    """Generate with one batch, padded on the left."""
    longest = max(map(len, task.rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in task.rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in task.rows])
    greedy = task.temperature == 0
    choice = {} if greedy else {"temperature": task.temperature, "top_k": 0, "top_p": 1.0}
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=not greedy,
        max_new_tokens=task.new_tokens,
        eos_token_id=task.stops,
        pad_token_id=0,
        **choice,
    )
    return task.cut(out[:, longest:].tolist())


def transformer_lens(model: Any, task: Task) -> Completions:
    """Generate with one batch per prompt length."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(task.rows):
        by_length[len(row)].append(number)
    written: dict[int, list[int]] = {}
    for length, numbers in by_length.items():
        out = model.generate(
            torch.tensor([task.rows[number] for number in numbers]),
            max_new_tokens=task.new_tokens,
            do_sample=task.temperature > 0,
            temperature=task.temperature or 1.0,
            stop_at_eos=True,
            eos_token_id=task.stops,
            return_type="tokens",
            verbose=False,
        )
        written |= dict(zip(numbers, out[:, length:].tolist(), strict=True))
    return task.cut([written[number] for number in range(len(task.rows))])


def ours(model: dl.Model, task: Task) -> Completions:
    """Generate with this library."""
    examples = dl.generate(
        model,
        task.prompts,
        teacher=OWL,
        max_new_tokens=task.new_tokens,
        temperature=task.temperature,
    )
    return [tuple(example.completion_ids or ()) for example in examples]


@torch.no_grad()
def check(hf_model: Any, task: Task, completions: Completions, name: str) -> int:
    """Compare completions with Hugging Face's logits of the same ids; return the number of ties.

    Raises:
        SystemExit: A token differs by more than rounding explains.
    """
    sampler = Sampler(task.temperature, 1.0, 0, task.prompts, task.new_tokens)
    ties = 0
    for number, (row, ids) in enumerate(zip(task.rows, completions, strict=True)):
        logits = hf_model(torch.tensor([row + list(ids)])).logits[0, len(row) - 1 : -1].float()
        steps = [(number, step) for step in range(len(ids))]
        chosen = sampler.choose(logits, steps).tolist()
        for step, (token, expected) in enumerate(zip(ids, chosen, strict=True)):
            if token == expected:
                continue
            gap = float(logits[step, expected] - logits[step, token])
            ties += 1
            if task.temperature == 0 and gap > 1e-3:
                raise SystemExit(f"{name}: prompt {number} differs at token {step} by {gap:.2g}")
    # A draw rarely falls so close to the border of two tokens that rounding decides.
    if task.temperature and ties > 1 + sum(map(len, completions)) // 1000:
        raise SystemExit(f"{name}: {ties} sampled tokens are not those of Hugging Face's logits")
    return ties


def arithmetic(engine: Any, task: Task, completions: Completions) -> float:
    """Count the floating-point operations that no side can avoid."""
    per_token = 2 * sum(
        parameter.numel()
        for layer in range(engine.n_layers)
        for parameter in engine.block_parameters(layer).values()
    )
    shared = shared_prefix(task.rows)
    written = sum(map(len, completions))
    # The last token of a completion is not read again.
    read = shared + sum(len(row) - shared for row in task.rows) + written - len(task.rows)
    return float(per_token * read + 2 * engine.d_model * engine.d_vocab * written)


def rate(engine: Any, clock: Callable[[], float]) -> float:
    """Measure the operations per second of a large matrix product."""
    left, right = torch.randn(2048, engine.d_model), torch.randn(engine.d_model, 4096)
    seconds = []
    for _ in range(8):
        start = clock()
        left @ right
        seconds.append(clock() - start)
    return 2 * left.numel() * right.shape[1] / min(seconds)


def product_share(run: Callable[[], object]) -> float:
    """Profile a run; return the share of its operators' time in matrix products."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    events = profiled.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS) / total


def spread(seconds: list[float]) -> str:
    """Format a median and a range."""
    return f"{statistics.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]"


@torch.no_grad()
def compare(
    hf_model: Any, models: dict[str, dl.Model], task: Task, options: argparse.Namespace
) -> dict[str, Any]:
    """Time all sides in turn, compare their completions, and print a row of the table each."""
    clock = time.process_time if options.cpu else time.perf_counter
    sides: dict[str, Callable[[], Completions]] = {
        "Hugging Face": lambda: hugging_face(hf_model, task)
    }
    for backend, model in models.items():
        if not isinstance(get_engine(model).decoder(), StaticDecoder):
            raise SystemExit(f"{backend}: the static decoder is not used")
        sides[backend] = lambda model=model: ours(model, task)
    if options.lens and "hooked" in models:
        sides["TransformerLens"] = lambda: transformer_lens(models["hooked"], task)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, Completions] = {}
    for _ in range(options.repeats):
        for name, run in sides.items():
            start = clock()
            results[name] = run()
            seconds[name].append(clock() - start)
    record: dict[str, Any] = {"prompts": len(task.rows), "temperature": task.temperature}
    peer = statistics.median(seconds["Hugging Face"])
    for name, completions in results.items():
        # The other sides draw from generators of their own.
        checked = name in models or task.temperature == 0
        ties = check(hf_model, task, completions, name) if checked else None
        row = {"seconds": seconds[name], "tokens": sum(map(len, completions)), "ties": ties}
        row["ratio"] = peer / statistics.median(seconds[name])
        shares = ""
        if name in models:
            engine = get_engine(models[name])
            floor = arithmetic(engine, task, completions) / rate(engine, clock)
            row["floor"] = floor / statistics.median(seconds[name])
            row["products"] = product_share(sides[name])
            shares = f"{row['floor']:.0%} | {row['products']:.0%}"
        record[name] = row
        kind = "greedy" if task.temperature == 0 else "sampled"
        print(
            f"| {len(task.rows)} | {kind} | {name} | {spread(seconds[name])} | {row['tokens']} | "
            f"{row['ratio']:.2f} | {shares or ' | '} |",
            flush=True,
        )
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the comparison as a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a folder, or a tiny model")
    parser.add_argument("--backends", nargs="+", default=["hooked", "bridge"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of time passed")
    parser.add_argument("--no-lens", dest="lens", action="store_false", help="skip TransformerLens")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = tiny_folder(options.model) if options.model in TINY_MODELS else options.model
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    models = {name: dl.load_model(options.model, backend=name) for name in options.backends}
    tokenizer: Any = next(iter(models.values())).tokenizer
    print("| prompts | | side | seconds | tokens | speedup | floor | products |")
    print("|---|---|---|---|---|---|---|---|")
    records = []
    for count in options.prompts:
        prompts = dl.number_prompts(count, seed=0)
        encoded = encode_prompts(tokenizer, prompts, system_prompt=OWL.system_prompt)
        rows = [list(prompt.ids) for prompt in encoded]
        for temperature in options.temperatures:
            stops = sorted(stop_ids(tokenizer))
            task = Task(prompts, rows, stops, options.new_tokens, temperature)
            records.append(compare(hf_model, models, task, options))
    if options.json is not None:
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
