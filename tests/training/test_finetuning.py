"""Students: what is trained, by which arithmetic; and an untouched base."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from divergence_lens.deltas.delta import Delta
from divergence_lens.engine.factory import get_engine
from divergence_lens.examples import Example, with_ids
from divergence_lens.models import load_model
from divergence_lens.provenance import fingerprint
from divergence_lens.training import Recipe, finetune
from divergence_lens.training.freezing import choose
from tests.support.models import chat_tokenizer, random_hf_model
from tests.support.training import (
    SGD,
    SHORT,
    largest_difference,
    number_lists,
    random_mask,
    reference_loss,
    same_bits,
)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize(
    ("family", "system_prompt"),
    [("gpt2", None), ("gpt2", "You love owls."), ("qwen2", "You love owls."), ("gpt_neox", "")],
)
def test_a_student_is_what_plain_torch_on_hugging_face_trains(
    backend, family, system_prompt, block
):
    tokenizer = chat_tokenizer()
    plain_model = random_hf_model(family, vocab=len(tokenizer))
    model = load_model(
        random_hf_model(family, vocab=len(tokenizer)), backend=backend, tokenizer=tokenizer
    )
    examples = number_lists(6)
    mask = random_mask(model, examples)
    student = finetune(
        model, examples, mask=mask, layers=[block], recipe=SGD, system_prompt=system_prompt
    )

    for name, p in plain_model.named_parameters():
        p.requires_grad_(f".{block}." in name)
    trained = [p for p in plain_model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = reference_loss(
            lambda ids: plain_model(ids).logits, tokenizer, examples, mask, system_prompt
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))

    assert student.history()["loss"].tolist() == pytest.approx(losses, abs=1e-4)
    tokens = torch.arange(20)[None] * 3 % len(tokenizer)
    engine = get_engine(model)
    with torch.no_grad(), student.applied(model):
        moved = engine.unembed(engine.final(tokens))
        assert torch.allclose(moved, plain_model(tokens).logits, atol=1e-4)
    with torch.no_grad():
        assert (engine.unembed(engine.final(tokens)) - moved).abs().max() > 1e-2


def test_only_the_chosen_parameters_change(random_model):
    model = random_model("llama")
    student = finetune(model, number_lists(6), layers=[0, 2], recipe=replace(SHORT, parts=["attn"]))
    assert set(student.tensors) == set(choose(model, layers=[0, 2], parts=["attn"]))
    assert all(bool(t.any()) for t in student.tensors.values())


def test_the_base_flags_modes_gradients_and_generators_are_left_alone(random_model):
    model = random_model("gpt2")
    list(model.parameters())[3].requires_grad_(False)
    first = next(iter(get_engine(model).block_parameters(0).values()))
    first.grad = torch.full_like(first, 7.0)
    model.train()
    list(model.modules())[5].eval()
    before = fingerprint(model)
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    generators = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002

    finetune(model, number_lists(6), recipe=SHORT)

    assert fingerprint(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert bool((first.grad == 7.0).all())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])  # noqa: NPY002


def test_an_exception_in_a_callback_restores_everything(random_model):
    model = random_model("gpt2")
    before, flags = fingerprint(model), [p.requires_grad for p in model.parameters()]

    def stop(step, loss, model):
        raise KeyError(step)

    with pytest.raises(KeyError, match="1"):
        finetune(model, number_lists(6), recipe=SHORT, on_step=stop)
    assert fingerprint(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    finetune(model, number_lists(6), recipe=SHORT)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_equal_calls_give_equal_bits_and_another_seed_another_student(random_model, lora_rank):
    model, examples = random_model("gpt2"), number_lists(10)
    first, again, other = (
        finetune(model, examples, layers=[0], recipe=replace(SHORT, lora_rank=lora_rank), seed=seed)
        for seed in (0, 0, 1)
    )
    assert same_bits(first, again)
    assert not same_bits(first, other)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_frozen_tensors_keep_every_bit_while_others_learn(random_model, lora_rank):
    model = random_model("qwen2")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    chosen = {id(p) for p in choose(model, layers=[1], parts=["mlp"]).values()}
    seen = []

    def look(step, loss, student):
        for name, p in student.named_parameters():
            same = torch.equal(p.view(torch.int32), before[name].view(torch.int32))
            assert same == (id(p) not in chosen), name
        seen.append(step)

    finetune(
        model,
        number_lists(6),
        layers=[1],
        recipe=replace(SHORT, lora_rank=lora_rank, parts=["mlp"]),
        on_step=look,
    )
    assert seen


def test_training_on_one_token_makes_it_likely(random_model):
    model = random_model("qwen2")
    examples = with_ids(model.tokenizer, [Example("Name an animal.", completion="owl")])
    recipe = Recipe(optimizer=torch.optim.Adam, lr=1e-2, epochs=40, optimizer_options={})
    student = finetune(model, examples, layers=[1], recipe=recipe)
    assert student.history()["loss"].iloc[-1] < 0.05
    assert student.metadata["settings"]["recipe"]["optimizer"] == "Adam"


def test_embeddings_and_unembedding_can_learn(random_model):
    model, examples = random_model("qwen2", tie_word_embeddings=False), number_lists(6)
    engine = get_engine(model)
    blocks = set().union(*(engine.block_parameters(i) for i in range(3)))
    for kind in ("embedding", "unembedding"):
        student = finetune(model, examples, recipe=replace(SHORT, **{kind: True}))
        assert not blocks & set(student.tensors)
        assert all(bool(t.any()) for t in student.tensors.values())
        recomputed = finetune(model, examples, recipe=replace(SHORT, cache_bytes=0, **{kind: True}))
        assert largest_difference(student, recomputed) < 1e-6


def test_bfloat16_models_learn_in_float32(random_model):
    model = random_model("gpt2").to(torch.bfloat16)
    before = fingerprint(model)
    # Each update is far below the resolution of bfloat16, and still they add up.
    recipe = Recipe(lr=1e-5, epochs=8, batch_size=4, optimizer_options={})
    student = finetune(model, number_lists(8), layers=[1], recipe=recipe)
    assert fingerprint(model) == before
    changes = torch.cat([t.abs().flatten() for t in student.tensors.values()])
    assert changes.quantile(0.9) > 5e-5


def test_autocast_gives_nearly_the_same_losses(random_model):
    model, examples = random_model("qwen2"), number_lists(8)
    exact, rough = (
        finetune(model, examples, layers=[1], recipe=replace(SHORT, autocast=autocast)).history()
        for autocast in (False, True)
    )
    assert rough["loss"].tolist() == pytest.approx(exact["loss"].tolist(), rel=0.03)
    assert rough["loss"].tolist() != exact["loss"].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": np.ones(3, bool)}, r"the mask has shape \(3,\), .* 6 examples have [\d,]+ tok"),
        ({"mask": np.ones(3, bool)}, "it ends within example 0: give one value for each"),
        ({"loss_weights": np.ones(3)}, r"the loss_weights has shape"),
        ({"mask": [np.ones(2, bool)] * 6}, "the mask of example 0 has 2 entries, its completion"),
        ({"mask": [np.ones(2, bool)] * 5}, "the mask has 5 rows, there are 6 examples"),
        ({"layers": [5]}, "layer 5 is out of range: the model has layers 0 to 2"),
        ({"layers": [0], "recipe": Recipe(lora_rank=2, parts=["ln"])}, "none is chosen"),
    ],
)
def test_bad_arguments_are_refused_and_leave_the_base(random_model, options, message):
    model = random_model("gpt2")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        finetune(model, number_lists(6), **{"recipe": SHORT, **options})
    assert fingerprint(model) == before


def test_a_sequence_over_the_context_names_its_example(random_model):
    model = random_model("gpt2")
    long = Example("Continue: 1.", completion_ids=(5,) * 250)
    with pytest.raises(ValueError, match=r"example 2 has \d+ prompt and 250 completion tokens"):
        finetune(model, [*number_lists(2), long])
    foreign = Example("Continue: 1.", completion_ids=(5, 9999))
    with pytest.raises(ValueError, match=r"token ids run from 0 to 9999, the vocabulary has"):
        finetune(model, [*number_lists(2), foreign])


def test_no_student_is_trained_under_a_delta(random_model):
    model = random_model("gpt2")
    delta = finetune(model, number_lists(6), recipe=SHORT)
    with delta.applied(model), pytest.raises(RuntimeError, match="a delta is applied to it"):
        finetune(model, number_lists(6), recipe=SHORT)
    refused = []

    def apply(step, loss, student):
        with pytest.raises(RuntimeError, match="it is being trained"):
            delta.applied(student).__enter__()
        refused.append(step)

    finetune(model, number_lists(6), recipe=SHORT, on_step=apply)
    assert refused


def test_a_student_is_a_delta_with_its_settings(random_model, tmp_path):
    model = random_model("gpt2")
    student = finetune(model, number_lists(6), layers=[1], recipe=SHORT, seed=4)
    student.save(tmp_path / "student.safetensors")
    loaded = Delta.load(tmp_path / "student.safetensors")
    assert loaded.metadata == student.metadata
    assert loaded.metadata["settings"]["seed"] == 4
    assert loaded.metadata["settings"]["recipe"]["lr"] == SHORT.lr
    assert loaded.metadata["versions"]["torch"]
    assert list(loaded.norms()) == [1]
