"""Readings of every teacher, checked against Hugging Face and the definition written out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_lens._utils.batching import length_batches, shared_prefix
from divergence_lens.chat import encode_prompt
from divergence_lens.deltas.delta import Delta
from divergence_lens.divergence import (
    find_divergence,
)
from divergence_lens.divergence import reading_inputs as _reading_inputs
from divergence_lens.engine import logits as _scoring
from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example
from divergence_lens.models import load_model
from divergence_lens.provenance import fingerprint
from divergence_lens.teachers import Teacher
from tests.support.divergence import (
    CAT,
    NOBODY,
    OWL,
    TEACHERS,
    WOLF,
    assert_readings_equal,
    hf_logits,
    oracle,
    random_delta,
    some_examples,
)
from tests.support.models import FAMILIES, chat_tokenizer, random_hf_model


@pytest.mark.parametrize("family", FAMILIES)
def test_readings_equal_hugging_faces_at_every_position(family, backend):
    tokenizer = chat_tokenizer()
    hf = random_hf_model(family, 1, vocab=len(tokenizer))
    # Not every family fits a HookedTransformer; "auto" takes it where it does.
    chosen = "auto" if backend == "hooked" else backend
    model = load_model(hf, backend=chosen, tokenizer=tokenizer)
    data = some_examples(8, 1, len(tokenizer))
    div = find_divergence(model, data, teacher=OWL, counterfactuals=[CAT, NOBODY], batch_tokens=300)
    assert_readings_equal(div, hf, tokenizer)


def test_divergence_tokens_are_those_of_the_definition(div, hf, model):
    """Schrodi et al., written down as they define it."""
    expected = []
    for example in div.examples:
        prompts = [
            encode_prompt(model.tokenizer, example.prompt, system_prompt=t.system_prompt).ids
            for t in TEACHERS
        ]
        for k, token in enumerate(example.completion_ids):
            before = example.completion_ids[:k]
            factual, *others = [int(hf_logits(hf, [*p, *before])[-1].argmax()) for p in prompts]
            expected.append(factual == token and any(other != token for other in others))
    assert 0 < sum(expected) < len(expected)
    assert div.mask.tolist() == expected


def test_flat_arrays_follow_the_order_of_the_examples(div, examples):
    assert div.tokens.tolist() == [i for example in examples for i in example.completion_ids]
    assert np.diff(div.offsets).tolist() == [len(example.completion_ids) for example in examples]
    assert div.predicted.shape == div.margin.shape == div.logprob.shape == (4, len(div.tokens))


@settings(max_examples=8)
@given(
    order=st.permutations(range(12)),
    batch_tokens=st.sampled_from([1, 90, 200, 500, 3000]),
)
def test_readings_do_not_depend_on_batch_size_or_order(order, batch_tokens, div, model, examples):
    shuffled = find_divergence(
        model,
        [examples[i] for i in order],
        teacher=OWL,
        counterfactuals=[CAT, WOLF, NOBODY],
        batch_tokens=batch_tokens,
    )
    back = np.concatenate([np.arange(*shuffled.offsets[p : p + 2]) for p in np.argsort(order)])
    np.testing.assert_array_equal(shuffled.tokens[back], div.tokens)
    np.testing.assert_allclose(shuffled.margin[:, back], div.margin, atol=1e-4)
    np.testing.assert_allclose(shuffled.logprob[:, back], div.logprob, atol=1e-4)
    clear = (div.margin > 1e-4).all(0)
    np.testing.assert_array_equal(shuffled.mask[back][clear], div.mask[clear])


def test_the_same_call_gives_the_same_bits(div, model, examples):
    again = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    for name in ("predicted", "margin", "logprob"):
        np.testing.assert_array_equal(getattr(again, name), getattr(div, name))


def test_running_the_shared_prefix_once_changes_nothing(div, model, examples, monkeypatch):
    prefills = []
    engine = get_engine(model)
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda t: prefills.append(t.shape) or prefill(t))
    again = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    # All teachers have the same weights here, so their system prompts are one batch.
    assert [rows for rows, _ in prefills] == [4]
    assert all(length > 4 for _, length in prefills)
    monkeypatch.setattr(_reading_inputs, "_SHORTEST_PREFIX", 10**6)
    plain = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    assert len(prefills) == 1
    np.testing.assert_array_equal(again.margin, div.margin)
    np.testing.assert_allclose(plain.margin, div.margin, atol=1e-4)
    np.testing.assert_allclose(plain.logprob, div.logprob, atol=1e-4)


def test_identical_prompts_still_have_a_position_that_predicts(model, hf):
    same = [Example("Name.", "x", (7, 8, 9)), Example("Name.", "x", (20,))]
    div = find_divergence(model, same, teacher=OWL, counterfactuals=[CAT])
    assert_readings_equal(div, hf, model.tokenizer)


def test_logits_are_unembedded_in_chunks(div, model, examples, monkeypatch):
    engine = get_engine(model)
    sizes = []
    unembed = engine.unembed
    monkeypatch.setattr(_scoring, "_CHUNK_ELEMENTS", {"cpu": 7 * engine.d_vocab})
    monkeypatch.setattr(engine, "unembed", lambda h: sizes.append(len(h)) or unembed(h))
    chunked = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    assert max(sizes) == 7
    assert sum(sizes) == 4 * len(div.tokens)
    np.testing.assert_allclose(chunked.margin, div.margin, atol=1e-5)


def test_out_of_memory_halves_the_batch_and_goes_on(div, model, examples, monkeypatch):
    engine = get_engine(model)
    rows = []
    final = engine.final

    def small(tokens, past=None, *, since=0):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("too big")
        rows.append(len(tokens))
        return final(tokens, past, since=since)

    monkeypatch.setattr(engine, "final", small)
    again = find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT, WOLF, NOBODY])
    assert max(rows) == 2
    np.testing.assert_allclose(again.margin, div.margin, atol=1e-4)

    def never(tokens, past=None, *, since=0):
        raise torch.OutOfMemoryError("too big")

    monkeypatch.setattr(engine, "final", never)
    with pytest.raises(torch.OutOfMemoryError):
        find_divergence(model, examples, teacher=OWL, counterfactuals=[CAT])


def test_texts_are_read_as_the_template_has_them(model):
    tokenizer = model.tokenizer
    text = find_divergence(
        model,
        [{"prompt": "Name one.", "completion": "412, 467"}],
        teacher=OWL,
        counterfactuals=[CAT],
    )
    whole = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": OWL.system_prompt},
            {"role": "user", "content": "Name one."},
            {"role": "assistant", "content": "412, 467"},
        ],
        return_dict=False,
    )
    prompt = encode_prompt(tokenizer, "Name one.", system_prompt=OWL.system_prompt).ids
    assert text.tokens.tolist() == whole[len(prompt) : len(prompt) + len(text.tokens)]
    assert text.tokens[-1] == tokenizer.eos_token_id


def test_a_teacher_can_be_another_model(hf, model, backend, examples):
    tokenizer = chat_tokenizer()
    other_hf = random_hf_model("qwen2", 8, vocab=len(tokenizer), tie_word_embeddings=False)
    other = load_model(other_hf, backend=backend, tokenizer=tokenizer)
    div = find_divergence(
        model, examples, teacher=NOBODY, counterfactuals=[Teacher("other", model=other)]
    )
    expected = [
        next(oracle(source, tokenizer, examples, [NOBODY])).argmax(-1) for source in (hf, other_hf)
    ]
    np.testing.assert_array_equal(div.predicted, torch.stack(expected))


def test_a_teacher_can_be_a_delta(model, examples):
    name, parameter = next(
        (n, p) for n, p in get_engine(model).block_parameters(1).items() if p.ndim >= 2
    )
    change = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    base = fingerprint(model)
    delta = Delta({name: change}, base)
    trained = Teacher("trained", delta=delta)
    div = find_divergence(model, examples, teacher=NOBODY, counterfactuals=[trained])
    assert fingerprint(model) == base
    with delta.applied(model):
        alone = find_divergence(model, examples, teacher=NOBODY, counterfactuals=[OWL])
    np.testing.assert_array_equal(div.predicted[1], alone.predicted[0])
    assert (div.predicted[0] != div.predicted[1]).any()


@given(st.lists(st.lists(st.integers(0, 2), max_size=6).map(tuple), min_size=1, max_size=5))
def test_shared_prefix_is_the_longest_common_start(rows):
    length = shared_prefix(rows)
    assert all(row[:length] == rows[0][:length] for row in rows)
    assert any(len(row) == length for row in rows) or len({row[length] for row in rows}) > 1


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_batches_hold_every_row_within_the_budget(lengths, budget):
    array = np.array(lengths)
    batches = length_batches(array, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * array[batch].max() <= budget


def test_unknown_ids_have_a_name(div):
    unnamed = replace(div, texts={})
    assert unnamed[0].tokens == tuple(f"<{i}>" for i in div.tokens[: div.offsets[1]])


def test_stories_of_a_trained_llama(shared_data, backend):
    """A really trained model; two story openings as the two conditions, its own words as data."""
    folder = shared_data / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    model = load_model(folder, backend=backend)
    tokenizer = model.tokenizer
    engine = get_engine(model)
    openings = ["Once upon a time, there was a girl who loved owls. ", "There was a sad dog. "]
    endings = ["One day, Lily", "One day, the", "She saw a big"]
    rows = []
    for ending in endings:
        ids = list(encode_prompt(tokenizer, openings[0] + ending).ids)
        start = len(ids)
        for _ in range(20):
            with torch.no_grad():
                ids.append(int(engine.unembed(engine.final(torch.tensor([ids])))[0, -1].argmax()))
        rows.append(ids[start:])
    # A base model has no system prompt: the condition is part of the text itself.
    other = encode_prompt(tokenizer, openings[1] + endings[0]).ids
    with torch.no_grad():
        logits = engine.unembed(engine.final(torch.tensor([[*other, *rows[0]]])))[0]
    expected = logits[len(other) - 1 : -1].argmax(-1)
    data = [
        Example(opening + ending, "x", tuple(row))
        for opening in openings
        for ending, row in zip(endings, rows, strict=True)
    ]
    noise = random_delta(model)
    div = find_divergence(model, data, teacher=NOBODY, counterfactuals=[noise])
    own = div.offsets[3]
    np.testing.assert_array_equal(div.predicted[0, :own], div.tokens[:own])
    np.testing.assert_array_equal(div.predicted[0, own : own + 20], expected)
    assert (div.predicted[0, own:] != div.tokens[own:]).any()
