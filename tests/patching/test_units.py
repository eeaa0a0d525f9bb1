"""Units: differing spans with different numbers of tokens, patched whole."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_lens.engine.factory import get_engine
from divergence_lens.models import load_model
from divergence_lens.pairs import Pairs
from divergence_lens.patching.attribution import attribution_patch
from divergence_lens.patching.exact import causal_mediation
from divergence_lens.teachers import Teacher
from tests.support.models import chat_tokenizer, random_hf_model, slow_except
from tests.support.patching_oracles import hand_set, one_hook_per_cell
from tests.support.unit_oracles import patched_answers_by_hand, patched_by_hand

DIRECTIONS = ("noising", "denoising")
# Two units, of which the clean side of the first and the corrupted side of the second is longer;
# then an insertion, and a deletion.
CLEAN = [5, 9, 11, 12, 13, 6, 7, 8, 14, 20, 21, 22, 17]
CORRUPTED = [5, 9, 31, 6, 7, 8, 32, 33, 34, 20, 21, 22, 17]
ROWS = (
    (CLEAN, CORRUPTED),
    ([5, 9, 11, 12, 6, 7, 17], [5, 9, 31, 6, 7, 17]),
    ([5, 9, 6, 7, 17], [5, 9, 31, 32, 6, 7, 17]),
    ([5, 9, 31, 6, 7, 17], [5, 9, 6, 7, 17]),
)


def unlike_pairs(rows=ROWS, **options):
    clean, corrupted = zip(*rows, strict=True)
    # Rows of equal length are aligned position by position, unless another alignment is given.
    units = [0, 1, -1, -1, -1, 3, 4, 5, -1, 9, 10, 11, 12]
    alignment = [units if row is ROWS[0] else None for row in rows]
    n = len(rows)
    single = {"answers": list(range(1, n + 1)), "foils": list(range(41, n + 41))}
    return Pairs.from_tokens(clean, corrupted, **single | {"alignment": alignment} | options)


ANSWERS = {"answers": [[1, 2], 3, [4, 5, 6], [7, 8]], "foils": [[1, 9, 2], [2, 3], 41, [9, 8]]}


@pytest.fixture(scope="module")
def both(backend):
    """A family's Hugging Face model and the library's model of it."""

    def get(family, seed=0):
        if backend == "hooked" and family.startswith("gemma"):
            pytest.skip("TransformerLens cannot convert this family to a HookedTransformer")
        tokenizer = chat_tokenizer()
        hf = random_hf_model(family, seed, vocab=len(tokenizer))
        own = random_hf_model(family, seed, vocab=len(tokenizer))
        return hf, load_model(own, backend=backend, tokenizer=tokenizer)

    return get


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("family", slow_except("qwen2", ("gpt2", "gpt_neox", "qwen2", "gemma2")))
def test_a_unit_equals_the_patch_by_hand_in_hugging_face(both, family, direction):
    hf, model = both(family)
    pairs = unlike_pairs()
    sites = ("resid_pre", "resid_mid", "resid_post")
    sites = sites if family != "gpt_neox" else ("resid_pre", "resid_post")
    by_site = causal_mediation(model, pairs, site=sites, direction=direction)
    largest = 0.0
    for i in range(len(pairs)):
        for number, column in enumerate(pairs.columns(i)):
            if not column.is_unit:
                continue
            for layer in range(3):
                for site, effects in by_site.items():
                    # With equal weights, the MLP of a patched `resid_mid` yields the source's
                    # `resid_post`.
                    by_hand = patched_by_hand(
                        hf,
                        pairs,
                        i,
                        [column],
                        site="resid_post" if site == "resid_mid" else site,
                        layers=[layer],
                        noising=direction == "noising",
                    )
                    assert effects.values[i, layer, number] == pytest.approx(by_hand, abs=1e-4)
                    largest = max(largest, abs(by_hand))
    assert largest > 0.01  # there is an effect to measure
    assert all(effects.missing() == {} for effects in by_site.values())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("window", [1, 2])
def test_units_of_a_segment_are_patched_together_and_in_windows(both, direction, window):
    hf, model = both("gpt2")
    names = ["template", "template", *["user"] * 10, "template"]
    pairs = unlike_pairs(ROWS[:1], segments=[names])
    effects = causal_mediation(
        model, pairs, site="resid_pre", direction=direction, span="segment", window=window
    )
    assert effects.labels == (("user", "template", "divergence"),)
    assert effects.differs == ((True, False, False),)
    chosen = [column for column in pairs.columns(0) if 2 <= column.clean[-1] < 12]
    assert sum(column.is_unit for column in chosen) == 2
    for layer in range(3):
        layers = range(layer, min(layer + window, 3))
        noising = direction == "noising"
        by_hand = patched_by_hand(
            hf, pairs, 0, chosen, site="resid_pre", layers=layers, noising=noising
        )
        assert effects.values[0, layer, 0] == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["resid_mid", "resid_post"])
def test_a_window_over_a_unit_after_the_block(both, site):
    hf, model = both("qwen2")
    pairs = unlike_pairs()
    effects = causal_mediation(model, pairs, site=site, window=2)
    for i in range(len(pairs)):
        for number, column in enumerate(pairs.columns(i)):
            for layer in range(3) if column.is_unit else ():
                layers = range(layer, min(layer + 2, 3))
                by_hand = patched_by_hand(hf, pairs, i, [column], site="resid_post", layers=layers)
                assert effects.values[i, layer, number] == pytest.approx(by_hand, abs=1e-4)


def rows_of_unlike_length(longest=10):
    token = st.integers(0, 40)
    row, end = st.lists(token, min_size=1, max_size=longest), st.lists(token, max_size=4)
    return st.tuples(end, row, row, end).map(
        lambda p: ([*p[0], *p[1], *p[3]], [*p[0], *p[2], *p[3]])
    )


def check_everything_at_layer_0(model, rows, site="resid_pre"):
    clean, corrupted = rows
    if clean == corrupted:
        return
    pairs = Pairs.from_tokens([clean], [corrupted], answers=[1], foils=[2])
    for direction in DIRECTIONS:
        effects = causal_mediation(model, pairs, site=site, span="all", direction=direction)
        np.testing.assert_allclose(effects.values[0, :, 0], effects.total[0], atol=1e-4)
        by_column = causal_mediation(model, pairs, site=site, direction=direction)
        assert by_column.missing() == {}
        assert by_column.values.shape[2] == len(pairs.columns(0))
        one_unit = sum(by_column.differs[0]) == 1 and len(clean) != len(corrupted)
        if one_unit and site == "resid_pre":
            # What follows is embedded at its new position; after block 0 it has read the base run.
            at = by_column.differs[0].index(True)
            assert by_column.values[0, 0, at] == pytest.approx(effects.total[0], abs=1e-4)


@settings(max_examples=5)
@given(rows=rows_of_unlike_length())
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_everything_at_layer_0_is_the_total_effect(model_of, family, rows):
    check_everything_at_layer_0(model_of(family), rows)


@pytest.mark.slow
@settings(max_examples=60)
@given(rows=rows_of_unlike_length(longest=25))
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gpt_neox", "gemma2"])
def test_everything_of_many_pairs_is_the_total_effect(model_of, family, site, rows):
    check_everything_at_layer_0(model_of(family), rows, site)


@pytest.mark.parametrize("site", ["attn_out", "mlp_out", "z", "v"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_inside_a_block_the_last_position_stands_for_a_unit(model_of, site, direction):
    model = model_of("gpt2")
    pairs = unlike_pairs(ROWS[1:3])
    effects = causal_mediation(model, pairs, site=site, direction=direction)
    expected = one_hook_per_cell(model, model, pairs, site, noising=direction == "noising")
    np.testing.assert_allclose(effects.values, expected, atol=1e-4)
    assert np.nanmax(np.abs(effects.values[1, :, 1])) > 1e-3  # an insertion has an effect, too


@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_a_model_that_attends_both_ways_reads_the_new_row(site):
    model = hand_set(attention_dir="bidirectional")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    pairs = Pairs.from_tokens(
        [[1, 2, 3, 4, 5], [6, 5, 4, 3]],
        [[1, 2, 6, 7, 4, 5], [6, 2, 2, 5, 4, 3]],
        answers=[1, 2],
        foils=[4, 5],
    )
    effects = causal_mediation(model, pairs, site=site)
    whole = causal_mediation(model, pairs, site=site, span="all")
    np.testing.assert_allclose(
        whole.values[..., 0], np.broadcast_to(whole.total[:, None], (2, 2)), atol=1e-5
    )
    for i, (new, unit, origin) in enumerate(
        (
            ([1, 2, 6, 7, 4, 5], 2, [0, 1, -3, -4, 3, 4]),
            ([6, 2, 2, 5, 4, 3], 0, [-1, -2, -3, 1, 2, 3]),
        )
    ):
        clean, corrupted = pairs.clean[i][None], pairs.corrupted[i][None]
        with torch.no_grad():
            (before, base), (_, source) = (model.run_with_cache(r) for r in (clean, corrupted))
            for layer in range(2):
                name = f"blocks.{layer}.hook_{site}"
                state = torch.stack(
                    [base[name][0, p] if p >= 0 else source[name][0, -1 - p] for p in origin]
                )

                def put(activation, hook, state=state, layer=layer, origin=origin):
                    if layer == 0 and site == "resid_pre":
                        there = torch.tensor(origin)[:, None] < 0
                        return torch.where(there, state, activation[0])[None]
                    return state[None]

                after = model.run_with_hooks(torch.tensor([new]), fwd_hooks=[(name, put)])
                answer, foil = int(pairs.answers[i]), int(pairs.foils[i])
                expected = after[0, -1, answer] - after[0, -1, foil]
                expected -= before[0, -1, answer] - before[0, -1, foil]
                assert effects.values[i, layer, unit] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid"])
def test_other_weights_read_the_source_span(model_of, site):
    model, other = model_of("qwen2"), model_of("qwen2", 1)
    pairs = unlike_pairs(corrupted_teacher=Teacher("other", model=other))
    for direction in DIRECTIONS:
        everything = causal_mediation(model, pairs, site=site, span="all", direction=direction)
        # The source's states of every position, read by the base model's blocks from layer l up.
        rows = pairs.corrupted if direction == "noising" else pairs.clean
        readers = (model, other) if direction == "noising" else (other, model)
        same = Pairs.from_tokens(
            rows,
            rows,
            answers=pairs.answers,
            foils=pairs.foils,
            clean_teacher=Teacher("reader", model=readers[0]),
            corrupted_teacher=Teacher("states", model=readers[1]),
        )
        expected = causal_mediation(model, same, site=site, span="all")
        base = everything.clean_metric if direction == "noising" else everything.corrupted_metric
        np.testing.assert_allclose(
            everything.values[..., 0] + base[:, None],
            expected.values[..., 0] + expected.clean_metric[:, None],
            atol=1e-4,
        )


def test_requested_units_equal_the_whole_grid_and_batches_do_not_matter(model_of):
    model = model_of("qwen2")
    pairs = unlike_pairs()
    whole = causal_mediation(model, pairs, site="resid_pre")
    small = causal_mediation(model, pairs, site="resid_pre", batch_rows=3)
    np.testing.assert_allclose(small.values, whole.values, atol=2e-5)
    top = whole.top(6)
    assert any(" → " in label for label in top["label"])
    some = causal_mediation(model, pairs, site="resid_pre", cells=top)
    assert np.isfinite(some.values).sum() == 6
    np.testing.assert_allclose(some.top(6)["effect"], top["effect"], atol=2e-5)
    cells = sum(len(pairs.columns(i)) for i in range(4)) * 3
    assert some.missing() == {"not requested": cells - 6}
    for i in range(len(pairs)):
        alone = causal_mediation(model, pairs[i], site="resid_pre")
        width = len(pairs.columns(i))
        np.testing.assert_allclose(alone.values[0], whole.values[i, :, :width], atol=2e-5)


def test_pairs_of_equal_length_do_not_notice_the_others(model_of):
    model = model_of("gpt2")
    equal = Pairs.from_tokens([[1, 2, 3, 4]], [[1, 5, 3, 4]], answers=[1], foils=[2])
    mixed = Pairs.from_tokens(
        [[1, 2, 3, 4], [1, 2, 3]], [[1, 5, 3, 4], [1, 6, 7, 3]], answers=[1, 1], foils=[2, 2]
    )
    for site in ("resid_post", "z"):
        alone = causal_mediation(model, equal, site=site).values
        np.testing.assert_array_equal(causal_mediation(model, mixed, site=site).values[:1], alone)


def test_ablations_and_noise_leave_the_positions_apart(model_of):
    model = model_of("gpt2")
    pairs = unlike_pairs()
    for corruption in ("zero", "mean"):
        effects = causal_mediation(model, pairs, corruption=corruption)
        assert [len(row) for row in effects.labels] == [len(row) for row in pairs.clean]
        assert effects.missing() == {}


@pytest.mark.parametrize("method", ["gradient", "integrated", "integrated-inputs", "graddrop"])
def test_attribution_of_a_unit_is_that_of_its_last_position(model_of, method):
    model = model_of("qwen2")
    pairs = unlike_pairs()
    effects = attribution_patch(model, pairs, site="z", method=method, steps=3, verify=4)
    exact = causal_mediation(model, pairs, site="z")
    assert effects.labels == exact.labels
    assert effects.missing() == {}
    units = [
        (i, number)
        for i in range(len(pairs))
        for number, column in enumerate(pairs.columns(i))
        if column.is_unit
    ]
    assert all(np.abs(effects.values[i, :, number]).max() > 0 for i, number in units)
    assert effects.agreement(exact).cells > 20
    assert effects.verified is not None


def test_attribution_of_a_unit_is_the_slope_of_its_exact_patch(both):
    """Move the last state of the span a little towards the other run's, by hand."""
    _, model = both("gpt2")
    pairs = unlike_pairs(ROWS[1:2])
    effects = attribution_patch(model, pairs, site="attn_out", method="gradient")
    engine = get_engine(model)
    base, source = pairs.clean[0][None], pairs.corrupted[0][None]
    old, new = (engine.activations(row, sites=("attn_out",))["attn_out"] for row in (base, source))

    def metric(layer, step):
        def move(activation):
            moved = activation.clone()
            moved[:, 3] += step * (new[layer][:, 2] - old[layer][:, 3])
            return moved

        with engine.hooked([(layer, "attn_out", move)]), torch.no_grad():
            logits = engine.unembed(engine.final(base))[0, -1]
        return float(logits[1] - logits[41])

    for layer in range(3):
        slope = (metric(layer, 1e-2) - metric(layer, -1e-2)) / 2e-2
        assert effects.values[0, layer, 2] == pytest.approx(slope, abs=2e-3)


