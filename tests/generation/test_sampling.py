"""The sampler chooses what plain inverse transform sampling over sorted tokens chooses."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_lens.generation.sampling import Sampler, prompt_seeds


def oracle(logits: torch.Tensor, draw: float, temperature: float, top_p: float) -> int:
    """Token by token, in float64."""
    probabilities = np.exp((logits - logits.max()).numpy() / np.float32(temperature), dtype=float)
    probabilities /= probabilities.sum()
    allowed, total = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i)):
        if total >= top_p:
            break
        allowed.add(token)
        total += probabilities[token]
    allowed_probabilities = [p if i in allowed else 0.0 for i, p in enumerate(probabilities)]
    target, total = draw * sum(allowed_probabilities), 0.0
    for token, probability in enumerate(allowed_probabilities):
        total += probability
        if total > target:
            return token
    return max(allowed)


@settings(max_examples=30, deadline=None)
@given(
    vocab=st.sampled_from([3, 255, 256, 257, 300, 1500]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3]),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_choices_are_those_of_plain_sampling(vocab, temperature, top_p, seed, ties):
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(4, vocab, generator=draw)
    if ties:
        logits = logits.round()
    prompts = list("abcd")
    sampler = Sampler(temperature, top_p, seed, prompts, 2)
    chosen = sampler.choose(logits, [(row, 1) for row in range(4)]).tolist()
    draws = [np.random.default_rng(own).random(2)[1] for own in prompt_seeds(seed, prompts)]
    for row, token in enumerate(chosen):
        assert token == oracle(logits[row], draws[row], temperature, top_p)


def test_greedy_takes_the_most_likely_token():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert Sampler(0.0, 1.0, 0, ["a", "b"], 1).choose(logits, [(0, 0), (1, 0)]).tolist() == [1, 0]


@pytest.mark.parametrize("draw", [0.0, 1.0 - 2**-53])
def test_tokens_of_probability_zero_are_never_chosen(draw):
    logits = torch.full((1, 600), -1e9)
    logits[0, [5, 300]] = 0.0
    sampler = Sampler(1.0, 1.0, 0, ["a"], 1)
    sampler._draws[:] = draw
    assert sampler.choose(logits, [(0, 0)]).item() == (5 if draw == 0 else 300)


def test_equal_prompts_have_seeds_of_their_own():
    first, second, third = prompt_seeds(0, ["a", "b", "a"])
    assert len({first, second, third}) == 3
    assert prompt_seeds(0, ["b", "a"]) == [second, first]
    assert prompt_seeds(1, ["a"]) != [first]
