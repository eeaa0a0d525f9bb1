"""A result is used with the model that it was computed with, or a warning says otherwise."""

import dataclasses
import warnings

import pytest
import torch
from typer.testing import CliRunner

import divergence_lens as dl
from divergence_lens.cli.main import app
from divergence_lens.models import load_model
from divergence_lens.provenance import model_probe
from tests.support.models import BACKENDS

OWL, CAT = dl.animal_teachers(["owl", "cat"])


@pytest.fixture(scope="module")
def base():
    return load_model("tiny")


@pytest.fixture(scope="module")
def divergence(base):
    examples = dl.generate(base, dl.number_prompts(8, seed=0), teacher=OWL, max_new_tokens=12)
    return dl.find_divergence(base, examples, teacher=OWL, counterfactuals=[CAT])


@pytest.fixture(scope="module")
def student(base, divergence):
    recipe = dl.Recipe(epochs=3, lr=0.01)
    return dl.finetune(base, divergence.examples, layers=[0], recipe=recipe)


def test_the_probe_holds_the_models_own_log_probabilities(base):
    probe = model_probe(base)
    ids = [1 + int(i * (base.cfg.d_vocab - 2) / 7) for i in range(8)]
    with torch.no_grad():
        logprobs = base(torch.tensor([ids]))[0, -1].log_softmax(-1)
    assert probe["vocabulary"] == base.cfg.d_vocab_out
    assert probe["logprobs"][0] == pytest.approx(float(logprobs[0]), abs=1e-4)
    assert probe["logprobs"][-1] == pytest.approx(float(logprobs[-1]), abs=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_weights_in_another_class_or_type_are_the_same_model(divergence, name, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        divergence.check_model(load_model("tiny", backend=name, dtype=dtype))


def test_other_weights_warn_in_patching_and_as_a_mask(base, divergence, student):
    pairs = divergence.pairs(limit=2)
    recipe = dl.Recipe(epochs=1)
    with student.applied(base):
        for patch in (dl.causal_mediation, dl.attribution_patch):
            with pytest.warns(UserWarning, match="behind these pairs was computed with .*'tiny'"):
                patch(base, pairs[:1])
    other = load_model("tiny-qwen2")
    with pytest.warns(UserWarning, match="the mask was computed with the model 'tiny'.*qwen2"):
        dl.finetune(other, divergence.examples, mask=divergence, layers=[0], recipe=recipe)
    # The same calls with the divergence's own model raise no warning, which would be an error.
    dl.attribution_patch(base, pairs)
    dl.finetune(base, divergence.examples, mask=divergence, layers=[0], recipe=recipe)


def test_another_tokenizer_is_refused(base, divergence):
    token_id = next(i for i, text in divergence.texts.items() if text.strip().isdigit())
    foreign = dataclasses.replace(divergence, texts={**divergence.texts, token_id: "zebra"})
    message = rf"another tokenizer: token {token_id} was 'zebra', and is"
    with pytest.raises(ValueError, match=message):
        foreign.pairs()
    with pytest.raises(ValueError, match=message):
        dl.finetune(base, foreign.examples, mask=foreign)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("complement", [[], pytest.param(["--complement"], marks=pytest.mark.slow)])
def test_commands_warn_about_a_file_of_another_model(tmp_path, base, divergence, complement):
    path, data = tmp_path / "divergence.safetensors", tmp_path / "data.jsonl"
    divergence.save(path)
    dl.save_examples(data, divergence.examples)
    commands = {
        "patch": ["patch", path, "--method", "gradient", "--limit", 1],
        "finetune": ["finetune", data, "--mask", path, "--epochs", 1, *complement],
    }
    for name, arguments in commands.items():
        for model, expected in (("tiny", 0), ("tiny-qwen2", 1)):
            out = ["--model", model, "--out", tmp_path / f"{name}.safetensors", "--force"]
            done = CliRunner().invoke(app, [str(word) for word in (*arguments, *out)])
            assert done.exit_code == 0, (done.output, done.exception)
            assert done.output.count("Warning: ") == expected
            assert done.output.count("was computed with the model 'tiny', but is") == expected
