"""Attention patterns, against TransformerLens's cache, and as figures."""

import numpy as np
import pytest
import torch

from divergence_lens import plots
from divergence_lens.pairs import Pairs
from divergence_lens.patching.attention import AttentionPatterns, attention_patterns
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.teachers import Teacher
from tests.support.patching_oracles import random_pairs

HEADS = [(2, 1), (0, 3)]


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])  # qwen2 has grouped queries
def test_equal_the_cache_of_transformer_lens(model_of, family):
    model = model_of(family)
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6, 9), longer=(0, 0))
    patterns = attention_patterns(model, pairs, heads=HEADS)
    assert patterns.heads == tuple(HEADS)
    for i in range(2):
        length = len(pairs.clean[i])
        for row, ours in (
            (pairs.clean[i], patterns.clean),
            (pairs.corrupted[i], patterns.corrupted),
        ):
            with torch.no_grad():
                _, cache = model.run_with_cache(row[None])
            for number, (layer, head) in enumerate(HEADS):
                expected = cache[f"blocks.{layer}.attn.hook_pattern"][0, head]
                np.testing.assert_allclose(
                    ours[i, number, :length, :length], expected.numpy(), atol=1e-5
                )
                assert np.isnan(ours[i, number, length:]).all()


def test_a_span_of_other_lengths_is_read_as_one_column(model_of):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab, lengths=(8,), longer=(2,))
    patterns = attention_patterns(model, pairs, heads=HEADS)
    columns = pairs.columns(0)
    assert len(patterns.labels[0]) == len(columns)
    assert any(column.is_unit for column in columns)
    np.testing.assert_allclose(np.nansum(patterns.corrupted[0], -1), 1.0, atol=1e-5)
    with torch.no_grad():
        _, cache = model.run_with_cache(pairs.corrupted[0][None])
    pattern = cache["blocks.2.attn.hook_pattern"][0, 1, -1]  # [key]
    expected = [float(pattern[list(column.corrupted)].sum()) for column in columns]
    np.testing.assert_allclose(patterns.corrupted[0, 0, -1], expected, atol=1e-5)


def test_each_run_has_its_own_weights(model_of):
    model, other = model_of("qwen2"), model_of("qwen2", 1)
    plain = random_pairs(model.cfg.d_vocab, lengths=(6,), longer=(0,))
    row = plain.clean
    pairs = Pairs.from_tokens(
        row, row, answers=[1], foils=[2], corrupted_teacher=Teacher("other", model=other)
    )
    patterns = attention_patterns(model, pairs, heads=HEADS)
    expected = attention_patterns(other, plain, heads=HEADS)
    np.testing.assert_allclose(patterns.corrupted, expected.clean, atol=1e-6)
    assert np.abs(patterns.clean - patterns.corrupted).max() > 0.01


def test_heads_come_from_a_table_of_effects(model_of, tmp_path):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6, 9), longer=(0, 0))
    top = causal_mediation(model, pairs, site="z").top(5)
    patterns = attention_patterns(model, pairs, heads=top)
    pairs_of_top = list(dict.fromkeys(zip(top["layer"], top["head"], strict=True)))
    assert list(patterns.heads) == pairs_of_top
    patterns.save(tmp_path / "a.safetensors")
    loaded = AttentionPatterns.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(loaded.clean, patterns.clean)
    assert (loaded.heads, loaded.labels) == (patterns.heads, patterns.labels)
    table = patterns.to_dataframe()
    sums = table.groupby(["pair", "layer", "head"])[["clean", "corrupted"]].sum()
    np.testing.assert_allclose(sums, 1.0, atol=1e-5)
    assert f"L{top['layer'][0]}H{top['head'][0]}" in patterns._repr_html_()
    assert "2 pairs" in repr(patterns)
    with pytest.raises(ValueError, match=r"lacks the columns \['head'\].*site=\"z\""):
        attention_patterns(model, pairs, heads=causal_mediation(model, pairs).top(2))
    with pytest.raises(ValueError, match="the model has no L9H0; it has"):
        attention_patterns(model, pairs, heads=[(9, 0)])
    with pytest.raises(ValueError, match="heads is empty"):
        attention_patterns(model, pairs, heads=[])


def test_figures_show_both_runs_and_their_difference(model_of):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6, 9), longer=(0, 0))
    patterns = attention_patterns(model, pairs, heads=HEADS)
    figure = patterns.plot(pair=0)
    clean, corrupted, difference = (np.asarray(trace.z, dtype=float) for trace in figure.data)
    np.testing.assert_allclose(clean, patterns.clean[0, :, 5, :6])
    np.testing.assert_allclose(difference, corrupted - clean, atol=1e-6)
    assert list(figure.layout.yaxis.ticktext) == ["L2H1", "L0H3"]
    whole = plots.attention_pattern(patterns, (0, 3), 1)
    np.testing.assert_allclose(whole.data[1].z, patterns.corrupted[1, 1])
    assert "L0H3" in whole.layout.title.text
    with pytest.raises(ValueError, match="are of L2H1, L0H3, not of L1H1"):
        patterns.plot((1, 1))
    with pytest.raises(IndexError, match="no pair 2"):
        patterns.plot(pair=2)
    with pytest.raises(IndexError, match="no position 6"):
        patterns.plot(position=6)


def test_patterns_are_patched_only_where_positions_correspond(model_of):
    model = model_of("qwen2")
    longer = random_pairs(model.cfg.d_vocab, lengths=(8,), longer=(2,))
    with pytest.raises(ValueError, match=r"pair 0 have 8 and 10 tokens .*one to one"):
        causal_mediation(model, longer, site="pattern")
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6, 9), longer=(0, 0))
    with pytest.raises(ValueError, match='"mean" does not apply to site "pattern"'):
        causal_mediation(model, pairs, site="pattern", corruption="mean")


def test_the_gradient_of_patterns_equals_that_of_a_small_step(model_of):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6, 9), longer=(0, 0))
    fast = attribution_patch(model, pairs, site="pattern", method="gradient")
    with torch.no_grad():
        _, clean = model.run_with_cache(pairs.clean[0][None])
        _, corrupted = model.run_with_cache(pairs.corrupted[0][None])
    layer, head, query, step = 1, 2, 4, 1e-2
    name = f"blocks.{layer}.attn.hook_pattern"
    change = corrupted[name][0, head, query] - clean[name][0, head, query]

    def metric(size: float) -> float:
        def moved(pattern, hook):
            pattern = pattern.clone()
            pattern[0, head, query] += size * change
            return pattern

        with torch.no_grad():
            logits = model.run_with_hooks(pairs.clean[0][None], fwd_hooks=[(name, moved)])[0, -1]
        return float(logits[int(pairs.answers[0])] - logits[int(pairs.foils[0])])

    slope = (metric(step) - metric(-step)) / (2 * step)
    assert fast.values[0, layer, query, head] == pytest.approx(slope, rel=0.02, abs=1e-3)
    integrated = attribution_patch(model, pairs, site="pattern", method="integrated")
    exact = causal_mediation(model, pairs, site="pattern")
    assert integrated.agreement(exact).pearson > 0.9
