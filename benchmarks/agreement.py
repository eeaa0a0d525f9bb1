"""Measure which approximation to trust at which site: every method against the exact grid.

    python benchmarks/agreement.py                            # the tiny model
    python benchmarks/agreement.py --model FOLDER             # another model, on the stories below

Prints two Markdown tables: Pearson correlations with the recall of the 20 strongest cells, and
calibration slopes. For the tiny model, the pairs are its own divergence tokens. For other models,
they are story openings that differ in one word. All cells of all pairs are pooled.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

import divergence_lens as dl
from divergence_lens.engine import get_engine
from divergence_lens.engine.sites import SITES
from divergence_lens.patching.agreement import Agreement
from divergence_lens.patching.gradients import Method

STORIES = (
    ("Once there was a girl named Lily. One day, she saw a big {} in the", "dog", "cat"),
    ("Tom had a red {}. He liked to play with his", "ball", "car"),
    ("One day, a {} went to the park. The sun was hot. He wanted to", "boy", "bird"),
    ("Mom said, \"Let's go to the {}.\" Sam was very happy. They went to the", "beach", "store"),
    ("The {} was very sad. It had lost its", "cat", "tree"),
    ("There was a big {}. It lived in a", "fish", "bear"),
    ("Lily was {}. She wanted to", "hungry", "tired"),
    ("Once there was a {} who liked to sing. Every day, the", "bird", "man"),
    ("Ben and Mia went to the {}. They saw a big", "zoo", "sea"),
    ("It was a {} day. Tim put on his", "cold", "sunny"),
    ("The dog ran to the {}. He picked up the", "ball", "bone"),
    ("Anna was {}. Her mom gave her a", "sick", "good"),
)  # fmt: skip


def story_pairs(model: Any) -> dl.Pairs:
    """Build one pair per opening, with the one word (clean) and the other (corrupted).

    The answer is the greedy token of the clean side. The foil is the greedy token of the corrupted
    side, or its second choice if the two agree.
    """
    engine = get_engine(model)

    def choices(text: str) -> list[int]:
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return engine.unembed(engine.final(ids)[:, -1])[0].topk(2).indices.tolist()

    clean = [text.format(word) for text, word, _ in STORIES]
    corrupted = [text.format(word) for text, _, word in STORIES]
    answers = [choices(text)[0] for text in clean]
    foils = [
        next(token for token in choices(text) if token != answer)
        for text, answer in zip(corrupted, answers, strict=True)
    ]
    return dl.Pairs.from_prompts(
        model, clean=clean, corrupted=corrupted, answers=answers, foils=foils, chat=False
    )


def divergence_pairs(model: Any, count: int) -> dl.Pairs:
    """Pairs at the first divergence tokens of the tiny model's own lists."""
    owl, *others = dl.animal_teachers(["owl", "cat", "wolf", "panda"])
    examples = dl.generate(model, dl.number_prompts(count, seed=0), teacher=owl)
    div = dl.find_divergence(model, examples, teacher=owl, counterfactuals=others)
    pairs = div.pairs(first_only=True)
    return pairs[:count]


def methods_of(site: str) -> list[str]:
    """The methods that are available for a site."""
    excluded = ("relp",) if site in ("q", "k") else ("qk", "atp*")
    return [method for method in get_args(Method) if method not in excluded]


def table(
    title: str, agreements: dict[tuple[str, str], Agreement], show: Any, columns: Sequence[str]
) -> None:
    """Print a Markdown table with one row per site and one column per method."""
    print(f"\n{title}\n\n| site | {' | '.join(f'`{c}`' for c in columns)} |")
    print(f"|---|{'---|' * len(columns)}")
    for site in dict.fromkeys(site for site, _ in agreements):
        cells = [show(agreements[site, c]) if (site, c) in agreements else "" for c in columns]
        print(f"| `{site}` | {' | '.join(cells)} |")


def main() -> None:
    """Run all methods on all sites and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--direction", default="noising", choices=("noising", "denoising"))
    parser.add_argument("--sites", nargs="+", default=list(SITES), choices=SITES)
    options = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # raised by TransformerLens itself
    model = dl.load_model(options.model)
    tiny = options.model.startswith("tiny")
    pairs = divergence_pairs(model, options.pairs) if tiny else story_pairs(model)
    agreements = {}
    for site in (site for site in options.sites if site in get_engine(model).sites):
        exact = dl.causal_mediation(model, pairs, site=site, direction=options.direction)
        for method in methods_of(site):
            effects = dl.attribution_patch(
                model, pairs, site=site, method=method, direction=options.direction
            )
            agreements[site, method] = effects.agreement(exact, k=20)
    lengths = sorted(len(row) for row in pairs.clean)
    print(
        f"{Path(options.model).name}: {len(pairs)} pairs of {lengths[0]} to {lengths[-1]} tokens, "
        f"{options.direction}, {get_engine(model).n_layers} layers"
    )
    columns = list(get_args(Method))
    table(
        "Pearson correlation with the exact effects, and recall of the 20 strongest cells:",
        agreements,
        lambda a: f"{a.pearson:.2f} / {a.recall:.0%}",
        columns,
    )
    table(
        "Calibration slope (exact on approximate; 1 is correct, below 1 the method exaggerates):",
        agreements,
        lambda a: f"{a.slope:.2f}",
        [c for c in columns if c not in ("graddrop", "atp*")],
    )


if __name__ == "__main__":
    main()
