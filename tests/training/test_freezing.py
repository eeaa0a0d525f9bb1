"""Exactly the chosen parameters are trainable, on either model class."""

import pytest

from divergence_lens.engine.factory import get_engine
from divergence_lens.engine.parameters import canonical
from divergence_lens.training.freezing import freeze_except


def learning(model):
    return {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gpt_neox", "llama"])
def test_only_the_chosen_layer_learns(random_model, family):
    model = random_model(family)
    with freeze_except(model, layers=[1]) as trainable:
        assert set(trainable) <= set(get_engine(model).block_parameters(1))
        assert learning(model) == {id(p) for p in trainable.values()}
        assert trainable.n_parameters == sum(p.numel() for p in trainable.values())


def test_flags_are_restored_after_an_exception(random_model):
    model = random_model("gpt2")
    first, *_ = model.parameters()
    first.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), freeze_except(model, layers=[0]):
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == before


def test_flags_last_until_restored_without_a_with_block(random_model):
    model = random_model("gpt2")
    before = learning(model)
    trainable = freeze_except(model, layers=[0], parts=["mlp"])
    assert learning(model) == {id(p) for p in trainable.values()}
    trainable.restore()
    assert learning(model) == before


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gpt_neox", "llama"])
def test_parts_mean_the_same_on_both_classes(random_model, family):
    model = random_model(family)

    def count(*parts):
        with freeze_except(model, layers=[0], parts=parts) as trainable:
            return trainable.n_parameters

    d_model, d_mlp, kv = 32, 64, 32 if family in ("gpt2", "gpt_neox") else 16
    assert count("W_Q") == count("W_O") == d_model * d_model
    assert count("W_K") == count("W_V") == d_model * kv
    assert count("W_in") == count("W_out") == d_model * d_mlp
    assert count("ln") == (4 if family in ("gpt2", "gpt_neox") else 2) * d_model
    biases = {"gpt2": d_model, "gpt_neox": d_model, "qwen2": d_model, "llama": 0}[family]
    attention = 2 * d_model**2 + 2 * d_model * kv
    if biases:
        assert count("b_Q") == biases
        output = 0 if family == "qwen2" else d_model
        assert count("attn") == attention + d_model + 2 * kv + output
    else:
        assert count("attn") == attention
    with freeze_except(model, layers=[0]) as every:
        assert count("attn", "mlp", "ln") == every.n_parameters


def test_biases_that_the_architecture_lacks_do_not_learn(random_model):
    model = random_model("llama")
    with freeze_except(model) as trainable:
        assert not any(canonical(n).split(".")[-1].startswith("b_") for n in trainable)


def test_embedding_and_unembedding(random_model):
    model = random_model("qwen2", tie_word_embeddings=False)
    vocab, d_model = model.cfg.d_vocab, 32
    with freeze_except(model, embedding=True) as trainable:
        assert trainable.n_parameters == vocab * d_model
    with freeze_except(model, unembedding=True) as trainable:
        assert trainable.n_parameters == vocab * d_model + d_model


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_tied_embeddings_are_one_tensor_or_two(random_model, backend, family):
    """A bridge shares the matrix, as Hugging Face does; a HookedTransformer has a copy of it."""
    model = random_model(family, tie_word_embeddings=True)
    vocab, d_model, positions = model.cfg.d_vocab, 32, 256 * 32 if family == "gpt2" else 0
    with freeze_except(model, embedding=True) as trainable:
        assert trainable.n_parameters == vocab * d_model + positions
        assert learning(model) == {id(p) for p in trainable.values()}
    with freeze_except(model, unembedding=True) as trainable:
        copy = vocab * d_model if backend == "hooked" else 0
        norm = 2 * d_model if family == "gpt2" else d_model
        assert trainable.n_parameters == copy + norm


def test_a_pattern_chooses_by_name(random_model):
    model = random_model("gpt2")
    name = next(iter(get_engine(model).block_parameters(2)))
    with freeze_except(model, pattern=name) as trainable:
        assert list(trainable) == [name]


def test_the_table_names_shapes_and_counts(random_model):
    trainable = freeze_except(random_model("gpt2"), layers=[0], parts=["ln"])
    assert "4 tensors, 128 parameters" in repr(trainable)
    assert "(32,)" in repr(trainable)
    assert trainable._repr_html_().count("<tr>") == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [3]}, "layer 3 is out of range: the model has layers 0 to 2"),
        ({"layers": [-1]}, "layer -1 is out of range"),
        ({"layers": [True]}, "layer True is out of range"),
        ({"layers": []}, "nothing is left to train"),
        ({"parts": ["W_QQ"]}, "is called 'W_QQ'; nearest: .*W_Q"),
        ({"pattern": "nothing*"}, "no parameter matches 'nothing"),
        ({"pattern": "*", "layers": [0]}, "not both"),
    ],
)
def test_bad_choices_are_refused_and_change_no_flag(random_model, options, message):
    model = random_model("gpt2")
    before = learning(model)
    with pytest.raises(ValueError, match=message):
        freeze_except(model, **options)
    assert learning(model) == before


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("layers", ["0", ["1"], [1.0], [None]])
def test_layers_that_are_no_whole_numbers_are_refused(random_model, layers):
    with pytest.raises(TypeError, match="layers are whole numbers from 0 to 2"):
        freeze_except(random_model("gpt2"), layers=layers)
