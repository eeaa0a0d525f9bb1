"""Long runs in small: divergence, patching and a sweep that write checkpoints."""

from pathlib import Path

import numpy as np

from divergence_lens.divergence import Divergence, find_divergence
from divergence_lens.evaluation.preferences import preference
from divergence_lens.examples import Example
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.effects import Effects
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.teachers import Teacher
from divergence_lens.training.finetuning import Recipe
from divergence_lens.training.sweep import layer_sweep
from divergence_lens.training.sweep_result import Sweep
from tests.support.models import chat_tokenizer
from tests.support.patching_oracles import random_pairs

OWL = Teacher("owl", system_prompt="You love owls.")

CAT = Teacher("cat", system_prompt="You love the cat.")

WOLF = Teacher("wolf", system_prompt="You think about the wolf all the time.")

ARRAYS = ("offsets", "tokens", "predicted", "margin", "logprob", "kl")

SMALL = 40
"""Tokens per batch that cut `some_examples` into many shards."""


def some_examples(n: int) -> list[Example]:
    draw = np.random.default_rng(0)
    return [
        Example(
            prompt="Continue: " + ", ".join(map(str, draw.integers(100, 1000, 3))),
            completion="random",
            completion_ids=tuple(
                draw.integers(0, len(chat_tokenizer()), draw.integers(1, 15)).tolist()
            ),
        )
        for _ in range(n)
    ]


def find(model, examples, **options) -> Divergence:
    options = {"counterfactuals": [CAT, WOLF], "batch_tokens": SMALL, "kl": True, **options}
    return find_divergence(model, examples, teacher=OWL, **options)


def assert_same_bits(one: Divergence, other: Divergence) -> None:
    for name in ARRAYS:
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name
    assert one.examples == other.examples


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def patch(model, **options):
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6, 8, 5, 7, 9), longer=(0, 1, 0, 2, 0))
    return causal_mediation(model, pairs, **{"batch_rows": 4, "corruption": "mean", **options})


def sweep(model, target="owl", questions=("Name an animal.", "Say an animal."), **options):
    def measure(student):
        chosen = {"target": target, "questions": questions, "candidates": ("owl", "cat")}
        return preference(student, **chosen)

    chosen = {
        "measure": measure,
        "recipe": Recipe(epochs=1, batch_size=4, warmup_steps=1),
        "layers": [0, 1],
        **options,
    }
    return layer_sweep(model, some_examples(6), **chosen)


def patch_and_sweep(model, folder, **options):
    """Exact and approximate effects and students, as one process or several find them."""
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6, 8, 5), longer=(0, 0, 0))
    attributed = attribution_patch(model, pairs, batch_rows=1, verify=5, **options)
    return (
        patch(model, **options),
        attributed,
        sweep(model, checkpoint_dir=folder, **options),
    )


def assert_same_effects(one: Effects, other: Effects) -> None:
    for name in ("values", "clean_metric", "corrupted_metric"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name
    assert one.verified == other.verified


def assert_same_students(one: Sweep, other: Sweep) -> None:
    for mine, theirs in zip(one.students, other.students, strict=True):
        assert (mine.condition, mine.layer, mine.seed) == (
            theirs.condition,
            theirs.layer,
            theirs.seed,
        )
        assert mine.values.keys() == theirs.values.keys()
        for name, values in mine.values.items():
            assert values.tobytes() == theirs.values[name].tobytes()
