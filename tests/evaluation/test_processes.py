"""Two processes that share a measurement return what one process returns."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import divergence_lens as dl
from divergence_lens.divergence import reading
from divergence_lens.evaluation import answers
from divergence_lens.generation import generating
from tests.support.processes import Shared

QUESTIONS = ["Name an animal.", "Say an animal.", "Your favorite animal?"]
PREFERENCE = {"target": "owl", "questions": QUESTIONS, "candidates": ("owl", "cat", "dog")}


def shared(models, call):
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(call, model, Shared(i)) for i, model in enumerate(models)]
        return [call.result() for call in calls]


@pytest.fixture
def models(random_model, monkeypatch):
    """One per thread, as each process has its own."""
    for module in (answers, reading, generating):
        monkeypatch.setattr(module, "Processes", Shared.of)
    return [random_model("llama", seed=2) for _ in range(2)]


@pytest.mark.parametrize(
    "options", [{}, {"sampled": dl.SampledAnswers(samples=4), "batch_tokens": 99}]
)
def test_preference(options, models):
    alone = dl.preference(models[0], **PREFERENCE, **options)
    both = shared(
        models, lambda m, each: dl.preference(m, **PREFERENCE, **options, accelerator=each)
    )
    for result in both:
        np.testing.assert_allclose(result.probabilities, alone.probabilities, rtol=1e-6)


def test_task_quality(models):
    examples = [dl.Example(prompt, "412, 467") for prompt in dl.number_prompts(5, seed=0)]
    options = {"max_new_tokens": 6, "batch_tokens": 200}
    alone = dl.task_quality(models[0], examples, **options)
    both = shared(models, lambda m, each: dl.task_quality(m, examples, **options, accelerator=each))
    for result in both:
        assert (result.lists, result.valid, result.tokens) == (5, alone.valid, alone.tokens)
        assert result.loss == pytest.approx(alone.loss, rel=1e-6)
