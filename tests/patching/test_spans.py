"""Patches of several positions or layers at once, and of what is not the counterfactual's state."""

import numpy as np
import pytest
import torch

from divergence_lens.engine.factory import get_engine
from divergence_lens.pairs import Pairs
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.corruption import EmbeddingNoise, embedding_spread
from divergence_lens.patching.exact import causal_mediation
from tests.support.patching_oracles import assert_same, logit_difference, random_pairs


@torch.no_grad()
def patched_metric(model, pairs, i, row, writes):
    """The metric of a row when (layer, site, positions, head, new states) are written into it."""
    engine = get_engine(model)

    def writer(positions, head, new):
        def write(activation):
            changed = activation.clone()
            if head is None:
                changed[0, positions] = new[positions]
            else:
                changed[0, positions, head] = new[positions, head]
            return changed

        return write

    functions = [
        (layer, site, writer(where, head, new)) for layer, site, where, head, new in writes
    ]
    with engine.hooked(functions):
        return float(logit_difference(engine.unembed(engine.final(row[None]))[0, -1], pairs, i))


def segmented(vocab, *, longer=0):
    """One pair whose rows differ in the span 2 to 4, with segments of two positions each."""
    generator = torch.Generator().manual_seed(3)
    clean = torch.randint(0, vocab, (8,), generator=generator)
    span = (clean[2:4].repeat(2)[: 2 + longer] + torch.arange(1, 3 + longer)) % vocab
    corrupted = torch.cat([clean[:2], span, clean[4:]])
    names = ["system"] * 4 + ["user"] * 2 + ["template"] * 2
    return Pairs.from_tokens([clean], [corrupted], answers=[1], foils=[2], segments=[names])


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
@pytest.mark.parametrize("site", ["resid_pre", "block_out", "z", "k"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_a_segment_is_patched_at_all_of_its_positions_at_once(model_of, family, site, direction):
    model = model_of(family)
    engine = get_engine(model)
    pairs = segmented(engine.d_vocab, longer=0)
    effects = causal_mediation(model, pairs, site=site, direction=direction, span="segment")
    assert effects.labels == (("system", "bias", "user", "template", "divergence"),)
    noising = direction == "noising"
    base, source = (pairs.clean, pairs.corrupted) if noising else (pairs.corrupted, pairs.clean)
    states = engine.activations(source[0][None], sites=(site,))[site]
    before = patched_metric(model, pairs, 0, base[0], [])
    for column, name in enumerate(effects.labels[0]):
        where = [p for p, segment in enumerate(pairs.segments[0]) if segment == name]
        for layer in range(engine.n_layers):
            for head in range(engine.site_heads(site)) or [None]:
                write = (layer, site, where, head, states[layer, 0])
                after = patched_metric(model, pairs, 0, base[0], [write])
                index = (0, layer, column) if head is None else (0, layer, column, head)
                assert effects.values[index] == pytest.approx(after - before, abs=1e-4)


def test_a_segment_that_is_one_column_is_that_column(model_of):
    model = model_of("qwen2")
    pairs = segmented(model.cfg.d_vocab, longer=2)
    effects = causal_mediation(model, pairs, span="segment")
    position = causal_mediation(model, pairs)
    names = list(effects.labels[0])
    columns = [position.segments[0].index("bias"), position.values.shape[2] - 1]
    for name, column in zip(("bias", "divergence"), columns, strict=True):
        np.testing.assert_allclose(
            effects.values[0, :, names.index(name)], position.values[0, :, column], atol=1e-5
        )
    assert effects.missing() == {}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_all_positions_of_a_residual_carry_the_total_effect(model_of, family):
    model = model_of(family)
    pairs = random_pairs(model.cfg.d_vocab, longer=(0, 1, 0, 3))
    for direction in ("noising", "denoising"):
        effects = causal_mediation(model, pairs, span="all", direction=direction)
        expected = np.broadcast_to(effects.total[:, None], effects.values[..., 0].shape)
        assert effects.values.shape == (4, model.cfg.n_layers, 1)
        np.testing.assert_allclose(effects.values[..., 0], expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out", "z", "v"])
@pytest.mark.parametrize("window", [2, 3])
def test_a_window_patches_neighbouring_layers_at_once(model_of, site, window):
    model = model_of("qwen2")
    engine = get_engine(model)
    pairs = random_pairs(engine.d_vocab, lengths=(6,), longer=(0,))
    effects = causal_mediation(model, pairs, site=site, window=window)
    states = engine.activations(pairs.corrupted[0][None], sites=(site,))[site]
    before = patched_metric(model, pairs, 0, pairs.clean[0], [])
    for position in range(6):
        for first in range(engine.n_layers):
            layers = range(first, min(first + window, engine.n_layers))
            for head in range(engine.site_heads(site)) or [None]:
                writes = [(layer, site, [position], head, states[layer, 0]) for layer in layers]
                after = patched_metric(model, pairs, 0, pairs.clean[0], writes)
                index = (0, first, position) if head is None else (0, first, position, head)
                assert effects.values[index] == pytest.approx(after - before, abs=1e-4)


def test_chosen_cells_of_spans_equal_the_whole_table(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab, longer=(0, 1, 0, 0))
    whole = causal_mediation(model, pairs, site="attn_out", span="segment")
    some = causal_mediation(model, pairs, site="attn_out", span="segment", cells=whole.top(4))
    assert np.isfinite(some.values).sum() == 4
    np.testing.assert_allclose(some.top(4)["effect"], whole.top(4)["effect"], atol=2e-5)
    assert np.isnan(whole.values[1]).sum() <= np.isnan(some.values[1]).sum()


@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_the_estimate_of_a_span_is_the_sum_of_its_positions(model_of, method):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab, longer=(0, 1, 0, 2))
    by_position = attribution_patch(model, pairs, site="z", method=method, steps=2)
    by_segment = attribution_patch(model, pairs, site="z", method=method, steps=2, span="segment")
    table = by_position.by_segment()
    np.testing.assert_allclose(by_segment.by_segment()[table.columns], table, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "k"])
@pytest.mark.parametrize("corruption", ["zero", "mean"])
def test_ablations_put_zeros_or_the_mean_of_the_clean_runs(model_of, site, corruption):
    model = model_of("qwen2")
    engine = get_engine(model)
    pairs = random_pairs(engine.d_vocab, lengths=(6, 6, 6), longer=(0, 0, 1))
    effects = causal_mediation(model, pairs, site=site, corruption=corruption, batch_rows=7)
    states = engine.activations(torch.stack(pairs.clean), sites=(site,))[site]
    put = states.mean(1) if corruption == "mean" else torch.zeros_like(states[:, 0])
    for i in range(3):
        before = patched_metric(model, pairs, i, pairs.clean[i], [])
        for position in range(6):
            for layer in range(engine.n_layers):
                for head in range(engine.site_heads(site)) or [None]:
                    write = (layer, site, [position], head, put[layer])
                    after = patched_metric(model, pairs, i, pairs.clean[i], [write])
                    index = (i, layer, position) if head is None else (i, layer, position, head)
                    assert effects.values[index] == pytest.approx(after - before, abs=1e-4)


def test_means_are_taken_at_the_same_place_of_the_same_segment(model_of):
    model = model_of("gpt2")
    engine = get_engine(model)
    rows = [[5, 6, 7, 8], [5, 9, 6, 7, 8]]
    segments = [["system", "user", "user", "user"], ["system", "system", "user", "user", "user"]]
    other = [[5, 6, 9, 8], [5, 9, 6, 9, 8]]
    pairs = Pairs.from_tokens(rows, other, answers=[1, 1], foils=[2, 2], segments=segments)
    effects = causal_mediation(model, pairs, corruption="mean")
    states = [
        engine.activations(row[None], sites=("resid_post",))["resid_post"] for row in pairs.clean
    ]
    mean = (states[0][1, 0, 1] + states[1][1, 0, 2]) / 2  # the first "user" of both
    new = states[0][1, 0].clone()
    new[1] = mean
    before = patched_metric(model, pairs, 0, pairs.clean[0], [])
    after = patched_metric(model, pairs, 0, pairs.clean[0], [(1, "resid_post", [1], None, new)])
    assert effects.values[0, 1, 1] == pytest.approx(after - before, abs=1e-4)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_causal_tracing_patches_between_a_clean_and_a_noisy_run(model_of, direction):
    model = model_of("qwen2")
    engine = get_engine(model)
    pairs = segmented(engine.d_vocab, longer=1)  # the corrupted row plays no part
    noise = EmbeddingNoise(segment="user", scale=2.0, seed=4)
    effects = causal_mediation(model, pairs, direction=direction, corruption=noise)
    drawn = noise.draw(engine, pairs.clean[0], pairs.segments[0])
    there = [name == "user" for name in pairs.segments[0]]
    assert (drawn.abs().sum(-1) > 0).tolist() == there
    assert float(drawn[there].std()) == pytest.approx(2 * embedding_spread(engine), rel=0.3)
    disturb = (0, "resid_pre", lambda x: x + drawn)
    with engine.hooked([disturb]):
        noisy = engine.activations(pairs.clean[0][None], sites=("resid_post",))["resid_post"][:, 0]
    clean = engine.activations(pairs.clean[0][None], sites=("resid_post",))["resid_post"][:, 0]
    states = noisy if direction == "noising" else clean
    for layer in range(engine.n_layers):
        for position in range(8):
            write = [(layer, "resid_post", [position], None, states[layer])]
            if direction == "noising":
                before = patched_metric(model, pairs, 0, pairs.clean[0], [])
                after = patched_metric(model, pairs, 0, pairs.clean[0], write)
            else:
                with engine.hooked([disturb]):
                    before = patched_metric(model, pairs, 0, pairs.clean[0], [])
                    after = patched_metric(model, pairs, 0, pairs.clean[0], write)
            assert effects.values[0, layer, position] == pytest.approx(after - before, abs=1e-4)
    assert abs(effects.total[0]) > 0.01


def test_noise_is_each_pairs_own_and_comes_from_the_seed_alone(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    noise = EmbeddingNoise(segment="bias")
    whole = causal_mediation(model, pairs, corruption=noise)
    order = [2, 0, 3, 1]
    assert_same(
        causal_mediation(model, pairs[order], corruption=noise).values,
        whole.values[order],
        atol=2e-5,
    )
    other = causal_mediation(model, pairs, corruption=EmbeddingNoise(segment="bias", seed=1))
    assert np.nanmax(np.abs(other.values - whole.values)) > 0.01


def test_attribution_serves_every_corruption(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    for corruption in ("mean", "zero", EmbeddingNoise(scale=0.05)):
        exact = causal_mediation(model, pairs, site="mlp_out", corruption=corruption)
        effects = attribution_patch(
            model, pairs, site="mlp_out", method="integrated", corruption=corruption
        )
        assert effects.agreement(exact).pearson > 0.7, str(corruption)
    along_inputs = attribution_patch(
        model, pairs, site="resid_pre", method="integrated-inputs", corruption=corruption, steps=50
    )
    sums = np.nansum(along_inputs.values[:, 0], axis=1)
    np.testing.assert_allclose(sums, along_inputs.total, atol=5e-3)


def test_refuses_spans_and_corruptions_that_make_no_sense(model_of, unchecked):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    with pytest.raises(ValueError, match="span is 'layer'"):
        causal_mediation(model, pairs, span="layer")
    with pytest.raises(ValueError, match="window is 9"):
        causal_mediation(model, pairs, window=9)
    with pytest.raises(ValueError, match="corruption is 'noise'"):
        causal_mediation(model, pairs, corruption="noise")
    with pytest.raises(ValueError, match="no corrupted run"):
        causal_mediation(model, pairs, corruption="zero", direction="denoising")
    with pytest.raises(ValueError, match="in the segment 'poem'"):
        causal_mediation(model, pairs, corruption=EmbeddingNoise(segment="poem"))
    with pytest.raises(ValueError, match="scale is 0"):
        EmbeddingNoise(scale=0)
    with pytest.raises(ValueError, match="end of a path"):
        attribution_patch(model, pairs, corruption="mean", method="integrated-inputs")
    with pytest.raises(ValueError, match="needs two pairs or more"):
        causal_mediation(model, pairs[0], corruption="mean")
    zero = causal_mediation(model, pairs, corruption="zero")
    with pytest.raises(ValueError, match="which has none"):
        zero.natural_indirect()
    with pytest.raises(ValueError, match="of corruption"):
        zero.agreement(causal_mediation(model, pairs))
