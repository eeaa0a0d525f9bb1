"""The tokens that a student learns: masks, loss weights and batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from divergence_lens.chat import answer_header, encode_prompt
from divergence_lens.data import TrainingData
from divergence_lens.divergence import find_divergence
from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example, with_ids
from divergence_lens.teachers import Teacher
from divergence_lens.training import finetune
from divergence_lens.training.rows import batches, pieces, training_rows
from tests.support.training import (
    SGD,
    SHORT,
    largest_difference,
    number_lists,
    random_mask,
    same_bits,
)


def test_accumulated_pieces_equal_one_large_batch(random_model):
    model, examples = random_model("gpt2"), number_lists(12)
    mask = random_mask(model, examples)
    whole, cut = (
        finetune(model, examples, mask=mask, recipe=replace(SGD, batch_tokens=batch_tokens))
        for batch_tokens in (10**6, 150)
    )
    assert largest_difference(whole, cut) < 1e-6
    assert whole.history()["loss"].tolist() == pytest.approx(cut.history()["loss"].tolist())


def test_masked_tokens_are_not_learned(random_model):
    model = random_model("gpt2")
    examples = with_ids(model.tokenizer, number_lists(6))
    mask = [np.arange(len(e.completion_ids)) < len(e.completion_ids) - 1 for e in examples]
    # The last token is held back, and nothing follows it: it may be any.
    others = [replace(e, completion_ids=(*e.completion_ids[:-1], 50)) for e in examples]
    assert same_bits(
        finetune(model, examples, mask=mask, recipe=SHORT),
        finetune(model, others, mask=mask, recipe=SHORT),
    )
    assert not same_bits(
        finetune(model, examples, recipe=SHORT), finetune(model, others, recipe=SHORT)
    )


def test_labels_that_are_not_the_tokens_are_learned(random_model):
    """The loss of one batch, against a plain pass over inputs and labels."""
    model = random_model("gpt2")
    examples = with_ids(model.tokenizer, number_lists(6))
    count = sum(len(example.completion_ids) for example in examples)
    marks = random_mask(model, examples)
    labels = np.random.default_rng(1).integers(5, 60, count)
    data = TrainingData(tuple(examples), marks, labels)
    student = finetune(model, data, mask=data.marks, recipe=replace(SGD, epochs=1))
    losses, end = [], 0
    for example in examples:
        prompt = encode_prompt(model.tokenizer, example.prompt).ids
        ids, own = example.completion_ids, slice(end, end + len(example.completion_ids))
        end += len(ids)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]]))[0, len(prompt) - 1 : -1]
        each = F.cross_entropy(logits, torch.from_numpy(labels[own]), reduction="none")
        losses += each[torch.from_numpy(marks[own])].tolist()
    assert student.history()["loss"][0] == pytest.approx(np.mean(losses), rel=1e-5)
    same = TrainingData(tuple(examples), marks)
    assert same_bits(
        finetune(model, same, mask=marks, recipe=SHORT),
        finetune(model, examples, mask=marks, recipe=SHORT),
    )


def test_masked_tokens_get_no_gradient(random_model):
    model, examples = random_model("gpt2"), number_lists(6)
    rows = training_rows(model, examples, mask=random_mask(model, examples))
    run = get_engine(model).begin(rows.tokens)
    logits = get_engine(model).unembed(get_engine(model).final_from(run.resid, 0, run))
    logits = logits.detach().requires_grad_()
    where = rows.loss_weights > 0
    F.cross_entropy(logits[where], rows.targets[where]).backward()
    assert not bool(logits.grad[~where].any())
    assert rows.tokens_learned == int(where.sum()) == int(random_mask(model, examples).sum())


def test_examples_without_a_learned_token_are_left_out(random_model):
    model = random_model("gpt2")
    examples = with_ids(model.tokenizer, number_lists(8))
    mask = [np.full(len(e.completion_ids), i % 2 == 0) for i, e in enumerate(examples)]
    every = finetune(model, examples, mask=mask, recipe=SHORT)
    reduced = finetune(model, examples[::2], recipe=SHORT)
    assert same_bits(every, reduced)
    assert every.metadata["settings"]["examples"] == 4


def test_weights_of_zero_and_one_are_a_mask_and_their_scale_does_not_matter(random_model):
    model, examples = random_model("gpt2"), number_lists(8)
    mask = random_mask(model, examples)
    masked = finetune(model, examples, mask=mask, recipe=SGD)
    assert same_bits(masked, finetune(model, examples, loss_weights=mask.astype(float), recipe=SGD))
    scaled = finetune(model, examples, loss_weights=4.0 * mask, recipe=SGD)
    assert largest_difference(masked, scaled) < 1e-6
    uneven = np.random.default_rng(1).random(len(mask))
    assert (
        largest_difference(masked, finetune(model, examples, loss_weights=uneven, recipe=SGD))
        > 1e-4
    )


def test_a_divergence_a_tensor_and_a_list_of_rows_are_masks(random_model):
    model, examples = random_model("gpt2"), number_lists(6)
    flat = random_mask(model, examples)
    ends = np.cumsum([len(e.completion_ids) for e in with_ids(model.tokenizer, examples)])

    class HasMask:
        mask = flat

    students = [
        finetune(model, examples, mask=mask, layers=[2], recipe=SHORT)
        for mask in (flat, torch.from_numpy(flat), np.split(flat, ends[:-1]), HasMask())
    ]
    assert all(same_bits(students[0], other) for other in students[1:])


def test_a_divergence_of_other_completions_is_no_mask(random_model):
    model = random_model("gpt2")
    examples = [Example("A.", "x", (5, 6, 7)), Example("B.", "y", (8, 9, 4))]
    owl, cat = (Teacher(name, system_prompt=name) for name in ("owl", "cat"))
    divergence = find_divergence(
        model, examples, teacher=owl, counterfactuals=[cat], require_agreement=False
    )
    mask = np.ones(6, bool)
    divergence.__dict__["mask"] = mask
    given = finetune(model, divergence.examples, mask=divergence, layers=[2], recipe=SHORT)
    assert same_bits(given, finetune(model, examples, mask=mask, layers=[2], recipe=SHORT))
    with pytest.raises(ValueError, match="another completion as example 0"):  # of equal length
        finetune(model, examples[::-1], mask=divergence, recipe=SHORT)
    with pytest.raises(ValueError, match="a divergence of 2 examples, there are 1"):
        finetune(model, examples[:1], mask=divergence, recipe=SHORT)


def test_empty_masks_are_refused(random_model):
    model, examples = random_model("gpt2"), number_lists(6)
    mask = random_mask(model, examples)
    with pytest.raises(ValueError, match=r"selects none of the [\d,]+ completion tokens"):
        finetune(model, examples, mask=mask & False)
    with pytest.raises(TypeError, match="not bool; for graded values use loss_weights="):
        finetune(model, examples, mask=mask.astype(float))
    with pytest.raises(ValueError, match="finite and not negative"):
        finetune(model, examples, loss_weights=np.where(mask, -1.0, 1.0))
    with pytest.raises(ValueError, match="no examples to learn from"):
        finetune(model, [])


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=200),
    size=st.integers(1, 32),
    seed=st.integers(0, 99),
    budget=st.integers(1, 400),
)
def test_an_epoch_has_every_row_once_in_full_batches_and_pieces_within_budget(
    lengths, size, seed, budget
):
    lengths = np.array(lengths)
    epoch = batches(lengths, size, seed, 0)
    assert sorted(np.concatenate(epoch)) == list(range(len(lengths)))
    assert len(epoch) == -(-len(lengths) // size)
    again = batches(lengths, size, seed, 0)
    assert all(np.array_equal(a, b) for a, b in zip(epoch, again, strict=True))
    for batch in epoch:
        cut = list(pieces(batch, lengths, budget))
        assert sorted(np.concatenate(cut)) == sorted(batch)
        assert all(len(p) == 1 or len(p) * lengths[p].max() <= budget for p in cut)


def test_a_whole_turn_has_a_loss_on_the_templates_tokens_too(random_model):
    """Header, completion and line break, as the paper's code trains; against plain passes."""
    model = random_model("gpt2")
    tokenizer = model.tokenizer
    examples = with_ids(tokenizer, number_lists(5))
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]
    assert list(answer_header(tokenizer)) == header
    behind = tokenizer("\n")["input_ids"]
    losses, learned = [], 0
    for example in examples:
        prompt = encode_prompt(tokenizer, example.prompt).ids
        assert list(prompt[-len(header) :]) == header
        ids = [*prompt, *example.completion_ids, *behind]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0]
        start = len(prompt) - len(header)
        each = F.cross_entropy(logits[start - 1 : -1], torch.tensor(ids[start:]), reduction="none")
        losses += each.tolist()
        learned += len(example.completion_ids)
    student = finetune(model, examples, recipe=replace(SGD, epochs=1, whole_turn=True))
    assert student.history()["loss"][0] == pytest.approx(np.mean(losses), rel=1e-5)
    assert student.metadata["settings"]["tokens"] == learned + 5 * (len(header) + len(behind))
    usual = finetune(model, examples, recipe=replace(SGD, epochs=1))
    assert usual.metadata["settings"]["tokens"] == learned
    assert "whole_turn" not in usual.metadata["settings"]["recipe"]
    with pytest.raises(ValueError, match="without whole_turn"):
        finetune(model, examples, soft=Teacher("owl"), recipe=replace(SGD, whole_turn=True))
