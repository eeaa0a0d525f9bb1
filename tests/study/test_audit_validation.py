"""The validation of the audit: parts and mixtures of audits, and a small run."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import divergence_lens as dl
from divergence_lens.auditing.baseline import MOST_SURPRISE
from divergence_lens.study import AuditStudyConfig, run_audit_study
from divergence_lens.study.audit_fit import fit_pools, fit_rows
from divergence_lens.study.audit_measures import described, mixed_sets, modes, without
from divergence_lens.study.audit_pools import LIMITS, AuditPools, Pool, mixture
from divergence_lens.study.audit_students import correlations

FEW = ("owl", "cat", "wolf", "panda")


@pytest.fixture(scope="module")
def audits():
    model = dl.load_model("tiny")
    made = []
    for seed, teacher in enumerate((dl.animal_teachers(["wolf"])[0], None)):
        data = dl.generate(model, dl.number_prompts(16, seed=seed), teacher=teacher)
        made.append(
            dl.audit(
                model,
                data,
                candidates=FEW,
                baseline=dl.Teacher("none"),
                temperature=0.0,
                neutral_rows=4,
                own_rows=2,
            )
        )
    return model, made


def test_fewer_candidates_need_no_second_reading(audits):
    model, (biased, _) = audits
    names = [name for name in FEW if name != "cat"]
    options = {"baseline": dl.Teacher("none"), "temperature": 0.0, "neutral_rows": 4, "own_rows": 0}
    read = dl.audit(model, biased.examples, candidates=names, **options)
    derived = without(biased, "cat")
    np.testing.assert_allclose(derived.by_row, read.by_row, atol=1e-4)
    np.testing.assert_allclose(derived.neutral, read.neutral, atol=1e-4)
    assert derived.candidates == read.candidates


def test_mixtures_hold_the_rows_of_both(audits):
    _, (biased, other) = audits
    mixed = mixture(biased, other, 0.25, 12, seed=1)
    assert len(mixed) == 12
    sources = [example in biased.examples for example in mixed.examples]
    assert sum(sources) == 3
    first = biased.examples.index(mixed.examples[0])
    np.testing.assert_array_equal(mixed.by_row[..., 0], biased.by_row[..., first])
    assert mixed.offsets[-1] == len(mixed.token_ids)
    assert [mode for mode, _ in modes(mixed)] == ["prompted"]


def test_correlations_are_over_rows_and_within_conditions():
    rng = np.random.default_rng(0)
    score = rng.normal(size=60)
    rows = [
        {"score": s + 10 * (i % 2), "transfer": 2 * s - 30 * (i % 2), "condition": str(i % 2)}
        for i, s in enumerate(score)
    ]
    own = correlations(rows)
    assert own["within"] == pytest.approx(1)
    assert own["slope_within"] == pytest.approx(2)
    assert own["pearson"] < 0


def test_pools_have_different_cells_and_cover_every_author():
    pools = AuditStudyConfig.for_model("tiny").pools()
    assert len({pool.name for pool in pools}) == len(pools)
    unbiased = [pool for pool in pools if pool.target is None]
    config = AuditStudyConfig()
    assert len(unbiased) == 10
    assert sum(pool.rows // config.set_rows for pool in unbiased) == 6 * 25 + 4 * 60
    assert {pool.writer for pool in pools} == {"finetuned", "prompted", "base"}


def test_pools_share_no_prompts(monkeypatch):
    pools = [*AuditStudyConfig().pools()]
    assert len({pool.seed("audit") for pool in pools} | {pool.seed("fit") for pool in pools}) == (
        2 * len(pools)
    )
    # Styles whose names are of equal length, at any temperature.
    made = AuditPools.__new__(AuditPools)
    made.config, made.other = AuditStudyConfig(), None
    made.model = dl.load_model("tiny")
    base = [
        Pool(writer="base", style=style, temperature=at, rows=8)
        for style, at in (("unseen1", 0.0), ("unseen2", 0.0), ("unseen1", 1.0))
    ]
    prompts = [{str(example.prompt) for example in made.lists(pool)} for pool in base]
    assert not prompts[0] & prompts[1]
    assert not prompts[0] & prompts[2]


def test_no_mixture_is_drawn_twice(audits, monkeypatch):
    _, (biased, other) = audits
    monkeypatch.setattr("divergence_lens.study.audit_measures.MIXED_ROWS", (8, 16, 32))
    sets = list(mixed_sets(Pool(writer="prompted", target="wolf"), biased, other))
    assert {share for share, *_ in sets} == {0.05, 0.1, 0.25, 0.5, 1.0}
    rows = [sorted(str(example.prompt) for example in mixed.examples) for *_, mixed in sets]
    assert len({tuple(own) for own in rows}) == len(rows)
    whole = [(size, len(mixed)) for share, size, _, mixed in sets if share == 1]
    assert whole == [(8, 8)] * 3 + [(16, 16)]
    # Mixtures of another target have other unbiased rows.
    again = mixed_sets(Pool(writer="prompted", target="owl"), biased, other)
    for (share, _, _, mine), (*_, theirs) in zip(sets, again, strict=True):
        if share == 0.5:
            assert mine.examples != theirs.examples


def test_the_temperature_of_the_baseline_is_not_called_the_fitted_one(audits):
    _, (biased, _) = audits
    stated = replace(biased, baseline=replace(biased.baseline, temperature=0.5, fitted=0.1))
    row = described(Pool(writer="prompted", target="wolf"), "prompted", stated)
    assert row["baseline_temperature"] == 0.5
    assert "fitted" not in row
    needed = stated.power.rows_needed(stated.share)
    assert row["rows_needed"] == (None if np.isinf(needed) else needed)


def test_cells_depend_on_the_other_base_and_on_the_limits(tmp_path, monkeypatch):
    made = AuditPools(AuditStudyConfig(), tmp_path)
    own = Pool(writer="finetuned", target="wolf")
    foreign = replace(own, change="other base")
    before = made.settings(own), made.settings(foreign)
    made.other = dl.load_model("tiny")
    assert made.settings(own) == before[0]
    assert made.settings(foreign) != before[1]
    few = [Pool(writer="base", temperature=0.5, rows=6)]
    monkeypatch.setattr("divergence_lens.study.audit_fit.fit_pools", lambda _rows, other: few)
    fit_rows(made)
    monkeypatch.setitem(LIMITS, "surprise", 0.01)
    fit_rows(made)
    assert len(list((tmp_path / "cells/fit").glob("*.json"))) == 2


def test_fit_sets_are_by_every_author_and_compared_with_the_check(tmp_path, monkeypatch):
    pools = list(fit_pools(50, other=True))
    assert len({pool.name for pool in pools}) == len(pools)
    assert {pool.change for pool in pools} == {"none", "paraphrased", "shuffled", "other base"}
    few = [p for p in pools if p.writer == "base" and p.style == "none"]
    few = [replace(pool, rows=24) for pool in few]
    monkeypatch.setattr("divergence_lens.study.audit_fit.fit_pools", lambda _rows, other: few)
    made = AuditPools(AuditStudyConfig(fit_rows=24), tmp_path)
    rows = fit_rows(made)
    assert [row["change"] == "none" for row in rows] == [row["fits"] for row in rows]
    assert all((row["surprise"] <= MOST_SURPRISE) == row["fits"] for row in rows)


def test_the_writer_is_no_auditor(tmp_path):
    pools = AuditPools(AuditStudyConfig(other_model=None), tmp_path)
    writer = pools.teacher("prompted", "wolf", "animal")
    assert "wolves" in writer.system_prompt
    assert writer.system_prompt != dl.persona_prompt("wolf")
    lists = pools.lists(Pool(writer="prompted", target="wolf", rows=6))
    assert all(example.completion_ids for example in lists)


@pytest.mark.slow
def test_a_small_validation_writes_its_tables_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr("divergence_lens.study.audit_measures.MIXED_ROWS", (6, 12))
    config = AuditStudyConfig(
        targets=("wolf", "panda"),
        sampled=0,
        trees=(),
        changed=("wolf",),
        other=1,
        long=("wolf",),
        long_rows=20,
        rows=12,
        sets=1,
        set_rows=6,
        kinds=("prompted",),
        neutral_rows=6,
        transfer_targets=("wolf", "panda"),
        transfer_rows=8,
        remedy_targets=("wolf",),
        strengths=(),
        fit_rows=0,
    )
    lines: list[str] = []
    tables = run_audit_study(config, tmp_path, progress=lines.append)
    assert set(tables) == {
        "detection",
        "writers",
        "mixtures",
        "false_alarms",
        "outside",
        "transfer",
        "remedies",
    }
    again = run_audit_study(config, tmp_path)
    for name, table in tables.items():
        written = pd.read_csv(tmp_path / f"{name}.csv")
        assert len(written) == len(table)
        pd.testing.assert_frame_equal(again[name], table)
    authors = tables["writers"].set_index("target")
    assert set(authors.index) == {"wolf", "panda"}
    base = dl.preference(dl.load_model("tiny"), target="wolf", candidates=dl.ANIMALS)
    assert authors.loc["wolf", "share_before"] == pytest.approx(base.share, abs=1e-5)
    assert (authors["share_after"] > 0.5).all()
    alone = tables["mixtures"].query("share == 0")
    assert set(alone["writer"]) == {"base"}
    assert tables["detection"]["of"].max() == 20
    assert set(tables["remedies"]["chosen_by"]) == {"audit", "random"}
