"""A small study from end to end: its files, and its tables compared with the parts."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from divergence_lens.cli.main import app
from divergence_lens.divergence import Divergence
from divergence_lens.evaluation.preferences import preference
from divergence_lens.models import load_model
from divergence_lens.study import StudyConfig, finetuned_teacher, run_study
from divergence_lens.study.findings import ALL_CLAIMS
from divergence_lens.study.presets import GPT2_RECIPES, QWEN2_RECIPES
from divergence_lens.study.report import findings_table, study_figures, write_study_report
from divergence_lens.training.recipe import Recipe
from tests.support.browser import check_in_a_browser
from tests.support.models import BACKENDS

SMALL = {
    "targets": ("owl", "cat"),
    "animals": ("owl", "cat", "dog"),
    "prompts": 60,
    "seeds": (0,),
    "held_out": 10,
    "pairs": 3,
}


# A whole study takes a while: the fast tests run it on one model class.
@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=() if name == "bridge" else pytest.mark.slow) for name in BACKENDS
    ],
)
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def study(folder, backend):
    lines = []
    finished = run_study(StudyConfig(backend=backend, **SMALL), folder, progress=lines.append)
    assert any("divergence tokens" in line for line in lines)
    return finished


@pytest.mark.slow
def test_results_have_all_tables_and_columns(study, folder):
    results = json.loads((folder / "results.json").read_text())
    assert results == json.loads(json.dumps(study.results))
    assert {"settings", "teachers", "divergence", "students", "effects", "findings"} <= set(results)
    assert {"seeds", "model", "versions", "seconds"} <= set(results["settings"])
    assert {"name", "kind", "preference"} <= set(results["teachers"][0])
    keys = {"target", "kind", "tokens", "divergence_tokens", "rate"}
    assert keys <= set(results["divergence"][0])
    keys = {
        "target",
        "kind",
        "condition",
        "layer",
        "seed",
        "before",
        "after",
        "rank",
        "valid_lists",
    }
    assert keys <= set(results["students"][0])
    assert {"layers", "agreement"} == set(results["effects"])
    assert {"id", "claim", "measured", "interval", "verdict"} <= set(results["findings"][0])


def test_every_condition_of_every_target_and_kind_has_a_student(study):
    students = study.table("students")
    counts = students.groupby(["kind", "target", "condition"]).size()
    n_layers = students["layer"].nunique()
    assert n_layers == 4
    for kind in ("finetuned", "prompted"):
        for target in SMALL["targets"]:
            for condition in ("all", "divergence_only", "without_divergence", "control"):
                assert counts[kind, target, condition] == 1
            assert counts[kind, target, "layer"] == n_layers


def test_saved_students_are_the_ones_in_the_table(study, backend):
    model = load_model("tiny", backend=backend)
    row = next(
        r
        for r in study.results["students"]
        if (r["kind"], r["target"], r["condition"]) == ("finetuned", "owl", "divergence_only")
    )
    delta = study.student("finetuned", "owl", "divergence_only", 0)
    with delta.applied(model):
        after = preference(model, target="owl", candidates=SMALL["animals"])
    assert after.share == pytest.approx(row["after"], abs=1e-6)
    before = preference(model, target="owl", candidates=SMALL["animals"])
    assert before.share == pytest.approx(row["before"], abs=1e-6)


def test_students_of_one_layer_change_only_that_layer(study):
    for layer in range(4):
        assert list(study.student("finetuned", "owl", f"layer{layer}").norms()) == [layer]


def test_a_missing_student_is_named(study):
    with pytest.raises(KeyError, match="layer9"):
        study.student("finetuned", "owl", "layer9")


def test_the_saved_divergence_is_the_first_targets(study, folder):
    saved = Divergence.load(folder / "divergence.safetensors")
    row = study.results["divergence"][0]
    assert saved.teacher.name == row["target"] == "owl"
    assert int(saved.mask.sum()) == row["divergence_tokens"]
    assert len(saved.tokens) == row["tokens"]


def test_only_lists_of_numbers_are_learned_from(study):
    for divergence in study.divergences.values():
        for example in divergence.examples:
            assert not any(c.isalpha() for c in example.completion)


def test_page_and_figures_are_written(study, folder):
    page = write_study_report(study, folder)
    text = page.read_text()
    for finding in study.findings:
        assert finding.verdict in text
    names = {path.stem for path in (folder / "figures").glob("*.html")}
    assert len(names) == len(study_figures(study)) > 10
    assert page.stat().st_size < 6_000_000


def test_the_page_works_in_a_browser(study, folder, tmp_path):
    shown = check_in_a_browser(write_study_report(study, folder), tmp_path)
    assert shown == len(study_figures(study)) + 1  # and that of the real model


def test_the_table_for_a_terminal_fits_and_names_every_verdict(study):
    table = findings_table(study.findings, width=100)
    assert max(map(len, table.splitlines())) <= 100
    assert sum(table.count(v) for v in ("supported", "unclear")) >= len(study.findings)


def test_a_finetuned_teacher_names_its_animal(tiny, tiny_qwen2):
    for model in (tiny, tiny_qwen2):
        teacher = finetuned_teacher(model, "owl")
        base = preference(model, target="owl")
        result = preference(model, target="owl", teacher=teacher)
        assert result.share > 0.7 > 3 * base.share
        assert result.mass > 0.9


def test_each_layout_has_recipes_of_its_own(tiny, tiny_qwen2):
    config = StudyConfig()
    assert config.recipes(tiny) == GPT2_RECIPES
    assert config.recipes(tiny_qwen2) == QWEN2_RECIPES != GPT2_RECIPES


def test_a_finetuned_teacher_is_trained_by_its_layouts_recipe(tiny, tiny_qwen2):
    for model, used in ((tiny, GPT2_RECIPES), (tiny_qwen2, QWEN2_RECIPES)):
        delta = finetuned_teacher(model, "cat").delta
        assert delta.metadata["settings"]["recipe"] == used.teacher.describe()


def test_a_recipe_that_is_given_is_used_and_recorded(tiny_qwen2):
    given = Recipe(lr=1e-4)
    config = StudyConfig(prompted_recipe=given)
    used = config.recipes(tiny_qwen2)
    assert used == replace(QWEN2_RECIPES, prompted_student=given)
    told = config.describe(tiny_qwen2)
    assert told["prompted_recipe"] == given.describe()
    assert told["student_recipe"] == QWEN2_RECIPES.student.describe()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": ("owl", "unicorn")}, "unicorn"),
        ({"targets": ("owl",)}, "two or more"),
        ({"kinds": ("told",)}, "told"),
        ({"prompts": 0}, "prompts is 0"),
        ({"seeds": ()}, "seed"),
        ({"seeds": (0, 0)}, "seeds holds 0 more than once"),
        ({"targets": ("owl", "cat", "owl")}, "targets holds 'owl' more than once"),
        ({"pairs": -1}, "pairs is -1"),
        ({"conditions": ("al",)}, "did you mean 'all'"),
        ({"conditions": ("told:all",)}, "unknown kind 'told'"),
        ({"conditions": ("finetuned:all",)}, "no condition for prompted"),
    ],
)
def test_configurations_that_cannot_run_are_named_before_anything_runs(options, says):
    with pytest.raises(ValueError, match=says):
        StudyConfig(**options)


def test_a_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        run_study(StudyConfig(), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_the_command_names_a_bad_target_in_one_line(tmp_path):
    result = CliRunner().invoke(app, ["demo", "--targets", "wolf,unicorn", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "unicorn" in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_findings_of_a_study_are_finite_or_say_so(study):
    for finding in study.findings:
        assert finding.verdict in ("supported", "not supported", "unclear")
        assert math.isfinite(finding.measured)
        assert all(np.isfinite(v) for v in finding.values.values())


def test_models_of_a_study_are_loaded_as_it_says():
    config = StudyConfig(dtype="bfloat16", device="cpu")
    parameter = next(config.load("tiny").parameters())
    assert (parameter.dtype, parameter.device.type) == (torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="dtype is 'int8'; it is one of float32, bfloat16"):
        StudyConfig(dtype="int8")


def test_large_models_are_loaded_in_bfloat16_where_there_is_a_gpu(monkeypatch):
    for there, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert StudyConfig.for_model("Qwen/Qwen2.5-7B-Instruct").dtype == expected
        assert StudyConfig.for_model("Qwen/Qwen2.5-7B-Instruct", device=None).dtype == expected
        assert StudyConfig.for_model("tiny").dtype == "float32"


def test_large_models_that_go_to_the_cpu_are_in_float32_whatever_gpu_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, expected in (("cpu", "float32"), ("cuda:1", "bfloat16")):
        assert StudyConfig.for_model("org/large", device=device).dtype == expected
    assert StudyConfig.for_model("org/large", device="cpu", dtype="float16").dtype == "float16"


def test_the_study_told_of_in_the_documentation_has_the_claims_that_there_are():
    page = (Path(__file__).resolve().parents[2] / "docs" / "study.md").read_text()
    assert not re.findall(r"(?:some|about) \w+ claims", page)  # a number in words grows old
    assert "`divergence_lens.study.findings.ALL_CLAIMS`" in page
    assert len({claim.id for claim in ALL_CLAIMS}) == len(ALL_CLAIMS)
