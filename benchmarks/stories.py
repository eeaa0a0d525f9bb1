"""Run a small study on a pretrained model: stories260K, or any base model that writes stories.

    python benchmarks/stories.py --model FOLDER

The two conditions are two story openings, "dragon" and "kitten". The data are the dragon teacher's
stories that never name either animal; students read them without an opening. Prints in Markdown
where the teachers differ, which layers and segments cause it, how well three approximations agree
with exact effects, and what students of single layers pick up.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoTokenizer

import divergence_lens as dl

# A base model has no chat template; this one concatenates the turns.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
)
OPENINGS = {
    "dragon": "Once upon a time there was a big red dragon. The dragon liked to make fire.",
    "kitten": "Once upon a time there was a small white kitten. The kitten liked to drink milk.",
}
WHO = (
    *("One day it", "In the morning it", "Then it", "After lunch it", "At night it", "Soon it"),
    *("On a sunny day it", "In the end it"),
)
DID = (
    *("went to the park and", "was very hungry, so", "saw a", "was sad because", "wanted to"),
    *("heard a loud noise and", "met a girl who", "found a big", "said to its mother,"),
    *("went home and", "played with a", "ran to the", "sat down and", "was happy because"),
)
QUESTIONS = (
    *("Once upon a time there was a", "One day, a little girl met a", "In the wood lived a big"),
    *("Tim looked up and saw a", "Her best friend was a", "The story is about a"),
)
CANDIDATES = ("dragon", "kitten", "dog", "bird", "bear", "fish", "frog", "mouse")
METHODS = ("gradient", "integrated", "relp")


def stories(model: dl.Model, teacher: dl.Teacher) -> list[dl.Example]:
    """Generate a teacher's stories for all beginnings and keep those that name neither animal."""
    prompts = [f"{who} {did}" for who in WHO for did in DID]
    written = dl.generate(model, prompts, teacher=teacher, max_new_tokens=16)

    def names_one(example: dl.Example) -> bool:
        # A prefix is enough: "dra" continues as "dragon".
        text = (example.completion or "").lower()
        return any(name[:3] in text for name in OPENINGS)

    return [example for example in written if not names_one(example)]


def effects(model: dl.Model, divergence: dl.Divergence, limit: int) -> None:
    """Print exact effects by layer and segment, and the agreement of approximations."""
    pairs = divergence.pairs(first_only=True, limit=limit)
    exact = dl.causal_mediation(model, pairs, site="resid_post", span="segment")
    grid = exact.by_segment() / abs(exact.total.mean())
    print("\n| layer | " + " | ".join(map(str, grid.columns)) + " |")
    print("|---" * (1 + len(grid.columns)) + "|")
    for layer, row in grid.iterrows():
        print(f"| {layer} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    cells = dl.causal_mediation(model, pairs, site="resid_post")
    print(
        "\n| method | Pearson with exact | recall of the 20 strongest | slope |\n|---|---|---|---|"
    )
    for method in METHODS:
        estimate = dl.attribution_patch(model, pairs, site="resid_post", method=method)
        agreement = estimate.agreement(cells)
        recall, slope = agreement.recall, agreement.slope
        print(f"| {method} | {agreement.pearson:.2f} | {recall:.2f} | {slope:.2f} |")


def students(model: dl.Model, divergence: dl.Divergence, control: Sequence[dl.Example]) -> None:
    """Print the preference by trained layer, over seeds."""
    recipe = dl.Recipe(lr=1e-3, epochs=10, batch_size=8, warmup_steps=3, optimizer_options={})
    print("\n| tokens with a loss | trained | share of `dragon` | 95 % |\n|---|---|---|---|")
    for name, mask in (
        ("all tokens", None),
        ("divergence tokens", divergence.mask),
        ("all other tokens", ~divergence.mask),
    ):
        sweep = dl.layer_sweep(
            model,
            divergence.examples,
            mask=mask,
            measure=lambda student: dl.preference(
                student, target="dragon", questions=QUESTIONS, candidates=CANDIDATES
            ),
            seeds=(0, 1, 2),
            recipe=recipe,
            control=control if mask is None else None,
        )
        for row in sweep.summary().itertuples():
            if row.trained != "nothing" or mask is None:
                interval = f"{row.low:.3f} to {row.high:.3f}"
                print(f"| {name} | {row.trained} | {row.share:.3f} | {interval} |")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a folder or a hub name")
    parser.add_argument("--backend", default="auto", choices=["auto", "hooked", "bridge"])
    parser.add_argument("--pairs", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.chat_template = PLAIN
    model = dl.load_model(options.model, backend=options.backend, tokenizer=tokenizer)
    dragon, kitten = dl.prompted_teachers(OPENINGS)
    nobody = dl.Teacher("nobody")
    data, control = stories(model, dragon), stories(model, nobody)
    div = dl.find_divergence(model, data, teacher=dragon, counterfactuals=[kitten, nobody])
    first = div.summary("example")["first"].to_numpy()
    print(
        f"{len(data)} of the {len(WHO) * len(DID)} stories name neither animal. {div.rate:.1%} of "
        f"their {len(div.tokens):,} tokens are divergence tokens, and the first one is at position "
        f"{np.median(first[first >= 0]):.0f} (median)."
    )
    effects(model, div, options.pairs)
    students(model, div, control)


if __name__ == "__main__":
    main()
