"""Compare loading a model, with its checks, with Hugging Face's loading of the same files.

    python benchmarks/loading.py --model FOLDER
    python benchmarks/loading.py --model FILE.gguf --backends bridge

Hugging Face loads the model and its tokenizer. It maps the weights of a folder into memory and
reads them in the first forward pass, so the table has its time with and without a pass over 12
tokens. This library loads the model, checks it against Hugging Face's logits, and checks its passes
and fused blocks before the first use. All sides take turns in one process, after the imports. The
times are CPU seconds of one thread: the median and the range.
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import divergence_lens as dl
from divergence_lens.engine import get_engine
from divergence_lens.tiny import TINY_MODELS, tiny_folder


def hugging_face(model: str, *, passed: bool) -> None:
    """Load the model and its tokenizer, and run 12 tokens if `passed`."""
    path = tiny_folder(model) if model in TINY_MODELS else Path(model)
    file = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = path.parent if file else path
    AutoTokenizer.from_pretrained(folder, **file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file).eval()
    if passed:
        with torch.no_grad():
            loaded(torch.arange(12).reshape(2, 6))


def ours(model: str, backend: Any, *, used: bool) -> None:
    """Load the model with checks, and prepare its first use if `used`."""
    loaded = dl.load_model(model, backend=backend)
    if used:
        get_engine(loaded)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the comparison as a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny", help="a folder, a GGUF file, or a tiny model")
    parser.add_argument("--backends", nargs="+", default=["hooked", "bridge"])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sides: dict[str, Callable[[], None]] = {
        "Hugging Face": partial(hugging_face, options.model, passed=False),
        "Hugging Face, first pass": partial(hugging_face, options.model, passed=True),
    }
    for backend in options.backends:
        sides[backend] = partial(ours, options.model, backend, used=False)
        sides[f"{backend}, first use"] = partial(ours, options.model, backend, used=True)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, run in sides.items():
            gc.collect()  # the model before is released outside of the measured time
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    print(f"{Path(options.model).name}\n")
    print("| | CPU seconds | / loading | / loading and first pass |")
    print("|---|---|---|---|")
    for name, times in seconds.items():
        median = statistics.median(times)
        ratios = [median / statistics.median(seconds[peer]) for peer in list(sides)[:2]]
        print(
            f"| {name} | {median:.2f} [{min(times):.2f}, {max(times):.2f}] | "
            + " | ".join(f"{ratio:.1f}" for ratio in ratios)
            + " |"
        )


if __name__ == "__main__":
    main()
