r"""The circuit of divergence tokens: which heads read the bias, and which write the digit.

    python benchmarks/circuits_divergence.py MODEL --factual 3 --prompts 24 --tokens 4 \
        --verify 12 --out benchmarks/results/circuits

1. Prompted teachers (an owl, a dog, ...; system prompts of one length) continue lists of numbers
   under a pattern, greedily.
2. The first tokens at which a counterfactual teacher would have written another one are divergence
   tokens. Both teachers have a margin there: how far their own token is ahead of their second. The
   tokens with the largest smaller margin are taken, one from each list.
3. For each of them, edges are scored by segment, and faithfulness is measured for growing circuits.
   Both use the one token, so this describes it, and claims nothing about others.
4. For the token with the largest total effect, the tables list the receivers that read the bias
   span and the senders that write to the logits, and path patching verifies the scores.
"""

import argparse
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import divergence_lens as dl

SYSTEM = "You love every {0}. You think about a {0} all the time. Your favorite animal is the {0}."
PATTERN = r"\d{3}(, \d{3}){5}"


@dataclass(frozen=True)
class Token:
    """A divergence token: its list, its number among all tokens, and the smaller of two margins."""

    divergence: dl.Divergence
    counterfactual: str
    example: int
    place: int
    margin: float

    def pair(self) -> dl.Pairs:
        """The pair of this token alone."""
        mask = np.zeros(len(self.divergence.tokens), dtype=bool)
        mask[self.place] = True
        chosen = self.divergence.with_mask(mask)
        return chosen.pairs(first_only=False, counterfactual=self.counterfactual)


def strongest(divergence: dl.Divergence) -> list[Token]:
    """The divergence tokens of each list with each counterfactual."""
    result = []
    own = divergence.predicted[0] == divergence.tokens
    for number, teacher in enumerate(divergence.counterfactuals, 1):
        differs = own & (divergence.predicted[number] != divergence.tokens)
        margins = np.minimum(divergence.margin[0], divergence.margin[number])
        for example in range(len(divergence)):
            start, stop = divergence.offsets[example : example + 2]
            first = np.flatnonzero(differs[start:stop])[:1]
            result += [
                Token(divergence, teacher.name, example, int(start + i), float(margins[start + i]))
                for i in first
            ]
    return result


def found(model: Any, args: argparse.Namespace) -> list[Token]:
    """The tokens with the largest margins, at most one of each list."""
    teachers = dl.prompted_teachers({name: SYSTEM.format(name) for name in args.personas})
    tokens: list[Token] = []
    prompts = dl.number_prompts(args.prompts, seed=0)
    for factual in teachers[: args.factual]:
        lists = dl.generate(model, prompts, teacher=factual, pattern=PATTERN, max_new_tokens=40)
        others = [teacher for teacher in teachers if teacher is not factual]
        divergence = dl.find_divergence(
            model, lists, teacher=factual, counterfactuals=others, pattern=PATTERN
        )
        own = strongest(divergence)
        print(f"{factual.name}: {len(lists)} lists, {len(own)} divergence tokens", flush=True)
        tokens += own
    best: dict[tuple[str, int], Token] = {}
    for token in sorted(tokens, key=lambda token: -token.margin):
        best.setdefault((token.divergence.teacher.name, token.example), token)
    return list(best.values())[: args.tokens]


def described(model: Any, token: Token) -> tuple[dict[str, Any], dl.EdgeScores, Any]:
    """A row about a token, its edge scores and its curve."""
    pair = token.pair()
    scores = dl.edge_scores(model, pair, span="segment", batch_rows=5)
    curve = dl.faithfulness_curve(model, pair, scores, select="greedy", batch_rows=1)
    row = {
        "factual": token.divergence.teacher.name,
        "counterfactual": token.counterfactual,
        "list": token.example,
        "answer": "".join(pair.answer_labels[0]),
        "foil": "".join(pair.foil_labels[0]),
        "margin": token.margin,
        "clean": float(scores.clean_metric[0]),
        "corrupted": float(scores.corrupted_metric[0]),
        **{f"at {share:.1%}": float(value) for share, value in zip(
            curve.shares, curve.values, strict=True) if share in (0.01, 0.05, 0.1, 0.2)},
        "cpr": curve.cpr,
        "cmd": curve.cmd,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    return row, scores, curve


def main() -> None:
    """Parse the arguments, find the tokens, score their edges, and measure circuits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--personas", nargs="+", default=["owl", "dog", "eagle", "bear"])
    parser.add_argument("--factual", type=int, default=2, help="personas that write lists")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--verify", type=int, default=20)
    parser.add_argument("--backend", default="bridge")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = dl.load_model(args.model, backend=args.backend)
    started = time.process_time()
    tokens = found(model, args)
    print(f"tokens: {time.process_time() - started:.0f} CPU seconds", flush=True)
    results = [described(model, token) for token in tokens]
    effects = [abs(row["clean"] - row["corrupted"]) for row, _, _ in results]
    best = int(np.argmax(effects))
    _, scores, curve = results[best]
    table = scores.top(2 * args.verify, "cells")
    agreement = scores.agreement(
        dl.path_patch(model, tokens[best].pair(), edges=table, span="segment", batch_rows=32)
    )
    print(f"{time.process_time() - started:.0f} CPU seconds; {agreement}", flush=True)
    by_segment = scores.by_segment()
    bias = by_segment["bias"].sort_values(key=abs, ascending=False).head(10)
    direct = scores.top(len(scores.graph))
    direct = direct[direct["receiver"] == "logits"].head(10)
    tables = {
        "tokens": pd.DataFrame([row for row, _, _ in results]),
        "segments": by_segment.T.rename_axis("segment").abs().sum(axis=1).reset_index(name="sum"),
        "reads-bias": bias.rename("score").rename_axis("receiver").reset_index(),
        "writes-logits": direct,
        "curve": curve.table(),
    }
    for name, one in tables.items():
        print(f"{name}\n{one.to_string(index=False)}", flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, one in tables.items():
            one.round(4).to_csv(args.out / f"divergence-{name}.csv", index=False)
        stats = {"best": best, "personas": args.personas, "prompts": args.prompts}
        stats |= {"verified": vars(agreement), "total_effect": float(scores.total[0])}
        stats |= {"text": scores_text(tokens[best])}
        (args.out / "divergence.json").write_text(json.dumps(stats, indent=1) + "\n")


def scores_text(token: Token) -> str:
    """The list up to the token."""
    start = int(token.divergence.offsets[token.example])
    ids = token.divergence.tokens[start : token.place]
    return "".join(token.divergence.texts[int(i)] for i in ids)


if __name__ == "__main__":
    main()
