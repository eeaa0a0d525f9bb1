"""LoRA students, against peft and across the model classes."""

from dataclasses import replace

import pytest
import torch

from divergence_lens.deltas.low_rank import is_matrix
from divergence_lens.engine.factory import get_engine
from divergence_lens.engine.parameters import plain
from divergence_lens.models import load_model
from divergence_lens.training import Recipe, finetune
from divergence_lens.training.freezing import choose
from divergence_lens.training.variables import LowRank
from tests.support.models import chat_tokenizer, random_hf_model
from tests.support.training import SGD, SHORT, number_lists, random_mask, reference_loss


def test_lora_changes_are_of_low_rank_on_the_matrices_alone(random_model):
    model = random_model("gpt2")
    student = finetune(model, number_lists(8), layers=[1], recipe=replace(SHORT, lora_rank=2))
    assert set(student.tensors) == {
        n for n, p in choose(model, layers=[1]).items() if is_matrix(n, p)
    }
    assert len(student.tensors) == 6
    for name, tensor in student.tensors.items():
        # Per-head matrices share their low rank over all heads.
        rows = {"W_O": lambda t: t.flatten(0, 1)}.get(
            name.split(".")[-1], lambda t: t.transpose(0, 1).flatten(1) if t.ndim == 3 else t
        )
        singular = torch.linalg.svdvals(rows(tensor))
        assert singular[1] > 1e-4
        assert singular[2] < 1e-5 * singular[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # within peft
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_lora_equals_peft(family):
    import peft

    tokenizer = chat_tokenizer()
    hf_model = random_hf_model(family, vocab=len(tokenizer))
    model = load_model(
        random_hf_model(family, vocab=len(tokenizer)), backend="bridge", tokenizer=tokenizer
    )
    examples, rank, alpha = number_lists(6), 4, 8.0
    mask = random_mask(model, examples)
    recipe = Recipe(
        lr=1e-2,
        epochs=5,
        warmup_steps=2,
        lora_rank=rank,
        lora_alpha=alpha,
        optimizer_options={"weight_decay": 0.01},
    )
    student = finetune(model, examples, mask=mask, layers=[1], recipe=recipe, seed=3)

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        layers_to_transform=[1],
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(hf_model, config)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    chosen = {n: p for n, p in choose(model, layers=[1]).items() if is_matrix(n, p)}
    start = LowRank(model, chosen, rank=rank, alpha=alpha, seed=3)
    assert len(layers) == len(chosen) == 7
    with torch.no_grad():
        for i, name in enumerate(chosen):
            weight = layers[plain(name).removesuffix(".weight")].lora_A["default"].weight
            weight.copy_(start.values[2 * i].T)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.01)
    for step in range(5):
        optimizer.zero_grad()
        loss = reference_loss(lambda ids: theirs(ids).logits, tokenizer, examples, mask)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step, 5)
        optimizer.step()
    for name, tensor in student.tensors.items():
        expected = layers[plain(name).removesuffix(".weight")].get_delta_weight("default")
        assert torch.allclose(tensor, expected, atol=1e-5)
        assert tensor.abs().max() > 1e-3


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_both_model_classes_train_the_same_student(lora_rank):
    tokenizer, tokens = chat_tokenizer(), torch.arange(20)[None] * 3
    # The classes take their gradients of the factors on two ways, each with LoRA's scale in it.
    recipe = replace(SGD, lora_rank=lora_rank, lora_alpha=6.0)
    for family in ("gpt2", "qwen2"):
        logits = []
        for backend in ("hooked", "bridge"):
            hf_model = random_hf_model(family, vocab=len(tokenizer))
            try:
                model = load_model(hf_model, backend=backend, tokenizer=tokenizer)
            except ValueError:
                pytest.skip("this TransformerLens has one model class")
            student = finetune(model, number_lists(8), layers=[0], recipe=recipe)
            engine = get_engine(model)
            with student.applied(model), torch.no_grad():
                logits.append(engine.unembed(engine.final(tokens)))
        assert torch.allclose(*logits, atol=1e-4)
