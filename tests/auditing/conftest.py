"""Audits of the tiny model that several tests read."""

import pytest

import divergence_lens as dl
from divergence_lens.data import NumberFilter

FEW = ("owl", "cat", "wolf", "panda", "eagle")


@pytest.fixture(scope="session")
def base():
    return dl.load_model("tiny")


@pytest.fixture(scope="session")
def lists(base):
    """`lists(teacher, n)`: number lists, without those that say more."""

    def write(teacher, n, *, seed=3, temperature=0.0):
        prompts = dl.number_prompts(n, seed=seed)
        data = dl.generate(base, prompts, teacher=teacher, temperature=temperature, seed=seed)
        return NumberFilter().report([example.completion for example in data]).select(data)

    return write


@pytest.fixture(scope="session")
def biased(base, lists):
    """An audit of lists by a prompted teacher that loves wolves."""
    data = lists(dl.animal_teachers(["wolf"])[0], 60)
    return dl.audit(base, data, candidates=FEW, neutral_rows=60, own_rows=4)
