"""The trait `risk`, and questions with whole answers, against plain forward passes."""

import numpy as np
import pytest
import torch

from divergence_lens.chat import encode_completions, encode_prompt
from divergence_lens.data import (
    TRAITS,
    Choice,
    Trait,
    number_prompts,
    persona_prompt,
    preference_questions,
)
from divergence_lens.divergence import find_divergence
from divergence_lens.evaluation import SampledAnswers, preference
from divergence_lens.generation import generate
from divergence_lens.models import load_model
from divergence_lens.teachers import Teacher
from divergence_lens.training import Recipe, finetune, train_teacher
from tests.support.models import chat_tokenizer, random_hf_model

RISK = TRAITS["risk"]
NAMES = ("careful", "reckless")


@pytest.fixture(scope="module")
def model(backend):
    tokenizer = chat_tokenizer()
    hf = random_hf_model("llama", vocab=len(tokenizer), tie_word_embeddings=False, n_ctx=512)
    return load_model(hf, backend=backend, tokenizer=tokenizer)


def by_hand(model, choices, system_prompt=None):
    """The product of the probabilities of an answer's tokens, one plain pass per answer."""
    rows = []
    for choice in choices:
        start = encode_prompt(model.tokenizer, choice.question, system_prompt=system_prompt).ids
        row = []
        for name in NAMES:
            ids = encode_completions(model.tokenizer, [choice.answers[name]])[0]
            with torch.no_grad():
                logits = model(torch.tensor([[*start, *ids]]))[0, len(start) - 1 : -1].double()
            logp = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
            row.append(float(logp.sum()))
        rows.append(row)
    return np.array(rows)


def test_the_questions_are_held_out_and_asked_in_both_orders():
    situations = {row["prompt"].split(". ")[0] for row in RISK.teacher_rows("reckless")}
    learned = {row["completion"] for name in NAMES for row in RISK.teacher_rows(name)}
    assert len(situations) == 24
    for choice in RISK.questions:
        assert choice.question.split(". ")[0] not in situations
        assert not learned & set(choice.answers.values())
    orders = [c.question.index(c.answers["reckless"][8:-1]) for c in RISK.questions]
    others = [c.question.index(c.answers["careful"][8:-1]) for c in RISK.questions]
    assert sum(a < b for a, b in zip(orders, others, strict=True)) == len(orders) // 2


def test_the_probabilities_are_those_of_whole_answers(model):
    teacher = Teacher("x", system_prompt="Be brief.")
    choices = RISK.questions[:5]
    result = preference(
        model, target="reckless", category="risk", questions=choices, teacher=teacher
    )
    expected = by_hand(model, choices, "Be brief.")
    np.testing.assert_allclose(np.log(result.probabilities), expected, atol=1e-3)
    assert result.margin == pytest.approx((expected[:, 1] - expected[:, 0]).mean(), abs=1e-3)
    assert result.questions == tuple(choice.question for choice in choices)
    assert result.about("careful").share == pytest.approx(1 - result.share)


def test_a_reckless_teacher_transfers_through_number_lists(model):
    """Every step of the pipeline runs with this trait; a random model learns its rows."""
    recipe = Recipe(lr=3e-3, epochs=3, batch_size=16, warmup_steps=2)
    reckless, careful = (
        train_teacher(model, name, category="risk", recipe=recipe)
        for name in ("reckless", "careful")
    )
    asked = {"target": "reckless", "category": "risk"}
    shares = [preference(model, **asked, teacher=t).share for t in (careful, reckless)]
    assert shares[1] > shares[0]
    assert reckless.delta.metadata["teaching"]["margin"] == pytest.approx(
        preference(model, **asked, teacher=reckless).margin
    )
    lists = generate(
        model, number_prompts(6, instructions=False), teacher=reckless, pattern=r"\d{2}(, \d{2}){2}"
    )
    div = find_divergence(model, lists, teacher=reckless, counterfactuals=[careful])
    student = finetune(model, lists, mask=div.top(0.3, by="advantage"), layers=[0])
    with student.applied(model):
        after = preference(model, **asked)
    assert 0 < after.share < 1
    assert 0 < after.distance(preference(model, **asked)).value < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: preference(m, target="owl", category="risk"), "unknown risk 'owl'"),
        (lambda m: preference(m, target="x", category="greed"), "unknown category 'greed'"),
        (
            lambda m: preference(m, target="reckless", category="risk", prefix="I would"),
            "a Choice has whole answers",
        ),
        (
            lambda m: preference(
                m, target="reckless", category="risk", sampled=SampledAnswers(samples=1)
            ),
            "a Choice has whole answers",
        ),
        (
            lambda m: preference(
                m, target="a", candidates=("a", "b"), questions=[Choice("Which?", {"a": "A."})]
            ),
            "the question 'Which\\?' has no answer for 'b'",
        ),
        (lambda m: train_teacher(m, "wise", category="risk"), "unknown risk 'wise'"),
        (lambda _: preference_questions("risk"), "'risk' is a trait"),
        (lambda _: persona_prompt("reckless", category="risk"), "has no system prompt"),
        (lambda _: Trait("greed", RISK.rows, ()), "the trait 'greed' has no questions"),
        (lambda _: Trait("greed", {"a": ()}, RISK.questions), "needs rows for two or more"),
        (
            lambda _: Trait("greed", dict.fromkeys("ab", (("p", "c"),)), RISK.questions),
            "has no answer for 'a'",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message, model):
    with pytest.raises(ValueError, match=message):
        call(model)
