"""Effects: tables, intervals, agreement, files."""

from dataclasses import replace

import numpy as np
import pytest

from divergence_lens.patching.agreement import agreement_of_cells
from divergence_lens.patching.effects import Effects

NAN = np.nan


@pytest.fixture
def effects() -> Effects:
    """Two pairs of 4 and 3 positions, two layers; one cell of the first has no counterpart."""
    values = np.array(
        [
            [[0.0, 1.0, NAN, 3.0], [0.0, -4.0, NAN, 2.0]],
            [[5.0, 0.5, 1.5, NAN], [1.0, 0.0, 2.0, NAN]],
        ],
        dtype=np.float32,
    )
    return Effects(
        values=values,
        site="resid_post",
        method="exact",
        direction="noising",
        metric="logit_difference",
        clean_metric=np.array([2.0, 1.0], dtype=np.float32),
        corrupted_metric=np.array([-2.0, 1.001], dtype=np.float32),
        segments=(("system", "bias", "bias", "divergence"), ("bias", "user", "divergence")),
        labels=(("a", "b", "c", "d"), ("<b>", "f", "g")),
        metadata={"seed": 0},
    )


def test_they_print_as_one_line_however_many_values_they_hold(effects):
    assert repr(effects) == (
        "Effects(exact noising of resid_post on logit_difference: 2 pairs, 2 layers, 4 positions; "
        "mean total effect -2; 2 of 14 cells missing: not measured)"
    )
    heads = replace(effects, values=effects.values[..., None].repeat(5, 3), site="z")
    assert "of z on logit_difference: 2 pairs, 2 layers, 4 positions, 5 heads;" in repr(heads)
    ablated = replace(effects, metadata={"settings": {"corruption": "mean"}})
    assert "exact noising by mean of resid_post" in repr(ablated)
    nothing = replace(effects, corrupted_metric=effects.clean_metric).normalized()
    assert repr(nothing).endswith(
        "undefined; 14 of 14 cells missing: of pairs with a total effect near zero)"
    )


def test_total_has_the_sign_of_the_direction(effects):
    np.testing.assert_allclose(effects.total, [-4, 0.001], atol=1e-6)
    np.testing.assert_allclose(replace(effects, direction="denoising").total, -effects.total)


def test_normalized_divides_by_the_total_and_flags_pairs_without_one(effects):
    assert effects.near_zero().tolist() == [False, True]
    shares = effects.normalized()
    np.testing.assert_allclose(shares.values[0], effects.values[0] / -4)
    assert np.isnan(shares.values[1]).all()
    assert shares.total[0] == pytest.approx(1)


def test_segments_put_unlike_lengths_together(effects):
    table = effects.by_segment()
    assert list(table.columns) == ["system", "bias", "user", "divergence"]
    np.testing.assert_allclose(table["bias"], [(1 + 5) / 2, (-4 + 1) / 2])
    np.testing.assert_allclose(table["user"], [0.5, 0])
    np.testing.assert_allclose(table["divergence"], [(3 + 1.5) / 2, 2])
    missing = replace(effects, segments=(("system", "user", "bias", "user"), ("user",) * 3))
    assert missing.by_segment()["bias"].isna().all()


def test_layers_are_averaged_with_an_interval_that_holds_the_mean(effects):
    table = effects.by_layer()
    np.testing.assert_allclose(table["effect"], [(4 + 7) / 2, (-2 + 3) / 2])
    assert (table["low"] <= table["effect"]).all()
    assert (table["high"] >= table["effect"]).all()
    np.testing.assert_allclose(
        effects.by_layer("mean")["effect"][0], (4 / 3 + 7 / 3) / 2, rtol=1e-6
    )


def test_intervals_are_seeded_and_cover_the_truth_as_often_as_they_say(effects):
    low, high = effects.interval()
    again, _ = effects.interval()
    np.testing.assert_array_equal(low, again)
    assert np.isnan(low[0, 2]) == np.isnan(effects.mean()[0, 2])
    assert low[0, 0] == 0
    assert high[0, 0] == 5
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = generator.normal(1.0, 1.0, size=(40, 1, 1)).astype(np.float32)
        many = Effects(
            values=values,
            site="z",
            method="exact",
            direction="noising",
            metric="m",
            clean_metric=values[:, 0, 0],
            corrupted_metric=values[:, 0, 0],
            segments=(("text",),) * 40,
            labels=(("x",),) * 40,
        )
        lower, upper = many.interval(resamples=300, seed=trial)
        covered += bool(lower[0, 0] <= 1.0 <= upper[0, 0])
    assert 0.88 < covered / 200 < 0.99


