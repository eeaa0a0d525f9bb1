"""OPT, whose MLPs write [batch * pos, d_model], against hooks on Hugging Face's model."""

import numpy as np
import pytest
import torch

import divergence_lens as dl
from tests.support.architectures import build
from tests.support.patching_oracles import logit_difference, random_pairs


@torch.no_grad()
def hooked_cell(hf, pairs, i, layer, position):
    """The metric after the source run's MLP output is written at one position."""
    linear = hf.model.decoder.layers[layer].fc2
    states = []
    handle = linear.register_forward_hook(lambda _m, _i, out: states.append(out.clone()))
    hf(pairs.corrupted[i][None])
    handle.remove()

    def write(_module, _inputs, out):
        changed = out.clone()
        changed[position] = states[0][position]
        return changed

    handle = linear.register_forward_hook(write)
    try:
        return float(logit_difference(hf(pairs.clean[i][None]).logits[0, -1], pairs, i))
    finally:
        handle.remove()


def test_mlp_outputs_are_patched_where_they_have_no_axis_of_positions():
    hf = build("OPT")
    pairs = random_pairs(64, lengths=(6, 8), longer=(0, 0))
    model = dl.load_model(build("OPT"), backend="bridge")
    exact = dl.causal_mediation(model, pairs, site="mlp_out")
    for i, row in enumerate(pairs.clean):
        with torch.no_grad():
            before = float(logit_difference(hf(row[None]).logits[0, -1], pairs, i))
        for layer in range(exact.values.shape[1]):
            for position in range(2, len(row)):
                expected = hooked_cell(hf, pairs, i, layer, position) - before
                assert exact.values[i, layer, position] == pytest.approx(expected, abs=1e-4)
    fast = dl.attribution_patch(model, pairs, site="mlp_out", method="integrated", steps=20)
    assert np.isfinite(fast.values[0, :, : len(pairs.clean[0])]).all()
    assert fast.agreement(exact).pearson > 0.99
