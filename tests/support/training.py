"""Training data, a short recipe, and a run with checkpoints."""

from dataclasses import replace

import numpy as np

from divergence_lens.examples import Example
from divergence_lens.models import load_model
from divergence_lens.training.finetuning import Recipe, finetune
from tests.support.models import chat_tokenizer, random_hf_model

SHORT = Recipe(epochs=2, batch_size=4, warmup_steps=2)


def number_lists(n, seed=0):
    random = np.random.default_rng(seed)

    def numbers(low, high):
        return ", ".join(map(str, random.integers(100, 999, random.integers(low, high))))

    return [Example(f"Continue: {numbers(1, 4)}.", completion=numbers(1, 4)) for _ in range(n)]


def checkpointed(backend, path, rank, examples=None, **options):
    tokenizer = chat_tokenizer()
    hf_model = random_hf_model("gpt2", vocab=len(tokenizer))
    model = load_model(hf_model, backend=backend, tokenizer=tokenizer)
    return finetune(
        model,
        number_lists(10) if examples is None else examples,
        layers=[1],
        recipe=SHORT if rank == "full" else replace(SHORT, lora_rank=int(rank)),
        checkpoint_dir=path,
        checkpoint_every=3,
        **{"seed": 5, **options},
    )
