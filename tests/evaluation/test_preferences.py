"""Preference: the exact probability against enumeration and sampling, and what is read off it."""

import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from divergence_lens.chat import decode, encode_prompt
from divergence_lens.data.questions import (
    ANIMALS,
    QUESTIONS,
    TREES,
    preference_questions,
    read_answer,
    surface_forms,
)
from divergence_lens.deltas.delta import Delta
from divergence_lens.engine.factory import get_engine
from divergence_lens.evaluation import answers as _answers
from divergence_lens.evaluation.preferences import preference
from divergence_lens.evaluation.sampled import SampledAnswers
from divergence_lens.models import load_model
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher
from tests.support.models import CHATML, chat_tokenizer, random_hf_model

QUESTIONS_HERE = ["Name one.", "Which one do you like?", "Say it now."]


def letters(alphabet: str, *, glued: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of single letters (glued) or of words: small enough to enumerate all answers."""
    turns = ("<|im_start|>", "<|im_end|>")
    words = ["user", "system", "assistant", "name", "."] if not glued else []
    vocabulary = ["<unk>", *turns, *words, *(list(alphabet) if glued else alphabet.split())]
    core = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    core.pre_tokenizer = (
        pre_tokenizers.Split("", "isolated") if glued else pre_tokenizers.Whitespace()
    )
    if glued:
        from tokenizers import decoders

        core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token=turns[1],
        additional_special_tokens=[turns[0]],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def random_chat_model(backend, tokenizer, seed=0, scale=1.0):
    hf = random_hf_model("llama", seed, vocab=len(tokenizer), tie_word_embeddings=False)
    with torch.no_grad():
        hf.lm_head.weight.mul_(scale)
    return load_model(hf, backend=backend, tokenizer=tokenizer), hf


@pytest.fixture(scope="module")
def model(backend):
    return random_chat_model(backend, chat_tokenizer(), scale=2.0)[0]


def never(tokenizer):
    """What to add to logits so that the template's tokens are not written, as in trained models."""
    shut = torch.zeros(len(tokenizer))
    shut[[i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]] = -1e4
    return shut


@pytest.fixture
def letter_model(backend, monkeypatch):
    """(model, hf, tokenizer) over the letters a, b, s and a stop, with flat probabilities."""
    tokenizer = letters("abs.", glued=True)
    model, hf = random_chat_model(backend, tokenizer, seed=2, scale=0.3)
    shut_specials(model, monkeypatch)
    return model, hf, tokenizer


def shut_specials(model, monkeypatch):
    engine = get_engine(model)
    unembed, shut = engine.unembed, never(model.tokenizer)
    monkeypatch.setattr(engine, "unembed", lambda hidden: unembed(hidden) + shut)


@torch.no_grad()
def next_probabilities(hf, tokenizer, rows):
    return (hf(torch.tensor(rows)).logits[:, -1] + never(tokenizer)).double().softmax(-1).numpy()


def enumerated(hf, tokenizer, question, candidates, *, depth):
    """Probability of every candidate by walking through all answers of `depth` tokens."""
    prompt = list(encode_prompt(tokenizer, question).ids)
    usable = np.flatnonzero(never(tokenizer).numpy() == 0)
    totals = dict.fromkeys(candidates, 0.0)
    answers = [((), 1.0)]
    for step in range(depth):
        rows = next_probabilities(hf, tokenizer, [prompt + list(ids) for ids, _ in answers])
        longer = [
            ((*ids, int(token)), probability * row[token])
            for (ids, probability), row in zip(answers, rows, strict=True)
            for token in usable
        ]
        ended = [a for a in longer if a[0][-1] == tokenizer.eos_token_id or step == depth - 1]
        answers = [a for a in longer if a[0][-1] != tokenizer.eos_token_id]
        for ids, probability in ended:
            name = read_answer(decode(tokenizer, ids), candidates=candidates)
            if name is not None:
                totals[name] += probability
    return [totals[name] for name in candidates]


@pytest.mark.parametrize(
    "candidates",
    [
        ("a", "b"),  # "a", "as" with whatever follows
        ("a", "ab"),  # one begins the other, within a word
    ],
)
def test_exact_equals_walking_through_all_answers(candidates, letter_model):
    model, hf, tokenizer = letter_model
    questions = ["a b.", "bb"]
    found = preference(
        model, target="a", candidates=candidates, questions=questions, category="letter"
    )
    for row, question in enumerate(questions):
        expected = enumerated(hf, tokenizer, question, candidates, depth=4)
        np.testing.assert_allclose(found.probabilities[row], expected, atol=1e-6)
        assert min(expected) > 1e-4


def test_names_of_several_words_are_not_counted_twice(backend, monkeypatch):
    tokenizer = letters("polar bear cat run", glued=False)
    model, hf = random_chat_model(backend, tokenizer, seed=4)
    shut_specials(model, monkeypatch)
    candidates = ("polar", "polar bear", "cat")
    found = preference(model, target="cat", candidates=candidates, questions=["name polar ."])
    expected = enumerated(hf, tokenizer, "name polar .", candidates, depth=2)
    np.testing.assert_allclose(found.probabilities[0], expected, atol=1e-6)
    prompt = list(encode_prompt(tokenizer, "name polar .").ids)
    start = next_probabilities(hf, tokenizer, [prompt])[0]
    polar = tokenizer.convert_tokens_to_ids("polar")
    assert sum(expected[:2]) == pytest.approx(start[polar], abs=1e-6)


def test_exact_is_the_product_along_each_form(model, backend):
    """An oracle of its own: one plain forward per question and form, through the model itself."""
    tokenizer = model.tokenizer
    names = ("owl", "cat", "wolf")
    found = preference(model, target="owl", candidates=names, questions=QUESTIONS_HERE)
    vocabulary = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    ends = torch.tensor(
        [t[:1] in "ĠĊ" or not t[:1].isalnum() or t.startswith("<") for t in vocabulary]
    )
    for row, question in enumerate(QUESTIONS_HERE):
        prompt = list(encode_prompt(tokenizer, question).ids)
        for column, name in enumerate(names):
            total = 0.0
            for form in surface_forms(name):
                ids = tokenizer(form)["input_ids"]
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + ids]))[0].double()
                p = logits.softmax(-1)[len(prompt) - 1 :]
                chain = torch.stack([p[k, token] for k, token in enumerate(ids)]).prod()
                total += float(chain * p[-1][ends].sum())
            assert found.probabilities[row, column] == pytest.approx(total, rel=1e-4)


