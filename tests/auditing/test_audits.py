"""Audits of the tiny model: verdicts, tables, files and views."""

import json
from dataclasses import replace

import numpy as np
import pytest

import divergence_lens as dl
from divergence_lens.auditing import Audit
from divergence_lens.auditing.candidates import build_auditors

FEW = ("owl", "cat", "wolf", "panda", "eagle")


def test_the_bias_of_the_data_is_named(biased):
    assert biased.verdict == "biased"
    assert biased.best == "wolf"
    assert biased.biased[0] == "wolf"
    assert "wolf" in biased.explanation
    assert biased.baseline.teacher.name == "neutral system prompt"


def test_lists_of_the_base_model_itself_carry_nothing(base, lists):
    audit = dl.audit(base, lists(None, 100), candidates=FEW, neutral_rows=40, share=0.5)
    assert audit.verdict == "nothing found"
    assert audit.biased == ()
    # Greedy lists are the baseline's own choice to the letter.
    np.testing.assert_array_equal(audit.by_row, 0)
    assert "No candidate stands out" in audit.explanation


def test_sampled_lists_of_the_base_model_carry_nothing(base, lists):
    audit = dl.audit(
        base, lists(None, 100, temperature=1.0), candidates=FEW, neutral_rows=0, own_rows=0
    )
    assert audit.biased == ()
    assert audit.verdict == "inconclusive"
    assert "the power is unknown" in audit.explanation
    assert audit.baseline.temperature == pytest.approx(1, abs=0.1)
    assert np.abs(audit.by_row.mean()) < 0.2


def test_few_rows_are_inconclusive(biased):
    few = biased.select([0, 1, 2])
    assert few.verdict in ("inconclusive", "biased")
    assert few.power.rows_needed(few.share) > 3
    quiet = few.select(np.array([True, True, False]))
    assert len(quiet) == 2


def test_copies_of_the_data_do_not_make_them_biased(base, lists):
    data = lists(None, 12, seed=5, temperature=1.0)
    options = {"candidates": FEW, "neutral_rows": 0, "own_rows": 0}
    once, often = dl.audit(base, data, **options), dl.audit(base, list(data) * 20, **options)
    assert often.independent_rows == pytest.approx(once.independent_rows)
    np.testing.assert_allclose(often.scores.z, once.scores.z, rtol=0.01)
    assert often.verdict == "inconclusive"
    same = dl.audit(base, list(data[:1]) * 4, **options)
    assert same.verdict == "inconclusive"
    assert "two different rows" in same.explanation


def test_a_stated_temperature_does_not_make_foreign_data_fit(base, biased):
    rows = [
        {"prompt": "1, 2", "completion": "yes the tree"},
        {"prompt": "1, 9", "completion": "zebra under"},
    ]
    audit = dl.audit(base, rows, candidates=FEW, temperature=1.0, neutral_rows=0, own_rows=0)
    assert audit.baseline.temperature == 1.0
    assert not audit.baseline.fits
    assert "could not have written these data" in audit.explanation


def test_power_is_that_of_the_weaker_kind(biased):
    both = replace(
        biased,
        kinds=("prompted", "finetuned"),
        by_row=np.repeat(biased.by_row, 2, 0),
        by_token=None,
        neutral=np.repeat(biased.neutral, 2, 0),
        own=np.concatenate([biased.own, biased.own / 4]),
        auditors=(),
    )
    weak = both.with_kinds("finetuned").power
    assert both.power.strength == pytest.approx(weak.strength)
    assert both.power.strength < biased.power.strength
    unknown = replace(both, own=np.concatenate([biased.own, np.nan * biased.own]))
    assert np.isnan(unknown.power.strength)


def test_data_without_a_null_have_no_verdict(biased):
    assert biased.baseline.fits
    for field, value in (("fitted", 2.0), ("surprise", 0.2)):
        audit = replace(biased, baseline=replace(biased.baseline, **{field: value}))
        assert (audit.verdict, audit.biased) == ("inconclusive", ())
        assert audit.scores.holm.min() < 0.05
        assert audit.explanation.startswith("The base model could not have written these data")
        assert audit.to_dict()["biased"] == []


def test_intervals_of_many_rows_need_no_resampling(biased, monkeypatch):
    resampled = biased.to_dataframe()
    monkeypatch.setattr("divergence_lens.auditing.tables._MOST_RESAMPLED", 10)
    normal = replace(biased).to_dataframe()
    width = resampled["high"] - resampled["low"]
    np.testing.assert_allclose(normal["high"] - normal["low"], width, rtol=0.25)
    assert ((normal["low"] + normal["high"]) / 2 - normal["score"]).abs().max() < 1e-9


