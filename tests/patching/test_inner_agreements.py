"""Agreement of approximate with exact effects, on effects whose agreement is known."""

import numpy as np
import pytest

from divergence_lens.patching.effects import Effects
from divergence_lens.patching.inner_agreements import agreement_row, inner_agreement, inner_cells


def _effects(inner, total=(2.0, 20.0)):
    """Two pairs, four layers, six positions; `inner` fills what is neither target nor last."""
    values = np.zeros((2, 4, 6), dtype=np.float32)
    values[:, :-1, :-1] = inner
    values[:, :, -1] = np.linspace(0.1, 1, 4) * np.array(total)[:, None]
    return Effects(
        values=values,
        site="resid_post",
        method="exact",
        direction="noising",
        metric="logit_difference",
        clean_metric=np.zeros(2, dtype=np.float32),
        corrupted_metric=np.array(total, dtype=np.float32),
        segments=(("user",) * 6,) * 2,
        labels=(tuple("abcdef"),) * 2,
    )


def test_agreement_at_the_target_position_and_in_the_last_layer_does_not_count():
    random = np.random.default_rng(0)
    exact = _effects(random.normal(size=(2, 3, 5)) * 0.1)
    noise = _effects(random.normal(size=(2, 3, 5)) * 0.1)
    row = agreement_row(noise, exact)
    assert row["pearson"] > 0.95
    by_hand = [
        np.corrcoef(noise.values[i, :3, :5].ravel(), exact.values[i, :3, :5].ravel())[0, 1]
        for i in range(2)
    ]
    assert row["inner_pearson"] == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert abs(row["inner_pearson"]) < 0.5
    assert (row["inner_pairs"], row["inner_cells"]) == (2, 30)
    assert inner_cells(exact).sum() == 30


def test_every_pair_has_one_vote_however_large_its_effect():
    cells = np.random.default_rng(1).normal(size=(2, 3, 5))
    approximate = cells * np.array([1.0, -1.0])[:, None, None]
    for scale in (1.0, 1000.0):
        factor = np.array([1.0, scale])[:, None, None]
        agreement = inner_agreement(_effects(approximate * factor), _effects(cells * factor))
        assert agreement.pearson == pytest.approx(0.0, abs=1e-6)


def test_pairs_without_a_total_effect_have_no_vote():
    cells = np.random.default_rng(1).normal(size=(2, 3, 5))
    exact = _effects(cells, total=(0.001, 2.0))
    agreement = inner_agreement(_effects(-cells, total=(0.001, 2.0)), exact)
    assert (agreement.pairs, agreement.pearson) == (1, pytest.approx(-1.0))
    nothing = _effects(cells, total=(0.0, 0.0))
    assert agreement_row(nothing, nothing)["inner_pearson"] is None
