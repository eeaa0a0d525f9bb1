"""Attribution patching against TransformerLens 4's own `tools.analysis.attribution_patch`.

    .venv-tl4/bin/python benchmarks/attribution_tl4.py       # 8 pairs of 60 tokens
    .venv-tl4/bin/python benchmarks/attribution_tl4.py --layers 4 --width 128

It needs the environment with TransformerLens 4, which `make test-tl4` makes. Both sides score the
same nodes of one random GPT-2-like model: each head's output and each MLP's output at every
position, and the embeddings. TransformerLens takes the mean over pairs, and goes from the corrupted
run to the clean one, so that ours does likewise. Printed are the largest difference of the scores
and the seconds of both, of processors and of the clock, the best of several runs in turn.
"""

import argparse
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from divergence_lens.engine import get_engine
from divergence_lens.models import load_model
from divergence_lens.pairs import Pairs
from divergence_lens.patching.attribution import attribution_patch

ANSWER, FOIL = 1, 2


def build(layers: int, width: int) -> Any:
    """A random GPT-2-like TransformerBridge."""
    config = GPT2Config(
        vocab_size=5000,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        n_positions=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return load_model(GPT2LMHeadModel(config).eval(), backend="bridge")


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result of `run`, the processor seconds over all threads, and those of the clock."""
    start, clock = time.process_time(), time.perf_counter()
    result = run()
    return result, time.process_time() - start, time.perf_counter() - clock


def ours(model: Any, pairs: Pairs) -> dict[str, np.ndarray]:
    """Mean scores over pairs by site."""
    effects = attribution_patch(
        model, pairs, site=("resid_pre", "z", "mlp_out"), direction="denoising"
    )
    return {site: one.values.mean(0) for site, one in effects.items()}


def theirs(model: Any, pairs: Pairs) -> dict[Any, float]:
    """Node scores of TransformerLens."""
    from transformer_lens.tools.analysis import attribution_patching

    result = attribution_patching.attribution_patch(
        model,
        torch.stack(pairs.clean),
        torch.stack(pairs.corrupted),
        lambda logits: logits[0, -1, ANSWER] - logits[0, -1, FOIL],
    )
    return result.node_scores


def difference(mine: dict[str, np.ndarray], nodes: dict[Any, float]) -> float:
    """The largest, over all of TransformerLens's nodes."""
    worst = 0.0
    for node, score in nodes.items():
        if node.kind == "embed":
            ours = mine["resid_pre"][0, node.position]
        elif node.kind == "mlp_out":
            ours = mine["mlp_out"][node.layer, node.position]
        else:
            ours = mine["z"][node.layer, node.position, node.head]
        worst = max(worst, abs(float(ours) - score))
    return worst


def main() -> None:
    """Run both and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=60)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    model = build(options.layers, options.width)
    get_engine(model)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 5000, (options.pairs, options.length), generator=generator)
    corrupted = torch.randint(0, 5000, (options.pairs, options.length), generator=generator)
    count = options.pairs
    pairs = Pairs.from_tokens(clean, corrupted, answers=[ANSWER] * count, foils=[FOIL] * count)
    times = []
    for _ in range(options.runs):
        mine, *my_times = timed(lambda: ours(model, pairs))
        nodes, *their_times = timed(lambda: theirs(model, pairs))
        times.append((*my_times, *their_times))
    my_cpu, my_clock, their_cpu, their_clock = (min(column) for column in zip(*times, strict=True))
    print(
        f"{options.layers} layers, d_model {options.width}, {count} pairs of {options.length} "
        f"tokens, {len(nodes)} nodes, {options.threads} threads, best of {options.runs}\n"
        f"processor: ours {my_cpu:.2f} s, TransformerLens {their_cpu:.2f} s, "
        f"{their_cpu / my_cpu:.1f} x\n"
        f"clock:     ours {my_clock:.2f} s, TransformerLens {their_clock:.2f} s, "
        f"{their_clock / my_clock:.1f} x\n"
        f"largest difference {difference(mine, nodes):.1e}, "
        f"of scores up to {max(abs(score) for score in nodes.values()):.2g}"
    )


if __name__ == "__main__":
    main()
