"""Compare teacher-forced scores with lm-eval's way of computing log-likelihoods.

    python benchmarks/scoring.py                                  # the tiny model
    python benchmarks/scoring.py --model FOLDER --questions 10 --docs docs/speed.md

lm-eval's `loglikelihood` sorts requests by length, pads them on the right, and computes the
log-softmax of the logits of all positions; this file does the same in plain Hugging Face. Tasks:

- answers: the forms of `preference` against one request per question and form. `preference` also
  computes the probability that the word ends after a form. Requests do not, so every token counts
  as such an end here, which costs the same and has probability 1.
- lists: `find_divergence` with two teachers against one request per teacher and number list.

Times are CPU seconds, which other programs on the machine hardly change: the median of alternating
runs and their range. "share" is the share of our time that the counted matrix products take at the
rate of a product of 1,024 rows. `--docs` writes the table between the markers of a page.
"""

import argparse
import dataclasses
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import divergence_lens as dl
from divergence_lens.chat import encode_prompts
from divergence_lens.data import preference_questions
from divergence_lens.engine import get_engine
from divergence_lens.evaluation.answers import form_events, form_ids
from divergence_lens.tiny import tiny_folder

Request = tuple[tuple[int, ...], tuple[int, ...]]
MARKERS = "<!-- scoring: begin -->", "<!-- scoring: end -->"
BATCH = 16


@torch.no_grad()
def loglikelihoods(hf: Any, requests: Sequence[Request]) -> np.ndarray:
    """Return the log-probability of each continuation after its context."""
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0] + requests[i][1]))
    scores = np.zeros(len(requests))
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        rows = [[*requests[i][0], *requests[i][1]][:-1] for i in part]
        width = max(map(len, rows))
        padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        logp = hf(padded).logits.log_softmax(-1)  # [batch, pos, d_vocab]
        for line, i in enumerate(part):
            context, continuation = requests[i]
            at = torch.arange(len(continuation)) + len(context) - 1
            scores[i] = float(logp[line, at, torch.tensor(continuation)].double().sum())
    return scores


def answers(hf: Any, model: Any, questions: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return ours and the peer's computation of the forms' log-probabilities."""
    asked = preference_questions("animal")[:questions]
    prompts = [encoded.ids for encoded in encode_prompts(model.tokenizer, asked)]
    forms, _ = form_ids(model.tokenizer, dl.ANIMALS)
    engine = get_engine(model)
    every_word_ends = np.zeros(engine.d_vocab, dtype=bool)

    @torch.no_grad()
    def ours() -> np.ndarray:
        return np.log(form_events(engine, prompts, forms, every_word_ends, 8192)).ravel()

    requests = [(prompt, form) for prompt in prompts for form in forms]
    return ours, lambda: loglikelihoods(hf, requests)


def lists(hf: Any, model: Any, questions: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return ours and the peer's computation of the lists' log-probabilities."""
    teachers = dl.animal_teachers(["owl", "cat"])
    random = np.random.default_rng(0)
    examples = [
        dl.Example(prompt, ", ".join(map(str, random.integers(100, 999, 10))))
        for prompt in dl.number_prompts(questions, seed=0)
    ]
    requests: list[Request] = []

    def ours() -> np.ndarray:
        div = dl.find_divergence(model, examples, teacher=teachers[0], counterfactuals=teachers[1:])
        lengths = [len(example.completion_ids or ()) for example in div.examples]
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        return np.add.reduceat(div.logprob.astype(float), starts, axis=1).ravel()

    completed = dl.find_divergence(
        model, examples, teacher=teachers[0], counterfactuals=teachers[1:]
    ).examples
    for teacher in teachers:
        encoded = encode_prompts(
            model.tokenizer, [e.prompt for e in completed], system_prompt=teacher.system_prompt
        )
        requests += [
            (prompt.ids, tuple(e.completion_ids or ()))
            for prompt, e in zip(encoded, completed, strict=True)
        ]
    return ours, lambda: loglikelihoods(hf, requests)


TASKS = {"answers": answers, "lists": lists}


def measured(hf: Any, model: Any, name: str, options: argparse.Namespace) -> str:
    """Run one task on both sides, alternating, and return its row of the table."""
    ours, peer = TASKS[name](hf, model, options.questions)
    engine, times = get_engine(model), ([], [])  # type: tuple[Any, tuple[list[float], list[float]]]
    for _ in range(options.repeats):
        before = dataclasses.replace(engine.work)
        results = []
        for side, run in enumerate((ours, peer)):
            start = time.process_time()
            results.append(run())
            times[side].append(time.process_time() - start)
    apart = float(abs(results[0] - results[1]).max())
    if not apart < 1e-3:
        raise SystemExit(f"{name}: log-probabilities differ by {apart:.1e}")
    block = sum(p.numel() for p in engine.block_parameters(0).values() if p.ndim > 1)
    products = (engine.work.positions - before.positions) * block
    products += (engine.work.unembedded - before.unembedded) * engine.d_model * engine.d_vocab
    own, other = (statistics.median(side) for side in times)
    share = products / multiplications_per_second(engine.d_model) / own
    spread = [f"{min(side):.2f} to {max(side):.2f}" for side in times]
    return (
        f"| {name} | {own:.2f} s ({spread[0]}) | {other:.2f} s ({spread[1]}) | "
        f"{other / own:.1f} | {apart:.0e} | {share:.0%} |"
    )


def multiplications_per_second(width: int) -> float:
    """Measure the rate of a product [1024, width] x [width, 4 width] in CPU time."""
    x, w = torch.randn(1024, width), torch.randn(4 * width, width)
    start = time.process_time()
    for _ in range(10):
        torch.nn.functional.linear(x, w)
    return 10 * x.numel() * 4 * width / (time.process_time() - start)


def main(arguments: list[str] | None = None) -> None:
    """Print the table, and write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, or a folder of a chat model")
    parser.add_argument("--backend", choices=["hooked", "bridge"], default="bridge")
    parser.add_argument("--questions", type=int, default=16, help="questions, and number lists")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--docs", type=Path, help="a page with the markers of this table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    folder = tiny_folder("tiny") if options.model == "tiny" else Path(options.model)
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    model = dl.load_model(folder, backend=options.backend)
    rows = [measured(hf, model, name, options) for name in TASKS]
    head = (
        f"| {folder.name} | ours | log-likelihoods | speedup | largest difference | share |",
        "|---|---|---|---|---|---|",
    )
    table = "\n".join([*head, *rows])
    print(table)
    if options.docs is not None:
        begin, end = MARKERS
        text = options.docs.read_text()
        if begin not in text or end not in text:
            raise SystemExit(f"{options.docs} lacks the markers {begin} and {end}")
        inner = f"{begin}\n{table}\n{end}"
        options.docs.write_text(re.sub(f"{begin}.*?{end}", lambda _: inner, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
