"""A paired study on a tiny model: twins, tables that a run resumes from, claims and conditions."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import divergence_lens as dl
from divergence_lens.data import TrainingData
from divergence_lens.study import (
    PairedDesign,
    StudyConfig,
    paired_conditions,
    run_study,
    write_study_report,
)
from divergence_lens.study.findings import judge
from divergence_lens.study.interventions import (
    Inputs,
    digit_tokens,
    extreme_digits,
    random_digits,
)
from divergence_lens.study.paired import PAIRED_TARGETS, TUNING_TARGETS, twin_of
from divergence_lens.study.paired_claims import (
    PAIRED_CLAIMS,
    UNBIASED,
    Dissociation,
    dissociation,
    single_layers,
)
from divergence_lens.study.paired_report import paired_figure, paired_sentences
from divergence_lens.study.rows import load_tables
from divergence_lens.study.runner import CellRunner
from divergence_lens.training import TEACHER
from tests.support.small_studies import cell_times

NAMES = ("all", "top_advantage", "random", "layer0")


@pytest.fixture(scope="module")
def config():
    return StudyConfig.for_pairs(
        "tiny",
        targets=("owl", "cat"),
        conditions=NAMES,
        prompts=12,
        seeds=(0, 1),
        held_out=4,
        teacher_recipe=replace(TEACHER, lr=1e-3, epochs=4),
        paired=PairedDesign(prefixes=("",), strength=1.2, pattern=r"\d{3}(, \d{3}){3}"),
    )


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paired")
    study = run_study(config, folder / "run", tables=folder / "tables")
    return folder, study


def test_every_cell_has_a_row(config, finished):
    folder, study = finished
    assert not study.failures
    rows = pd.read_csv(folder / "tables" / "students.csv")
    assert len(rows) == len(study.results["students"]) == 2 * 2 * len(NAMES)
    assert dict(zip(rows["target"], rows["twin"], strict=True)) == {"owl": "cat", "cat": "owl"}
    teachers = study.table("teachers")
    assert list(teachers["name"]) == ["owl", "cat"]
    assert teachers["margin"].to_numpy() == pytest.approx(1.2, rel=0.01)


def test_seeds_and_pairs_come_in_a_balanced_order(config, tmp_path):
    four = replace(config, targets=("owl", "cat", "dog", "fox"))
    runner = CellRunner(four, tmp_path)
    order = [
        (task.seed, task.condition.name, task.target)
        for group in runner.tasks()
        for task in group
        if task.condition is not None
    ]
    runner.store.close()
    assert order[:4] == [
        *((0, "top_advantage", target) for target in ("owl", "cat")),
        *((0, "all", target) for target in ("owl", "cat")),
    ]
    half = len(order) // 2
    assert {seed for seed, *_ in order[:half]} == {0}
    assert {target for _, _, target in order[: half // 2]} == {"owl", "cat"}


def test_twins_answer_the_same_prompts_and_learn_as_many_tokens(config, finished):
    folder, _ = finished
    runner = CellRunner(config, folder / "run")
    owl, cat = (runner.divergence("finetuned", name) for name in ("owl", "cat"))
    runner.store.close()
    assert [e.prompt for e in owl.examples] == [e.prompt for e in cat.examples]
    assert owl.names == ("owl", "cat")
    assert cat.names == ("cat", "owl")
    rows = pd.read_csv(folder / "tables" / "students.csv")
    sizes = rows.pivot_table(index=["condition", "seed"], columns="target", values="tokens")
    assert (sizes["owl"] == sizes["cat"]).all()


def test_masks_of_digits(config, finished):
    folder, _ = finished
    runner = CellRunner(config, folder / "run")
    divergence = runner.divergence("finetuned", "owl")
    inputs = Inputs(runner, "finetuned", "owl")
    data = TrainingData.of(divergence)
    digits = digit_tokens(inputs, data, 0)
    texts = [runner.model.tokenizer.decode([i]).strip() for i in divergence.tokens]
    assert [bool(flag) for flag in digits] == [text.isdigit() for text in texts]
    top = extreme_digits(inputs, data, 0, share=0.25, top=True)
    bottom = extreme_digits(inputs, data, 0, share=0.25, top=False)
    assert top.sum() == bottom.sum() == round(0.25 * digits.sum())
    assert not (top & bottom).any()
    assert not ((top | bottom) & ~digits).any()
    advantage = divergence.advantage
    assert advantage[top].min() >= advantage[digits & ~top].max()
    assert advantage[bottom].max() <= advantage[digits & ~bottom].min()
    drawn = [random_digits(inputs, data, seed, share=0.25) for seed in (0, 0, 1)]
    runner.store.close()
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()
    assert not (drawn[0] & ~digits).any()


def test_the_same_selection_among_lists_of_the_base_model(config, finished):
    folder, _ = finished
    runner = CellRunner(config, folder / "run")
    top = paired_conditions(4)["unbiased_top"]
    masks, lists = [], []
    for target, twin in (("owl", "cat"), ("cat", "owl")):
        inputs = Inputs(runner, "finetuned", target)
        data = top.data(inputs, 0)
        masks.append(top.mask(inputs, data, 0))
        lists.append([(e.prompt, e.completion) for e in data.examples])
        # The advantage from plain passes of each teacher, with the digits as the only choices.
        read = dl.find_divergence(
            runner.model,
            data.examples,
            teacher=runner.teacher("finetuned", target),
            counterfactuals=[runner.teacher("finetuned", twin)],
            pattern=config.paired.pattern,
        )
        digits = digit_tokens(inputs, data, 0)
        wanted = round(0.1 * digits.sum())
        assert masks[-1].sum() == wanted
        assert not (masks[-1] & ~digits).any()
        advantage = read.advantage
        assert advantage[masks[-1]].min() >= advantage[digits & ~masks[-1]].max() - 1e-6
    own = [(e.prompt, e.completion) for e in runner.divergence("finetuned", "owl").examples]
    runner.store.close()
    assert lists[0] == lists[1] != own
    assert not (masks[0] & masks[1]).any()


def test_the_tables_have_the_effects_of_patching(config, finished, tmp_path):
    folder, _ = finished
    patched = replace(config, conditions=("all",), seeds=(0,), pairs=1)
    study = run_study(patched, folder / "run", tables=tmp_path)
    tables = load_tables(tmp_path)
    for name in ("layers", "agreement"):
        own, wanted = tables[name].drop(columns="key"), study.table(name)
        assert len(own)
        columns = list(own)
        pd.testing.assert_frame_equal(
            own.sort_values(columns, ignore_index=True),
            wanted[columns].sort_values(columns, ignore_index=True),
            check_dtype=False,
        )
    # Other pairs replace these, so that each target has one row for each method.
    run_study(replace(patched, pairs=2), folder / "run", tables=tmp_path)
    again = load_tables(tmp_path)["agreement"]
    assert len(again) == len(tables["agreement"])
    assert not set(again["key"]) & set(tables["agreement"]["key"])


def test_single_layers_on_the_lists_of_the_base_model():
    conditions = paired_conditions(30)
    alone = {name: c for name, c in conditions.items() if c.label == UNBIASED}
    assert [c.layers for c in alone.values()] == [(0,), (15,), (29,)]
    top, layer = conditions["unbiased_top"], conditions["layer0"]
    for condition in alone.values():
        assert (condition.data, condition.mask) == (top.data, top.mask)
        assert condition.rate == layer.rate
    values = {("layer", 0): 5.0, (UNBIASED, 0): 3.0, (UNBIASED, 3): 2.0}
    rows = pd.DataFrame(
        {
            "condition": condition,
            "layer": place,
            "seed": 0,
            "target": own,
            "twin": twin,
            "distribution": {own: value / 2, twin: -value / 2},
        }
        for (condition, place), value in values.items()
        for own, twin in (("owl", "cat"), ("cat", "owl"))
    )
    tables = {"students": rows}
    assert single_layers(tables) == [0]
    assert single_layers(tables, UNBIASED) == [0, 3]
    contrast = next(c for c in PAIRED_CLAIMS if c.id == "unbiased_first_layer_beats_last").estimand
    assert contrast(tables, 3) == {"owl": 1.0, "cat": 1.0}


def test_a_contrast_has_the_seeds_that_both_sides_have(finished):
    _, study = finished
    rows = study.table("students")
    few = rows[(rows["condition"] != "random") | (rows["seed"] == 1)]
    contrast = Dissociation((("all", None),), (("random", None),))({"students": few}, 3)
    every, random = (dissociation({"students": rows}, name) for name in ("all", "random"))
    assert contrast == {t: pytest.approx(every[t][1] - random[t][1]) for t in ("cat", "owl")}


def test_the_dissociation_is_the_margin_minus_the_twins(finished):
    folder, study = finished
    rows = pd.read_csv(folder / "tables" / "students.csv")
    for tables in ({"students": study.table("students")}, load_tables(folder / "tables")):
        own = dissociation(tables, "all")
        for target, twin in (("owl", "cat"), ("cat", "owl")):
            for seed in (0, 1):
                one, other = (
                    rows[
                        (rows["condition"] == "all")
                        & (rows["seed"] == seed)
                        & (rows["target"] == name)
                    ].iloc[0]
                    for name in (target, twin)
                )
                expected = one[f"after_{target}"] - other[f"after_{target}"]
                assert own[target][seed] == pytest.approx(expected, abs=1e-9)
        contrast = Dissociation((("layer", 0),), (("random", None),))(tables, 3)
        layer, random = dissociation(tables, "layer", 0), dissociation(tables, "random")
        assert contrast == {
            t: pytest.approx(np.mean(layer[t]) - np.mean(random[t])) for t in ("cat", "owl")
        }


def test_a_student_without_a_twin_is_left_out(finished):
    folder, _ = finished
    tables = load_tables(folder / "tables")
    students = tables["students"]
    gone = (students["target"] == "cat") & (students["seed"] == 1)
    partly = dissociation({"students": students[~gone]}, "all")
    assert {target: len(seeds) for target, seeds in partly.items()} == {"owl": 1, "cat": 1}


def test_a_new_folder_resumes_from_the_tables(config, finished, tmp_path):
    folder, study = finished
    again = run_study(config, tmp_path / "run", tables=folder / "tables")
    computed = {name.split("/")[0] for name in cell_times(tmp_path / "run")}
    assert computed == {"students", "preferences"}  # no teacher was trained, no list written
    for name in ("students", "teachers"):
        old, new = (s.table(name).drop(columns="fit", errors="ignore") for s in (study, again))
        pd.testing.assert_frame_equal(old, new, check_dtype=False)
    # A row of other settings stays in the table and is not taken for one of these.
    other = replace(config, seeds=(2,), conditions=("all",))
    run_study(other, folder / "run", tables=folder / "tables")
    rows = pd.read_csv(folder / "tables" / "students.csv")
    assert sorted(set(rows["seed"])) == [0, 1, 2]
    assert len(rows) == 2 * 2 * len(NAMES) + 2


def test_claims_are_open_until_all_targets_are_measured(finished):
    folder, study = finished
    verdicts = {finding.id: finding.verdict for finding in study.findings}
    assert set(verdicts) >= {f"finetuned/{claim.id}" for claim in PAIRED_CLAIMS[:11]}
    tables = load_tables(folder / "tables")
    findings = judge(tables, last_layer=3, claims=PAIRED_CLAIMS, required=4)
    for finding in findings:
        assert finding.verdict == "unclear"
        if finding.n:
            assert "measured for 2 of 4 targets" in finding.caveat


def test_the_report_answers_with_the_dissociations(finished, tmp_path):
    _, study = finished
    page = write_study_report(study, tmp_path / "report").read_text(encoding="utf-8")
    rows = {finding.id: finding for finding in study.findings}
    top = rows["finetuned/top_advantage_transfers"]
    assert f"s, it is {top.measured:+.2f} (" in page
    share = rows["finetuned/few_digits_diverge"].measured
    assert f"At {share:.1%} of the digits" in page
    figure = paired_figure({"students": study.table("students")})
    names = list(figure.layout.xaxis.ticktext)
    after = {
        (row["target"], row["seed"]): row["distribution"]
        for row in study.results["students"]
        if row["condition"] == "all"
    }
    owl = np.mean([after["owl", seed]["owl"] - after["cat", seed]["owl"] for seed in (0, 1)])
    cat = np.mean([after["cat", seed]["cat"] - after["owl", seed]["cat"] for seed in (0, 1)])
    assert figure.data[0].y[names.index("all digits")] == pytest.approx((owl + cat) / 2)
    assert (tmp_path / "report" / "figures").is_dir()


def test_sentences_leave_out_what_was_not_measured():
    rows = [
        {"id": "finetuned/all_digits_transfer", "measured": 0.5, "interval": None, "unit": "nats"},
        {"id": "finetuned/few_digits_diverge", "measured": None, "interval": None, "unit": "share"},
    ]
    (sentence,) = paired_sentences(rows)
    assert sentence.startswith("Students of all digits prefer their teacher's target more than")
    assert sentence.endswith("by +0.50 nats.")


def test_a_claim_on_layers_waits_for_its_own_layers(finished):
    folder, _ = finished
    tables = load_tables(folder / "tables")  # layer 0 of 0 to 3
    assert set(Dissociation((("layer", 0),))(tables, 3)) == {"owl", "cat"}
    assert Dissociation((("layer", -1),))(tables, 3) == {}
    assert Dissociation((("layer", 0), ("layer", 1)), (("layer", -1),))(tables, 3) == {}


def test_core_and_further_conditions():
    known = paired_conditions(30)
    single = [c.layers for c in known.values() if c.label == "layer"]
    assert single == [(0,), (7,), (15,), (22,), (29,)]
    shallow = [c.layers for c in paired_conditions(4).values() if c.label == "layer"]
    assert shallow == [(0,), (1,), (2,), (3,)]
    chosen = {
        tier: [
            c.name
            for c in StudyConfig.for_pairs(tier=tier, other_model="x").conditions_of(
                "finetuned", 30
            )
        ]
        for tier in ("core", "further", "all")
    }
    assert chosen["all"] == [*chosen["core"], *chosen["further"]] == list(known)
    # Every condition that a claim names exists.
    named = {
        side[0]
        for claim in PAIRED_CLAIMS
        if isinstance(claim.estimand, Dissociation)
        for side in (*claim.estimand.over, *claim.estimand.under)
    }
    assert named <= {c.label or c.name for c in known.values()}
    assert not set(PAIRED_TARGETS) & set(TUNING_TARGETS)
    assert [twin_of(name, PAIRED_TARGETS) for name in PAIRED_TARGETS] == [
        *("dog", "owl"),
        *("bear", "eagle"),
    ]


def test_a_layer_is_chosen_by_its_number_before_the_model_is_loaded():
    config = StudyConfig.for_pairs(conditions=("layer29", "all", "unbiased_layer15"))
    names = [condition.name for condition in config.conditions_of("finetuned", 30)]
    assert names == ["all", "layer29", "unbiased_layer15"]
    with pytest.raises(ValueError, match="no condition 'layer29'; did you mean"):
        config.conditions_of("finetuned", 12)


def test_the_targets_of_a_trait_are_its_candidates():
    config = StudyConfig.for_pairs(category="risk", device="cpu")
    assert config.target_pairs == (("careful", "reckless"),)
    assert config.animals == config.targets
    assert config.paired is not None
    assert config.paired.asked == {"category": "risk"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ("owl", "cat", "dog")}, "an even number"),
        ({"kinds": ("prompted",)}, "finetuned teachers alone"),
        ({"mechanism": True}, "does not measure it"),
    ],
)
def test_bad_configurations(options, words):
    with pytest.raises(ValueError, match=words):
        StudyConfig.for_pairs("tiny", **options)


def test_bad_designs(tmp_path):
    with pytest.raises(ValueError, match="questions is 0"):
        PairedDesign(questions=0)
    with pytest.raises(ValueError, match="temperature is 0"):
        PairedDesign(temperature=0.0)
    with pytest.raises(ValueError, match="tier is 'most'"):
        StudyConfig.for_pairs(tier="most")
    with pytest.raises(ValueError, match="category is 'luck'; use animal, risk"):
        StudyConfig.for_pairs(category="luck")
    with pytest.raises(ValueError, match=r"no condition 'sampled'; .*groups are core, fu"):
        StudyConfig.for_pairs(conditions=("sampled",))
    with pytest.raises(ValueError, match="tables are those of a paired study"):
        run_study(StudyConfig(), tmp_path / "run", tables=tmp_path / "tables")


@pytest.mark.slow
def test_every_further_condition_runs(config, finished):
    folder, _ = finished
    further = replace(config, conditions=("further",), seeds=(0,))
    study = run_study(further, folder / "run", tables=folder / "tables")
    # The twelve lists of one teacher have no divergence token, which a student cannot learn.
    runner = CellRunner(further, folder / "run")
    without = [t for t in ("owl", "cat") if not runner.divergence("finetuned", t).mask.any()]
    runner.store.close()
    failed = {failure["cell"]: failure["error"] for failure in study.failures}
    assert set(failed) == {f"students/finetuned/{target}/first_only-0" for target in without}
    assert all("leaves no token with a loss" in error for error in failed.values())
    rows = study.table("students")
    # A second base model is not given, so its condition is left out.
    names = {c.label or c.name for c in paired_conditions(4).values() if c.group == "further"}
    assert set(rows["condition"]) == names - {"other_base"}
    sizes = rows.groupby("condition")["examples"].first()
    assert sizes["dose25"] == 3
    assert sizes["dose50"] == 6
    assert sizes["few_rows"] == 3
    # Attention and MLP are both here; greedy lists are compared with the core's `all`.
    measured = {finding.id.partition("/")[2] for finding in study.findings if finding.n}
    assert "attention_beats_mlp" in measured
    assert "greedy_beats_sampled" not in measured