def test_labels_segments_and_positions_of_columns(model_of):
    model = model_of("qwen2")
    tokenizer = chat_tokenizer()
    pairs = unlike_pairs(tokenizer=tokenizer)
    effects = causal_mediation(model, pairs)
    unit = effects.labels[1][2]
    clean, corrupted = unit.split(" → ")
    assert clean == f"{tokenizer.decode([11])}|{tokenizer.decode([12])}"
    assert corrupted == tokenizer.decode([31])
    assert effects.segments[1] == ("text", "text", "bias", "text", "text", "divergence")
    assert effects.differs[1] == (False, False, True, False, False, False)
    assert effects.positions[1] == (0, 1, 2, 4, 5, 6, 7)
    assert [effects.column(1, p) for p in range(7)] == [0, 1, 2, 2, 3, 4, 5]


def test_a_patched_row_that_does_not_fit_the_context_is_refused(random_model):
    model = random_model("gpt2", n_ctx=14)
    with pytest.raises(ValueError, match=r"'14 → 32\|33\|34' alone gives a row of 15 tokens"):
        causal_mediation(model, unlike_pairs(ROWS[:1]), site="resid_pre")


@pytest.mark.slow
@pytest.mark.parametrize("family", slow_except("qwen2", ("gpt2", "qwen2")))
@pytest.mark.parametrize("direction", slow_except("noising", ("noising", "denoising")))
@pytest.mark.parametrize("site", ["resid_pre", "resid_post"])
def test_answers_of_several_tokens_after_rows_of_new_lengths(both, family, site, direction):
    hf, model = both(family)
    pairs = unlike_pairs(**ANSWERS)
    effects = causal_mediation(model, pairs, site=site, direction=direction)
    whole = causal_mediation(model, pairs, site="resid_pre", direction=direction, span="all")
    np.testing.assert_allclose(whole.values[:, 0, 0], whole.total, atol=2e-4)
    for i in range(len(pairs)):
        columns = pairs.columns(i)
        for layer in (0, 1):
            by_hand = [
                patched_answers_by_hand(
                    hf,
                    pairs,
                    i,
                    [column],
                    site=site,
                    layers=[layer],
                    noising=direction == "noising",
                )
                for column in columns
            ]
            np.testing.assert_allclose(effects.values[i, layer, : len(columns)], by_hand, atol=2e-4)
