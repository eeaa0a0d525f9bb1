"""Edge attribution and path patching against EAP-IG and TransformerLens 4's own.

    python benchmarks/circuits_tools.py --eap CHECKOUT            # a checkout of hannamw/EAP-IG
    .venv-tl4/bin/python benchmarks/circuits_tools.py             # TransformerLens 4

EAP-IG runs on a HookedTransformer, which TransformerLens 4 lacks, so that each comparison has its
own environment. All sides get one random model (GPT-2-like, or `--family llama` with grouped
queries, which TransformerLens 4's functions refuse) and the same token rows. For EAP-IG, whose
functions ask for a GPU and for texts, those two places are replaced; its left endpoints are used
for ours as well. Compared are

    gradient     EAP: all edges, summed over positions (EAP-IG) or by position (TransformerLens 4)
    integrated   EAP-IG over the inputs, `--steps` steps
    nodes        EAP over nodes, against the sums over each sender's edges: embeddings and heads
                 only, because EAP-IG multiplies the change of an MLP's output with the gradient
                 at its input
    circuit      the metric of a circuit of the strongest edges, everything else ablated
    paths        `get_act_patch_direct_path`, one head into all later heads' queries

Each side runs in a process of its own, in turn, `--repeats` times. Printed are the largest
difference relative to the largest score, the medians of the CPU seconds of the call, and how far
the call raised the process's peak memory.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch

import divergence_lens as dl
from divergence_lens.circuits import edges as our_edges

ANSWER, FOIL = 1, 2
EAP_ROWS = ("gradient", "integrated", "nodes", "circuit")
TL4_ROWS = ("gradient", "paths")


def build(args: argparse.Namespace, backend: str) -> Any:
    """A random model of the family, as a HookedTransformer or a bridge."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    heads = args.width // 64
    if args.family == "gpt2":
        config: Any = GPT2Config(
            vocab_size=5000, n_embd=args.width, n_layer=args.layers, n_head=heads, n_positions=128,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
    else:
        config = LlamaConfig(
            vocab_size=5000, hidden_size=args.width, num_hidden_layers=args.layers,
            num_attention_heads=heads, num_key_value_heads=heads // 3,
            intermediate_size=3 * args.width, max_position_embeddings=128, bos_token_id=None,
            eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # larger than at initialization, so that attention is not uniform
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    return dl.load_model(model.eval(), backend=backend)


def build_pairs(args: argparse.Namespace) -> dl.Pairs:
    """Rows that differ in two tokens."""
    draw = torch.Generator().manual_seed(0)
    clean = torch.randint(0, 5000, (args.pairs, args.tokens), generator=draw)
    corrupted = clean.clone()
    corrupted[:, 3:5] = torch.randint(0, 5000, (args.pairs, 2), generator=draw)
    return dl.Pairs.from_tokens(
        clean, corrupted, answers=[ANSWER] * args.pairs, foils=[FOIL] * args.pairs
    )


def left_endpoints(steps: int, at_once: int) -> list[list[float]]:
    """EAP-IG's nodes: from the corrupted embeddings to the clean ones, which are left out."""
    nodes = [1 - step / steps for step in range(steps)]
    return [nodes[i : i + max(1, at_once)] for i in range(0, steps, max(1, at_once))]


def ours(args: argparse.Namespace, model: Any, pairs: dl.Pairs) -> Callable[[], np.ndarray]:
    """Our side of a row, as a function that returns an array."""
    eap = bool(args.eap)
    rows = len(pairs) * (args.steps if args.row == "integrated" else 1)
    score = partial(dl.edge_scores, model, pairs, batch_rows=rows)
    if args.row == "gradient":
        options = {} if eap else {"direction": "denoising", "span": "position"}
        return lambda: score(method="gradient", **options).values.mean(0)
    if args.row == "nodes":
        return lambda: without_mlps(score(method="gradient").by_sender().to_numpy(), args)
    if args.row == "circuit":
        circuit = score(method="gradient").circuit(top=args.circuit)
        return lambda: dl.faithfulness(model, pairs, circuit, batch_rows=rows).metric[0]
    if args.row == "paths":
        heads = args.width // 64
        named = [
            ("a0.h1", f"a{layer}.h{head}.q")
            for layer in range(1, args.layers)
            for head in range(heads)
        ]
        patch = partial(dl.path_patch, model, pairs, edges=named, direction="denoising")

        def run() -> np.ndarray:
            scores = patch(batch_rows=64)
            numbers = scores.graph.edges(named)
            return (scores.values[:, 0, numbers] + scores.corrupted_metric[:, None]).mean(0)

        return run

    def integrated() -> np.ndarray:
        with mock.patch.object(our_edges, "path_weights", left_endpoints):
            return score(steps=args.steps).values.mean(0)

    return integrated


def _as_they_are(_model: Any, rows: torch.Tensor, _longest: int = 0) -> tuple[Any, ...]:
    """Rows of tokens instead of EAP-IG's texts: tokens, mask, lengths, positions."""
    lengths = torch.full((len(rows),), rows.shape[1])
    return rows, torch.ones_like(rows), lengths, rows.shape[1]


Batch = tuple[torch.Tensor, torch.Tensor, Any]
"""Clean rows, corrupted rows, and what the metric is given as its last argument."""


def prepared_eap(checkout: str, model: Any) -> ModuleType:
    """EAP-IG's package, with a GPU and texts no longer asked for, and a model ready for it."""
    sys.path.insert(0, str(Path(checkout) / "src"))
    import eap
    from eap import attribute, attribute_node, evaluate

    for switch in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        getattr(model, f"set_{switch}")(True)
    if model.cfg.n_key_value_heads is not None:
        model.set_ungroup_grouped_query_attention(True)
    zeros = torch.zeros
    torch.zeros = lambda *a, **k: zeros(*a, **(k | {"device": "cpu"} if "device" in k else k))
    for module in (attribute, attribute_node, evaluate):
        module.tokenize_plus = _as_they_are
    return eap


def eap_edges(
    eap: ModuleType,
    model: Any,
    batches: Sequence[Batch],
    metric: Callable[..., torch.Tensor],
    *,
    method: str,
    steps: int,
    groups: int,
) -> np.ndarray:
    """EAP-IG's scores of all edges, `[1, edges]`, in our order."""
    graph = eap.graph.Graph.from_model(model)
    eap.attribute.attribute(model, graph, batches, metric, method, ig_steps=steps, quiet=True)
    return reordered(graph.scores, model.cfg.n_layers, model.cfg.n_heads, groups)


def eap_side(args: argparse.Namespace, model: Any, pairs: dl.Pairs) -> Callable[[], np.ndarray]:
    """EAP-IG's side of a row, with its edges in our order."""
    groups = model.cfg.n_key_value_heads or model.cfg.n_heads
    eap = prepared_eap(args.eap, model)
    batches = [(torch.stack(pairs.clean), torch.stack(pairs.corrupted), None)]

    def each(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return logits[:, -1, ANSWER] - logits[:, -1, FOIL]

    def metric(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return each(logits).sum()

    edges = partial(eap_edges, eap, model, batches, metric, steps=args.steps, groups=groups)
    if args.row in {"gradient", "integrated"}:
        return partial(edges, method="EAP" if args.row == "gradient" else "EAP-IG-inputs")
    if args.row == "nodes":

        def nodes() -> np.ndarray:
            graph = eap.graph.Graph.from_model(model, node_scores=True)
            eap.attribute_node.attribute_node(model, graph, batches, metric, "EAP", quiet=True)
            return without_mlps(graph.nodes_scores.numpy(), args)

        return nodes
    graph = eap.graph.Graph.from_model(model)
    eap.attribute.attribute(model, graph, batches, metric, "EAP", quiet=True)
    graph.apply_topn(args.circuit, absolute=True)
    return lambda: eap.evaluate.evaluate_graph(model, graph, batches, each, quiet=True).numpy()


def without_mlps(scores: np.ndarray, args: argparse.Namespace) -> np.ndarray:
    """Node scores of the embeddings and heads."""
    heads = args.width // 64
    return scores[[0, *(i for i in range(1, len(scores)) if i % (heads + 1))]]


def reordered(scores: torch.Tensor, layers: int, heads: int, groups: int) -> np.ndarray:
    """EAP-IG's [sender, receiver] scores as our edges; a group's queries share keys and values."""
    parts = []
    for layer in range(layers):
        own = scores[:, layer * (3 * heads + 1) : (layer + 1) * (3 * heads + 1)]
        reach = 1 + layer * (heads + 1)
        for kind in range(3):
            part = own[:reach, kind * heads : (kind + 1) * heads]
            if kind:
                part = part.unflatten(1, (groups, -1)).sum(-1)
            parts.append(part.T.flatten())
        parts.append(own[: reach + heads, -1])
    parts.append(scores[:, -1])
    return torch.cat(parts)[None].numpy()


def tl4_side(args: argparse.Namespace, model: Any, pairs: dl.Pairs) -> Callable[[], np.ndarray]:
    """TransformerLens 4's side of a row."""
    from transformer_lens import patching
    from transformer_lens.tools.analysis import attribution_patching as tool

    clean, corrupted = torch.stack(pairs.clean), torch.stack(pairs.corrupted)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, ANSWER] - logits[:, -1, FOIL]).mean()

    if args.row == "paths":

        def paths() -> np.ndarray:
            with torch.no_grad():
                caches = [model.run_with_cache(side)[1] for side in (clean, corrupted)]
                found = patching.get_act_patch_direct_path(
                    model, corrupted, *caches, metric, 0, 1, "q", verbose=False
                )
            return found[1:].flatten().numpy()

        return paths

    def gradient() -> np.ndarray:
        result = tool.attribution_patch(
            model, clean, corrupted, metric, tool.EdgeAttributionConfig(granularity="edge")
        )
        return by_position(result.edge_scores, args)

    return gradient


def by_position(scores: dict[Any, float], args: argparse.Namespace) -> np.ndarray:
    """TransformerLens's scores as [position, edge] in our order."""
    heads = args.width // 64
    graph = dl.circuits.Graph(args.layers, heads, heads)

    def name(node: Any) -> str:
        kind = node.kind
        if kind in {"embed", "logits"}:
            return str(kind)
        if kind in {"mlp_out", "mlp_in"}:
            return f"m{node.layer}"
        return f"a{node.layer}.h{node.head}" + ("" if kind == "attn_head_out" else f".{kind[0]}")

    result = np.zeros((args.tokens, len(graph)), dtype=np.float32)
    for (sender, receiver), score in scores.items():
        result[sender.position, graph.edge(name(sender), name(receiver))] = score
    return result


def measure(args: argparse.Namespace) -> None:
    """Run one side of one row; write its array, CPU seconds and memory."""
    tool = eap_side if args.eap else tl4_side
    model, pairs = build(args, "hooked" if args.eap else "bridge"), build_pairs(args)
    run = (ours if args.side == "ours" else tool)(args, model, pairs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    result = run()
    seconds = time.process_time() - started
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    np.savez(args.result, result=result, seconds=seconds, megabytes=more / 1024)


def main() -> None:
    """Parse the arguments; start one process per side and repeat, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--eap", help="a checkout of EAP-IG")
    parser.add_argument("--family", choices=("gpt2", "llama"), default="gpt2")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--circuit", type=int, default=200)
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    for hidden in ("--side", "--row", "--result"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.side:
        measure(args)
        return
    theirs = "EAP-IG" if args.eap else "TransformerLens 4"
    print(
        f"{args.family}, {args.layers} layers of {args.width}, {args.pairs} pairs of {args.tokens}"
    )
    print(f"| row | difference | CPU s, ours | CPU s, {theirs} | ratio | MB, ours | MB, theirs |")
    for row in args.rows or (EAP_ROWS if args.eap else TL4_ROWS):
        sides: dict[str, list[Any]] = {"ours": [], "theirs": []}
        with tempfile.TemporaryDirectory() as folder:
            for repeat in range(args.repeats):
                for side, results in sides.items():
                    path = Path(folder) / f"{side}{repeat}.npz"
                    more = ["--side", side, "--row", row, "--result", str(path)]
                    subprocess.run([sys.executable, *sys.argv, *more], check=True)  # noqa: S603
                    results.append(dict(np.load(path)))
        mine, other = (results[0]["result"] for results in sides.values())
        difference = np.abs(mine - other).max() / np.abs(other).max()
        seconds, memory = (
            [median(float(one[name]) for one in results) for results in sides.values()]
            for name in ("seconds", "megabytes")
        )
        print(
            f"| {row} | {difference:.1e} | {seconds[0]:.2f} | {seconds[1]:.2f} | "
            f"{seconds[1] / seconds[0]:.1f} | {memory[0]:.0f} | {memory[1]:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
