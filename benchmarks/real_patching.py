"""Compare patching on a trained chat model with TransformerLens's loop and plain Hugging Face.

    python benchmarks/real_patching.py MODEL                  # a local folder, such as SmolLM2-135M
    python benchmarks/real_patching.py MODEL --rows exact gradient --backend bridge

The pairs are number prompts under two system prompts (a wolf and a lion, with as many tokens),
with the chat template. Rows:

    exact, exact-8   all layers and positions of resid_pre, for one pair and for 8
    exact-z          the same for the z of every head
    integrated       resid_post, 10 steps
    gradient         resid_post

The baseline of the exact rows is TransformerLens's `generic_activation_patch`, which runs the model
once per cell; its time is measured on `--cells` random cells and multiplied. It runs on two
models: one with weights in memory as TransformerLens stores them, which its products copy, and
ours, whose weights are views that they do not copy. The baseline of `integrated` is one trace per
layer and step, measured on three layers and multiplied. That of `gradient` is two forward passes
and one backward pass of the Hugging Face model, without gradients of the weights and with logits of
the last position only. Sides alternate for `--repeats` rounds; the table shows medians of CPU
seconds over all threads, which other programs hardly affect, and the range of the ratio. TFLOP
counts the operations of the matrix products in the first round, which takes hardly longer for it.
Results are compared, and the command stops at a difference above 1e-3 of the largest value.
"""

import argparse
import copy
import os
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import pandas as pd
import torch
from products import Products
from transformer_lens import patching
from transformers import AutoModelForCausalLM

import divergence_lens as dl
from divergence_lens.engine import get_engine

ROWS = ("exact", "exact-8", "exact-z", "integrated", "gradient")
TOLERANCE = 1e-3
STEPS = 10
LAYERS = (0, 10, 20)
SYSTEM = "You love every {0}. You think about a {0} all the time. Your favorite animal is the {0}."


def number_pairs(model: Any, count: int) -> dl.Pairs:
    """Build pairs of number prompts of one length under two personas."""
    prompts = dl.number_prompts(20 * count, seed=0)
    pairs = dl.Pairs.from_prompts(
        model,
        clean=prompts,
        system_prompt=SYSTEM.format("wolf"),
        corrupted_system_prompt=SYSTEM.format("lion"),
        answers=["1"] * len(prompts),
        foils=["2"] * len(prompts),
    )
    lengths = [len(row) for row in pairs.clean]
    common = max(set(lengths), key=lengths.count)
    return pairs[[i for i, length in enumerate(lengths) if length == common][:count]]


def metric(logits: torch.Tensor, pairs: dl.Pairs) -> torch.Tensor:
    """Mean logit difference of answers and foils; `logits` are those of the last position."""
    rows = torch.arange(len(pairs))
    return (logits[rows, pairs.answers] - logits[rows, pairs.foils]).mean()


class ExactLoop:
    """TransformerLens's loop over a sample of the cells."""

    def __init__(self, model: Any, pairs: dl.Pairs, site: str, cells: int) -> None:
        self.model, self.pairs, self.site = model, pairs, site
        self.clean, corrupted = torch.stack(pairs.clean), torch.stack(pairs.corrupted)
        with torch.no_grad():
            _, self.cache = model.run_with_cache(corrupted)
        engine = get_engine(model)
        start = int((self.clean != corrupted).any(0).nonzero()[0])
        sizes = {"layer": engine.n_layers, "pos": self.clean.shape[1]}
        if site == "z":
            sizes["head_index"] = engine.n_heads
        generator = np.random.default_rng(0)
        self.index = pd.DataFrame(
            {
                name: generator.integers(start if name == "pos" else 0, size, cells)
                for name, size in sizes.items()
            }
        )
        # Both sides count only cells that can have an effect: those from the first difference on.
        self.total = int(np.prod(list(sizes.values()))) * (sizes["pos"] - start) // sizes["pos"]

    @torch.no_grad()
    def __call__(self) -> np.ndarray:
        """Run the model once per sampled cell; return the metric of each."""
        setter = (
            patching.layer_pos_head_vector_patch_setter
            if self.site == "z"
            else patching.layer_pos_patch_setter
        )
        values = patching.generic_activation_patch(
            self.model,
            self.clean,
            self.cache,
            lambda logits: metric(logits[:, -1], self.pairs),
            setter,
            self.site,
            index_df=self.index,
        )
        return np.asarray(values)

    def difference(self, effects: dl.Effects, values: np.ndarray) -> float:
        """The largest difference, relative to the largest of the values."""
        mine = effects.values.mean(0) + effects.clean_metric.mean()
        return relative(mine[tuple(self.index.to_numpy().T)], values)


