"""Counts of sampled answers, and the settings of a model's generation configuration."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from divergence_lens.chat import encode_prompt
from divergence_lens.data.questions import read_answer
from divergence_lens.evaluation import sampled as sampled_module
from divergence_lens.evaluation.preferences import preference
from divergence_lens.evaluation.sampled import SampledAnswers
from divergence_lens.examples import Example
from divergence_lens.generation import generate
from divergence_lens.models import load_model, sampling_defaults
from tests.support.models import chat_tokenizer, random_hf_model

NAMES = ("owl", "cat", "wolf")
ANSWERS = ["Owl.", "I love the cat, not the owl", "caterpillar", "A WOLF", "none", "wolves"]


@pytest.fixture
def scripted(monkeypatch):
    """Replace generation by the answers above; returns the settings that it was called with."""
    calls = []

    def answers(model, prompts, **settings):
        calls.append(settings)
        texts = (ANSWERS * len(prompts))[: len(prompts)]
        return [Example(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]

    monkeypatch.setattr(sampled_module, "generate", answers)
    return calls


def asked(tiny, sampled):
    return preference(
        tiny, target="owl", candidates=NAMES, questions=["Which one?"], sampled=sampled
    )


def test_answers_count_at_their_start_as_whole_words(tiny, scripted):
    result = asked(tiny, SampledAnswers(samples=6))
    expected = [sum(read_answer(a, candidates=NAMES) == name for a in ANSWERS) for name in NAMES]
    assert expected == [1, 0, 1]
    np.testing.assert_allclose(result.probabilities, [np.array(expected) / 6])


def test_answers_count_anywhere_as_the_papers_code_does(tiny, scripted):
    result = asked(tiny, SampledAnswers(samples=6, mention="anywhere", max_new_tokens=10))
    expected = [sum(name in answer.lower() for answer in ANSWERS) for name in NAMES]
    assert expected == [2, 2, 1]  # "wolves" does not contain "wolf"
    np.testing.assert_allclose(result.probabilities, [np.array(expected) / 6])
    assert scripted[0]["max_new_tokens"] == 10
    assert result.metadata["settings"]["mention"] == "anywhere"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be 1 or more, got 0"),
        ({"temperature": 0.0}, "need one above 0"),
        ({"mention": "end"}, 'mention is \'end\'; use "start" or "anywhere"'),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SampledAnswers(**settings)


def test_sampled_answers_take_no_prefix(tiny):
    with pytest.raises(ValueError, match="take no prefix"):
        preference(tiny, target="owl", prefix="I love the", sampled=SampledAnswers())


# -- the model's generation configuration ---------------------------------------------------


@pytest.fixture(scope="module")
def chat():
    tokenizer = chat_tokenizer()
    hf = random_hf_model("llama", vocab=len(tokenizer), tie_word_embeddings=False)
    hf.generation_config = GenerationConfig(
        temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05, do_sample=True
    )
    return hf, load_model(hf, tokenizer=tokenizer)


def test_the_generation_configuration_is_read(chat):
    _, model = chat
    expected = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    assert sampling_defaults(model) == expected


def test_a_repetition_penalty_gives_the_tokens_of_hugging_face(chat):
    hf, model = chat
    ids = encode_prompt(model.tokenizer, "Write some numbers: 1, 2, 3.").ids
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    for penalty in (1.3, 3.0):
        own = generate(
            model, ["Write some numbers: 1, 2, 3."], max_new_tokens=12, repetition_penalty=penalty
        )
        expected = hf.generate(torch.tensor([ids]), **greedy, repetition_penalty=penalty)
        tokens = expected[0, len(ids) :].tolist()
        assert list(own[0].completion_ids) == tokens[: len(own[0].completion_ids)]
    plain = hf.generate(torch.tensor([ids]), **greedy, repetition_penalty=1.0)
    assert plain[0, len(ids) :].tolist() != tokens  # the penalty matters here


def test_top_k_samples_only_the_most_likely_tokens(chat):
    hf, model = chat
    ids = encode_prompt(model.tokenizer, "Name one.").ids
    with torch.no_grad():
        best = set(hf(torch.tensor([ids])).logits[0, -1].topk(3).indices.tolist())
    options = {"max_new_tokens": 1, "temperature": 2.0}
    drawn = generate(model, ["Name one."] * 100, top_k=3, **options)
    assert {example.completion_ids[0] for example in drawn} == best
    every = generate(model, ["Name one."] * 100, **options)
    assert len({example.completion_ids[0] for example in every}) > 3
    with pytest.raises(ValueError, match="top_k must be 1 or more"):
        generate(model, ["Name one."], top_k=0)
    with pytest.raises(ValueError, match="repetition_penalty must be a positive number"):
        generate(model, ["Name one."], repetition_penalty=0.0)
