"""Models and pairs that the tests of circuits share."""

from functools import cache

import pytest

import divergence_lens as dl
from tests.support.models import BACKENDS, random_hf_model
from tests.support.patching_oracles import random_pairs


@cache
def _hf(family):
    return random_hf_model(family, n_layers=2)


@cache
def _model(family, backend):
    return dl.load_model(_hf(family), backend=backend)


@pytest.fixture(scope="session")
def hf_of():
    return _hf


@pytest.fixture(scope="session")
def model_of():
    return _model


@pytest.fixture(params=BACKENDS)
def model(request):
    """A random Llama of two layers, with four heads over two key and value heads."""
    return _model("llama", request.param)


@pytest.fixture(scope="session")
def pairs():
    return random_pairs(64)