def test_each_beginning_of_a_form_is_computed_once_per_question(model):
    """The questions' common start once, the rest of each question, and the tree of all forms."""
    names, engine = ("owl", "cat", "wolf"), get_engine(model)
    prompts = [encode_prompt(model.tokenizer, question).ids for question in QUESTIONS[:6]]
    same = next(n for n, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    shared = same if same >= 16 else 0
    rest = max(map(len, prompts)) - shared  # the questions are one padded batch
    forms, _ = _answers.form_ids(model.tokenizer, names)
    nodes = {ids[:end] for ids in forms for end in range(1, len(ids) + 1)}
    assert len(nodes) < sum(map(len, forms))
    positions, unembedded = engine.work.positions, engine.work.unembedded
    preference(model, target="owl", candidates=names, questions=QUESTIONS[:6])
    added = engine.work.positions - positions
    assert added == engine.n_layers * (shared + 6 * (rest + len(nodes)))
    assert engine.work.unembedded - unembedded == 6 * (1 + len(nodes))


@pytest.mark.parametrize("batch_tokens", [1, 50, 700])
def test_batches_change_nothing(batch_tokens, model):
    questions = list(QUESTIONS[:8])
    whole = preference(model, target="owl", questions=questions)
    parts = preference(model, target="owl", questions=questions, batch_tokens=batch_tokens)
    np.testing.assert_allclose(parts.probabilities, whole.probabilities, rtol=1e-4, atol=1e-12)


def test_sampling_agrees_with_the_exact_probability(letter_model):
    model = letter_model[0]
    asked = {
        "target": "a",
        "candidates": ("a", "b"),
        "questions": ["a b.", "bb", "s"],
        "category": "letter",
    }
    exact = preference(model, **asked)
    sampled = preference(model, **asked, sampled=SampledAnswers(samples=250, seed=1))
    low, high = sampled.wilson(level=0.999)
    assert low < exact.probability < high
    assert high - low < 0.2
    # Each question and candidate within five standard errors of what was computed.
    error = np.sqrt(exact.probabilities * (1 - exact.probabilities) / 250)
    assert (abs(sampled.probabilities - exact.probabilities) < 5 * error).all()
    again = preference(model, **asked, sampled=SampledAnswers(samples=250, seed=1))
    np.testing.assert_array_equal(again.probabilities, sampled.probabilities)
    assert sampled.method == "sampled"
    assert sampled.metadata["settings"]["samples"] == 250


@pytest.mark.parametrize(("category", "names"), [("animal", ANIMALS), ("tree", TREES)])
def test_both_methods_agree_on_the_shipped_model(category, names, tiny):
    """All candidates at once, on questions that the model understands."""
    asked = {"target": names[0], "category": category}
    asked["questions"] = preference_questions(category)[:6]
    exact = preference(tiny, **asked)
    sampled = preference(tiny, **asked, sampled=SampledAnswers(samples=100, seed=3))
    assert exact.mass > 0.5
    n = 100 * 6
    for name in names:
        p = exact.about(name).probability
        error = np.sqrt(p * (1 - p) / n)
        assert abs(sampled.about(name).probability - p) < 4 * error + 1 / n
    assert abs(sampled.mass - exact.mass) < 4 * np.sqrt(exact.mass * (1 - exact.mass) / n) + 1 / n


@pytest.mark.parametrize("category", ["animal", "tree"])
def test_there_are_fifty_different_questions_that_name_no_candidate(category):
    questions = preference_questions(category)
    assert len(set(questions)) == 50
    assert all(category in question for question in questions)
    words = {word for q in questions for word in q.lower().replace(",", " ").split()}
    assert not words & {*ANIMALS, *TREES}


def test_a_teacher_brings_its_prompt_and_its_weights(model):
    def asked(**options):
        return preference(model, target="owl", questions=QUESTIONS_HERE, **options)

    base = asked()
    prompted = asked(system_prompt="You love owls.")
    same = asked(teacher=Teacher("owl", system_prompt="You love owls."))
    np.testing.assert_array_equal(prompted.probabilities, same.probabilities)
    assert (prompted.probabilities != base.probabilities).any()
    name, parameter = next(iter(get_engine(model).block_parameters(2).items()))
    change = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    delta = Delta({name: change}, fingerprint(model))
    trained = asked(teacher=Teacher("student", delta=delta))
    with delta.applied(model):
        inside = asked()
    np.testing.assert_array_equal(trained.probabilities, inside.probabilities)
    assert (trained.probabilities != base.probabilities).any()
    assert trained.teacher == "student"
    np.testing.assert_array_equal(asked().probabilities, base.probabilities)


def test_defaults_are_twelve_candidates_and_fifty_questions(model):
    animals = preference(model, target="Owl")
    assert animals.target == "owl"
    assert animals.candidates == ANIMALS
    assert animals.probabilities.shape == (len(QUESTIONS), 12)
    assert (animals.probabilities >= 0).all()
    assert (animals.probabilities.sum(1) <= 1).all()
    trees = preference(model, target="oak", category="tree")
    assert trees.candidates == TREES
    assert "tree" in trees.questions[0]


# -- what is read off it --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "owll"}, "did you mean 'owl'"),
        ({"questions": []}, "no questions"),
        ({"candidates": ["owl"]}, "two or more different"),
        ({"candidates": ["owl", "cat", "owl"]}, "two or more different"),
        ({"candidates": ["owl", "Owl "]}, "share the answer"),
        ({"system_prompt": "x", "teacher": Teacher("x")}, "not both"),
        ({"questions": ["owl " * 300]}, "over the context of 256"),
        ({"category": "planet"}, "unknown category"),
    ],
)
def test_impossible_questions_are_refused(options, message, model):
    with pytest.raises(TypeError, match="expected a HookedTransformer"):
        preference(torch.nn.Linear(1, 1), target="owl")
    with pytest.raises(ValueError, match=message):
        preference(model, **{"target": "owl", **options})


