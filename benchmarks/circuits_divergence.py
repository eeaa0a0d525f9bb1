"""The circuit of divergence tokens: which heads read the bias, and which write the digit.

    python benchmarks/circuits_divergence.py MODEL --out benchmarks/results/circuits

Two personas (a wolf and a lion, with as many tokens) continue lists of numbers. Pairs are the first
positions at which their greedy choices differ, under the wolf's text. Edges are scored over half
of the pairs by segment, and a greedy circuit is measured on the other half. Printed and written are
the heads that read the bias span, the senders that write to the logits, the agreement of the scores
with path patching, and the circuit's faithfulness by size.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import pandas as pd

import divergence_lens as dl

SYSTEM = "You love every {0}. You think about a {0} all the time. Your favorite animal is the {0}."


def main() -> None:
    """Parse the arguments, find the pairs, score the edges, and measure circuits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--verify", type=int, default=20)
    parser.add_argument("--backend", default="bridge")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = dl.load_model(args.model, backend=args.backend)
    wolf, lion = dl.prompted_teachers({name: SYSTEM.format(name) for name in ("wolf", "lion")})
    examples = dl.generate(
        model, dl.number_prompts(args.prompts, seed=0), teacher=wolf, max_new_tokens=24
    )
    divergence = dl.find_divergence(model, examples, teacher=wolf, counterfactuals=[lion])
    pairs = divergence.pairs(first_only=True)[: args.pairs]
    half = len(pairs) // 2
    train, test = pairs[:half], pairs[half:]
    print(f"{pairs}; scored on {len(train)}, measured on {len(test)}", flush=True)
    started = time.process_time()
    scores = dl.edge_scores(model, train, span="segment", verify=args.verify, batch_rows=10)
    print(f"scores: {time.process_time() - started:.0f} CPU seconds; {scores.verified}", flush=True)
    by_segment = scores.by_segment()
    bias = by_segment["bias"].sort_values(key=abs, ascending=False).head(12)
    direct = scores.top(len(scores.graph))
    direct = direct[direct["receiver"] == "logits"].head(12)
    curve = dl.faithfulness_curve(model, test, scores, select="greedy", batch_rows=2)
    tables = {
        "reads-bias": bias.rename("score").rename_axis("receiver").reset_index(),
        "writes-logits": direct,
        "curve": curve.table(),
    }
    for name, table in tables.items():
        print(f"{name}\n{table.to_string(index=False)}", flush=True)
    print(f"CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            pd.DataFrame(table).round(4).to_csv(args.out / f"divergence-{name}.csv", index=False)
        stats = {
            "pairs_scored": len(train),
            "pairs_measured": len(test),
            "total_effect": float(scores.total.mean()),
            "verified": None if scores.verified is None else vars(scores.verified),
            "cpr": curve.cpr,
            "cmd": curve.cmd,
        }
        (args.out / "divergence.json").write_text(json.dumps(stats, indent=1) + "\n")


if __name__ == "__main__":
    main()
