"""The history of a training run, and callbacks that add to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from divergence_lens.deltas.delta import Delta
from divergence_lens.evaluation.preferences import preference
from divergence_lens.examples import Example
from divergence_lens.provenance import fingerprint
from divergence_lens.training import Recipe, finetune
from tests.support.training import SHORT, number_lists, same_bits


def test_history_holds_every_step_and_what_the_callback_returns(random_model):
    model, base = random_model("gpt2"), fingerprint(random_model("gpt2"))
    seen = []

    def watch(step, loss, student):
        seen.append((step, fingerprint(student) != base, torch.is_grad_enabled()))
        return {"twice": 2 * loss}

    recipe = Recipe(epochs=3, batch_size=4, warmup_steps=2, final_lr=0.0)
    history = finetune(model, number_lists(10), recipe=recipe, on_step=watch, every=4).history()
    assert [step for step, _, _ in seen] == [4, 8, 9]
    assert all(changed and not grad for _, changed, grad in seen)
    assert history["step"].tolist() == list(range(1, 10))
    assert history["epoch"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert history["lr"].tolist() == pytest.approx(
        [0.005 * x for x in (1 / 2, 1, *((9 - step) / 7 for step in range(2, 9)))]
    )
    watched = history.dropna()
    assert watched["twice"].tolist() == pytest.approx((2 * watched["loss"]).tolist())
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]


@pytest.mark.parametrize("kind", [np.float32, torch.tensor])
def test_numbers_of_a_callback_can_be_saved(random_model, tmp_path, kind):
    student = finetune(
        random_model("gpt2"),
        number_lists(4),
        recipe=replace(SHORT, checkpoint_every=1),
        on_step=lambda step, *_: {"seen": kind(step)},
        checkpoint_dir=tmp_path / "run",
    )
    student.save(tmp_path / "student.safetensors")
    history = Delta.load(tmp_path / "student.safetensors").history()
    assert history["seen"].tolist() == history["step"].tolist()


@pytest.mark.parametrize(
    ("returned", "message"),
    [(0.5, "on_step returned 0.5; return a mapping"), ({"x": np.ones(2)}, "'x' as a ndarray")],
)
def test_values_that_the_history_cannot_store_are_refused_at_once(
    random_model,
    returned,
    message,
    unchecked,
):
    with pytest.raises(TypeError, match=message):
        finetune(random_model("gpt2"), number_lists(4), recipe=SHORT, on_step=lambda *_: returned)


def test_preference_can_be_followed_while_a_student_learns(random_model):
    model = random_model("qwen2")
    asked = {"target": "owl", "questions": ["Name one."], "candidates": ["owl", "cat"]}
    examples = [Example("Name one.", completion="owl")] * 4
    recipe = Recipe(lr=1e-2, epochs=6, batch_size=4, warmup_steps=0, optimizer_options={})

    def follow(step, loss, student):
        return {"owl": preference(student, **asked).share}

    for lora_rank in (None, 4):
        student = finetune(
            model,
            examples,
            recipe=replace(recipe, lora_rank=lora_rank),
            every=3,
            on_step=follow,
        )
        followed = student.history()["owl"].dropna()
        assert list(followed.index) == [2, 5]
        assert followed.min() > preference(model, **asked).share
        # The last value is that of the student itself, and measuring did not change it.
        with student.applied(model):
            assert followed[5] == pytest.approx(preference(model, **asked).share, abs=1e-5)
        alone = finetune(model, examples, recipe=replace(recipe, lora_rank=lora_rank))
        assert same_bits(student, alone)
