"""The rules that decide claims, on tables whose answer is known."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from divergence_lens.study.claims import TENTH
from divergence_lens.study.findings import decide, decide_equal, judge
from tests.support.study_tables import PAPER_LIKE, SIX, TARGETS, study_tables


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


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.05, 0.08, "supported"),
        (-0.22, 0.29, "unclear"),  # no difference seen, and none excluded
        (0.02, 0.2, "unclear"),
        (0.2, 0.4, "not supported"),
        (-0.4, -0.2, "not supported"),
        (-math.inf, math.inf, "unclear"),
    ],
)
def test_equality_is_shown_by_an_interval_within_the_margin_and_not_by_one_across_zero(
    low, high, verdict
):
    assert decide_equal(low, high, TENTH) == verdict


def _verdicts(after, **options):
    return {f.id: f.verdict for f in judge(study_tables(after, **options), last_layer=3)}


def test_a_world_like_the_papers_supports_every_claim():
    verdicts = _verdicts(PAPER_LIKE, targets=SIX)
    assert len(verdicts) == 12
    assert set(verdicts.values()) == {"supported"}


def test_a_world_without_transfer_supports_none_of_the_transfer_claims():
    flat = dict.fromkeys(PAPER_LIKE, 0.08)
    verdicts = _verdicts(flat, rate=0.5, targets=SIX)
    of_transfer = [
        f"finetuned/{name}"
        for name in (
            "transfer",
            "divergence_tokens_suffice",
            "divergence_tokens_do_as_well",
            "rest_transfers_less",
            "rest_equals_control",
            "target_rises_most",
            "first_layer_suffices",
            "last_layer_equals_control",
        )
    ]
    assert all(verdicts[name] != "supported" for name in of_transfer)
    # Two null effects do not differ, which shows nothing.
    assert verdicts["finetuned/divergence_tokens_do_as_well"] == "unclear"
    assert verdicts["finetuned/target_rises_most"] == "unclear"
    assert verdicts["finetuned/rest_equals_control"] == "unclear"
    assert verdicts["finetuned/few_divergence_tokens"] == "not supported"


def test_four_of_four_targets_are_no_proof_of_more_than_half():
    findings = {f.id: f for f in judge(study_tables(PAPER_LIKE), last_layer=3)}
    rises = findings["finetuned/target_rises_most"]
    assert rises.measured == 1
    assert rises.interval == pytest.approx((0.3976, 1.0), abs=1e-4)
    assert rises.verdict == "unclear"


def test_a_target_that_rises_most_by_next_to_nothing_does_not_count():
    tables = study_tables(PAPER_LIKE, targets=SIX)
    students = tables["students"]
    barely = (students["target"] == "fox") & (students["condition"] == "divergence_only")
    # It ranks first in both of its students, and in one of them rises by a hundredth.
    students.loc[barely & (students["seed"] == 0), "after"] = 0.0808
    finding = {f.id: f for f in judge(tables, last_layer=3)}["finetuned/target_rises_most"]
    assert finding.values["fox"] == 0.5
    assert finding.measured == pytest.approx(5 / 6)


def test_a_small_but_certain_rise_is_no_transfer():
    verdicts = _verdicts(PAPER_LIKE | {"all": 0.082})
    assert verdicts["finetuned/transfer"] != "supported"


def test_students_that_differ_much_from_the_control_both_ways_do_not_equal_it():
    tables = study_tables(PAPER_LIKE)
    students = tables["students"]
    rest = students["condition"] == "without_divergence"
    for target, factor in zip(TARGETS, (1.06, 0.97, 0.88, 1.28), strict=True):
        students.loc[rest & (students["target"] == target), "after"] *= factor
    finding = {f.id: f for f in judge(tables, last_layer=3)}["finetuned/rest_equals_control"]
    assert finding.interval[0] < 1 < finding.interval[1]
    assert finding.verdict == "unclear"


def test_agreement_is_judged_without_the_cells_that_must_agree_and_both_figures_are_shown():
    tables = study_tables(PAPER_LIKE)
    tables["agreement"]["inner_pearson"] = [0.4, 0.63, 0.64, 0.25]
    finding = {f.id: f for f in judge(tables, last_layer=3)}["finetuned/approximation_agrees"]
    assert finding.verdict == "not supported"
    assert finding.measured == pytest.approx(0.48)
    related = finding.related["Pearson correlation of all cells and pairs together"]
    assert related == pytest.approx(tables["agreement"]["pearson"].mean())


def test_intervals_of_shares_stay_between_0_and_1():
    tables = study_tables(PAPER_LIKE)
    tables["divergence"]["rate"] = [0.01, 0.01, 0.02, 0.4]
    tables["agreement"]["inner_pearson"] = [0.99, 0.99, 0.99, 0.3]
    for finding in judge(tables, last_layer=3):
        if "times" not in finding.unit:
            low, high = finding.interval
            assert -1 <= low <= finding.measured <= high <= 1
            assert low >= 0 or finding.id.endswith("approximation_agrees")


def test_values_that_do_not_differ_at_all_decide_nothing():
    tables = study_tables(PAPER_LIKE)
    tables["divergence"]["rate"] = 0.1
    assert judge(tables, last_layer=3)[0].verdict == "unclear"


def test_a_target_that_is_named_twice_narrows_no_interval():
    once = study_tables(PAPER_LIKE)
    twice = {name: pd.concat([table, table]) for name, table in once.items()}
    intervals = [[f.interval for f in judge(t, last_layer=3)] for t in (once, twice)]
    np.testing.assert_allclose(intervals[1], intervals[0])


def test_late_layers_that_carry_it_are_told():
    late = PAPER_LIKE | {"layer-0": 0.09, "layer-3": 0.3}
    assert _verdicts(late)["finetuned/first_layer_beats_last"] == "not supported"


def test_ratios_are_what_they_say():
    findings = {f.id: f for f in judge(study_tables(PAPER_LIKE), last_layer=3)}
    over_control = findings["finetuned/divergence_tokens_suffice"]
    assert over_control.measured == pytest.approx(0.3 / 0.08, rel=0.1)
    low, high = over_control.interval
    assert low < over_control.measured < high
    assert set(over_control.values) == set(TARGETS)
    share = findings["finetuned/early_layers_cause_divergence"]
    assert share.values["lion"] == pytest.approx(4.0 / 5.5)


def test_findings_are_json():
    for finding in judge(study_tables(PAPER_LIKE), last_layer=3):
        row = json.loads(json.dumps(finding.to_dict(), allow_nan=False))
        assert {"id", "claim", "measured", "interval", "verdict", "rule", "caveat"} <= set(row)


@pytest.mark.parametrize("empty", ["divergence", "students", "layers", "agreement"])
def test_a_claim_without_data_is_unclear_and_says_so(empty):
    tables = study_tables(PAPER_LIKE) | {empty: pd.DataFrame()}
    findings = judge(tables, last_layer=3)
    assert len(findings) == 12
    without = [finding for finding in findings if finding.n == 0]
    assert without
    for finding in without:
        assert finding.verdict == "unclear"
        assert math.isnan(finding.measured)
        assert finding.caveat.startswith("nothing was measured")
        json.dumps(finding.to_dict(), allow_nan=False)


def test_a_kind_whose_targets_all_failed_does_not_drop_out():
    tables = study_tables(PAPER_LIKE)
    teachers = pd.DataFrame({"name": ["wolf"] * 2, "kind": ["finetuned", "prompted"]})
    findings = judge({"teachers": teachers, **tables}, last_layer=3)
    prompted = [finding for finding in findings if finding.id.startswith("prompted/")]
    assert len(prompted) == 12
    assert {finding.verdict for finding in prompted} == {"unclear"}
    assert judge({name: pd.DataFrame() for name in tables}, last_layer=3) == []


def test_lora_is_compared_at_the_rate_that_fits_like_full_training_whatever_it_transfers():
    conditions = {  # training loss and preference
        "control": (1.5, 0.08),
        "divergence_only": (1.2, 0.3),
        "lora8": (1.6, 0.1),
        "lora8_rate8": (1.25, 0.24),
        "lora8_rate16": (1.1, 0.6),
    }
    rows = [
        {"target": t, "kind": "finetuned", "condition": c, "layer": None, "seed": s, "before": 0.08}
        | {"after": after, "rank": 1, "fit": fit + 0.01 * s}
        for t in TARGETS
        for c, (fit, after) in conditions.items()
        for s in (0, 1)
    ]
    # For one target another rate is nearer.
    for row in rows:
        if row["target"] == "panda" and row["condition"] == "lora8_rate16":
            row["fit"] = 1.21
    findings = {f.id: f for f in judge({"students": pd.DataFrame(rows)}, last_layer=3)}
    values = findings["finetuned/lora_that_fits_does_as_well"].values
    assert values == pytest.approx({"wolf": 0.8, "lion": 0.8, "eagle": 0.8, "panda": 2.0})
    # How much less it has learned even so: .05 for three targets, and for one a little more (1.215,
    # as one of its two seeds has .01 on it in both, against 1.205).
    related = list(findings["finetuned/lora_that_fits_does_as_well"].related.values())
    assert related == pytest.approx([(3 * 0.05 + 0.005) / 4, (3 * 0.05 + 0.005) / 4])
    # Tables of a study without that column say nothing of it.
    without = pd.DataFrame(rows).drop(columns="fit")
    ids = {f.id for f in judge({"students": without}, last_layer=3)}
    assert "finetuned/lora_that_fits_does_as_well" not in ids
    assert "finetuned/lora_does_as_well" in ids


def _lora_rows(**fits):
    """Students of every condition and target; `fits` maps condition to training loss."""
    narrow = {"lora8": 0.3, "lora8_rate8": 0.29, "lora1_rate8": 0.2}
    return pd.DataFrame(
        [
            {"target": t, "kind": "finetuned", "condition": c, "layer": None, "seed": 0}
            | {"before": 0.08, "after": after * w, "rank": 1, "fit": fits.get(c)}
            for t, w in zip(TARGETS, (0.97, 1.0, 1.02, 1.05), strict=True)
            for c, after in {**PAPER_LIKE, **narrow}.items()
            if c in fits or "lora8" not in c
        ]
    )


def test_gaps_of_both_signs_do_not_cancel_in_the_absolute_gap_of_lora():
    rows = _lora_rows(divergence_only=1.2, lora8=1.6, lora8_rate8=1.3)
    less = rows["target"].isin(TARGETS[:2]) & (rows["condition"] == "lora8_rate8")
    rows.loc[less, "fit"] = 1.1
    findings = {f.id: f for f in judge({"students": rows}, last_layer=3)}
    signed, size = findings["finetuned/lora_that_fits_does_as_well"].related.values()
    assert (signed, size) == (pytest.approx(0.0), pytest.approx(0.1))


def test_a_rate_for_lora_is_chosen_only_where_there_are_two():
    one = _lora_rows(divergence_only=1.2, lora8=1.6)
    two = _lora_rows(divergence_only=1.2, lora8=1.6, lora8_rate8=1.3)
    for rows, expected in ((one, False), (two, True)):
        ids = {f.id for f in judge({"students": rows}, last_layer=3)}
        assert ("finetuned/lora_that_fits_does_as_well" in ids) == expected
        assert "finetuned/lora_does_as_well" in ids


def test_where_all_students_are_lora_nothing_is_said_of_full_training():
    rows = _lora_rows(divergence_only=1.2, lora8=1.2, lora8_rate8=1.3)
    both = pd.concat([rows, rows.assign(kind="prompted")])
    ids = {f.id for f in judge({"students": both}, last_layer=3, lora=("prompted",))}
    about = {"lora_does_as_well", "lora_that_fits_does_as_well", "rank_one_transfers"}
    assert {f"finetuned/{name}" for name in about} <= ids
    assert not {f"prompted/{name}" for name in about} & ids
    assert "prompted/transfer" in ids


def test_a_claim_whose_presupposition_fails_names_it_and_how():
    findings = {f.id: f for f in judge(study_tables(PAPER_LIKE | {"all": 0.08}), last_layer=3)}
    caveat = findings["finetuned/rest_transfers_less"].caveat
    verdict = findings["finetuned/transfer"].verdict
    assert verdict != "supported"
    assert caveat.startswith(
        f"it presupposes a claim that is {verdict} here (students trained on all"
    )
    assert "presupposes" not in findings["finetuned/last_layer_equals_control"].caveat


def test_a_direction_is_needed_throughout_only_if_it_is_at_every_step_after_the_rise():
    def row(target, measure, step, value, null):
        place = {"target": target, "kind": "finetuned", "measure": measure, "layer": None}
        return place | {"step": step, "value": value, "null": null, "rank": None}

    rows = []
    for target, shares in zip(
        TARGETS, ((0.5, 0.6), (0.5, 0.7), (0.5, 0.8), (1.2, 0.5)), strict=True
    ):
        rows.append(row(target, "added", None, 0.5, 0.1))
        rows.append(row(target, "removed", 5, 0.2, 0.105))  # not risen by a tenth yet
        rows += [
            row(target, "removed", s, 0.3 * x, 0.3) for s, x in zip((10, 15), shares, strict=True)
        ]
    students = study_tables(PAPER_LIKE)["students"]
    tables = {"mechanism": pd.DataFrame(rows), "students": students}
    finding = {f.id: f for f in judge(tables, last_layer=3)}[
        "finetuned/direction_is_needed_throughout"
    ]
    assert finding.values == pytest.approx({"wolf": 0.6, "lion": 0.7, "eagle": 0.8, "panda": 1.2})
    assert finding.verdict == "unclear"
