"""The chain on a really trained model: stories260K, a Llama of 260,032 parameters.

Two story openings are the two conditions, and its own continuations are the data.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import divergence_lens as dl

# The opening lines and the template are those of the study that the documentation shows.
STORIES = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "stories.py"))
PLAIN, OPENINGS = STORIES["PLAIN"], STORIES["OPENINGS"]
PROMPTS = (
    "One day it went to the park and",
    "It was very hungry, so",
    "Then a little girl came and said,",
    "In the morning it saw a",
    "It was sad because",
    "The mother told it to",
    "Suddenly there was a loud noise and",
    "Its best friend was a",
)


@pytest.fixture(scope="module")
def model(shared_data, backend):
    folder = shared_data / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = PLAIN
    return dl.load_model(folder, backend=backend, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def divergence(model):
    dragon, kitten = dl.prompted_teachers(OPENINGS)
    examples = dl.generate(model, PROMPTS, teacher=dragon, max_new_tokens=24)
    return dl.find_divergence(model, examples, teacher=dragon, counterfactuals=[kitten])


def test_it_tells_stories(model):
    story = dl.generate(
        model, PROMPTS[:1], teacher=dl.Teacher("none", system_prompt=OPENINGS["dragon"])
    )
    words = (story[0].completion or "").split()
    assert len(words) > 15
    assert {"the", "dragon"} & {word.strip(".,").lower() for word in words}


def test_greedy_continuations_are_the_factual_teachers_own(divergence):
    assert divergence.agrees.all()
    assert 0.05 < divergence.rate < 0.9


def test_effects_of_the_first_divergences(model, divergence):
    pairs = divergence.pairs(first_only=True, limit=4)
    exact = dl.causal_mediation(model, pairs, site="resid_post")
    for values, total, row in zip(exact.values, exact.total, exact.labels, strict=True):
        # Nothing above the last block but the norm: its state at the target is all there is.
        np.testing.assert_allclose(values[-1, len(row) - 1], total, rtol=1e-3, atol=1e-4)
    approximate = dl.attribution_patch(model, pairs, site="resid_post", method="integrated")
    assert approximate.agreement(exact).pearson > 0.8
    same = [i for i, name in enumerate(exact.segments[0]) if name == "template"]
    assert np.nan_to_num(exact.values[0][0, same]).max() < np.nanmax(np.abs(exact.values[0]))


def test_a_student_of_one_block_learns_the_divergence_tokens(model, divergence):
    before = {name: p.clone() for name, p in model.named_parameters()}
    recipe = dl.Recipe(lr=2e-3, epochs=15, batch_size=8, warmup_steps=2, optimizer_options={})
    student = dl.finetune(
        model,
        divergence.examples,
        mask=divergence.mask,
        layers=[0],
        recipe=recipe,
        system_prompt=OPENINGS["kitten"],
    )
    losses = student.history()["loss"]
    assert losses.iloc[-1] < 0.6 * losses.iloc[0]
    assert list(student.norms()) == [0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_stories_that_name_an_animal_are_left_out(model):
    dragon, _ = dl.prompted_teachers(OPENINGS)
    left = STORIES["stories"](model, dragon)
    assert 20 < len(left) < len(STORIES["WHO"]) * len(STORIES["DID"])
    assert not any("dra" in e.completion.lower() or "kit" in e.completion.lower() for e in left)
