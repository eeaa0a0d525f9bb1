"""Training data and masks, two recipes, a run with checkpoints, and comparisons of students."""

from dataclasses import replace

import numpy as np
import torch

from divergence_lens.chat import encode_prompt
from divergence_lens.examples import Example, with_ids
from divergence_lens.models import load_model
from divergence_lens.training.finetuning import Recipe, finetune
from tests.support.models import chat_tokenizer, random_hf_model

SHORT = Recipe(epochs=2, batch_size=4, warmup_steps=2)
SGD = Recipe(
    optimizer="sgd",
    lr=0.1,
    epochs=3,
    batch_size=64,
    warmup_steps=0,
    schedule="constant",
    optimizer_options={"momentum": 0.9},
)


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
        recipe=replace(SHORT, lora_rank=None if rank == "full" else int(rank), checkpoint_every=3),
        checkpoint_dir=path,
        **{"seed": 5, **options},
    )


def random_mask(model, examples, seed=0, share=0.3):
    count = sum(len(e.completion_ids) for e in with_ids(model.tokenizer, examples))
    return np.random.default_rng(seed).random(count) < share


def same_bits(left, right):
    assert left.tensors.keys() == right.tensors.keys()
    return all(torch.equal(left.tensors[n], right.tensors[n]) for n in left.tensors)


def largest_difference(left, right):
    assert left.tensors.keys() == right.tensors.keys()
    return max(float((left.tensors[n] - right.tensors[n]).abs().max()) for n in left.tensors)


def reference_loss(logits_of, tokenizer, examples, mask, system_prompt=None):
    """Mean cross-entropy of the masked-in completion tokens, one unpadded sequence at a time."""
    total, count, at = torch.tensor(0.0), 0, 0
    for example in with_ids(tokenizer, examples):
        prompt = encode_prompt(tokenizer, example.prompt, system_prompt=system_prompt).ids
        logits = logits_of(torch.tensor([[*prompt, *example.completion_ids]]))[0]
        for k, token in enumerate(example.completion_ids):
            if mask[at + k]:
                total = total - logits[len(prompt) + k - 1].log_softmax(-1)[token]
                count += 1
        at += len(example.completion_ids)
    return total / count