class TraceLoop:
    """Integrated gradients by one trace per step, on some of the layers."""

    def __init__(self, model: Any, pairs: dl.Pairs, layers: Sequence[int]) -> None:
        self.model, self.pairs, self.layers = model, pairs, layers
        with torch.no_grad():
            names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
            self.clean = torch.stack(pairs.clean)
            _, self.base = model.run_with_cache(self.clean, names_filter=names)
            _, self.source = model.run_with_cache(torch.stack(pairs.corrupted), names_filter=names)
        self.total = get_engine(model).n_layers / len(layers)

    def __call__(self) -> np.ndarray:
        """Return `[pairs, layers, pos]` attributions."""
        values = []
        for layer in self.layers:
            name = f"blocks.{layer}.hook_resid_post"
            change = self.source[name] - self.base[name]
            total = torch.zeros_like(change)
            for step in range(STEPS):
                leaf = (self.base[name] + (step + 0.5) / STEPS * change).requires_grad_()
                hook = (name, lambda _, leaf=leaf, **__: leaf)
                logits = self.model.run_with_hooks(self.clean, fwd_hooks=[hook])[:, -1]
                value = metric(logits, self.pairs) * len(self.pairs)
                total += torch.autograd.grad(value, leaf)[0]
            values.append((total * change).sum(-1) / STEPS)
        return torch.stack(values, 1).numpy()

    def difference(self, effects: dl.Effects, values: np.ndarray) -> float:
        """The largest difference, relative to the largest of the values."""
        return relative(effects.values[:, list(self.layers)], values)


class PlainPasses:
    """Two forward passes and one backward pass of the Hugging Face model."""

    total = 1.0

    def __init__(self, folder: str, pairs: dl.Pairs) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.clean, self.corrupted = torch.stack(pairs.clean), torch.stack(pairs.corrupted)
        self.pairs = pairs

    def __call__(self) -> np.ndarray:
        """Return the clean metric."""
        with torch.no_grad():
            self.model(self.corrupted, logits_to_keep=1)
        embedded = self.model.get_input_embeddings()(self.clean).requires_grad_()
        logits = self.model(inputs_embeds=embedded, logits_to_keep=1).logits[:, -1]
        value = metric(logits, self.pairs)
        value.backward()
        return value.detach().numpy()

    def difference(self, effects: dl.Effects, values: np.ndarray) -> float:
        """The difference of the clean metric, relative to it."""
        return relative(np.asarray(effects.clean_metric.mean()), values)


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result and the CPU seconds of a call, over all threads."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def compare(
    name: str, ours: Callable[[], Any], peers: dict[str, Any], cells: int, repeats: int
) -> None:
    """Alternate all sides and print one row per baseline."""
    mine: list[float] = []
    theirs: dict[str, list[float]] = {label: [] for label in peers}
    scales = {
        label: peer.total / cells if isinstance(peer, ExactLoop) else peer.total
        for label, peer in peers.items()
    }
    worst = 0.0
    counted, others = Products(), {label: Products() for label in peers}
    for repeat in range(repeats):
        with counted if repeat == 0 else nullcontext():
            effects, seconds = timed(ours)
        mine.append(seconds)
        for label, peer in peers.items():
            with others[label] if repeat == 0 else nullcontext():
                values, seconds = timed(peer)
            scale = scales[label]
            theirs[label].append(seconds * scale)
            worst = max(worst, peer.difference(effects, values))
    if worst > TOLERANCE:
        raise SystemExit(f"{name}: results differ by {worst:.1e} of the largest value")
    for label, times in theirs.items():
        ratios = [b / a for a, b in zip(mine, times, strict=True)]
        arithmetic = counted.flops / 1e12, others[label].flops * scales[label] / 1e12
        print(
            f"| {name} | {median(mine):.2f} s | {label}: {median(times):.1f} s | "
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{arithmetic[0]:.3g} | {arithmetic[1]:.3g} | {worst:.0e} |",
            flush=True,
        )


def with_own_weights(model: Any) -> Any:
    """A copy whose parameters are contiguous, as TransformerLens's loading leaves them."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return copied


def main() -> None:
    """Run the selected rows and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--backend", nargs="+", default=["hooked", "bridge"])
    parser.add_argument("--cells", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", DeprecationWarning)
    plain = dl.load_model(options.model, backend="hooked")
    stored = with_own_weights(plain) if any("exact" in row for row in options.rows) else None
    print(
        "| row | ours | baseline | ratio (range) | TFLOP, ours | TFLOP, baseline | largest "
        "difference |\n|---|---|---|---|---|---|---|"
    )
    for backend in options.backend:
        model = plain if backend == "hooked" else dl.load_model(options.model, backend=backend)
        for row in options.rows:
            pairs = number_pairs(model, 8 if row == "exact-8" else 1)
            site = {"exact-z": "z", "exact": "resid_pre", "exact-8": "resid_pre"}.get(row)
            peers: dict[str, Any]
            if site is not None:
                ours = partial(dl.causal_mediation, model, pairs, site=site)
                peers = {
                    label: ExactLoop(loaded, pairs, site, options.cells)
                    for label, loaded in (("TransformerLens", stored), ("our weights", plain))
                }
            else:
                ours = partial(dl.attribution_patch, model, pairs, site="resid_post", method=row)
                peers = (
                    {"one trace per step": TraceLoop(plain, pairs, LAYERS)}
                    if row == "integrated"
                    else {"plain passes": PlainPasses(options.model, pairs)}
                )
            repeats = 1 if row in ("exact-8", "exact-z") else options.repeats
            name = f"{row}, {backend}, {len(pairs.clean[0])} tokens"
            compare(name, ours, peers, options.cells, repeats)


if __name__ == "__main__":
    main()
