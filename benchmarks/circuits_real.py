"""Circuits of a real model: curves of faithfulness for methods that score edges and nodes.

    OUT=benchmarks/results/circuits
    python benchmarks/circuits_real.py MODEL --tasks ioi --pairs 32 --out $OUT
    python benchmarks/circuits_real.py MODEL --tasks colored --pairs 16 --out $OUT

MODEL is a folder or a name. Two tasks are generated here along the lines of the MIB benchmark
(Mueller et al. 2025, arXiv 2504.13151), with names, places and objects of our own:

    ioi      "When Mary and John went to the store, John gave a drink to" -> " Mary", not " John";
             the counterfactual repeats a third name instead of John's
    colored  a list of colored objects, and the question for the color of one of them; the
             counterfactual asks for another one

Only prompts that the model answers correctly, with tokens that line up, are used, as in MIB. Scores
come from one half of them, and curves from the other half. Printed and written are the accuracy and
margin of the task, and for each method the circuit sizes, faithfulness, CPR and CMD. Edges are
ranked by magnitude, and once more by sign (those that help the answer first), which suits CPR.
"""

import argparse
import json
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import divergence_lens as dl
from divergence_lens.engine import get_engine

NAMES = [
    "Mary",
    "John",
    "Anna",
    "Peter",
    "Laura",
    "Simon",
    "Alice",
    "Frank",
    "Emma",
    "Henry",
    "Kate",
    "Paul",
    "Sarah",
    "Tom",
    "Lucy",
    "Mark",
    "Jane",
    "David",
    "Helen",
    "George",
    "Ruth",
    "Adam",
    "Grace",
    "Daniel",
]
PLACES = ("store", "park", "school", "office", "market", "beach", "station", "garden", "museum")
OBJECTS = ("drink", "book", "ring", "letter", "basket", "map", "ball", "key")
COLORS = ["red", "blue", "green", "black", "white", "yellow", "pink", "brown", "orange", "purple"]
THINGS = ["cup", "pen", "hat", "box", "bag", "ball", "book", "plate", "lamp", "coin"]

Task = tuple[list[str], list[str], list[str], list[str]]
"""Clean and corrupted prompts, answers and foils."""


def ioi(count: int, seed: int) -> Task:
    """Indirect objects: the name that is not repeated."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        a, b, c = draw.sample(NAMES, 3)
        first, second = draw.sample((a, b), 2)
        place, thing = draw.choice(PLACES), draw.choice(OBJECTS)
        text = f"When {first} and {second} went to the {place}, {{}} gave a {thing} to"
        rows.append((text.format(b), text.format(c), f" {a}", f" {b}"))
    clean, corrupted, answers, foils = map(list, zip(*rows, strict=True))
    return clean, corrupted, answers, foils


def colored(count: int, seed: int) -> Task:
    """Colored objects: the color of the object that the question names."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        things, colors = draw.sample(THINGS, 3), draw.sample(COLORS, 3)
        items = [f"a {color} {thing}" for color, thing in zip(colors, things, strict=True)]
        asked, other = draw.sample(range(3), 2)
        text = (
            f"I see {items[0]}, {items[1]} and {items[2]}. "
            "Q: What color is the {}? A: The {} is"
        )
        clean, corrupted = (text.format(things[i], things[i]) for i in (asked, other))
        rows.append((clean, corrupted, f" {colors[asked]}", f" {colors[other]}"))
    clean_rows, corrupted_rows, answers, foils = map(list, zip(*rows, strict=True))
    return clean_rows, corrupted_rows, answers, foils


TASKS: dict[str, Callable[[int, int], Task]] = {"ioi": ioi, "colored": colored}


@torch.no_grad()
def solved(model: Any, task: Task) -> tuple[dl.Pairs, dict[str, float]]:
    """Pairs that the model answers correctly, and its accuracy and margin on all."""
    tokenizer = model.tokenizer
    one = [
        i
        for i in range(len(task[0]))
        if all(
            len(tokenizer(part[i], add_special_tokens=False)["input_ids"]) == 1 for part in task[2:]
        )
        and len(tokenizer(task[0][i])["input_ids"]) == len(tokenizer(task[1][i])["input_ids"])
    ]
    clean, corrupted, answers, foils = ([part[i] for i in one] for part in task)
    pairs = dl.Pairs.from_prompts(
        model, clean=clean, corrupted=corrupted, answers=answers, foils=foils, chat=False
    )
    engine, margins, first = get_engine(model), [], []
    for i, row in enumerate(pairs.clean):
        logits = engine.unembed(engine.final(row[None])[0, -1])
        answer, foil = int(pairs.answers[i, 0]), int(pairs.foils[i, 0])
        margins.append(float(logits[answer] - logits[foil]))
        first.append(int(logits.argmax()) == answer)
    margin = np.array(margins)
    stats = {
        "prompts": len(margin),
        "accuracy": float((margin > 0).mean()),
        "margin": float(margin.mean()),
        "answer_is_argmax": float(np.mean(first)),
    }
    return pairs[margin > 0], stats


def main() -> None:
    """Parse the arguments, compute all curves, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--prompts", type=int, default=120, help="prompts generated per task")
    parser.add_argument("--pairs", type=int, default=24, help="solved pairs used, half to score")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--backend", default="bridge")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = dl.load_model(args.model, backend=args.backend)
    for name in args.tasks:
        tables = []
        pairs, stats = solved(model, TASKS[name](args.prompts, 0))
        pairs = pairs[: min(args.pairs, len(pairs))]
        half = len(pairs) // 2
        train, test = pairs[:half], pairs[half:]
        stats |= {"scored_on": len(train), "measured_on": len(test)}
        print(name, json.dumps(stats), flush=True)
        started = time.process_time()
        gradient = dl.edge_scores(model, train, method="gradient")
        integrated = dl.edge_scores(model, train, steps=args.steps)
        print(f"scores: {time.process_time() - started:.0f} CPU seconds", flush=True)
        noise = np.random.default_rng(0)
        methods: dict[str, tuple[Any, str, str]] = {
            "edges, gradient": (gradient, "edges", "top"),
            "edges, integrated-inputs": (integrated, "edges", "top"),
            "edges, integrated-inputs, greedy": (integrated, "edges", "greedy"),
            "edges, random": (noise.random(len(gradient.graph)), "edges", "top"),
            "nodes, gradient": (gradient, "nodes", "top"),
            "nodes, integrated-inputs": (integrated, "nodes", "top"),
            "nodes, random": (noise.random(len(gradient.graph.senders)), "nodes", "top"),
        }
        for absolute in (True, False):
            for label, (scores, level, select) in methods.items():
                if not absolute and ("random" in label or "greedy" in label):
                    continue
                ranking = scores
                if not absolute:  # a noising effect is negative where the edge helps the answer
                    ranking = -(
                        scores.mean() if level == "edges" else scores.by_sender().to_numpy()
                    )
                curve = dl.faithfulness_curve(
                    model,
                    test,
                    ranking,
                    level=level,
                    select=select,
                    absolute=absolute,
                    batch_rows=8,
                )
                ranked = "magnitude" if absolute else "signed"
                table = curve.table().assign(
                    task=name, method=label, ranked=ranked, cpr=curve.cpr, cmd=curve.cmd
                )
                tables.append(table)
                print(f"{label} ({ranked}): CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}", flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            pd.concat(tables).round(4).to_csv(args.out / f"{name}.csv", index=False)
            (args.out / f"{name}.json").write_text(json.dumps(stats, indent=1) + "\n")


if __name__ == "__main__":
    main()