def test_top_is_sorted_by_magnitude_and_skips_missing_cells(effects):
    top = effects.top(3)
    assert top["effect"].tolist() == [5, -4, 3]
    assert top[["pair", "layer", "position"]].to_numpy().tolist() == [
        [1, 0, 0],
        [0, 1, 1],
        [0, 0, 3],
    ]
    assert top["label"].tolist() == ["<b>", "b", "d"]
    assert top["segment"].tolist() == ["bias", "bias", "divergence"]
    assert len(effects.top(1000)) == len(effects.to_dataframe()) == 12
    assert len(effects.top(0)) == 0
    with pytest.raises(ValueError, match="k is -1"):
        effects.top(-1)


def test_heads_are_added_in_tables_and_listed_in_top(effects):
    heads = replace(effects, values=np.stack([effects.values, 2 * effects.values], axis=3))
    np.testing.assert_allclose(heads.by_segment(), 3 * effects.by_segment())
    assert heads.top(1)["head"].tolist() == [1]
    assert heads.normalized().values.shape == heads.values.shape


def test_every_table_states_its_missing_cells_and_why(effects):
    note = "2 of 14 cells missing: not measured"
    tables = (effects.by_segment(), effects.by_layer(), effects.top(2), effects.to_dataframe())
    assert all(note in str(table) and table.attrs["missing"] == note for table in tables)
    assert list(effects.by_segment().columns) == ["system", "bias", "user", "divergence"]
    some = replace(effects, metadata={"settings": {"cells": "a hash"}})
    assert some.missing() == {"not requested": 2}
    assert some.normalized().missing() == {
        "not requested": 2,
        "of pairs with a total effect near zero": 6,
    }
    assert some.normalized().missing_note() == (
        "8 of 14 cells missing: 2 not requested, 6 of pairs with a total effect near zero"
    )
    heads = replace(effects, values=np.stack([effects.values] * 3, axis=3))
    assert heads.missing_note() == "6 of 42 cells missing: not measured"
    whole = effects[1]
    assert whole.missing() == {}
    assert whole.by_segment().columns.name == "segment"
    assert "missing" not in repr(whole)


def test_a_total_of_nothing_is_nan(effects):
    nothing = replace(effects, values=np.full_like(effects.values, np.nan))
    assert nothing.by_segment().isna().all(axis=None)
    assert nothing.by_layer()["effect"].isna().all()
    assert (nothing.by_layer()["pairs"] == 0).all()
    assert len(nothing.top(3)) == len(nothing.to_dataframe()) == 0


def test_columns_are_looked_up_by_clean_position(effects):
    assert effects.column(0, 3) == 3
    united = replace(effects, positions=((0, 1, 4, 6, 8), ()))
    assert [united.column(0, p) for p in range(8)] == [0, 1, 1, 1, 2, 2, 3, 3]
    assert united[[1, 0]].positions == ((), (0, 1, 4, 6, 8))
    with pytest.raises(ValueError, match="pair 0 has 4 columns and no position 8"):
        united.column(0, 8)
    with pytest.raises(ValueError, match="pair 1 has 3 columns and no position 3"):
        united.column(1, 3)
    with pytest.raises(ValueError, match="labels and positions differ in length"):
        replace(effects, positions=((0, 1), ()))
    segments = replace(effects, metadata={"settings": {"span": "segment"}})
    with pytest.raises(ValueError, match="span='segment'"):
        segments.column(0, 1)


def test_agreement_is_what_numpy_says():
    generator = np.random.default_rng(1)
    exact = generator.normal(size=300)
    approximate = 2 * exact + 0.3 * generator.normal(size=300)
    result = agreement_of_cells(approximate, exact, k=30)
    assert result.pearson == pytest.approx(np.corrcoef(approximate, exact)[0, 1])
    assert result.slope == pytest.approx(np.polyfit(approximate, exact, 1)[0])
    ranks = [np.argsort(np.argsort(x)) for x in (approximate, exact)]
    assert result.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert 0.9 < result.sign <= 1
    assert 0.8 < result.recall <= 1
    assert result.cells == 300


