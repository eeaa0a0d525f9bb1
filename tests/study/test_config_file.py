"""Settings of a study in YAML: what is printed is what is read."""

import dataclasses

import pytest
import torch
import yaml
from typer.testing import CliRunner

from divergence_lens.cli.main import app
from divergence_lens.study import StudyConfig, config_to_yaml, read_config
from divergence_lens.study.conditions import Condition
from divergence_lens.training import PAPER, Recipe


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "study.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    "config",
    [
        StudyConfig.for_model("tiny"),
        StudyConfig.for_model("tiny-qwen2", seeds=(5,), lora_rank=4, layer_seeds=(0, 1)),
        StudyConfig.for_model("some/model", device="cpu", teacher_recipe=Recipe(epochs=1)),
        StudyConfig.for_pairs(device="cpu", prompts=7),
        StudyConfig.for_pairs("some/model", device="cpu", category="risk"),
        StudyConfig(
            student_recipe=Recipe(
                optimizer="sgd", parts=("attn", "W_in"), optimizer_options={"momentum": 0.9}
            )
        ),
    ],
    ids=["tiny", "changed", "large", "paired", "risk", "recipe"],
)
def test_a_printed_configuration_is_read_back(config, write):
    read = read_config(write(config_to_yaml(config)))
    # Conditions of a paired study are objects with functions; their names determine them.
    names = [getattr(condition, "name", condition) for condition in read.conditions]
    assert names == [getattr(condition, "name", condition) for condition in config.conditions]
    assert dataclasses.replace(read, conditions=config.conditions) == config


def test_the_yaml_names_every_field():
    settings = yaml.safe_load(config_to_yaml(StudyConfig.for_model("some/model", device="cpu")))
    names = {f.name for f in dataclasses.fields(StudyConfig)} - {"paired", "paper_design"}
    assert set(settings) == names
    assert settings["teacher_recipe"]["lora_rank"] == PAPER.lora_rank
    assert settings["prompts"] == 10_000


def test_other_fields_have_the_defaults_of_the_model(write):
    path = write("model: tiny-qwen2\nseeds: [7]\nteacher_recipe:\n  epochs: 2\n")
    config = read_config(path, targets=("owl", "cat"))
    assert config == StudyConfig.for_model(
        "tiny-qwen2", seeds=(7,), targets=("owl", "cat"), teacher_recipe=Recipe(epochs=2)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [0]", "unknown field 'seed'; did you mean seeds"),
        ("- 1", "holds no settings"),
        ("a: [", "is not valid YAML"),
        ("teacher_recipe: paper", "write fields of Recipe below it"),
        ("teacher_recipe: {epoch: 1}", "unknown field 'epoch'; did you mean epochs"),
        ("targets: owl", "targets"),
        ("targets: [owl]", "needs two or more"),
        ("model: tiny\ndtype: float8", "dtype is 'float8'"),
    ],
)
def test_a_wrong_file_is_refused(text, message, write):
    with pytest.raises((ValueError, TypeError), match=message):
        read_config(write(text))


def test_code_does_not_fit_into_yaml():
    own = Condition(name="mine", isolates="my own cause", group="mine")
    with pytest.raises(ValueError, match="condition 'mine' is an object"):
        config_to_yaml(StudyConfig(conditions=("all", own)))
    with pytest.raises(TypeError, match="optimizer Adagrad is a class"):
        config_to_yaml(StudyConfig(teacher_recipe=Recipe(optimizer=torch.optim.Adagrad)))


def test_options_of_the_command_override_the_file(write):
    path = write("model: tiny-qwen2\nseeds: [7]\nprompts: 9\n")
    arguments = ["study", "--config", str(path), "--print-config", "--seeds", "1,2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    settings = yaml.safe_load(done.stdout)
    assert (settings["model"], settings["seeds"], settings["prompts"]) == ("tiny-qwen2", [1, 2], 9)
    assert read_config(write(done.stdout)) == StudyConfig.for_model(
        "tiny-qwen2", seeds=(1, 2), prompts=9
    )
