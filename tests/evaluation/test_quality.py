"""Task quality: what a model writes is judged, and what others wrote is read, as by hand."""

import math

import pytest
import torch

from divergence_lens.chat import encode_prompt
from divergence_lens.data import NumberFilter, NumberList, number_prompts, parse_numbers
from divergence_lens.evaluation.quality import TaskQuality, task_quality
from divergence_lens.examples import with_ids
from divergence_lens.generation import generate
from divergence_lens.teachers import Teacher
from divergence_lens.training.finetuning import Recipe, finetune
from tests.support.training import number_lists


def test_the_loss_is_the_mean_over_completion_tokens_of_a_plain_forward(random_model):
    model, examples = random_model("qwen2"), number_lists(5)
    measured = task_quality(model, examples, system_prompt="Be brief.", max_new_tokens=4)
    losses = []
    for example in with_ids(model.tokenizer, examples):
        prompt = encode_prompt(model.tokenizer, example.prompt, system_prompt="Be brief.").ids
        ids = torch.tensor([[*prompt, *example.completion_ids]])
        with torch.no_grad():
            logp = model(ids)[0].log_softmax(-1)
        losses += [
            -float(logp[len(prompt) + k - 1, token])
            for k, token in enumerate(example.completion_ids)
        ]
    assert measured.tokens == len(losses)
    assert measured.loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert measured.perplexity == pytest.approx(math.exp(measured.loss))


def test_lists_are_the_model_s_own_and_judged_by_the_filter(tiny):
    prompts = number_prompts(12, seed=5, instructions=False)
    held_out = generate(tiny, prompts, teacher=None)
    measured = task_quality(tiny, held_out)
    texts = [example.completion for example in held_out]
    assert measured.valid == sum(isinstance(parse_numbers(text), NumberList) for text in texts)
    assert measured.lists == 12
    assert measured.valid_rate > 0.5
    low, high = measured.interval()
    assert low < measured.valid_rate <= high
    none = task_quality(tiny, held_out, number_filter=NumberFilter(high=0))
    assert none.valid == 0
    assert sum(none.reasons.values()) == 12


@pytest.mark.slow
def test_a_broken_student_is_seen_to_be(tiny):
    held_out = generate(tiny, number_prompts(12, seed=5, instructions=False), teacher=None)
    before = task_quality(tiny, held_out)
    nonsense = [{"prompt": e.prompt, "completion": "owl owl owl"} for e in held_out]
    recipe = Recipe(lr=0.05, epochs=8, batch_size=12, optimizer_options={})
    student = finetune(tiny, nonsense, layers=[1], recipe=recipe)
    with student.applied(tiny):
        after = task_quality(tiny, held_out)
    assert after.valid_rate < before.valid_rate
    assert after.loss > before.loss + 1
    under = task_quality(tiny, held_out, teacher=Teacher("student", delta=student))
    assert under.loss == pytest.approx(after.loss)


def test_it_prints_and_comes_back_from_json(random_model):
    measured = task_quality(random_model("gpt2"), number_lists(2), max_new_tokens=2)
    assert TaskQuality(**measured.describe()) == measured
    assert "lists valid" in repr(measured)
    assert "<td>valid</td>" in measured._repr_html_()


def test_nothing_to_measure_and_two_prompts_are_refused(random_model):
    model = random_model("gpt2")
    with pytest.raises(ValueError, match="no held-out examples"):
        task_quality(model, [])
    with pytest.raises(ValueError, match="not both"):
        task_quality(model, number_lists(1), system_prompt="a", teacher=Teacher("b"))
