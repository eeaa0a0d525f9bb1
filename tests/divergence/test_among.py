"""Divergence among some ids: every argmax and probability is over these alone."""

import numpy as np
import pytest
import torch

import divergence_lens as dl
from divergence_lens.chat import prompt_ids
from divergence_lens.study.interventions import digit_ids

TEACHERS = [dl.Teacher("owl", "You love owls."), dl.Teacher("cat", "You love cats.")]


@pytest.fixture(scope="module")
def numerals(tiny):
    return digit_ids(tiny.tokenizer)


@pytest.fixture(scope="module")
def examples(tiny):
    prompts = dl.number_prompts(6, instructions=False)
    return dl.generate(
        tiny, prompts, teacher=TEACHERS[0], temperature=1.0, pattern=r"\d{3}(, \d{3}){3}"
    )


def test_numerals_are_the_tokens_of_digits(tiny, numerals):
    vocabulary = {i: tiny.tokenizer.decode([i]).strip() for i in range(len(tiny.tokenizer))}
    plain = {i for i, text in vocabulary.items() if text and set(text) <= set("0123456789")}
    assert set(numerals) == plain


def test_choices_are_those_of_the_logits_among_the_ids(tiny, numerals, examples):
    found = dl.find_divergence(
        tiny, examples, teacher=TEACHERS[0], counterfactuals=TEACHERS[1:], among=numerals
    )
    columns = torch.tensor(numerals)
    for number, teacher in enumerate(TEACHERS):
        rows = prompt_ids(
            tiny.tokenizer, [example.prompt for example in examples], [teacher.system_prompt]
        )[0]
        for row, example in enumerate(examples):
            prompt, ids = list(rows[row]), list(example.completion_ids)
            with torch.no_grad():
                logits = tiny(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
            among = logits[:, columns].log_softmax(-1)  # [pos, ids]
            start = found.offsets[row]
            for k, token in enumerate(ids):
                place = start + k
                if token in numerals:
                    assert found.predicted[number, place] == columns[among[k].argmax()]
                    expected = float(among[k, numerals.index(token)])
                    assert found.logprob[number, place] == pytest.approx(expected, abs=1e-4)
                    top = among[k].topk(2).values
                    margin = float(top[0] - top[1])
                    assert found.margin[number, place] == pytest.approx(margin, abs=1e-4)
                else:
                    assert found.predicted[number, place] == token
                    assert found.logprob[number, place] == 0


def test_other_tokens_never_diverge(tiny, numerals, examples):
    found = dl.find_divergence(
        tiny, examples, teacher=TEACHERS[0], counterfactuals=TEACHERS[1:], among=numerals
    )
    outside = ~np.isin(found.tokens, numerals)
    assert outside.any()
    assert not found.mask[outside].any()
    assert not found.advantage[outside].any()
    assert found.metadata["settings"]["among"] == sorted(numerals)


def test_all_ids_change_nothing(tiny, examples):
    options = {"teacher": TEACHERS[0], "counterfactuals": TEACHERS[1:]}
    plain = dl.find_divergence(tiny, examples, **options)
    whole = dl.find_divergence(tiny, examples, **options, among=range(tiny.cfg.d_vocab))
    np.testing.assert_array_equal(whole.predicted, plain.predicted)
    np.testing.assert_allclose(whole.logprob, plain.logprob, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"among": [5]}, "a choice needs two or more"),
        ({"among": [0, 1]}, "no completion has any of the 2 ids"),
        ({"among": [737, 738], "kl": True}, "leave out kl or among"),
    ],
)
def test_bad_input(tiny, examples, options, words):
    with pytest.raises(ValueError, match=words):
        dl.find_divergence(
            tiny, examples, teacher=TEACHERS[0], counterfactuals=TEACHERS[1:], **options
        )