def test_finetuned_auditors_find_a_finetuned_writer(base, lists):
    questions = [f"{question} Now." for question in dl.preference_questions()[30:]]
    rows = [{"prompt": question, "completion": "panda."} for question in questions]
    recipe = dl.Recipe(lr=1e-3, epochs=10, batch_size=20, optimizer_options={})
    writer = dl.Teacher("writer", delta=dl.finetune(base, rows, recipe=recipe, seed=5))
    data = lists(writer, 50)
    audit = dl.audit(base, data, candidates=FEW[2:], teachers="both", neutral_rows=0, own_rows=0)
    assert audit.best == "panda"
    assert audit.verdict == "biased"
    assert audit.kinds == ("prompted", "finetuned")
    assert audit.to_dataframe()["kind"][0] == "finetuned"
    assert audit.baseline.teacher.name == "no system prompt"


def test_the_table_holds_every_candidate_once(biased):
    table = biased.to_dataframe()
    assert sorted(table["candidate"]) == sorted(FEW)
    assert table["z"].is_monotonic_decreasing
    assert ((table["low"] <= table["score"]) & (table["score"] <= table["high"])).all()
    assert (table["p"] <= table["p_holm"] + 1e-12).all()
    assert (table["p_fdr"] <= table["p_holm"] + 1e-12).all()
    means = biased.by_row[0].mean(-1) - biased.null.shift[0]
    for name, score in zip(table["candidate"], table["score"], strict=True):
        assert score == pytest.approx(means[FEW.index(name)])


def test_rows_and_tokens_are_ranked_by_contribution(biased):
    rows = biased.rows("wolf")
    assert rows["score"].is_monotonic_decreasing
    assert biased.rows("wolf", most=3).equals(rows.head(3))
    assert rows["score"].sum() == pytest.approx(biased.by_row[0, 2].sum())
    first = int(rows["row"][0])
    assert rows["prompt"][0] == str(biased.examples[first].prompt)
    tokens = biased.tokens("wolf")
    assert tokens["score"].is_monotonic_decreasing
    by_row = tokens.groupby("row")["score"].sum()
    np.testing.assert_allclose(by_row, biased.by_row[0, 2], atol=1e-3)
    shown = biased.show(first, "wolf")
    assert shown.scores.sum() == pytest.approx(rows["score"][0], abs=1e-3)
    assert shown._repr_html_().count("<span") == len(shown)


def test_a_file_holds_the_audit(biased, tmp_path):
    biased.save(tmp_path / "audit.safetensors")
    loaded = Audit.load(tmp_path / "audit.safetensors")
    assert repr(loaded) == repr(biased)
    assert loaded.to_dataframe().equals(biased.to_dataframe())
    assert loaded.examples == biased.examples
    assert loaded.baseline.logprob == biased.baseline.logprob
    assert loaded.power == biased.power
    with pytest.raises(ValueError, match="no tokenizer"):
        loaded.replace()
    assert loaded.mask().tokens == biased.mask().tokens


def test_json_and_page_state_the_verdict(biased, tmp_path):
    record = json.loads(json.dumps(biased.to_dict(), allow_nan=False))
    assert record["verdict"] == "biased"
    assert record["candidates"][0]["candidate"] == "wolf"
    biased.write_page(tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text()
    assert biased.explanation.split(";")[0].replace("'", "&#x27;") in page
    assert "<script src" not in page
    figure = biased.plot()
    assert list(figure.data[0].y) == biased.to_dataframe()["candidate"].to_list()


def test_the_run_resumes_from_its_checkpoints(base, biased, tmp_path, monkeypatch):
    data = biased.examples[:20]
    options = {"candidates": FEW, "neutral_rows": 0, "own_rows": 0, "checkpoint_dir": tmp_path}
    first = dl.audit(base, data, **options)
    shards = list(tmp_path.rglob("shard-*.safetensors"))
    assert shards

    def read_again(*_args, **_options):
        raise AssertionError("the data were read again")

    monkeypatch.setattr("divergence_lens.divergence.reading._Reader.read", read_again)
    again = dl.audit(base, data, **options)
    np.testing.assert_array_equal(again.by_row, first.by_row)
    with pytest.raises(ValueError, match="of another run"):
        dl.audit(base, data, **options | {"candidates": FEW[:3]})


def test_candidates_may_have_system_prompts_or_be_teachers(base, biased):
    prompts = {name: dl.persona_prompt(name) for name in FEW}
    options = {"neutral_rows": 0, "own_rows": 0}
    by_prompt = dl.audit(base, biased.examples, candidates=prompts, **options)
    np.testing.assert_allclose(by_prompt.by_row, biased.by_row, atol=1e-4)
    by_teacher = dl.audit(base, biased.examples, teachers=dl.animal_teachers(FEW), **options)
    np.testing.assert_allclose(by_teacher.by_row, biased.by_row, atol=1e-4)
    assert by_teacher.kinds == ("given",)
    fruit = build_auditors(base, ["apples", "bread"], "prompted", category="food")
    assert "apples" in fruit[0].teachers[0].system_prompt
