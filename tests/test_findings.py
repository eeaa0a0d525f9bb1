"""The rules: what makes a claim supported, on tables whose answer is known."""

import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens.findings import decide, judge, t_interval

TARGETS = ("wolf", "lion", "eagle", "panda")


@pytest.mark.parametrize(
    ("low", "high", "above", "verdict"),
    [
        (0.1, 0.3, True, "supported"),
        (-0.3, -0.1, True, "not supported"),
        (-0.1, 0.1, True, "unclear"),
        (0.1, 0.3, False, "not supported"),
        (-0.3, -0.1, False, "supported"),
        (-math.inf, math.inf, True, "unclear"),
        (math.nan, math.nan, True, "unclear"),
    ],
)
def test_the_interval_decides(low, high, above, verdict):
    assert decide(low, high, 0.0, above=above) == verdict


def test_t_interval_against_published_quantiles():
    # Student's t at 97.5 %: 12.706, 4.303, 3.182, 2.776, 2.228 for 1, 2, 3, 4, 10
    # degrees of freedom.
    for freedom, quantile in {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 10: 2.228}.items():
        values = np.arange(freedom + 1.0)
        mean, low, high = t_interval(values.tolist())
        unit = float(values.std(ddof=1)) / math.sqrt(freedom + 1)
        assert mean == values.mean()
        assert (high - mean) / unit == pytest.approx(quantile, rel=2e-4)
        assert (mean - low) / unit == pytest.approx(quantile, rel=2e-4)


def test_one_value_has_no_interval_and_none_no_mean():
    assert t_interval([0.5]) == (0.5, -math.inf, math.inf)
    assert all(math.isnan(x) for x in t_interval([math.nan]))


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8), st.floats(-5, 5))
def test_a_shift_moves_the_interval_with_it(values, shift):
    plain, moved = t_interval(values), t_interval([v + shift for v in values])
    assert moved == pytest.approx([end + shift for end in plain], abs=1e-6)


def test_the_interval_covers_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = sum(
        low < 0 < high for _, low, high in map(t_interval, random.normal(size=(4000, 4)).tolist())
    )
    assert hits / 4000 == pytest.approx(0.95, abs=0.015)


def _tables(after, *, rank=1, rate=0.12):
    """Tables of four targets that differ by some per cent; `after` maps condition to preference."""
    wobble = dict(zip(TARGETS, (0.97, 1.0, 1.02, 1.05), strict=True))
    students = [
        {
            "target": target,
            "kind": "finetuned",
            "condition": condition.split("-")[0],
            "block": int(condition.split("-")[1]) if "-" in condition else None,
            "seed": seed,
            "before": 0.08,
            # The noise of a condition and a target, so that ratios do not come out exact.
            "after": value * wobble[target] ** (1 + i % 3),
            "rank": rank,
        }
        for (i, (condition, value)), target, seed in itertools.product(
            enumerate(after.items()), TARGETS, (0, 1)
        )
    ]
    one_per_target = {"target": list(TARGETS), "kind": ["finetuned"] * 4}
    layers = [
        {"target": t, "kind": "finetuned", "site": site, "layer": layer, "absolute_effect": size}
        for t in TARGETS
        for site in ("attn_out", "mlp_out")
        for layer, size in enumerate((3.0, 1.0, 0.5, wobble[t]))
    ]
    return {
        "divergence": pd.DataFrame(one_per_target | {"rate": [rate * wobble[t] for t in TARGETS]}),
        "students": pd.DataFrame(students),
        "layers": pd.DataFrame(layers),
        "agreement": pd.DataFrame(
            one_per_target | {"method": ["integrated"] * 4, "pearson": [0.97, 0.95, 0.99, 0.98]}
        ),
    }


PAPER_LIKE = {
    "all": 0.2,
    "divergence_only": 0.3,
    "without_divergence": 0.1,
    "control": 0.08,
    "block-0": 0.28,
    "block-3": 0.1,
}


def _verdicts(after, **options):
    return {f.id: f.verdict for f in judge(_tables(after, **options), last_block=3)}


def test_a_world_like_the_papers_supports_every_claim():
    verdicts = _verdicts(PAPER_LIKE)
    assert len(verdicts) == 10
    assert set(verdicts.values()) == {"supported"}


def test_a_world_without_transfer_supports_none_of_the_transfer_claims():
    flat = dict.fromkeys(PAPER_LIKE, 0.08)
    verdicts = _verdicts(flat, rank=6, rate=0.5)
    transfer = (
        "transfer",
        "divergence_tokens_suffice",
        "rest_transfers_less",
        "first_block_suffices",
    )
    assert all(verdicts[f"finetuned/{name}"] != "supported" for name in transfer)
    assert verdicts["finetuned/target_rises_most"] == "not supported"
    assert verdicts["finetuned/few_divergence_tokens"] == "not supported"


def test_late_blocks_that_carry_it_are_told():
    late = PAPER_LIKE | {"block-0": 0.09, "block-3": 0.3}
    assert _verdicts(late)["finetuned/first_block_beats_last"] == "not supported"


def test_ratios_are_what_they_say():
    found = {f.id: f for f in judge(_tables(PAPER_LIKE), last_block=3)}
    over_control = found["finetuned/divergence_tokens_suffice"]
    assert over_control.measured == pytest.approx(0.3 / 0.08, rel=0.1)
    low, high = over_control.interval
    assert low < over_control.measured < high
    assert set(over_control.values) == set(TARGETS)
    share = found["finetuned/early_layers_cause_divergence"]
    assert share.values["lion"] == pytest.approx(4.0 / 5.5)


def test_findings_are_json():
    for finding in judge(_tables(PAPER_LIKE), last_block=3):
        row = json.loads(json.dumps(finding.to_dict(), allow_nan=False))
        assert {"id", "claim", "measured", "interval", "verdict", "rule", "caveat"} <= set(row)


def test_a_claim_without_data_is_left_out():
    tables = _tables({"all": 0.2, "control": 0.08})
    ids = {f.id for f in judge(tables | {"layers": pd.DataFrame()}, last_block=3)}
    assert "finetuned/transfer" in ids
    assert not any("block" in name or "early" in name for name in ids)
