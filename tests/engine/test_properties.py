"""Random models, lengths and positions, against plain Hugging Face forward passes with hooks."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import divergence_lens as dl
from tests.support.architectures import decoder_layers
from tests.support.models import BACKENDS, FAMILIES, random_hf_model

LAYERS, VOCABULARY, LONGEST = 3, 64, 24  # some rows are longer than the windows of 16

ids = st.integers(0, VOCABULARY - 1)
backends = st.sampled_from(BACKENDS)


@cache
def models(family, backend, seed=0):
    """A Hugging Face model, and the model that `load_model` makes of a copy."""
    hf_model = random_hf_model(family, seed)
    chosen = "auto" if backend == "hooked" else backend
    return hf_model, dl.load_model(copy.deepcopy(hf_model), backend=chosen)


def check_divergence(data, family):
    backend = data.draw(backends)
    rows = data.draw(st.lists(st.lists(ids, min_size=2, max_size=LONGEST), min_size=1, max_size=5))
    starts = [data.draw(st.integers(1, len(row) - 1)) for row in rows]
    pair = [models(family, backend, seed) for seed in (0, 1)]
    result = dl.find_divergence(
        pair[0][1],
        [
            {"prompt": row[:start], "completion_ids": row[start:]}
            for row, start in zip(rows, starts, strict=True)
        ],
        teacher=dl.Teacher("base"),
        counterfactuals=[dl.Teacher("other", model=pair[1][1])],
        batch_tokens=data.draw(st.sampled_from([1, 40, 4096])),
    )
    for line, (hf_model, _) in enumerate(pair):
        expected = []
        for row, start in zip(rows, starts, strict=True):
            with torch.no_grad():
                logits = hf_model(torch.tensor([row]), use_cache=False).logits[0, start - 1 : -1]
            given_ids = torch.tensor(row[start:])[:, None]
            expected.append(logits.log_softmax(-1).gather(1, given_ids)[:, 0])
        np.testing.assert_allclose(result.logprob[line], torch.cat(expected).numpy(), atol=3e-4)


@torch.no_grad()
def patched_logits(hf_model, clean, corrupted, layer, position):
    """Hugging Face's last logits with one residual state of the corrupted run, and without."""
    module = decoder_layers(hf_model, LAYERS)[layer]
    states = []

    def record(_module, _inputs, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    def replace(_module, _inputs, output):
        changed = (output[0] if isinstance(output, tuple) else output).clone()
        changed[:, position] = states[0][:, position]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(record)
    hf_model(torch.tensor([corrupted]), use_cache=False)
    handle.remove()
    base = hf_model(torch.tensor([clean]), use_cache=False).logits[0, -1]
    handle = module.register_forward_hook(replace)
    patched = hf_model(torch.tensor([clean]), use_cache=False).logits[0, -1]
    handle.remove()
    return base, patched


def check_patch(data, family):
    hf_model, model = models(family, data.draw(backends))
    length = data.draw(st.integers(1, LONGEST))
    row = st.lists(ids, min_size=length, max_size=length)
    clean = data.draw(row)
    corrupted = data.draw(row.filter(lambda other: other != clean))
    layer, position = data.draw(st.integers(0, LAYERS - 1)), data.draw(st.integers(0, length - 1))
    answer, foil = data.draw(st.lists(ids, min_size=2, max_size=2, unique=True))
    pairs = dl.Pairs.from_tokens([clean], [corrupted], answers=[answer], foils=[foil])
    value = dl.causal_mediation(model, pairs, site="resid_post").values[0, layer, position]
    base, patched = patched_logits(hf_model, clean, corrupted, layer, position)
    expected = float((patched[answer] - patched[foil]) - (base[answer] - base[foil]))
    scale = max(1.0, float(base.abs().max()))
    np.testing.assert_allclose(value, expected, atol=5e-5 * scale)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_log_probabilities_are_hugging_faces(family, data):
    check_divergence(data, family)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("family", ["gpt2", "mistral"])
def test_patched_cells_are_those_of_hooks_on_hugging_face(family, data):
    check_patch(data, family)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_hugging_faces_in_every_family(family, data):
    check_divergence(data, family)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_cells_are_those_of_hooks_in_every_family(family, data):
    check_patch(data, family)
