"""Show which share of the time is spent in matrix products, and what bfloat16 changes, on a CPU.

    python benchmarks/arithmetic.py --model FOLDER            # for docs/speed-peers.md: --write
    python benchmarks/arithmetic.py --model FOLDER --tasks generation lists --no-bfloat16

Each task runs once while its matrix products are recorded, and then `--rounds` times in float32
and in bfloat16 in turn, for CPU seconds over all threads. Two shares:

- of a large product: the counted operations at the rate of a product [2048, d_model] x [d_model,
  4096], divided by the time. Small products and copies of weights reach less.
- of the same products: the time of exactly these products alone, divided by the time. The rest is
  everything else: norms, activation functions, softmax, indexing, Python.

Agreement of bfloat16: the share of equal predictions and tokens, or the largest difference of
values relative to the largest value.
"""

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from products import Products
from tables import (
    FIGURES,
    PAGE,
    merge_figures,
    multiplications_per_second,
    spread,
    table,
    timed,
    two_digits,
    write_section,
)

sys.path.insert(0, str(Path(__file__).parent / "sides"))
from ours import TASKS, load

TITLES = {
    "generation": ("generate, 16 prompts, 32 tokens", 16),
    "lists": ("find_divergence, 2 teachers, 8 lists", 8),
    "answers": ("preference, 4 questions", 4),
    "patching": ("exact grid, one pair of 16 tokens", 16),
    "activations": ("gradient attribution, 8 pairs of 16 tokens", 16),
    "integrated": ("integrated inputs, 5 steps, 8 pairs of 16 tokens", 16),
    "training": ("LoRA on the middle layer, 16 lists, 2 epochs", 16),
}


def agreement(first: Any, second: Any) -> str:
    """Compare the results of two number formats."""
    if "tokens" in first:
        written = first["tokens"] >= 0
        return f"{(first['tokens'] == second['tokens'])[written].mean():.1%} of tokens equal"
    if "predicted" in first:
        equal = (first["predicted"] == second["predicted"]).mean()
        apart = np.abs(first["scores"] - second["scores"]).max() / np.abs(first["scores"]).max()
        return f"{equal:.1%} of predictions equal, largest difference {apart:.1%}"
    apart = max(float(np.abs(first[n] - second[n]).max() / np.abs(first[n]).max()) for n in first)
    correlations = [
        float(np.corrcoef(np.ravel(first[name]), np.ravel(second[name]))[0, 1])
        for name in first
        if np.size(first[name]) > 2
    ]
    return f"largest difference {apart:.1%}, correlation {min(correlations):.3f}"


def measure(name: str, models: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Measure one task in all formats; shares are those of float32."""
    title, size = TITLES[name]
    runs = {dtype: TASKS[name](model, size)[1] for dtype, model in models.items()}
    with Products() as products:
        runs["float32"]()
    times: dict[str, list[float]] = {dtype: [] for dtype in runs}
    results: dict[str, Any] = {}
    for _ in range(options.rounds):
        for dtype, run in runs.items():
            results[dtype], spent = timed(run)
            times[dtype].append(spent)
    width = models["float32"].cfg.d_model
    rate = 2 * multiplications_per_second(2048, width, 4096)
    row = {
        "task": title,
        "gflop": products.flops / 1e9,
        "gflops_of_large_product": rate / 1e9,
        "seconds_of_products": products.seconds(),
        "times": times,
        "backend": options.backend,
        "threads": options.threads,
    }
    if "bfloat16" in results:
        row["agreement"] = agreement(results["float32"], results["bfloat16"])
    return row


def shares(rows: dict[str, Any]) -> str:
    """Format the shares of the time in matrix products."""
    lines = []
    for row in rows.values():
        own = median(row["times"]["float32"])
        large = 1e9 * row["gflop"] / (1e9 * row["gflops_of_large_product"]) / own
        lines.append(
            [
                *(row["task"], spread(row["times"]["float32"]), two_digits(row["gflop"])),
                *(two_digits(row["gflop"] / own), f"{large:.0%}"),
                f"{row['seconds_of_products'] / own:.0%}",
            ]
        )
    head = ("task", "CPU s", "GFLOP", "GFLOP/s", "of a large product", "of the same products")
    return table(head, lines)


def formats(rows: dict[str, Any]) -> str:
    """Format the comparison of float32 and bfloat16."""
    lines = []
    for row in rows.values():
        if "bfloat16" in row["times"]:
            single, half = (median(row["times"][dtype]) for dtype in ("float32", "bfloat16"))
            lines.append(
                [
                    *(row["task"], two_digits(single), two_digits(half)),
                    *(f"{single / half:.2g}", row["agreement"]),
                ]
            )
    return table(("task", "float32, CPU s", "bfloat16, CPU s", "speedup", "agreement"), lines)


def write(model: str, rows: dict[str, Any]) -> None:
    """Store figures and write the tables."""
    figures = merge_figures(FIGURES / "arithmetic.json", {model: rows})
    for section, show in (("arithmetic", shares), ("bfloat16", formats)):
        tables = [f"**{name}**\n\n{show(part)}" for name, part in figures.items()]
        write_section(PAGE, section, "\n\n".join(tables))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure the chosen tasks, print both tables, and return the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--tasks", nargs="+", default=list(TITLES), choices=list(TITLES))
    parser.add_argument("--backend", default="bridge", choices=["hooked", "bridge"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-bfloat16", dest="bfloat16", action="store_false")
    parser.add_argument("--write", action="store_true", help="update the figures of the docs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    dtypes = ["float32", *(["bfloat16"] if options.bfloat16 else [])]
    models = {
        dtype: load(str(options.model), options.backend, getattr(torch, dtype)) for dtype in dtypes
    }
    rows = {}
    for name in options.tasks:
        rows[name] = measure(name, models, options)
        print(shares({name: rows[name]}).splitlines()[-1])
        print(formats({name: rows[name]}).splitlines()[-1], flush=True)
        if options.write:  # after each row: the whole takes minutes
            write(options.model.name, rows)
    return rows


if __name__ == "__main__":
    main()
