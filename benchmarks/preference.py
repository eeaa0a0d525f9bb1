"""Compare `preference` with forward passes of Hugging Face over the questions.

    python benchmarks/preference.py --model FOLDER

The baseline is one pass over the questions, padded on the right as one batch, with the logits of
all positions, or without any but those of each question's last token. It answers less: it has no
form of several tokens, and does not know whether the word ends. The sides take turns; the table has
the median and range of CPU seconds of one thread. Before, `bench-quick`'s check compares the
probabilities of three questions with products of plain passes; the command fails at a difference.
"""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import quick
import torch
from tables import spread, timed
from transformers import AutoModelForCausalLM

import divergence_lens as dl
from divergence_lens.chat import encode_prompts
from divergence_lens.data import preference_questions


def one_pass(hf: Any, prompts: Sequence[Sequence[int]], *, last: bool) -> torch.Tensor:
    """Return the logits of the questions, padded on the right, or only their last ones."""
    batch = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)  # [batch, pos]
    for row, ids in enumerate(prompts):
        batch[row, : len(ids)] = torch.tensor(ids)
    if not last:
        return hf(batch).logits  # type: ignore[no-any-return]
    hidden = hf.model(batch).last_hidden_state  # [batch, pos, d_model]
    ends = torch.tensor([len(ids) - 1 for ids in prompts])
    return hf.lm_head(hidden[torch.arange(len(prompts)), ends])  # type: ignore[no-any-return]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the comparison as a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder in the layout of Llama or Qwen2")
    parser.add_argument("--backends", nargs="+", default=["hooked", "bridge"])
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    questions = list(preference_questions())[: options.questions]
    hf = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    models = {name: dl.load_model(options.model, backend=name) for name in options.backends}
    for name, model in models.items():
        print(f"{name}: {quick.preference(quick.Subject(name, hf, model, [], []))}")
    tokenizer: Any = next(iter(models.values())).tokenizer
    prompts = [encoded.ids for encoded in encode_prompts(tokenizer, questions)]
    sides: dict[str, Callable[[], Any]] = {
        "one pass, all logits": lambda: one_pass(hf, prompts, last=False),
        "one pass, last logits": lambda: one_pass(hf, prompts, last=True),
    }
    for name, model in models.items():
        sides[f"`preference`, {name}"] = lambda model=model: dl.preference(
            model, target=dl.ANIMALS[0], questions=questions
        )
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with torch.no_grad():
        for run in sides.values():
            run()  # not measured: memory is allocated
        for _ in range(options.repeats):
            for name, run in sides.items():
                seconds[name].append(timed(run)[1])
    positions = int(np.sum([len(ids) for ids in prompts]))
    print(f"\n{len(prompts)} questions of {positions:,} tokens, {len(dl.ANIMALS)} candidates\n")
    print("| | CPU seconds | / all logits | / last logits |")
    print("|---|---|---|---|")
    for name, times in seconds.items():
        middle = statistics.median(times)
        ratios = [middle / statistics.median(seconds[peer]) for peer in list(sides)[:2]]
        print(f"| {name} | {spread(times)} | {ratios[0]:.2f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
