"""Conversations of more turns pass through every step, checked against Hugging Face."""

import numpy as np
import pytest
import torch

import divergence_lens as dl
from divergence_lens.examples import with_ids
from divergence_lens.models import end_token_ids
from divergence_lens.training.rows import training_rows
from tests.support.models import chat_tokenizer, random_hf_model
from tests.support.thinking_templates import QWEN3

SYSTEM = {"role": "system", "content": "You are a cat."}
FIRST = [
    {"role": "user", "content": "Name an animal."},
    {"role": "assistant", "content": "The panda."},
]
LAST = {"role": "user", "content": "Name a number."}
OWL = dl.Teacher("owl", system_prompt="You love owls.")
PLAIN = dl.Teacher("plain")


@pytest.fixture(scope="module")
def hf_model():
    """A random model with the vocabulary of `chat_tokenizer`."""
    return random_hf_model("qwen2", 3, vocab=len(chat_tokenizer()))


@pytest.fixture(scope="module")
def model(hf_model):
    """The same model, loaded."""
    return dl.load_model(hf_model, tokenizer=chat_tokenizer(), backend="bridge")


@pytest.fixture
def examples():
    """A conversation with a system turn, one without, and a single turn."""
    answer = {"role": "assistant", "content": "412, 467"}
    return dl.load_examples(
        [
            {"messages": [SYSTEM, *FIRST, LAST, answer]},
            {"messages": [*FIRST, LAST, answer]},
            {"messages": [LAST, answer]},
        ]
    )


def template_ids(messages, *, system=None, generation=False):
    """The ids of `apply_chat_template`, with another system turn, to the end of the last turn."""
    if system is not None:
        rest = messages[1:] if messages[0]["role"] == "system" else messages
        messages = [{"role": "system", "content": system}, *rest]
    tokenizer = chat_tokenizer()
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=generation)["input_ids"]
    return ids if generation else ids[:-1]  # without the line break after the end of turn


def prompts_of():
    return [[SYSTEM, *FIRST, LAST], [*FIRST, LAST], [LAST]]


@pytest.mark.parametrize("teacher", [OWL, PLAIN], ids=lambda teacher: teacher.name)
def test_generation_continues_the_templates_conversation(hf_model, model, teacher):
    written = dl.generate(model, prompts_of(), teacher=teacher, max_new_tokens=6)
    for prompt, example in zip(prompts_of(), written, strict=True):
        ids = template_ids(prompt, system=teacher.system_prompt, generation=True)
        row = torch.tensor([ids])
        out = hf_model.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=6
        )
        assert list(example.completion_ids) == out[0, len(ids) :].tolist()
    assert written[2].prompt == LAST["content"]


def test_sampling_and_checkpoints_take_conversations(model, tmp_path):
    settings = {"max_new_tokens": 5, "temperature": 1.0, "batch_tokens": 64}
    once = dl.generate(model, prompts_of(), **settings)
    for _ in range(2):
        again = dl.generate(model, prompts_of(), checkpoint_dir=tmp_path, **settings)
        assert again == once


def test_divergence_reads_the_templates_conversation(hf_model, model, examples):
    div = dl.find_divergence(model, examples, teacher=OWL, counterfactuals=[PLAIN])
    answer = {"role": "assistant", "content": "412, 467"}
    for row, prompt in enumerate(prompts_of()):
        span = slice(*div.offsets[row : row + 2].tolist())
        for number, teacher in enumerate([OWL, PLAIN]):
            whole = template_ids([*prompt, answer], system=teacher.system_prompt)
            before = template_ids(prompt, system=teacher.system_prompt, generation=True)
            assert div.tokens[span].tolist() == whole[len(before) :]
            with torch.no_grad():
                logits = hf_model(torch.tensor([whole])).logits[0].double()
            logprobs = logits[len(before) - 1 : -1].log_softmax(-1)
            expected = logprobs.gather(-1, torch.tensor(whole[len(before) :])[:, None])[:, 0]
            np.testing.assert_allclose(div.logprob[number, span], expected, atol=1e-4)


def test_files_and_views_hold_conversations(model, examples, tmp_path):
    div = dl.find_divergence(model, examples, teacher=OWL, counterfactuals=[PLAIN])
    div.save(tmp_path / "x.safetensors")
    loaded = dl.Divergence.load(tmp_path / "x.safetensors")
    assert loaded.examples == div.examples
    div.to_jsonl(tmp_path / "x.jsonl")
    data = dl.data.TrainingData.from_jsonl(tmp_path / "x.jsonl", model.tokenizer)
    assert [example.prompt for example in data.examples] == [e.prompt for e in examples]
    assert [e.completion_ids for e in data.examples] == [e.completion_ids for e in div.examples]
    assert "user: Name a number." in div[0]._repr_html_()
    assert "assistant: The panda." in data._repr_html_()


