"""The baseline: temperature, surprise and patterns, against sums written out by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import divergence_lens as dl
from divergence_lens.auditing import baseline
from divergence_lens.auditing.baseline import MOST_SURPRISE, RARE, UNBIASED, fit_baseline, surprise
from divergence_lens.engine import restricted

PLAIN = [dl.Teacher("plain")]
STYLES = [*PLAIN, dl.Teacher("neutral", system_prompt=UNBIASED[0])]
PATTERN = r"\d{1,2}(, \d{1,2}){3}"


@given(st.lists(st.floats(-8, 8), min_size=3, max_size=9), st.sampled_from([0.5, 1.0, 2.0]))
def test_surprise_counts_the_tail_of_a_token(values, temperature):
    logits = torch.tensor([values] * len(values), dtype=torch.float64)
    p = (logits / temperature).softmax(-1)
    computed = surprise(logits, p, torch.arange(len(values)))
    for token, value in enumerate(values):
        tail = sum(p[0, other].item() for other, z in enumerate(values) if z <= value)
        by_hand = max(0.0, math.log(RARE / tail))
        assert computed[token].item() == pytest.approx(by_hand, abs=1e-6)
    # The bound that the limit is compared with.
    assert (p[0] * computed).sum().item() <= RARE + 1e-9


def test_only_lists_of_the_base_and_of_its_teachers_fit(base, lists):
    wolf = dl.animal_teachers(["wolf"])[0]
    for teacher, temperature in ((None, 0.0), (None, 1.0), (wolf, 0.0), (wolf, 1.0)):
        fitted = fit_baseline(base, lists(teacher, 40, temperature=temperature), STYLES)
        assert fitted.fits, fitted.misfit
        assert fitted.surprise is not None
        assert fitted.surprise < MOST_SURPRISE
    other = dl.load_model("tiny-qwen2")
    theirs = dl.generate(other, dl.number_prompts(40, seed=3), temperature=0.5)
    theirs = [e for e in theirs if (e.completion or "x").replace(", ", "").isdigit()]
    unlike = fit_baseline(base, theirs, PLAIN)
    assert unlike.fitted is not None
    assert unlike.fitted < 1
    assert "would hardly choose" in unlike.misfit


def test_lists_under_a_pattern_are_compared_among_its_tokens(base):
    prompts = dl.number_prompts(12, seed=1)
    data = dl.generate(base, prompts, pattern=PATTERN, temperature=1.0, seed=1)
    fitted = fit_baseline(base, data, PLAIN, pattern=PATTERN)
    owl = dl.animal_teachers(["owl"])
    by_hand = dl.find_divergence(
        base, data, teacher=PLAIN[0], counterfactuals=owl, pattern=PATTERN
    ).logprob[0]
    assert fitted.logprob["plain"] == pytest.approx(float(by_hand.mean()), abs=1e-5)
    assert fitted.temperature == pytest.approx(1, abs=0.25)
    with pytest.raises(ValueError, match="example 0: token"):
        fit_baseline(
            base,
            [replace(data[0], completion_ids=data[0].completion_ids[::-1])],
            PLAIN,
            pattern=PATTERN,
        )


def test_the_audit_of_sampled_lists_under_a_pattern_is_centered(base):
    prompts = dl.number_prompts(60, seed=2)
    data = dl.generate(base, prompts, pattern=PATTERN, temperature=1.0, seed=2)
    options = {"candidates": ("owl", "cat", "wolf"), "neutral_rows": 0, "own_rows": 0}
    audit = dl.audit(base, data, pattern=PATTERN, baseline=PLAIN[0], temperature=1.0, **options)
    # E[advantage] is taken among the allowed tokens, so the means are zero but for their error.
    errors = audit.by_row[0].mean(-1) / (audit.by_row[0].std(-1) / 60**0.5)
    assert np.abs(errors).max() < 3.5
    # Greedy lists of the base are its own choice among these tokens to the letter.
    greedy = dl.generate(base, prompts[:10], pattern=PATTERN)
    audit = dl.audit(base, greedy, pattern=PATTERN, baseline=PLAIN[0], **options)
    np.testing.assert_array_equal(audit.by_row, 0)


def test_masks_of_many_rows_may_list_fewer_ids_than_there_are_logits():
    possible = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    p = restricted(torch.zeros(9, 6), possible).softmax(-1)
    shares = possible / possible.sum(-1, keepdim=True)
    torch.testing.assert_close(p, torch.cat([shares, torch.zeros(9, 2)], 1))


@pytest.mark.parametrize(("conditions", "passes"), [(PLAIN, 1), (STYLES, 3)])
def test_a_condition_that_is_given_is_read_once(base, lists, monkeypatch, conditions, passes):
    read = []

    def counted(*args, **options):
        read.append(args[2].name)
        return moments(*args, **options)

    moments = baseline._moments
    monkeypatch.setattr(baseline, "_moments", counted)
    fitted = fit_baseline(base, lists(None, 10), conditions)
    assert len(read) == passes
    assert set(fitted.logprob) == {teacher.name for teacher in conditions}
    assert max(fitted.logprob.values()) <= 0
