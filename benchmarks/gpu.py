"""Measure the library once on a GPU, in one command of at most 8 minutes.

    python benchmarks/gpu.py                                  # random weights of Qwen2.5-7B's shape
    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --shape tiny --device cpu --no-compile    # tries the command itself

The model has random weights in bfloat16 (float32 on a CPU). Rows show the time, the peak of the
card's memory, and the share of the card's rate, which is measured with a large matrix product. The
share counts the matrix products of the positions that the engine computed, without attention
scores; it is left out where a backward pass runs as well. The first rows compare plain forward
passes of Hugging Face, with torch's attention kernels and `torch.compile`, with the engine's. A
step starts only if `--minutes` are not over; steps that fail say why, and the others still run.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Qwen2Config

import divergence_lens as dl
from divergence_lens.engine import get_engine


@dataclass(frozen=True)
class Shape:
    """Sizes of a random Qwen2 model and of its tasks."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    lists: int
    row: int
    pairs: int
    new_tokens: int
    product: int

    @property
    def block(self) -> int:
        """Parameters in the matrices of one layer."""
        keys = self.width // self.heads * self.kv_heads
        return 2 * self.width * (self.width + keys) + 3 * self.width * self.mlp


SHAPES = {
    "qwen2.5-7b": Shape(152_064, 3584, 28, 28, 4, 18_944, 64, 96, 10, 32, 8192),
    "tiny": Shape(2_000, 64, 3, 4, 2, 128, 4, 24, 2, 4, 256),
}

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def build(shape: Shape, device: str) -> Any:
    """Build a random Hugging Face model."""
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class Bench:
    """Runs steps and collects their rows until the time is over."""

    def __init__(self, shape: Shape, device: str, minutes: float) -> None:
        self.shape, self.device = shape, device
        self.rows: list[dict[str, Any]] = []
        self._end = time.perf_counter() + 60 * minutes
        self.rate = self._rate()

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def _rate(self) -> float:
        """Measure the FLOP/s of a large matrix product."""
        size = self.shape.product
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        best = float("inf")
        for _ in range(10):
            self._wait()
            start = time.perf_counter()
            torch.mm(a, b)
            self._wait()
            best = min(best, time.perf_counter() - start)
        return 2 * size**3 / best

    def step(
        self,
        name: str,
        run: Callable[[], Any],
        *,
        flops: Callable[[], float] | None = None,
        repeats: int = 1,
    ) -> Any:
        """Time one step after a warm-up, if it is to be repeated; print and store its row."""
        if time.perf_counter() > self._end:
            self._report({"step": name, "skipped": "the time is over"})
            return None
        if self.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        result, best = None, float("inf")
        try:
            for _ in range(repeats + (repeats > 1)):
                self._wait()
                start = time.perf_counter()
                result = run()
                self._wait()
                best = min(best, time.perf_counter() - start)
        except Exception as error:  # noqa: BLE001 - the other steps still run
            self._report({"step": name, "failed": " ".join(str(error).split())[:200]})
            return None
        row: dict[str, Any] = {"step": name, "seconds": best}
        if self.device != "cpu":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if flops is not None:
            row["share"] = flops() / best / self.rate
        self._report(row)
        return result

    def _report(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        cells = [
            f"{row['seconds']:8.3f} s" if "seconds" in row else "",
            f"{row['peak_gib']:6.1f} GiB" if "peak_gib" in row else "",
            f"{row['share']:5.0%} of the rate" if "share" in row else "",
            *(f"{key}: {row[key]}" for key in ("skipped", "failed") if key in row),
        ]
        print(f"{row['step']:44s} {'  '.join(filter(None, cells))}", flush=True)


def forwards(bench: Bench, hf: Any, *, compiled: bool) -> None:
    """Time plain forward passes of Hugging Face, without logits except at the last position."""
    shape = bench.shape
    tokens = torch.randint(shape.vocab, (16, shape.row), device=bench.device)
    flops = 2.0 * tokens.numel() * shape.layers * shape.block

    def forward(model: Any) -> Callable[[], Any]:
        @torch.no_grad()
        def run() -> Any:
            return model(tokens, use_cache=False, logits_to_keep=1).logits

        return run

    for name, kernel in {"default": None, **SDPA}.items():
        with nullcontext() if kernel is None else sdpa_kernel(kernel):
            bench.step(f"Hugging Face forward, {name}", forward(hf), flops=lambda: flops, repeats=3)
    if compiled:
        bench.step(
            "Hugging Face forward, torch.compile",
            forward(torch.compile(hf)),
            flops=lambda: flops,
            repeats=3,
        )
        torch.compiler.reset()


def library(bench: Bench, hf: Any) -> None:
    """Time the library's calls."""
    shape = bench.shape
    writer = dl.load_model("tiny")
    dtype = next(hf.parameters()).dtype
    model = dl.load_model(
        hf, backend="bridge", device=bench.device, dtype=dtype, tokenizer=writer.tokenizer
    )
    engine = bench.step("first use: checks of the engine", lambda: get_engine(model))
    if engine is None:
        raise SystemExit("the engine refuses the model; the other steps need it")
    start = dataclasses.replace(engine.work)

    def counted() -> float:
        """FLOPs of the products since the last call, from the positions that were computed."""
        nonlocal start
        positions = engine.work.positions - start.positions
        unembedded = engine.work.unembedded - start.unembedded
        start = dataclasses.replace(engine.work)
        return 2.0 * (positions * shape.block + unembedded * shape.width * shape.vocab)

    tokens = torch.randint(shape.vocab, (16, shape.row), device=bench.device)

    @torch.no_grad()
    def forward() -> Any:
        return engine.unembed(engine.final(tokens)[:, -1])

    forward_flops = 2.0 * tokens.numel() * shape.layers * shape.block
    bench.step("engine forward", forward, flops=lambda: forward_flops, repeats=3)

    teachers = dl.animal_teachers(dl.ANIMALS)[:4]
    prompts = dl.number_prompts(shape.lists, seed=0)
    lists = dl.generate(writer, prompts, teacher=teachers[0])
    counted()
    bench.step(
        f"find_divergence, 4 teachers, {shape.lists} lists",
        lambda: dl.find_divergence(model, lists, teacher=teachers[0], counterfactuals=teachers[1:]),
        flops=counted,
    )
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(
        shape.vocab, (2, shape.pairs, shape.row), generator=generator
    )  # two of [pairs, pos]
    corrupted[:, -5:] = clean[:, -5:]
    pairs = dl.Pairs.from_tokens(
        clean, corrupted, answers=[1] * shape.pairs, foils=[2] * shape.pairs
    )
    bench.step(
        f"attribution_patch, {shape.pairs} pairs", lambda: dl.attribution_patch(model, pairs)
    )
    counted()
    bench.step(
        f"causal_mediation, {shape.pairs} pairs of {shape.row} tokens",
        lambda: dl.causal_mediation(model, pairs),
        flops=counted,
    )
    recipe = dl.Recipe(epochs=1, batch_size=shape.lists, lora_rank=8, warmup_steps=0)
    layer = shape.layers // 2
    bench.step(
        f"finetune, one LoRA step on layer {layer}",
        lambda: dl.finetune(model, lists, layers=[layer], recipe=recipe),
    )
    bench.step(
        f"generate, {shape.lists} prompts, {shape.new_tokens} tokens",
        lambda: dl.generate(model, prompts, teacher=teachers[0], max_new_tokens=shape.new_tokens),
    )


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run all steps and return their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=6.5, help="start no step after these")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    shape, device = SHAPES[options.shape], options.device
    card = "CPU" if device == "cpu" else torch.cuda.get_device_name()
    bench = Bench(shape, device, options.minutes)
    print(f"{card}: {bench.rate / 1e12:.1f} TFLOP/s in a product of {shape.product} squared")
    hf = build(shape, device)
    forwards(bench, hf, compiled=not options.no_compile)
    library(bench, hf)
    if options.json:
        record = {
            "card": card,
            "shape": options.shape,
            "torch": torch.__version__,
            "tflops": bench.rate / 1e12,
            "rows": bench.rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return bench.rows


if __name__ == "__main__":
    main()