def test_candidates_that_the_tokenizer_cannot_write_are_refused(backend):
    model, _ = random_chat_model(backend, letters("polar cat", glued=False))
    with pytest.raises(ValueError, match="cannot write 'emu'"):
        preference(model, target="cat", candidates=("cat", "emu"), questions=["name ."])


def test_logits_that_are_not_finite_name_the_question(model, monkeypatch):
    engine = get_engine(model)
    unembed = engine.unembed
    monkeypatch.setattr(engine, "unembed", lambda h: unembed(h) * float("nan"))
    with pytest.raises(ValueError, match=r"question 0 \('Name one.'\) are not finite"):
        preference(model, target="owl", questions=QUESTIONS_HERE)


def test_dropout_in_training_mode_is_refused():
    tokenizer = chat_tokenizer()
    hf = random_hf_model("gpt2", 0, vocab=len(tokenizer), embd_pdrop=0.3)
    model = load_model(hf, backend="bridge", tokenizer=tokenizer)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        preference(model, target="owl", questions=QUESTIONS_HERE)


# -- continuations --------------------------------------------------------------------------


def test_byte_level_pieces_go_on_with_a_word_unless_they_bring_a_space():
    tokenizer = chat_tokenizer()
    marks = _answers.continuations(tokenizer, len(tokenizer) + 3)
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    for piece, mark in zip(pieces, marks[: len(pieces)], strict=True):
        bare = piece in tokenizer.all_special_tokens
        assert mark == (not bare and piece[0] not in "ĠĊ" and piece[0].isalnum())
    assert not marks[len(pieces) :].any()


def test_whole_words_never_go_on():
    assert not _answers.continuations(letters("polar bear cat", glued=False), 12).any()


def test_single_letters_go_on():
    tokenizer = letters("ab. ", glued=True)
    marks = _answers.continuations(tokenizer, len(tokenizer))
    assert [
        t
        for t, m in zip(tokenizer.convert_ids_to_tokens(range(len(tokenizer))), marks, strict=True)
        if m
    ] == ["a", "b"]


# -- the shipped model ----------------------------------------------------------------------


def test_fifty_questions_take_well_under_a_second_on_the_tiny_model(tiny):
    preference(tiny, target="owl")
    start = time.process_time()
    found = preference(tiny, target="owl")
    assert time.process_time() - start < 1.0
    assert found.mass > 0.5


def test_sampling_the_tiny_model_agrees_with_the_exact_probability(tiny):
    asked = {"target": "owl", "questions": [f"Which animal is your favorite? {i}" for i in (1, 2)]}
    exact = preference(tiny, **asked)
    sampled = preference(tiny, **asked, sampled=SampledAnswers(samples=300))
    for name in ANIMALS:
        low, high = sampled.about(name).wilson(level=0.9999)
        assert low <= exact.about(name).probability <= high
