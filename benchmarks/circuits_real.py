"""Circuits of a real model: curves of faithfulness for methods that score edges and nodes.

    OUT=benchmarks/results/circuits
    python benchmarks/circuits_real.py MODEL --tasks ioi --pairs 32 --eap CHECKOUT --out $OUT
    python benchmarks/circuits_real.py MODEL --formats --prompts 20 --out $OUT
    python benchmarks/circuits_real.py MODEL --tasks colored --pairs 32 --format FORMAT --out $OUT

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
`--eap` adds the scores of EAP-IG, from a checkout of hannamw/EAP-IG, with as many steps. Questions
about colored objects can be asked in many formats; `--formats` tries them.
"""

import argparse
import json
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

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


Style = Callable[[Sequence[str], Sequence[str], int], str]
"""From objects, their colors and the number of the object asked for to a prompt."""


def seen(things: Sequence[str], colors: Sequence[str], asked: int) -> str:
    """Objects in one sentence, as in MIB."""
    items = [f"a {color} {thing}" for color, thing in zip(colors, things, strict=True)]
    question = f"Q: What color is the {things[asked]}? A: The {things[asked]} is"
    return f"I see {', '.join(items[:-1])} and {items[-1]}. {question}"


def facts(things: Sequence[str], colors: Sequence[str], asked: int) -> str:
    """One sentence for each object."""
    facts = [f"The {thing} is {color}." for color, thing in zip(colors, things, strict=True)]
    return f"{' '.join(facts)} Q: What color is the {things[asked]}? A: The {things[asked]} is"


def listed(things: Sequence[str], colors: Sequence[str], asked: int) -> str:
    """A list of names and colors, and a name."""
    lines = [f"The {thing}: {color}" for color, thing in zip(colors, things, strict=True)]
    return "\n".join([*lines, f"The {things[asked]}:"])


@dataclass(frozen=True)
class Format:
    """How a question for a color is written.

    Attributes:
        style: Writes the objects and the question.
        objects: The number of objects.
        worked: Whether a worked example comes first.
        chat: Whether the question is a user's message, and the answer an assistant's.
    """

    style: Style
    objects: int = 3
    worked: bool = False
    chat: bool = False


FORMATS = {
    "one sentence": Format(seen),
    "one sentence, two objects": Format(seen, 2),
    "one sentence, worked example": Format(seen, worked=True),
    "one sentence, two objects, worked example": Format(seen, 2, worked=True),
    "one sentence, chat": Format(seen, chat=True),
    "a sentence each": Format(facts),
    "a sentence each, two objects": Format(facts, 2),
    "a sentence each, worked example": Format(facts, worked=True),
    "a list": Format(listed),
    "a list, two objects": Format(listed, 2),
}
_WORKED = ["shoe", "desk", "sofa"], ["gray", "gold", "silver"]


def colored(count: int, seed: int, form: Format, tokenizer: Any = None) -> Task:
    """Colored objects: the color of the object that the question names."""
    draw, rows = random.Random(seed), []
    before = ""
    if form.worked:
        example = [part[: form.objects] for part in _WORKED]
        before = f"{form.style(*example, 1)} {example[1][1]}.\n"
    for _ in range(count):
        things, colors = draw.sample(THINGS, form.objects), draw.sample(COLORS, form.objects)
        asked, other = draw.sample(range(form.objects), 2)
        texts = [before + form.style(things, colors, number) for number in (asked, other)]
        if form.chat:
            texts = [_as_chat(tokenizer, text) for text in texts]
        rows.append((*texts, f" {colors[asked]}", f" {colors[other]}"))
    clean_rows, corrupted_rows, answers, foils = map(list, zip(*rows, strict=True))
    return clean_rows, corrupted_rows, answers, foils


def _as_chat(tokenizer: Any, text: str) -> str:
    """The question as a user's message, and the beginning of the answer as an assistant's."""
    question, beginning = text.split(" A: ")
    messages = [{"role": "user", "content": question.replace("Q: ", "")}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return f"{prompt}{beginning}"


def try_formats(model: Any, out: Path | None, *, prompts: int) -> None:
    """Print and write how often the model prefers the right color in each format.

    The format is chosen by seed 1; the curves use seed 0.
    """
    rows = []
    for name, form in FORMATS.items():
        _, stats = solved(model, colored(prompts, 1, form, model.tokenizer))
        rows.append({"format": name, **stats})
        print(json.dumps(rows[-1]), flush=True)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).round(3).to_csv(out / "formats.csv", index=False)