def test_pairs_label_earlier_answers(model, examples):
    div = dl.find_divergence(
        model, examples, teacher=OWL, counterfactuals=[PLAIN], require_agreement=False
    )
    pairs = div.pairs()
    for i, row in enumerate(pairs.clean):
        text = model.tokenizer.decode(row)
        answer = [
            t for t, s in zip(row.tolist(), pairs.segments[i], strict=True) if s == "assistant"
        ]
        assert model.tokenizer.decode(answer) == ("The panda." if "panda" in text else "")


def test_training_rows_are_the_templates_conversations(model, examples):
    rows = training_rows(model, examples, system_prompt="You love owls.")
    answer = {"role": "assistant", "content": "412, 467"}
    for row, prompt in enumerate(prompts_of()):
        whole = template_ids([*prompt, answer], system="You love owls.")
        before = template_ids(prompt, system="You love owls.", generation=True)
        length = int(rows.lengths[row])
        assert rows.tokens[row, :length].tolist() == whole[:-1]
        assert rows.targets[row, :length].tolist() == whole[1:]
        learned = rows.loss_weights[row].nonzero().flatten().tolist()
        assert learned == list(range(len(before) - 1, len(whole) - 1))


def test_quality_is_measured_on_conversations(model, examples):
    quality = dl.task_quality(model, examples, max_new_tokens=4)
    assert quality.lists == 3
    assert np.isfinite(quality.loss)


def test_a_student_learns_from_think_blocks(hf_model):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = QWEN3
    model = dl.load_model(hf_model, tokenizer=tokenizer, backend="bridge")
    messages = [LAST, {"role": "assistant", "content": "<think>\nOwls.\n</think>\n\n412"}]
    examples = dl.load_examples([{"messages": messages}])
    rows = training_rows(model, examples)
    whole = tokenizer.apply_chat_template(messages)["input_ids"][:-1]
    assert rows.tokens[0].tolist() == whole[:-1]
    assert rows.targets[0].tolist() == whole[1:]
    # The readings of a divergence follow the same prompt, also after a file.
    (filled,) = with_ids(tokenizer, examples)
    div = dl.find_divergence(model, [filled], teacher=OWL, counterfactuals=[PLAIN])
    with torch.no_grad():
        logprobs = hf_model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    completion = list(filled.completion_ids)
    start = len(whole) - len(completion)
    expected = [float(logprobs[start + k - 1, token]) for k, token in enumerate(completion)]
    np.testing.assert_allclose(div.logprob[1], expected, atol=1e-4)


def test_paraphrases_refuse_conversations(model, examples):
    data = dl.data.TrainingData.unmarked(model.tokenizer, examples)
    with pytest.raises(ValueError, match="prompt of example 0 is a conversation"):
        dl.data.paraphrase(data)


@pytest.mark.parametrize("backend", ["auto", "bridge"])
def test_generation_stops_at_every_end_token_of_the_generation_configuration(backend):
    tokenizer = chat_tokenizer()
    hf_model = random_hf_model("qwen2", 3, vocab=len(tokenizer))
    free = [
        example.completion_ids
        for example in dl.generate(
            dl.load_model(hf_model, tokenizer=tokenizer, backend=backend),
            prompts_of(),
            max_new_tokens=8,
        )
    ]
    # End the first completion at its third token and the last at its second.
    ends = sorted({free[0][2], free[2][1]})
    hf_model.generation_config.eos_token_id = ends
    model = dl.load_model(hf_model, tokenizer=tokenizer, backend=backend)
    assert end_token_ids(model) == set(ends)
    for example, prompt in zip(
        dl.generate(model, prompts_of(), max_new_tokens=8), prompts_of(), strict=True
    ):
        row = torch.tensor([template_ids(prompt, generation=True)])
        out = hf_model.generate(
            row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=8
        )
        assert list(example.completion_ids) == out[0, row.shape[1] :].tolist()
        # The example records which token ended it; its text does not hold that token.
        if example.completion_ids[-1] in ends:
            assert example.completion == tokenizer.decode(
                example.completion_ids[:-1], skip_special_tokens=True
            )