def test_agreement_with_oneself_is_whole_and_with_the_opposite_is_none(effects):
    same = effects.agreement(effects)
    assert (same.sign, same.recall) == (1.0, 1.0)
    assert same.pearson == pytest.approx(1)
    assert same.slope == pytest.approx(1)
    assert same.cells == 9  # cells that are zero in both say nothing
    opposite = replace(effects, values=-effects.values).agreement(effects)
    assert opposite.sign == 0
    assert opposite.pearson == pytest.approx(-1)


def test_agreement_refuses_what_is_not_comparable(effects):
    with pytest.raises(ValueError, match="site"):
        effects.agreement(replace(effects, site="z"))
    with pytest.raises(ValueError, match="same pairs"):
        effects.agreement(replace(effects, labels=(("a", "b", "c", "x"), effects.labels[1])))
    with pytest.raises(ValueError, match="at least 2"):
        agreement_of_cells([1.0, NAN], [1.0, 2.0])


def test_natural_direct_effects_come_from_denoising(effects):
    with pytest.raises(ValueError, match="denoising"):
        effects.natural_direct()
    turned = replace(effects, direction="denoising")
    direct = turned.natural_direct()
    # patched metric minus clean metric, where values are patched minus corrupted metric
    np.testing.assert_allclose(direct[0, 0, 1], (1.0 + -2.0) - 2.0)


def test_files_give_back_everything(effects, tmp_path):
    checked = replace(
        effects,
        verified=effects.agreement(effects),
        differs=((False, True, True, False), (True, False, False)),
        positions=((0, 1, 3, 4, 5), ()),
    )
    for i, kept in enumerate((effects, checked)):
        path = tmp_path / f"{i}.safetensors"
        kept.save(path)
        loaded = Effects.load(path)
        for name in ("values", "clean_metric", "corrupted_metric"):
            np.testing.assert_array_equal(getattr(loaded, name), getattr(kept, name))
        names = ("site", "method", "direction", "metric", "segments", "labels", "metadata")
        for name in (*names, "differs", "positions"):
            assert getattr(loaded, name) == getattr(kept, name)
        assert loaded.verified == kept.verified


def test_view_escapes_names_and_counts_missing_cells(effects):
    html = replace(effects, metric="<b>m</b>")._repr_html_()
    assert "<b>m</b>" not in html
    assert "2 of 14 cells missing: not measured" in html
    assert (
        "no cells missing" in replace(effects, values=np.nan_to_num(effects.values))._repr_html_()
    )
    assert "&lt;b&gt;" in html


def test_fields_that_do_not_fit_are_refused(effects):
    with pytest.raises(ValueError, match="labels has 1 entries"):
        replace(effects, labels=effects.labels[:1])
    with pytest.raises(ValueError, match="longest row has 3"):
        replace(effects, labels=(("a",) * 3,) * 2, segments=(("a",) * 3,) * 2)
    with pytest.raises(ValueError, match="level is 95"):
        effects.interval(level=95)


def test_an_index_selects_pairs_and_cuts_the_positions_to_their_longest_row(effects):
    whole = replace(
        effects,
        verified=effects.agreement(effects),
        metadata={"settings": {"finished_pairs": [4, 9]}},
    )
    for index in (1, -1, slice(1, None), [1], np.array([False, True]), [False, True]):
        one = whole[index]
        assert isinstance(one, Effects)
        np.testing.assert_array_equal(one.values, effects.values[1:, :, :3])
        assert (one.labels, one.segments) == (effects.labels[1:], effects.segments[1:])
        assert one.total.tolist() == effects.total[1:].tolist()
        assert one.setting("finished_pairs") == [9]
        assert one.verified is None
    turned = whole[[1, 0]]
    np.testing.assert_array_equal(turned.values, effects.values[::-1])
    assert turned.setting("finished_pairs") == [9, 4]
    assert whole.setting("finished_pairs") == [4, 9]
    assert [len(one) for one in effects] == [1, 1]
    with pytest.raises(IndexError, match="no pair 2"):
        effects[2]
    with pytest.raises(ValueError, match="selects none"):
        effects[[False, False]]
