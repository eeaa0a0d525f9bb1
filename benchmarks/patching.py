"""Compare exact and approximate patching with the usual loops on a random model.

    python benchmarks/patching.py                         # resid_pre, one pair of 60 tokens
    python benchmarks/patching.py --sites resid_pre z --pairs 8
    python benchmarks/patching.py --integrated            # attribution against a trace per step

Exact patching is compared with TransformerLens's `patching.get_act_patch_*`, which runs the model
once per cell, with all pairs as one batch and the mean metric. Integrated attribution is compared
with one trace per layer, step and pair. Both sides get the same model, tokens and threads. Prints
CPU seconds (over all threads, hardly affected by other programs), wall-clock seconds (meaningful on
an idle machine), and the largest difference between the values. For plain gradients, see
`attribution_tl4.py`.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault(
    "TQDM_DISABLE", "1"
)  # the loops show progress bars and have no option to hide them

import numpy as np
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig, patching

from divergence_lens.engine import get_engine
from divergence_lens.pairs import Pairs
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.exact import causal_mediation

LOOPS = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "resid_mid": patching.get_act_patch_resid_mid,
    "attn_out": patching.get_act_patch_attn_out,
    "mlp_out": patching.get_act_patch_mlp_out,
    "z": patching.get_act_patch_attn_head_out_by_pos,
}


def build(layers: int, width: int) -> Any:
    """Build a random GPT-2-like HookedTransformer."""
    cfg = HookedTransformerConfig(
        n_layers=layers,
        d_model=width,
        n_heads=width // 64,
        d_head=64,
        d_mlp=4 * width,
        n_ctx=128,
        d_vocab=5000,
        act_fn="gelu_new",
        normalization_type="LN",
        seed=0,
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TransformerLens 4 removes the class
        return HookedTransformer(cfg).eval()


def make_pairs(count: int, length: int) -> Pairs:
    """Build rows of random tokens that differ at all positions except the last five."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 5000, (count, length), generator=generator)
    corrupted = torch.randint(0, 5000, (count, length), generator=generator)
    corrupted[:, -5:] = clean[:, -5:]
    return Pairs.from_tokens(clean, corrupted, answers=[1] * count, foils=[2] * count)


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result of `run`, the CPU seconds of all threads, and the wall-clock seconds."""
    start, clock = time.process_time(), time.perf_counter()
    result = run()
    return result, time.process_time() - start, time.perf_counter() - clock


@torch.no_grad()
def loop(model: Any, pairs: Pairs, site: str) -> np.ndarray:
    """Run TransformerLens's loop over cells on all pairs; returns the mean metric of each cell."""
    clean, corrupted = torch.stack(pairs.clean), torch.stack(pairs.corrupted)
    _, cache = model.run_with_cache(corrupted)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, 1] - logits[:, -1, 2]).mean()

    return np.asarray(LOOPS[site](model, clean, cache, metric))


def trace_per_step(model: Any, pairs: Pairs, steps: int, *, weights: bool) -> np.ndarray:
    """Integrated gradients of resid_post: one forward and one backward per layer, step and pair.

    With `weights`, `backward()` also computes the gradients of the weights, which a careless
    implementation would do.
    """
    engine = get_engine(model)
    values = np.zeros((len(pairs), engine.n_layers, len(pairs.clean[0])), dtype=np.float32)
    for i in range(len(pairs)):
        base = engine.activations(pairs.clean[i][None], sites=("resid_post",))["resid_post"]
        source = engine.activations(pairs.corrupted[i][None], sites=("resid_post",))["resid_post"]
        for layer in range(engine.n_layers):
            change = source[layer] - base[layer]
            total = torch.zeros_like(change)
            for step in range(steps):
                leaf = (base[layer] + (step + 0.5) / steps * change).requires_grad_()
                name = f"blocks.{layer}.hook_resid_post"
                hook = (name, lambda _, leaf=leaf, **__: leaf)
                logits = model.run_with_hooks(pairs.clean[i][None], fwd_hooks=[hook])
                metric = logits[0, -1, 1] - logits[0, -1, 2]
                if weights:
                    metric.backward()
                    assert leaf.grad is not None
                    total += leaf.grad
                    model.zero_grad()
                else:
                    total += torch.autograd.grad(metric, leaf)[0]
            values[i, layer] = (total * change).sum(-1)[0] / steps
    return values


def report(
    name: str, ours: tuple[float, float], theirs: tuple[float, float], difference: float
) -> None:
    """Print one line of the table."""
    print(
        f"{name:22s} CPU {ours[0]:7.2f} s, loop {theirs[0]:7.2f} s, "
        f"{theirs[0] / ours[0]:4.1f} x | wall {ours[1]:7.2f} s, loop {theirs[1]:7.2f} s, "
        f"{theirs[1] / ours[1]:4.1f} x | largest difference {difference:.1e}",
        flush=True,
    )


def main() -> None:
    """Run the selected comparisons and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", nargs="+", default=["resid_pre"], choices=sorted(LOOPS))
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--length", type=int, default=60)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--integrated", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, pairs = build(options.layers, options.width), make_pairs(options.pairs, options.length)
    get_engine(model)
    print(
        f"{options.layers} layers, d_model {options.width}, {options.pairs} pairs of "
        f"{options.length} tokens, {options.threads} threads"
    )
    if options.integrated:
        effects, *ours = timed(
            lambda: attribution_patch(model, pairs, site="resid_post", method="integrated")
        )
        for weights in (False, True):
            values, *theirs = timed(lambda w=weights: trace_per_step(model, pairs, 10, weights=w))
            difference = float(np.abs(effects.values - values).max())
            name = "backward()" if weights else "state only"
            report(f"integrated, {name}", tuple(ours), tuple(theirs), difference)
        return
    for site in options.sites:
        effects, *ours = timed(lambda site=site: causal_mediation(model, pairs, site=site))
        values, *theirs = timed(lambda site=site: loop(model, pairs, site))
        mine = effects.values.mean(0) + effects.clean_metric.mean()
        difference = float(np.abs(mine - values).max())
        report(f"exact {site}", tuple(ours), tuple(theirs), difference)


if __name__ == "__main__":
    main()
