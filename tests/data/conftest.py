"""Data that several files of tests change."""

import pytest

from divergence_lens.data import animal_teachers, number_prompts
from divergence_lens.divergence import find_divergence
from divergence_lens.generation import generate


@pytest.fixture(scope="package")
def divergence(tiny):
    """The divergence tokens of an owl teacher's lists. Shared: leave it as you found it."""
    owl, *others = animal_teachers(["owl", "cat", "wolf"])
    examples = generate(
        tiny, number_prompts(24, instructions=False), teacher=owl, max_new_tokens=20
    )
    return find_divergence(tiny, examples, teacher=owl, counterfactuals=others)
