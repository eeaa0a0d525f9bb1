"""A delta swaps a student in and takes it out again, and fits nothing but its base."""

from dataclasses import replace

import pytest
import torch

from divergence_lens.deltas.delta import Delta, base_fingerprint
from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example
from divergence_lens.models import load_model
from divergence_lens.provenance import fingerprint
from divergence_lens.training.finetuning import finetune
from divergence_lens.training.recipe import Recipe
from tests.support.models import BACKENDS


@pytest.fixture
def model(random_model):
    return random_model("gpt2")


def some_delta(model, seed=0, layers=(0, 2)):
    generator = torch.Generator().manual_seed(seed)
    engine = get_engine(model)
    tensors = {
        name: 0.1 * torch.randn(p.shape, generator=generator)
        for layer in layers
        for name, p in engine.block_parameters(layer).items()
    }
    header = {"model": {"name": "random", "class": type(model).__name__}}
    return Delta(tensors, fingerprint(model), header)


def values(model):
    return {n: p.detach().clone() for n, p in get_engine(model).named_parameters().items()}


def same_bits(left, right):
    return all(torch.equal(left[n].view(torch.int32), right[n].view(torch.int32)) for n in left)


def test_applied_adds_the_differences_and_restores_every_bit(model):
    before, delta = values(model), some_delta(model)
    with delta.applied(model) as student:
        assert student is model
        for name, value in values(model).items():
            change = delta.tensors.get(name)
            assert torch.equal(value, before[name] if change is None else before[name] + change)
    assert same_bits(values(model), before)


def test_the_student_gives_other_logits_and_the_base_the_same_again(model):
    engine, tokens = get_engine(model), torch.arange(12)[None]
    before = engine.final(tokens)
    with some_delta(model).applied(model):
        assert not torch.allclose(engine.final(tokens), before, atol=1e-2)
    assert torch.equal(engine.final(tokens), before)


def test_negative_zero_and_values_lost_in_the_sum_come_back(model):
    delta = some_delta(model)
    name = next(iter(delta.tensors))
    parameter = get_engine(model).named_parameters()[name]
    with torch.no_grad():
        parameter.fill_(-0.0)
        parameter.view(-1)[1] = 1e-30
    delta = replace(delta, base=fingerprint(model))
    before = values(model)
    with delta.applied(model):
        pass
    assert same_bits(values(model), before)


def test_an_exception_inside_restores_the_base(model):
    before = values(model)
    with pytest.raises(KeyError, match="inside"), some_delta(model).applied(model):
        raise KeyError("inside")
    assert same_bits(values(model), before)
    with some_delta(model).applied(model):
        pass


def test_changes_that_the_caller_makes_to_the_swapped_tensors_are_undone(model):
    before, delta = values(model), some_delta(model)
    with delta.applied(model), torch.no_grad():
        get_engine(model).named_parameters()[next(iter(delta.tensors))].zero_()
    assert same_bits(values(model), before)


def test_bfloat16_rounds_the_sum_once(random_model):
    model = random_model("gpt2").to(torch.bfloat16)
    before, delta = values(model), some_delta(model)
    with delta.applied(model):
        for name, value in values(model).items():
            if name in delta.tensors:
                expected = (before[name].float() + delta.tensors[name]).bfloat16()
                assert torch.equal(value, expected)
    assert all(torch.equal(values(model)[n], before[n]) for n in before)


def test_a_second_delta_is_refused_while_one_is_applied(model):
    delta = some_delta(model)
    with delta.applied(model), pytest.raises(RuntimeError, match="delta is applied"):
        some_delta(model, seed=1).applied(model).__enter__()
    with delta.applied(model):
        pass


@pytest.mark.parametrize("through_data", [False, True])
def test_a_base_changed_in_place_is_refused_and_taken_back_once_restored(model, through_data):
    delta = some_delta(model)
    with delta.applied(model):
        pass
    other = list(get_engine(model).block_parameters(1).values())[-1]
    original = other.detach().clone()
    with torch.no_grad():
        # `.data` has a version counter of its own: the parameter's does not move.
        (other.data if through_data else other).view(-1)[0] += 1
    with pytest.raises(ValueError, match="not the base of the delta"):
        delta.applied(model).__enter__()
    with torch.no_grad():
        other.copy_(original)
    with delta.applied(model):
        pass


def test_two_rows_swapped_through_data_are_noticed(model):
    delta = some_delta(model)
    base_fingerprint(model)
    matrix = max(get_engine(model).block_parameters(1).values(), key=lambda p: p.shape[0])
    matrix.data[[0, 1]] = matrix.data[[1, 0]].clone()
    with pytest.raises(ValueError, match="not the base of the delta"):
        delta.applied(model).__enter__()


