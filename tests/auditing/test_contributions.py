"""Contributions of tokens, against Hugging Face's logits and sums written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import divergence_lens as dl
from divergence_lens.auditing.baseline import (
    TEMPERATURES,
    Baseline,
    fit_baseline,
    kinds_in,
    kinds_of,
    possible_ids,
)
from divergence_lens.auditing.candidates import Auditors
from divergence_lens.auditing.reading import contrast, read_contributions
from divergence_lens.divergence import KINDS, read_teachers
from divergence_lens.models import load_model
from tests.support.divergence import CAT, NOBODY, OWL, WOLF, oracle, some_examples
from tests.support.models import chat_tokenizer, random_hf_model

CANDIDATES = [OWL, CAT, WOLF]


@pytest.fixture(scope="module")
def hf():
    return random_hf_model("qwen2", 3, vocab=len(chat_tokenizer()), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def model(hf, backend):
    return load_model(hf, backend=backend, tokenizer=chat_tokenizer())


@pytest.fixture(scope="module")
def examples():
    return some_examples(10, 0, len(chat_tokenizer()))


def expected_contributions(hf, examples, temperature):
    """The definition, with the logits of one example and teacher at a time."""
    ids = torch.tensor([i for example in examples for i in example.completion_ids])
    base, *others = oracle(hf, chat_tokenizer(), examples, [NOBODY, *CANDIDATES])
    logs = torch.stack([logits.log_softmax(-1) for logits in others])  # [candidates, tokens, vocab]
    advantage = torch.stack(
        [logs[c] - logs[[d for d in range(3) if d != c]].mean(0) for c in range(3)]
    )
    if temperature:
        p = (base / temperature).softmax(-1)
    else:
        p = torch.nn.functional.one_hot(base.argmax(-1), base.shape[-1]).float()
    given_token = advantage.gather(-1, ids[None, :, None].expand(3, -1, 1))[..., 0]
    return (given_token - (p * advantage).sum(-1)).numpy(), base.argmax(-1).numpy()


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_contributions_follow_the_definition(hf, model, examples, temperature):
    baseline = Baseline(NOBODY, temperature, {})
    read = read_contributions(model, examples, baseline, [Auditors("given", tuple(CANDIDATES))])
    tokens, choice = expected_contributions(hf, examples, temperature)
    np.testing.assert_allclose(read.by_token[0], tokens, atol=1e-4)
    np.testing.assert_array_equal(read.choice, choice)
    for row, (start, end) in enumerate(zip(read.offsets, read.offsets[1:], strict=False)):
        np.testing.assert_allclose(read.rows[0, :, row], tokens[:, start:end].sum(1), atol=1e-3)


def test_parts_do_not_change_the_contributions(model, examples, monkeypatch, tmp_path):
    baseline, auditors = Baseline(NOBODY, 1.0, {}), [Auditors("given", tuple(CANDIDATES))]
    whole = read_contributions(model, examples, baseline, auditors)
    monkeypatch.setattr("divergence_lens.auditing.reading.PART_ROWS", 3)
    parts = read_contributions(model, examples, baseline, auditors, checkpoint_dir=tmp_path)
    np.testing.assert_allclose(parts.by_token, whole.by_token, atol=1e-5)
    np.testing.assert_allclose(parts.rows, whole.rows, atol=1e-4)
    assert len(list(tmp_path.glob("rows-*"))) == 4
    monkeypatch.setattr("divergence_lens.auditing.reading.MOST_VALUES", 10)
    again = read_contributions(model, examples, baseline, auditors, checkpoint_dir=tmp_path)
    np.testing.assert_array_equal(again.rows, parts.rows)
    assert again.by_token is None


def test_the_mean_contribution_of_what_the_baseline_writes_is_zero(model, examples):
    """Over all next tokens, weighted by their probability: the sum that a martingale needs."""
    vocabulary = len(chat_tokenizer())
    one = examples[0]
    rows = [replace(one, completion_ids=(i,)) for i in range(vocabulary)]
    baseline, auditors = Baseline(NOBODY, 1.0, {}), [Auditors("given", tuple(CANDIDATES))]
    read = read_contributions(model, rows, baseline, auditors)
    p = np.exp(read_teachers(model, rows, [NOBODY]).logprob[0])
    assert p.sum() == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose((p * read.by_token[0]).sum(-1), 0, atol=1e-4)


@given(st.integers(2, 6), st.integers(0, 1000))
def test_contrasts_are_differences_to_the_mean_of_the_others(n, seed):
    values = np.random.default_rng(seed).normal(size=(n, 5)).astype(np.float32)
    own = contrast(values)
    for c in range(n):
        np.testing.assert_allclose(own[c], values[c] - np.delete(values, c, 0).mean(0), atol=1e-5)
    np.testing.assert_allclose(own.sum(0), 0, atol=1e-4)


def test_expected_log_probabilities_come_from_the_kl_divergence(model, examples):
    """At temperature 1, E[log p_c] = E[log p_0] - KL(p_0 || p_c)."""
    teachers = [NOBODY, *CANDIDATES]
    kl = read_teachers(model, examples, teachers, kl=True).kl
    read = read_teachers(model, examples, teachers, expected_at=1.0)
    np.testing.assert_allclose(read.expected[0] - read.expected[1:], kl, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_the_baseline_fits_data_of_the_base_model(tiny, temperature):
    conditions = [
        dl.Teacher("none"),
        dl.Teacher("neutral", system_prompt=dl.neutral_prompt(0)),
    ]
    for own in conditions:
        data = dl.generate(
            tiny, dl.number_prompts(60, seed=4), teacher=own, temperature=temperature, seed=1
        )
        fitted = fit_baseline(tiny, data, conditions)
        assert fitted.teacher is own
        assert fitted.temperature == pytest.approx(temperature, abs=0.1)
        assert fitted.fits
        assert set(fitted.logprob) == {"none", "neutral"}


def test_data_that_the_base_model_would_not_write_do_not_fit(tiny):
    ids = np.random.default_rng(0).integers(10, 1000, size=(20, 8))
    data = [dl.Example("List: 4, 5.", "?", tuple(row.tolist())) for row in ids]
    fitted = fit_baseline(tiny, data, [dl.Teacher("none")])
    assert fitted.temperature == TEMPERATURES[-1]
    assert not fitted.fits
    assert fit_baseline(tiny, data, [dl.Teacher("none")], temperature=1.0).temperature == 1.0


def test_kinds_of_tokens_that_the_data_lack_are_impossible(hf, model, examples):
    """The definition, with probabilities over the possible ids alone."""
    tokenizer = chat_tokenizer()
    kinds = kinds_of(model)
    numbers = np.flatnonzero(kinds == "number")
    draw = np.random.default_rng(0)
    lists = [replace(e, completion_ids=tuple(draw.choice(numbers, 4).tolist())) for e in examples]
    assert kinds_in(model, lists) == ("number",)
    baseline = Baseline(NOBODY, 1.0, {}, ("number",))
    read = read_contributions(model, lists, baseline, [Auditors("given", tuple(CANDIDATES))])
    numbers = torch.from_numpy(numbers)
    base, *others = (
        logits[:, numbers].log_softmax(-1)
        for logits in oracle(hf, tokenizer, lists, [NOBODY, *CANDIDATES])
    )
    ids = torch.tensor([i for example in lists for i in example.completion_ids])
    place = torch.searchsorted(numbers, ids)
    for c in range(3):
        rest = torch.stack([others[d] for d in range(3) if d != c]).mean(0)
        advantage = others[c] - rest  # [tokens, numbers]
        expected = (base.exp() * advantage).sum(-1)
        own = advantage.gather(-1, place[:, None])[:, 0] - expected
        np.testing.assert_allclose(read.by_token[0, c], own, atol=1e-4)
    assert possible_ids(model, KINDS) is None
    assert possible_ids(model, ["number"]).sum() == len(numbers)
