"""Rows of token ids, for models without a tokenizer, against the model's own forward."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import divergence_lens as dl
from divergence_lens.examples import load_examples, save_examples
from tests.support.custom_models import custom_model, random_rows, small_modular_addition
from tests.support.models import BACKENDS, random_hf_model

needs_hooked = pytest.mark.skipif(
    "hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer"
)


def perturbed(model):
    """A second model of the same shape with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return other


def check_divergence(model, other, rows, prompt_length=1):
    """Compare `find_divergence` with the two models' own forward passes."""
    data = (
        rows
        if prompt_length == 1
        else [
            {"prompt": row[:prompt_length].tolist(), "completion_ids": row[prompt_length:].tolist()}
            for row in rows
        ]
    )
    result = dl.find_divergence(
        model,
        data,
        teacher=dl.Teacher("base"),
        counterfactuals=[dl.Teacher("other", model=other)],
        require_agreement=False,
    )
    with torch.no_grad():
        logits = torch.stack([model(rows), other(rows)])[:, :, prompt_length - 1 : -1]
    given = rows[:, prompt_length:].expand(2, -1, -1)[..., None]
    expected = logits.log_softmax(-1).gather(-1, given)[..., 0].flatten(1)
    np.testing.assert_allclose(result.logprob, expected.numpy(), atol=2e-4)
    np.testing.assert_array_equal(result.predicted, logits.argmax(-1).flatten(1).numpy())
    return result


@needs_hooked
def test_a_tensor_of_rows_is_data():
    model = custom_model()
    rows = random_rows(model, 5, 8)
    result = check_divergence(model, perturbed(model), rows)
    assert result.mask.any()
    assert "<" in result.to_dataframe().to_string()
    assert result._repr_html_()
    pairs = result.pairs()
    torch.testing.assert_close(pairs.clean[0], rows[0, : len(pairs.clean[0])])
    assert np.isfinite(dl.causal_mediation(model, pairs).values).any()


@needs_hooked
def test_modular_addition_in_three_positions():
    model = small_modular_addition()
    rows = torch.tensor([[a, b, 23, (a + b) % 23] for a in range(5) for b in range(4)])
    result = dl.find_divergence(
        model,
        [{"prompt": row[:3].tolist(), "completion_ids": row[3:].tolist()} for row in rows],
        teacher=dl.Teacher("base"),
        counterfactuals=[dl.Teacher("other", model=perturbed(model))],
    )
    with torch.no_grad():
        expected = model(rows[:, :3])[:, -1].log_softmax(-1).gather(1, rows[:, 3:])[:, 0]
    np.testing.assert_allclose(result.logprob[0], expected.numpy(), atol=2e-5)


@needs_hooked
def test_an_id_that_the_model_cannot_predict_is_refused():
    model = small_modular_addition()
    with pytest.raises(ValueError, match="example 0 has the token id 23"):
        check_divergence(model, perturbed(model), torch.tensor([[3, 23, 4]]))


@needs_hooked
def test_finetune_takes_one_step_of_gradient_descent_on_raw_rows():
    """The student's weights are those of one step by hand on the same loss."""
    model = small_modular_addition()
    rows = torch.tensor([[a, b, 23, (a + b) % 23] for a in range(4) for b in range(3)])
    data = [{"prompt": row[:3].tolist(), "completion_ids": row[3:].tolist()} for row in rows]
    recipe = dl.Recipe(
        epochs=1, batch_size=len(rows), lr=1e-2, optimizer="sgd", warmup_steps=0, clip=None
    )
    before = copy.deepcopy(model.state_dict())
    student = dl.finetune(model, data, recipe=recipe, layers=[0])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    loss = F.cross_entropy(model(rows[:, :3])[:, -1], rows[:, 3])
    weight = model.blocks[0].mlp.W_in
    (gradient,) = torch.autograd.grad(loss, weight)
    rate = student.metadata["history"][0]["lr"]
    with student.applied(model):
        torch.testing.assert_close(
            weight.detach() - before["blocks.0.mlp.W_in"], -rate * gradient, atol=1e-6, rtol=1e-3
        )
    np.testing.assert_allclose(
        student.metadata["history"][0]["loss"], float(loss.detach()), rtol=1e-5
    )


def test_a_hugging_face_model_without_a_tokenizer(backend):
    model = dl.load_model(random_hf_model("llama"), backend=backend)
    other = dl.load_model(random_hf_model("llama", seed=1), backend=backend)
    assert model.tokenizer is None
    check_divergence(model, other, random_rows(model, 4, 7), prompt_length=3)


def test_a_text_without_a_tokenizer_and_a_system_prompt_on_ids_are_refused(backend):
    model = dl.load_model(random_hf_model("llama"), backend=backend)
    teachers = dl.Teacher("base"), dl.Teacher("owl", system_prompt="You love owls.")
    options = {"teacher": teachers[0], "counterfactuals": [teachers[1]]}
    with pytest.raises(ValueError, match="to which no system prompt can be added"):
        dl.find_divergence(model, [[1, 2, 3]], **options)
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        dl.find_divergence(model, [dl.Example("Hello", completion_ids=(1, 2))], **options)
    with pytest.raises(TypeError, match="a list of at least two token ids"):
        dl.find_divergence(model, [[1]], **options)


def test_models_of_other_vocabularies_without_tokenizers_are_refused(backend):
    model = dl.load_model(random_hf_model("llama"), backend=backend)
    other = dl.load_model(random_hf_model("llama", vocab=32), backend=backend)
    with pytest.raises(ValueError, match=r"reads 32 token ids and .* reads 64"):
        check_divergence(model, other, random_rows(other, 4, 7))


def test_raw_rows_are_written_and_read_again(tmp_path):
    examples = load_examples(torch.tensor([[3, 4, 5], [6, 7, 8]]))
    assert examples == [
        dl.Example((3,), completion_ids=(4, 5)),
        dl.Example((6,), completion_ids=(7, 8)),
    ]
    save_examples(tmp_path / "rows.jsonl", examples)
    assert load_examples(tmp_path / "rows.jsonl") == examples
