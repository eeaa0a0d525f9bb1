"""Soft distillation, against plain passes of teacher and student."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_lens.chat import encode_prompt
from divergence_lens.deltas import Delta, base_fingerprint
from divergence_lens.engine import get_engine
from divergence_lens.examples import with_ids
from divergence_lens.teachers import Teacher
from divergence_lens.training import Recipe, SoftTargets, finetune
from divergence_lens.training import cross_entropy as _cross_entropy
from divergence_lens.training.soft import soft_divergence
from tests.support.training import SGD, SHORT, largest_difference, number_lists, random_mask

OWL = Teacher("owl", system_prompt="You love owls.")


def plain_divergence(student, teacher, *, direction, temperature, top_k):
    """Loop over positions, one outcome at a time, in float64."""
    values = []
    for own, other in zip(student, teacher, strict=True):
        q, p = (own / temperature).softmax(-1), (other / temperature).softmax(-1)
        if top_k is not None and top_k < len(p):
            order = p.argsort(descending=True)
            q, p = (torch.cat([x[order[:top_k]], x[order[top_k:]].sum()[None]]) for x in (q, p))
        first, second = (p, q) if direction == "forward" else (q, p)
        values.append(temperature**2 * (first * (first.log() - second.log())).sum())
    return torch.stack(values)


@given(
    direction=st.sampled_from(["forward", "reverse"]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    top_k=st.sampled_from([None, 1, 3, 50]),
    rows=st.integers(1, 9),
)
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("trained", [False, True])
def test_losses_and_gradients_are_those_of_a_plain_computation(
    trained, direction, temperature, top_k, rows
):
    draw = torch.Generator().manual_seed(rows)
    hidden, states, matrix, other = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((8, 5), (8, 5), (5, 11), (5, 12))
    )
    weights = torch.rand(8, generator=draw, dtype=torch.float64)
    target = (states @ other)[:, :11]
    settings = {"direction": direction, "temperature": temperature, "top_k": top_k}
    soft = SoftTargets(teacher=OWL, **settings)

    def loss(logits, chunk):
        return soft_divergence(logits, (states @ other)[chunk], soft) @ weights[chunk]

    (one, own), (two, plain) = (
        (hidden.clone().requires_grad_(), matrix.clone().requires_grad_(trained)) for _ in range(2)
    )
    chunked = _cross_entropy.recomputed_loss if trained else _cross_entropy.chunked_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cross_entropy, "_CHUNK_ELEMENTS", rows)
        value = chunked(lambda part: part @ own, one, loss, d_vocab=1)
        (2 * value).backward()
    expected = plain_divergence(two @ plain, target, **settings) @ weights
    (2 * expected).backward()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-9, atol=1e-9)
    if trained:
        torch.testing.assert_close(own.grad, plain.grad, rtol=1e-9, atol=1e-9)


def first_loss(model, examples, mask, teacher, **settings):
    """The mean divergence of the unmasked tokens before any update, from whole passes."""
    values, end = [], 0
    for example in with_ids(model.tokenizer, examples):
        logits = []
        for reader in (Teacher("student"), teacher):
            prompt = encode_prompt(
                model.tokenizer, example.prompt, system_prompt=reader.system_prompt
            ).ids
            with torch.no_grad(), reader.applied(model) as applied:
                row = applied(torch.tensor([[*prompt, *example.completion_ids]]))
            logits.append(row[0, len(prompt) - 1 : -1].double())
        own = mask[end : end + len(logits[0])]
        end += len(logits[0])
        values += plain_divergence(*logits, **settings)[torch.from_numpy(own)].tolist()
    return np.mean(values)


def trained_teacher(model, *names):
    """A teacher with changed parameters, whose names contain one of `names`."""
    draw = torch.Generator().manual_seed(0)
    parameters = get_engine(model).named_parameters()
    changes = {
        name: 0.2 * torch.randn(value.shape, generator=draw)
        for name, value in parameters.items()
        # A HookedTransformer has biases of zero that the architecture lacks.
        if any(part in name for part in names) and value.any()
    }
    assert changes
    return Teacher("trained", system_prompt="Hi.", delta=Delta(changes, base_fingerprint(model)))


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "forward", "temperature": 1.0, "top_k": None},
        {"direction": "reverse", "temperature": 2.0, "top_k": 4},
    ],
)
@pytest.mark.parametrize("weights", ["prompt", "block", "unembed"])
def test_a_student_starts_at_the_teachers_divergence(weights, options, random_model):
    model, examples = random_model("llama"), number_lists(6)
    mask = random_mask(model, examples, share=0.5)
    teacher = OWL if weights == "prompt" else trained_teacher(model, ".1.", "unembed", "lm_head")
    if weights == "block":
        teacher = trained_teacher(model, ".0.")
    student = finetune(
        model,
        examples,
        mask=mask,
        layers=[1],
        recipe=replace(SGD, epochs=1),
        soft=SoftTargets(teacher=teacher, **options),
    )
    expected = first_loss(model, examples, mask, teacher, **options)
    assert student.history()["loss"][0] == pytest.approx(expected, rel=1e-4)
    described = student.metadata["settings"]["soft"]
    assert described["teacher"] == teacher.name
    assert described["top_k"] == options["top_k"]


def test_a_student_approaches_its_teacher(random_model):
    """All layers with LoRA: the divergence at the training tokens falls."""
    model, examples = random_model("llama"), number_lists(8)
    teacher = trained_teacher(model, ".0.", ".1.")
    recipe = Recipe(epochs=15, batch_size=8, lr=0.02, warmup_steps=2, lora_rank=4)
    student = finetune(model, examples, soft=teacher, recipe=recipe)
    losses = student.history()["loss"]
    assert losses.iloc[-1] < 0.5 * losses.iloc[0]
    # A student that equals its teacher has nothing to learn.
    same = finetune(model, examples, soft=Teacher("itself"), recipe=SGD, layers=[0])
    assert same.history()["loss"].abs().max() < 1e-5
    assert max(float(t.abs().max()) for t in same.tensors.values()) < 1e-4


@pytest.mark.parametrize("unembedding", [False, True])
def test_chunks_and_pieces_do_not_change_the_student(random_model, monkeypatch, unembedding):
    model, examples = random_model("llama"), number_lists(10)
    recipe = replace(SHORT, unembedding=unembedding)
    options = {"soft": OWL, "layers": [1], "seed": 3}
    whole = finetune(model, examples, recipe=recipe, **options)
    monkeypatch.setattr(_cross_entropy, "_CHUNK_ELEMENTS", 3000)
    parts = finetune(model, examples, recipe=replace(recipe, batch_tokens=150), **options)
    assert largest_difference(whole, parts) < 1e-5


def test_a_stopped_run_belongs_to_its_teacher(random_model, tmp_path):
    model, examples = random_model("llama"), number_lists(10)
    options = {"layers": [1], "recipe": replace(SHORT, checkpoint_every=2)}

    def stop(step, loss, model):
        if step == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        finetune(model, examples, soft=OWL, on_step=stop, checkpoint_dir=tmp_path, **options)
    with pytest.raises(ValueError, match="another"):
        finetune(model, examples, checkpoint_dir=tmp_path, **options)
    resumed = finetune(model, examples, soft=OWL, checkpoint_dir=tmp_path, **options)
    assert largest_difference(resumed, finetune(model, examples, soft=OWL, **options)) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "sideways"}, 'direction is \'sideways\'; use "forward" or "reverse"'),
        ({"temperature": 0.0}, "temperature is 0.0; it must be a positive number"),
        ({"top_k": 0}, "top_k is 0; it must be 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SoftTargets(teacher=OWL, **options)
