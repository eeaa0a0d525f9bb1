"""Exact mediation: against plain loops, against TransformerLens, against known circuits."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_lens.engine.factory import get_engine
from divergence_lens.engine.sites import SITES
from divergence_lens.models import is_hooked
from divergence_lens.pairs import Pairs
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.teachers import Teacher
from tests.support.models import slow_except
from tests.support.patching_oracles import (
    FOUR,
    assert_same,
    hand_set,
    induction_model,
    one_hook_per_cell,
    random_pairs,
)

SHORT = (6, 8)
FAMILIES = ("gpt2", "gpt_neox", "qwen2", "gemma2")


@pytest.mark.parametrize("family", slow_except("qwen2", FAMILIES))
@pytest.mark.parametrize("site", SITES)
def test_equals_one_hook_per_cell(model_of, family, site):
    model = model_of(family)
    if site not in get_engine(model).sites:
        pytest.skip(f"{family} has no {site}")
    pairs = random_pairs(model.cfg.d_vocab, lengths=SHORT, longer=(0, 0))
    effects = causal_mediation(model, pairs, site=site)
    expected = one_hook_per_cell(model, model, pairs, site)
    assert np.nanmax(np.abs(expected)) > 0.1  # there is something to find
    assert_same(effects.values, expected)


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "z", "k"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_aligns_rows_of_unlike_length(model_of, site, direction):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab, lengths=SHORT, longer=(1, 3))
    effects = causal_mediation(model, pairs, site=site, direction=direction)
    expected = one_hook_per_cell(model, model, pairs, site, noising=direction == "noising")
    if site.startswith("resid"):  # units are patched whole there, see test_units
        units = [number for number, column in enumerate(pairs.columns(0)) if column.is_unit]
        assert units == [2]
        expected[:, :, units] = effects.values[:, :, units]
    assert effects.missing() == {}
    assert_same(effects.values, expected)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["resid_pre", "mlp_out", "z"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_other_weights_run_under_their_own_weights(model_of, site, direction):
    model, other = model_of("qwen2"), model_of("qwen2", 1)
    pairs = random_pairs(model.cfg.d_vocab, lengths=SHORT, longer=(0, 0))
    pairs = Pairs.from_tokens(
        pairs.clean,
        pairs.clean,
        answers=pairs.answers,
        foils=pairs.foils,
        corrupted_teacher=Teacher("other", model=other),
    )
    effects = causal_mediation(model, pairs, site=site, direction=direction)
    noising = direction == "noising"
    models = (model, other) if noising else (other, model)
    assert_same(effects.values, one_hook_per_cell(*models, pairs, site, noising=noising))


LOOPS = {"z": "attn_head_out_by_pos", "pattern": "attn_head_pattern_by_pos"}


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "pattern"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])  # qwen2 has grouped queries
def test_equals_the_loops_of_transformer_lens(model_of, backend, site, family):
    if backend != "hooked":
        pytest.skip("TransformerLens's own loops are for HookedTransformer")
    from transformer_lens import patching

    model = model_of(family)
    assert is_hooked(model)
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6,), longer=(0,))
    loop = getattr(patching, f"get_act_patch_{LOOPS.get(site, site)}")
    answer, foil = int(pairs.answers[0]), int(pairs.foils[0])
    with torch.no_grad():
        _, cache = model.run_with_cache(pairs.corrupted[0][None])
        expected = loop(
            model, pairs.clean[0][None], cache, lambda x: x[0, -1, answer] - x[0, -1, foil]
        )
    if site == "pattern":
        expected = expected.movedim(1, 2)  # [layer, head, pos] -> [layer, pos, head]
    effects = causal_mediation(model, pairs, site=site)
    np.testing.assert_allclose(
        effects.values[0] + effects.clean_metric[0], expected.numpy(), atol=1e-4
    )


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "z"])
def test_a_model_that_attends_both_ways_equals_the_loops_of_transformer_lens(site):
    model = bidirectional()
    from transformer_lens import patching

    clean = [[1, 2, 3, 4, 5, 6], [7, 1, 2, 3, 4], [6, 5, 4, 3, 2, 1]]
    corrupted = [[1, 2, 5, 4, 5, 6], [7, 1, 4, 6, 4], [6, 5, 2, 2, 2, 1]]
    pairs = Pairs.from_tokens(clean, corrupted, answers=[1, 2, 3], foils=[4, 5, 6])
    loop = getattr(patching, f"get_act_patch_{'attn_head_out_by_pos' if site == 'z' else site}")
    effects = causal_mediation(model, pairs, site=site)
    approximate = attribution_patch(model, pairs, site=site, method="integrated", steps=50)
    for i, length in enumerate((6, 5, 6)):
        answer, foil = int(pairs.answers[i]), int(pairs.foils[i])
        with torch.no_grad():
            _, cache = model.run_with_cache(pairs.corrupted[i][None])
            expected = loop(
                model,
                pairs.clean[i][None],
                cache,
                lambda x, a=answer, b=foil: x[0, -1, a] - x[0, -1, b],
            )
        patched_metric = effects.values[i, :, :length] + effects.clean_metric[i]
        np.testing.assert_allclose(patched_metric, expected.numpy(), atol=1e-4)
        if site == "resid_pre":  # states before the first difference differ too, and count
            assert np.abs(effects.values[i, 1:, :2]).min() > 1e-6
            sums = np.nansum(approximate.values[i], axis=1)
            np.testing.assert_allclose(sums, effects.total[i], atol=2e-2)


def test_only_patching_takes_a_model_that_attends_both_ways():
    with pytest.raises(ValueError, match="both directions"):
        get_engine(bidirectional())


def bidirectional():
    """A random HookedTransformer in which every position reads all others."""
    model = hand_set(attention_dir="bidirectional")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def test_shows_the_induction_circuit_and_nothing_else():
    model = induction_model()
    # After 1 2 ... 1 the model says 2. Changing the 2 changes what the induction head copies.
    copied = Pairs.from_tokens([[0, 1, 2, 3, 1]], [[0, 1, 4, 3, 1]], answers=[2], foils=[4])
    # Changing the first 1 takes away what the previous-token head reports at the 2.
    matched = Pairs.from_tokens([[0, 1, 2, 3, 1]], [[0, 5, 2, 3, 1]], answers=[2], foils=[4])
    expected = {
        ("resid_pre", "copied"): {(0, 2), (1, 2)},
        ("resid_post", "copied"): {(0, 2), (1, 4)},
        ("z", "copied"): {(1, 4, 0)},
        ("resid_pre", "matched"): {(0, 1), (1, 2)},
        ("resid_post", "matched"): {(0, 2), (1, 4)},
        ("z", "matched"): {(0, 2, 0), (1, 4, 0)},
    }
    for (site, which), cells in expected.items():
        pairs = copied if which == "copied" else matched
        shares = causal_mediation(model, pairs, site=site).normalized().values[0]
        lit = {tuple(cell) for cell in np.argwhere(np.abs(shares) > 1e-3).tolist()}
        assert lit == cells, (site, which)
        np.testing.assert_allclose([shares[cell] for cell in cells], 1, atol=1e-3)


@pytest.mark.parametrize("site", SITES)
def test_patching_a_run_with_its_own_states_changes_nothing(model_of, site):
    model = model_of("gpt2")
    twin = Teacher("twin", model=copy.deepcopy(model))
    rows = [[3, 1, 4, 1, 5], [9, 2, 6]]
    pairs = Pairs.from_tokens(rows, rows, answers=[1, 2], foils=[3, 4], corrupted_teacher=twin)
    effects = causal_mediation(model, pairs, site=site)
    assert np.nanmax(np.abs(effects.values)) < 1e-5
    assert np.abs(effects.total).max() < 1e-5


def test_the_only_differing_token_carries_the_total_effect_into_block_0(model_of):
    model = model_of("qwen2")
    clean, corrupted = [[5, 6, 7, 8, 9, 10]], [[5, 6, 17, 8, 9, 10]]
    pairs = Pairs.from_tokens(clean, corrupted, answers=[1], foils=[2])
    for direction in ("noising", "denoising"):
        effects = causal_mediation(model, pairs, site="resid_pre", direction=direction)
        assert abs(effects.total[0]) > 0.05
        np.testing.assert_allclose(effects.values[0, 0, 2], effects.total[0], atol=1e-5)
        others = np.delete(effects.values[0, 0], 2)
        np.testing.assert_allclose(others, 0, atol=1e-5)
    last = causal_mediation(model, pairs, site="resid_post").normalized().values[0, -1]
    np.testing.assert_allclose(last, [0, 0, 0, 0, 0, 1], atol=1e-4)


def test_natural_direct_effect_is_the_metric_of_the_corrupted_run_less_the_clean_one(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6,), longer=(0,))
    effects = causal_mediation(model, pairs, site="attn_out", direction="denoising")
    patched = effects.values + effects.corrupted_metric[:, None, None]
    np.testing.assert_allclose(
        effects.natural_direct(), patched - effects.clean_metric[:, None, None], atol=1e-5
    )


@pytest.mark.slow
@settings(max_examples=4)
@given(batch_rows=st.integers(1, 60), order=st.permutations(range(4)))
@pytest.mark.parametrize("site", ["resid_post", "z"])
def test_batch_size_and_order_of_pairs_do_not_matter(model_of, site, batch_rows, order):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    whole = causal_mediation(model, pairs, site=site)
    other = causal_mediation(model, pairs[order], site=site, batch_rows=batch_rows)
    assert_same(other.values, whole.values[list(order)], atol=2e-5)
    np.testing.assert_allclose(other.clean_metric, whole.clean_metric[list(order)], atol=2e-5)


def test_a_pair_alone_equals_the_pair_among_others(model_of):
    model = model_of("gpt_neox")
    pairs = random_pairs(model.cfg.d_vocab)
    together = causal_mediation(model, pairs, site="mlp_out").values
    for i, length in enumerate(FOUR):
        alone = causal_mediation(model, pairs[i], site="mlp_out").values
        assert_same(alone[0], together[i, :, :length], atol=2e-5)


def test_chosen_cells_equal_the_full_grid_and_the_others_are_missing(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab, longer=(0, 1, 0, 0))
    for site in ("resid_post", "z"):
        for direction in ("noising", "denoising"):
            whole = causal_mediation(model, pairs, site=site, direction=direction)
            top = whole.top(7)
            some = causal_mediation(model, pairs, site=site, direction=direction, cells=top)
            assert np.isfinite(some.values).sum() == 7
            np.testing.assert_allclose(some.top(7)["effect"], top["effect"], atol=2e-5)


@pytest.mark.parametrize("metric", ["probability_difference", "log_probability", "kl"])
def test_named_metrics_are_what_they_say(model_of, metric):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab, lengths=(6,), longer=(0,))
    engine = get_engine(model)
    with torch.no_grad():
        clean = engine.unembed(engine.final(pairs.clean[0][None]))[0, -1].log_softmax(-1)

    def by_hand(logits, pairs, i):
        logs = logits.log_softmax(-1)
        if metric == "kl":
            return torch.nn.functional.kl_div(logs, clean, reduction="sum", log_target=True)
        answer, foil = logs[int(pairs.answers[i])], logs[int(pairs.foils[i])]
        return answer if metric == "log_probability" else answer.exp() - foil.exp()

    effects = causal_mediation(model, pairs, metric=metric)
    expected = one_hook_per_cell(model, model, pairs, "resid_post", metric=by_hand)
    assert_same(effects.values, expected, atol=1e-5)
    assert effects.metric == metric


def test_a_metric_can_be_any_function_of_the_logits(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)

    def difference(logits, index):
        rows = torch.arange(len(logits))
        return logits[rows, pairs.answers[index, 0]] - logits[rows, pairs.foils[index, 0]]

    mine = causal_mediation(model, pairs, metric=difference)
    assert mine.metric == "difference"
    assert_same(mine.values, causal_mediation(model, pairs).values, atol=2e-5)


def test_bfloat16_stays_near_float32(model_of):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab)
    exact = causal_mediation(model, pairs).values
    half = causal_mediation(copy.deepcopy(model).to(torch.bfloat16), pairs)
    assert half.values.dtype == np.float32
    there = np.isfinite(exact)
    assert np.corrcoef(half.values[there], exact[there])[0, 1] > 0.98


def test_leaves_no_hooks_flags_or_gradients(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    flags = [p.requires_grad for p in model.parameters()]

    def broken(logits, index):
        raise RuntimeError("stop")

    causal_mediation(model, pairs, site="z")
    with pytest.raises(RuntimeError, match="stop"):
        causal_mediation(model, pairs, metric=broken)
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_several_sites_equal_each_site_alone(model_of):
    model = model_of("qwen2")
    pairs = random_pairs(model.cfg.d_vocab, longer=(0, 1, 0, 2))
    sites = ("resid_pre", "mlp_out", "z", "k")
    together = causal_mediation(model, pairs, site=sites)
    assert tuple(together) == sites
    for site in sites:
        alone = causal_mediation(model, pairs, site=site)
        assert together[site].site == site
        assert_same(together[site].values, alone.values, atol=2e-5)
    assert list(causal_mediation(model, pairs, site=["z"])) == ["z"]
    for site in (("z", "z"), []):
        with pytest.raises(ValueError, match="each once"):
            causal_mediation(model, pairs, site=site)


def test_parallel_blocks_have_no_resid_mid(model_of):
    model = model_of("gpt_neox")
    pairs = random_pairs(model.cfg.d_vocab)
    with pytest.raises(ValueError, match="parallel"):
        causal_mediation(model, pairs, site="resid_mid")


def test_refuses_what_cannot_be_patched(model_of, unchecked):
    model = model_of("gpt2")
    vocab = model.cfg.d_vocab
    pairs = random_pairs(vocab)
    with pytest.raises(ValueError, match="no site 'patterns'"):
        causal_mediation(model, pairs, site="patterns")
    with pytest.raises(ValueError, match="direction is 'up'"):
        causal_mediation(model, pairs, direction="up")
    with pytest.raises(ValueError, match="metric is 'accuracy'"):
        causal_mediation(model, pairs, metric="accuracy")
    with pytest.raises(ValueError, match="one number per row"):
        causal_mediation(model, pairs, metric=lambda logits, _: logits)
    with pytest.raises(ValueError, match=r"pair \d is nan in the clean run"):
        causal_mediation(model, pairs, metric=lambda logits, _: logits[:, 0] * torch.nan)
    with pytest.raises(ValueError, match=r"pair \d is nan in a patched run"):
        causal_mediation(model, pairs, metric=nan_once_patched())
    with pytest.raises(ValueError, match="batch_rows is 0"):
        causal_mediation(model, pairs, batch_rows=0)
    with pytest.raises(ValueError, match="lacks the columns"):
        causal_mediation(model, pairs, cells=causal_mediation(model, pairs).top(3)[["pair"]])
    wrong = causal_mediation(model, pairs).top(3).assign(layer=99)
    with pytest.raises(ValueError, match="layer 99"):
        causal_mediation(model, pairs, cells=wrong)
    foreign = Pairs.from_tokens([[1, vocab]], [[1, 2]], answers=[1], foils=[2])
    with pytest.raises(ValueError, match="clean row of pair 0 holds token id"):
        causal_mediation(model, foreign)
    long = list(range(vocab))[:1] * (model.cfg.n_ctx + 1)
    with pytest.raises(ValueError, match="context holds"):
        causal_mediation(model, Pairs.from_tokens([long], [[1]], answers=[1], foils=[2]))
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            causal_mediation(model, pairs)
    finally:
        model.eval()


def nan_once_patched():
    """A metric that is sound for as many calls as there are baselines."""
    calls = []

    def metric(logits, _):
        calls.append(len(logits))
        return logits[:, 0] if len(calls) <= 2 else logits[:, 0] * torch.nan

    return metric


def test_refuses_states_of_a_model_of_another_shape():
    small, large = hand_set(), hand_set(n_layers=3)
    rows = [[1, 2, 3]]
    teacher = Teacher("other", model=large)
    pairs = Pairs.from_tokens(rows, rows, answers=[1], foils=[2], corrupted_teacher=teacher)
    with pytest.raises(ValueError, match="same shape"):
        causal_mediation(small, pairs)


def test_cells_of_another_span_are_refused(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    table = causal_mediation(model, pairs, span="segment").top(3)
    with pytest.raises(ValueError, match="span='segment', and span is 'position'"):
        causal_mediation(model, pairs, cells=table)
    again = causal_mediation(model, pairs, cells=table, span="segment")
    assert np.count_nonzero(np.nan_to_num(again.values)) == 3


def test_a_teacher_that_is_the_model_itself_makes_no_other_run(model_of):
    model = model_of("gpt2")
    row = torch.arange(1, 8)
    same = Pairs.from_tokens(
        [row], [row], answers=[1], foils=[2], corrupted_teacher=Teacher("same", model=model)
    )
    with pytest.raises(ValueError, match="pair 0 are identical"):
        causal_mediation(model, same)


def test_metrics_without_a_name_are_told_apart(model_of):
    model = model_of("gpt2")
    pairs = random_pairs(model.cfg.d_vocab)
    one, other = (
        causal_mediation(model, pairs, metric=metric)
        for metric in (lambda logits, _: logits[:, 3], lambda logits, _: -logits[:, 3])
    )
    assert one.agreement(one).pearson == pytest.approx(1)
    with pytest.raises(ValueError, match="two metrics named '<lambda>' have other values"):
        one.agreement(other)
