"""Recipes: refused settings, optimizers, and the paper's values."""

from dataclasses import replace

import pytest
import torch

from divergence_lens.training import PAPER, Recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1"),
        ({"clip": 0.0}, "clip is 0"),
        ({"epochs": 0}, "epochs is 0; it must be at least 1"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be at least 1"),
        ({"lora_rank": 2, "embedding": True}, "train the embedding in full, with lora_rank=None"),
        ({"batch_tokens": 0}, "batch_tokens is 0; it must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0; it must be at least 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"final_lr": 2.0}, r"final_lr is 2\.0"),
        ({"optimizer": "adamm"}, "optimizer is 'adamm'"),
        ({"optimizer": torch.optim.LBFGS}, "LBFGS"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def test_counts_are_whole_numbers(unchecked):
    with pytest.raises(TypeError, match=r"epochs is 1\.5; it must be a whole number"):
        Recipe(epochs=1.5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", torch.optim.SGD, torch.optim.RMSprop])
def test_every_optimizer_runs_without_options(optimizer):
    recipe = replace(Recipe(), optimizer=optimizer)
    variable = torch.ones(2, requires_grad=True)
    built = recipe.build([variable])
    variable.sum().backward()
    built.step()
    assert (variable < 1).all()
    assert recipe.describe()["optimizer_options"] == ({"eps": 5e-3} if optimizer == "adamw" else {})


def test_the_paper_s_recipe():
    assert (PAPER.lora_rank, PAPER.lora_alpha, PAPER.lr) == (8, 8, 2e-4)
    assert (PAPER.batch_size, PAPER.epochs, PAPER.warmup_steps, PAPER.clip) == (60, 10, 5, 1.0)
    assert PAPER.rate(4, 105) == PAPER.rate(5, 105) == 2e-4
    assert PAPER.rate(104, 105) == pytest.approx(2e-6)