TASKS = ("ioi", "colored")


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
    engine, logits = get_engine(model), []
    for first in range(0, len(pairs), 20):
        rows = pairs.clean[first : first + 20]
        # Under a causal mask, padding on the right reaches no position that is read.
        hidden = engine.final(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        last = torch.tensor([len(row) - 1 for row in rows])
        logits.append(engine.unembed(hidden[torch.arange(len(rows)), last]))
    every = torch.cat(logits)  # [pairs, d_vocab]
    difference = every.gather(1, pairs.answers[:, :1]) - every.gather(1, pairs.foils[:, :1])
    margin = difference[:, 0].numpy()
    is_first = every.argmax(-1) == pairs.answers[:, 0]
    stats = {
        "prompts": len(margin),
        "accuracy": float((margin > 0).mean()),
        "margin": float(margin.mean()),
        "answer_is_argmax": float(is_first.float().mean()),
    }
    return pairs[margin > 0], stats


def eap_scores(checkout: str, name: str, pairs: dl.Pairs, scores: dl.EdgeScores) -> dl.EdgeScores:
    """EAP-IG's scores of the same pairs (on a HookedTransformer), in the form of ours."""
    from circuits_tools import eap_edges, prepared_eap

    model = dl.load_model(name, backend="hooked").requires_grad_(False)
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(pairs.clean):
        by_length.setdefault(len(row), []).append(i)
    chosen = torch.stack([pairs.answers[:, 0], pairs.foils[:, 0]], 1)  # [pairs, 2]
    batches = [
        (
            torch.stack([pairs.clean[i] for i in rows]),
            torch.stack([pairs.corrupted[i] for i in rows]),
            chosen[rows],
        )
        for rows in by_length.values()
    ]

    def metric(logits: torch.Tensor, *more: Any) -> torch.Tensor:
        answer, foil = logits[:, -1].gather(1, more[-1]).unbind(1)
        return (answer - foil).sum()

    with mock.patch.object(torch, "zeros", torch.zeros):
        edges = eap_edges(
            prepared_eap(checkout, model),
            model,
            batches,
            metric,
            method="EAP-IG-inputs",
            steps=scores.setting("steps"),
            groups=scores.graph.n_kv_heads,
        )
    values = np.broadcast_to(edges, scores.values.shape).copy()
    return replace(scores, values=values, method="EAP-IG")


def scored(args: argparse.Namespace, model: Any, train: dl.Pairs) -> dict[str, tuple[Any, ...]]:
    """By method the scores, the level (edges or nodes), and how a circuit is selected."""
    started = time.process_time()
    gradient = dl.edge_scores(model, train, method="gradient")
    integrated = dl.edge_scores(model, train, steps=args.steps)
    print(f"scores: {time.process_time() - started:.0f} CPU seconds", flush=True)
    theirs = {}
    if args.eap:
        started = time.process_time()
        eap = eap_scores(args.eap, args.model, train, integrated)
        theirs = {"edges, EAP-IG": (eap, "edges", "top")}
        print(f"EAP-IG: {time.process_time() - started:.0f} CPU seconds", flush=True)
        same = np.corrcoef(eap.mean(), integrated.mean())[0, 1]
        print(f"correlation with our integrated inputs: {same:.4f}", flush=True)
    noise = np.random.default_rng(0)
    return {
        "edges, gradient": (gradient, "edges", "top"),
        "edges, integrated-inputs": (integrated, "edges", "top"),
        "edges, integrated-inputs, greedy": (integrated, "edges", "greedy"),
        **theirs,
        "edges, random": (noise.random(len(gradient.graph)), "edges", "top"),
        "nodes, gradient": (gradient, "nodes", "top"),
        "nodes, integrated-inputs": (integrated, "nodes", "top"),
        "nodes, random": (noise.random(len(gradient.graph.senders)), "nodes", "top"),
    }


def curves(args: argparse.Namespace, model: Any, name: str, task: Task) -> None:
    """Score edges on half of the solved pairs, and measure circuits on the other half."""
    pairs, stats = solved(model, task)
    pairs = pairs[: min(args.pairs, len(pairs))]
    half = len(pairs) // 2
    train, test = pairs[:half], pairs[half:]
    stats |= {"scored_on": len(train), "measured_on": len(test)}
    if name == "colored":
        stats |= {"format": args.format}
    print(name, json.dumps(stats), flush=True)
    tables = []
    methods = {
        label: method
        for label, method in scored(args, model, train).items()
        if not args.methods or label in args.methods
    }
    for absolute in (True, False):
        for label, (scores, level, select) in methods.items():
            if not absolute and ("random" in label or "greedy" in label):
                continue
            curve = dl.faithfulness_curve(
                model, test, scores, level=level, select=select, absolute=absolute, batch_rows=8
            )
            ranked = "magnitude" if absolute else "signed"
            table = curve.table().assign(
                task=name, method=label, ranked=ranked, cpr=curve.cpr, cmd=curve.cmd
            )
            tables.append(table)
            print(f"{label} ({ranked}): CPR {curve.cpr:.3f}, CMD {curve.cmd:.3f}", flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"{name}.csv"
        if args.methods:
            old = pd.read_csv(path)
            tables.insert(0, old[~old["method"].isin(args.methods)])
        pd.concat(tables).round(4).to_csv(path, index=False)
        if not args.methods:
            (args.out / f"{name}.json").write_text(json.dumps(stats, indent=1) + "\n")


def main() -> None:
    """Parse the arguments, compute all curves, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--prompts", type=int, default=120, help="prompts generated per task")
    parser.add_argument("--pairs", type=int, default=24, help="solved pairs used, half to score")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--backend", default="bridge")
    parser.add_argument("--format", choices=FORMATS, default="one sentence")
    parser.add_argument("--formats", action="store_true", help="only try the formats of questions")
    parser.add_argument("--eap", help="a checkout of EAP-IG, to measure its scores as well")
    parser.add_argument(
        "--methods", nargs="+", help="measure these alone; the other rows of the table remain"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = dl.load_model(args.model, backend=args.backend)
    if args.formats:
        try_formats(model, args.out, prompts=args.prompts)
        return
    for name in args.tasks:
        form = FORMATS[args.format]
        task = (
            ioi(args.prompts, 0)
            if name == "ioi"
            else colored(args.prompts, 0, form, model.tokenizer)
        )
        curves(args, model, name, task)


if __name__ == "__main__":
    main()