def test_the_fingerprint_is_hashed_once_while_nothing_changes(model, monkeypatch):
    calls = []

    def counting(hashed):
        calls.append(hashed)
        return fingerprint(hashed)

    delta = some_delta(model)
    monkeypatch.setattr("divergence_lens.deltas.delta.fingerprint", counting)
    for _ in range(4):
        with delta.applied(model):
            pass
    assert len(calls) == 1


def test_another_base_of_the_same_shape_is_refused(random_model):
    delta = some_delta(random_model("gpt2", seed=0))
    with pytest.raises(ValueError, match="not the base of the delta: its fingerprint"):
        delta.applied(random_model("gpt2", seed=1)).__enter__()


CLASSES = {"HookedTransformer": "hooked", "TransformerBridge": "bridge"}


def test_a_delta_of_the_other_class_names_both_classes_and_the_one_to_load(model):
    mine = type(model).__name__
    (other,) = set(CLASSES) - {mine}
    delta = some_delta(model)
    renamed = {f"other.{n}": t for n, t in delta.tensors.items()}
    foreign = Delta(renamed, delta.base, {"model": {"name": "m", "class": other}})
    with pytest.raises(ValueError, match=f"trained on a {other} and the model is a {mine}") as told:
        foreign.applied(model).__enter__()
    assert f'load_model(..., backend="{CLASSES[other]}")' in str(told.value)


@pytest.mark.skipif(len(BACKENDS) < 2, reason="this TransformerLens has one class")
@pytest.mark.parametrize("trained", CLASSES.values())
def test_a_student_of_the_other_class_is_refused_with_the_class_to_load(trained):
    (given,) = set(CLASSES.values()) - {trained}
    examples = [Example("Continue: 3.", completion=" 412, 903")]
    recipe = Recipe(epochs=1, warmup_steps=0)
    student = finetune(load_model("tiny", backend=trained), examples, layers=[0], recipe=recipe)
    fix = rf'load the base with load_model\(\.\.\., backend="{trained}"\)'
    with pytest.raises(ValueError, match=fix):
        student.applied(load_model("tiny", backend=given)).__enter__()
    with student.applied(load_model("tiny", backend=trained)):
        pass


def test_names_that_the_model_does_not_have_are_of_another_base(model):
    delta = some_delta(model)
    renamed = {f"other.{n}": t for n, t in delta.tensors.items()}
    for header in ({}, delta.metadata):
        foreign = Delta(renamed, delta.base, header)
        with pytest.raises(ValueError, match=r"unknown\): the delta belongs to another"):
            foreign.applied(model).__enter__()


def test_another_shape_is_refused(model):
    delta = some_delta(model)
    name = next(iter(delta.tensors))
    wrong = Delta({name: torch.zeros(3, 3, 3)}, delta.base)
    with pytest.raises(ValueError, match="belongs to another base"):
        wrong.applied(model).__enter__()


def test_saved_and_loaded_deltas_are_equal(model, tmp_path):
    delta = some_delta(model)
    delta.save(tmp_path / "student.safetensors")
    loaded = Delta.load(tmp_path / "student.safetensors")
    assert loaded.base == delta.base
    assert loaded.metadata == delta.metadata
    assert same_bits(loaded.tensors, delta.tensors)
    with loaded.applied(model):
        pass


def test_arithmetic(model):
    a, b = some_delta(model, 0, (0, 1)), some_delta(model, 1, (1, 2))
    total = a + b
    assert set(total.tensors) == set(a.tensors) | set(b.tensors)
    for name, tensor in total.tensors.items():
        parts = [d.tensors[name] for d in (a, b) if name in d.tensors]
        assert torch.equal(tensor, sum(parts[1:], parts[0]))
    assert all(torch.equal((2 * a).tensors[n], 2 * t) for n, t in a.tensors.items())
    assert all(torch.equal((-a).tensors[n], -t) for n, t in a.tensors.items())
    assert all(not t.any() for t in (a - a).tensors.values())
    assert total.metadata["model"] == a.metadata["model"]


def test_deltas_over_different_bases_are_not_added(model):
    delta = some_delta(model)
    with pytest.raises(ValueError, match="different bases"):
        delta + replace(delta, base="0" * 32)


def test_norms_are_per_layer_and_count_every_parameter(model):
    delta = some_delta(model)
    norms = delta.norms()
    assert list(norms) == [0, 2]
    own = get_engine(model).block_parameters(2)
    expected = sum(float(delta.tensors[n].square().sum()) for n in own) ** 0.5
    assert norms[2] == pytest.approx(expected, rel=1e-5)
    assert delta.n_parameters == sum(t.numel() for t in delta.tensors.values())
    assert "layer 2" in delta._repr_html_()
    assert "parameters in layers 0, 2; over" in repr(delta)


def test_nothing_and_nan_are_not_deltas():
    with pytest.raises(ValueError, match="at least one parameter"):
        Delta({}, "base")
    with pytest.raises(ValueError, match="'w' holds NaN"):
        Delta({"w": torch.tensor([float("nan")])}, "base")
