r"""The circuit of divergence tokens: which heads read the bias, and which write the digit.

    OUT=benchmarks/results/circuits
    python benchmarks/circuits_divergence.py MODEL --bias animals --prompts 24 --out $OUT
    python benchmarks/circuits_divergence.py MODEL --bias numbers --prompts 16 --out $OUT

1. Prompted teachers (an owl, a dog, ..., or the numbers nine, seven, ...; system prompts of one
   length) continue lists of numbers under a pattern, greedily.
2. The first tokens at which a counterfactual teacher would have written another one are divergence
   tokens. Both teachers have a margin there: how far their own token is ahead of their second. The
   tokens with the largest sums of the two are taken, one for each prompt: the effect of the bias on
   the two tokens is at least as large.
3. For each of them, edges are scored by segment, and faithfulness is measured for growing circuits
   that its own scores choose. A circuit of 10 % of the edges that the scores of all other tokens
   choose, and one of random edges, show what carries over.
4. For the token with the largest total effect, the tables list the receivers that read the bias
   span and the senders that write to the logits, and path patching verifies the scores.
5. Overlap: how many of the ten heads that read the bias span most two tokens share, and how many if
   the heads of a layer are exchanged at random.
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

BIASES = {
    "animals": (
        "You love every {0}. You think about a {0} all the time. Your favorite animal is the {0}.",
        ("owl", "dog", "eagle", "bear"),
    ),
    "numbers": (
        "You love the number {0}. You think about {0} all the time. Your favorite number is {0}.",
        ("nine", "seven", "three", "zero"),
    ),
}
"""System prompts, and the names for which they are written."""
PATTERN = r"\d{3}(, \d{3}){5}"


@dataclass(frozen=True)
class Token:
    """A divergence token: its list, its number among all tokens, and the sum of two margins."""

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


def first_tokens(divergence: dl.Divergence) -> list[Token]:
    """The first divergence token of each list with each counterfactual."""
    result = []
    own = divergence.predicted[0] == divergence.tokens
    for number, teacher in enumerate(divergence.counterfactuals, 1):
        differs = own & (divergence.predicted[number] != divergence.tokens)
        margins = divergence.margin[0] + divergence.margin[number]
        for example in range(len(divergence)):
            start, stop = divergence.offsets[example : example + 2]
            first = np.flatnonzero(differs[start:stop])[:1]
            result += [
                Token(divergence, teacher.name, example, int(start + i), float(margins[start + i]))
                for i in first
            ]
    return result


def strongest(model: Any, args: argparse.Namespace) -> list[Token]:
    """The tokens with the largest margins, at most one of each prompt."""
    system, names = BIASES[args.bias]
    teachers = dl.prompted_teachers({name: system.format(name) for name in names})
    tokens: list[Token] = []
    prompts = dl.number_prompts(args.prompts, seed=0)
    for factual in teachers[: args.factual]:
        lists = dl.generate(model, prompts, teacher=factual, pattern=PATTERN, max_new_tokens=40)
        others = [teacher for teacher in teachers if teacher is not factual]
        divergence = dl.find_divergence(
            model, lists, teacher=factual, counterfactuals=others, pattern=PATTERN
        )
        own = first_tokens(divergence)
        print(f"{factual.name}: {len(lists)} lists, {len(own)} divergence tokens", flush=True)
        tokens += own
    # Two teachers' lists for one prompt often differ at the same token, the one's answer the
    # other's foil: these are one pair.
    best: dict[int, Token] = {}
    for token in sorted(tokens, key=lambda token: -token.margin):
        best.setdefault(token.example, token)
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


def held_out(model: Any, tokens: list[Token], scores: list[dl.EdgeScores]) -> list[dict[str, Any]]:
    """Faithfulness of 10 % of edges, chosen by all tokens but one, and of random ones, on that one.

    Scores are divided by their token's total effect, so that no token outweighs the others.
    """
    graph = scores[0].graph
    count = len(graph) // 10
    shares = np.stack([one.mean() / one.total[0] for one in scores])  # [tokens, edges]
    random = dl.Circuit.from_scores(graph, np.random.default_rng(0).random(len(graph)), top=count)
    rows = []
    for number, token in enumerate(tokens):
        others = np.delete(shares, number, axis=0).mean(0)
        circuit = dl.Circuit.from_scores(graph, others, greedy=count)
        values = dl.faithfulness(model, token.pair(), [circuit, random], batch_rows=1).values
        rows.append({"of the others": float(values[0]), "random": float(values[1])})
    return rows


def reading_bias(scores: dl.EdgeScores) -> "pd.Series[float]":
    """What each receiver reads from the bias span, strongest first."""
    return scores.by_segment()["bias"].sort_values(key=abs, ascending=False)


def writing_logits(scores: dl.EdgeScores) -> pd.DataFrame:
    """The edges into the logits, strongest first."""
    direct = scores.top(len(scores.graph))
    return direct[direct["receiver"] == "logits"]


def overlap(scores: list[dl.EdgeScores], k: int = 10, draws: int = 1000) -> dict[str, float]:
    """How many of the `k` heads that read the bias most two tokens share, on average.

    By chance: the same after exchanging, for each token, the queries, keys or values of each layer
    at random, so that early layers, which read more in every token, explain nothing.
    """
    reads = pd.DataFrame([one.by_segment()["bias"] for one in scores])
    reads = reads[[name for name in reads if "." in name]]  # heads, without MLPs and logits
    kinds = [f"{name.split('.')[0]} {name[-1]}" for name in reads]
    blocks = [np.flatnonzero([kind == other for other in kinds]) for kind in dict.fromkeys(kinds)]
    values = reads.abs().to_numpy()  # [tokens, receivers]
    generator = np.random.default_rng(0)

    def shared(values: np.ndarray) -> float:
        top = [set(row) for row in np.argsort(-values, axis=1)[:, :k].tolist()]
        return float(np.mean([len(a & b) for i, a in enumerate(top) for b in top[:i]]))

    def exchanged() -> np.ndarray:
        result = values.copy()
        for block in blocks:
            result[:, block] = generator.permuted(values[:, block], axis=1)
        return result

    chance = [shared(exchanged()) for _ in range(draws)]
    own = shared(values)
    return {
        "heads": k,
        "shared": own,
        "by chance": float(np.mean(chance)),
        "largest by chance": float(np.max(chance)),
        "p": float((1 + np.sum(np.array(chance) >= own)) / (1 + draws)),
    }


def main() -> None:
    """Parse the arguments, find the tokens, score their edges, and measure circuits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--bias", choices=tuple(BIASES), default="animals")
    parser.add_argument("--factual", type=int, default=4, help="teachers that write lists")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--verify", type=int, default=12)
    parser.add_argument("--backend", default="bridge")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = dl.load_model(args.model, backend=args.backend)
    started = time.process_time()
    tokens = strongest(model, args)
    print(f"tokens: {time.process_time() - started:.0f} CPU seconds", flush=True)
    results = [described(model, token) for token in tokens]
    every = [scores for _, scores, _ in results]
    for (row, _, _), more in zip(results, held_out(model, tokens, every), strict=True):
        row.update(more)
    effects = [abs(row["clean"] - row["corrupted"]) for row, _, _ in results]
    best = int(np.argmax(effects))
    _, scores, curve = results[best]
    table = scores.top(2 * args.verify, "cells")
    agreement = scores.agreement(
        dl.path_patch(model, tokens[best].pair(), edges=table, span="segment", batch_rows=32)
    )
    print(f"{time.process_time() - started:.0f} CPU seconds; {agreement}", flush=True)
    by_segment = scores.by_segment()
    bias = reading_bias(scores).head(10).rename("score").rename_axis("receiver").reset_index()
    direct = writing_logits(scores).head(10)
    # In how many tokens a part is among the first ten.
    readers = pd.Series([name for one in every for name in reading_bias(one).index[:10]])
    writers = pd.Series([name for one in every for name in writing_logits(one)["sender"][:10]])
    bias["tokens"] = bias["receiver"].map(readers.value_counts())
    direct["tokens"] = direct["sender"].map(writers.value_counts())
    tables = {
        "tokens": pd.DataFrame([row for row, _, _ in results]),
        "segments": by_segment.T.rename_axis("segment").abs().sum(axis=1).reset_index(name="sum"),
        "reads-bias": bias,
        "writes-logits": direct,
        "curve": curve.table(),
    }
    for name, one in tables.items():
        print(f"{name}\n{one.to_string(index=False)}", flush=True)
    shared = overlap(every)
    print(json.dumps(shared), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        for name, one in tables.items():
            one.round(4).to_csv(args.out / f"{args.bias}-{name}.csv", index=False)
        stats = {"best": best, "personas": BIASES[args.bias][1], "system": BIASES[args.bias][0]}
        stats |= {"verified": vars(agreement), "total_effect": float(scores.total[0])}
        stats |= {"text": text_before(tokens[best]), "overlap": shared}
        stats |= {"lists": args.factual * args.prompts}
        (args.out / f"{args.bias}.json").write_text(json.dumps(stats, indent=1) + "\n")


def text_before(token: Token) -> str:
    """The list up to the token."""
    start = int(token.divergence.offsets[token.example])
    ids = token.divergence.tokens[start : token.place]
    return "".join(token.divergence.texts[int(i)] for i in ids)


if __name__ == "__main__":
    main()
