"""Custom conditions, and configurations that are refused before anything runs."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from divergence_lens.models import load_model
from divergence_lens.study import StudyConfig, run_study
from divergence_lens.study.config_checks import check_models
from divergence_lens.study.interventions import divergence_tokens, own_lists, random_tokens
from divergence_lens.study.presets import STUDENT
from divergence_lens.study.registry import conditions
from divergence_lens.training.recipe import PAPER
from tests.support.small_studies import copy_folder, own_condition

ROOT = Path(__file__).resolve().parents[2]


def only_first_lists(inputs, seed, *, n):
    return own_lists(inputs, seed)[:n]


def test_a_condition_of_ones_own_gets_its_data_mask_and_layers(config, folder, tmp_path):
    out = copy_folder(folder, tmp_path / "own")
    mine = own_condition(
        "mine", data=partial(only_first_lists, n=7), mask=divergence_tokens, layers=(2,)
    )
    study = run_study(replace(config, conditions=("control", mine)), out)
    row = next(r for r in study.results["students"] if r["condition"] == "mine")
    divergence = study.divergences["finetuned", "owl"]
    assert row["examples"] == 7
    assert row["tokens"] == divergence.mask[: divergence.offsets[7]].sum()
    assert list(study.student("finetuned", "owl", "mine").norms()) == [2]


@pytest.mark.slow
def test_a_seed_draws_another_mask(config, folder, tmp_path):
    out = copy_folder(folder, tmp_path / "seeds")
    drawing = own_condition("drawing", mask=partial(random_tokens, among="all"))
    study = run_study(replace(config, conditions=("control", drawing), seeds=(0, 1)), out)
    rows = study.table("students")
    rows = rows[(rows["condition"] == "drawing") & (rows["target"] == "owl")]
    assert len(set(rows["tokens"])) == 1
    assert len(set(rows["after"])) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mask": lambda _inputs, data, _seed: data.marks}, "function with a name"),
        ({"data": partial(only_first_lists, 1)}, "by keyword"),
        ({"train_prompt": "none"}, "train_prompt is 'none'"),
        ({"kinds": ("told",)}, "unknown kind 'told'"),
    ],
)
def test_conditions_that_cannot_be_identified_again_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        own_condition("mine", **options)


def test_two_conditions_of_one_name_are_refused(config):
    with pytest.raises(ValueError, match="two conditions are named 'mine'"):
        replace(
            config,
            conditions=(own_condition("mine"), own_condition("mine", mask=divergence_tokens)),
        )


def test_every_condition_is_in_the_documentation():
    page = (ROOT / "docs" / "study.md").read_text()
    missing = []
    for name, condition in conditions(4).items():
        family = re.split(r"\d|_absent|_neutral|_empty", name)[0]
        if f"`{name}`" not in page and f"`{family}" not in page:
            missing.append(name)
        assert condition.isolates[0].islower()
        assert not condition.isolates.endswith(".")
        assert "|" not in condition.isolates  # it stands in a cell of a table
    assert missing == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"conditions": ("layer7",)}, "no condition 'layer7'"),
        ({"conditions": ("other_base",)}, "'other_base' needs another base"),
        ({"conditions": (own_condition("deep", layers=(9,)),)}, "'deep': layer 9 is out of range"),
        ({"conditions": (own_condition("odd", parts=("W_X",)),)}, "'odd': no parameter"),
        ({"conditions": (own_condition("fast", recipe={"speed": 3}),)}, "'fast': .*speed"),
    ],
)
def test_what_the_model_cannot_do_is_named_before_anything_is_written(
    config, tmp_path, options, says
):
    out = tmp_path / "nothing"
    with pytest.raises(ValueError, match=says):
        run_study(replace(config, **options), out)
    assert not out.exists()


def test_a_model_without_a_chat_template_has_no_prompted_teachers(config, tmp_path):
    model = load_model("tiny", backend="bridge")
    model.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="cannot have prompted teachers"):
        check_models(replace(config, kinds=("prompted",)), model, None)


@pytest.mark.slow
def test_the_settings_for_a_large_model_are_the_papers():
    model = load_model("tiny", backend="bridge")
    config = StudyConfig.for_model("org/large", lora_rank=4, targets=("owl", "cat"))
    assert config.kinds == ("prompted",)
    assert config.instructions
    assert config.recipes(model).prompted_student == replace(PAPER, lora_rank=4)
    assert config.system_prompt("prompted", "own") is None
    names = {condition.name for condition in config.conditions_of("prompted", 28)}
    assert {"lora1", "lora32", "layer27", "from26", "kl_same"} <= names
    for rank in (4, 8):  # the paper's is 8
        config = StudyConfig.for_model("org/large", lora_rank=None if rank == 8 else rank)
        names = {condition.name for condition in config.conditions_of("prompted", 28)}
        other = {f"lora{r}" for r in (1, 2, 4, 8, 16, 32) if r != rank}
        assert {name for name in names if name.startswith("lora")} == other
        # So none is what all students are anyway.
        recipes = {n: config.recipe_of(model, "prompted", conditions(28)[n]) for n in names}
        same = {n for n, recipe in recipes.items() if recipe != recipes["divergence_only"]}
        assert same == other
    assert not [name for name in names if "rate" in name or name.startswith("lora_")]
    used = StudyConfig.for_model("tiny", lora_rank=4).recipes(model)
    assert used.student == replace(STUDENT, lora_rank=4)
    assert used.teacher.lora_rank is None
