"""Students in the formats of others: what Hugging Face and peft load gives the student's logits."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from divergence_lens.deltas.delta import Delta
from divergence_lens.engine.factory import get_engine
from divergence_lens.models import load_model
from divergence_lens.training.finetuning import Recipe, finetune
from tests.support.models import BACKENDS, FAMILIES, chat_tokenizer, random_hf_model
from tests.support.training import number_lists

SHORT = Recipe(epochs=2, batch_size=4, warmup_steps=1, lr=0.02)
TOKENS = torch.arange(20)[None] * 5 % 100


def both(family, backend, **sizes):
    """The model and, apart from it, the same weights in Hugging Face's class."""
    tokenizer = chat_tokenizer()

    def made():
        return random_hf_model(family, vocab=len(tokenizer), **sizes)

    try:
        return load_model(made(), backend=backend, tokenizer=tokenizer), made()
    except ValueError:
        pytest.skip(f"{family} has no such class")


@torch.no_grad()
def student_logits(model, student):
    engine = get_engine(model)
    before = engine.unembed(engine.final(TOKENS))
    with student.applied(model):
        logits = engine.unembed(engine.final(TOKENS))
    assert (logits - before).abs().max() > 1e-3
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face_gives_the_student_s_logits(backend, family, tmp_path):
    model, hf_model = both(family, backend)
    student = finetune(model, number_lists(4), layers=[0, 2], recipe=SHORT)
    folder = student.to_huggingface(tmp_path / "student", base=hf_model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(TOKENS).logits, student_logits(model, student), atol=1e-5)
    # All that was not trained is the base, bit for bit.
    changed = {
        name
        for name, value in loaded.state_dict().items()
        if not torch.equal(value, hf_model.state_dict()[name])
    }
    assert changed
    assert all(".0." in name or ".2." in name for name in changed)
    about = json.loads((folder / "divergence_lens.json").read_text())
    assert about["base"] == student.base


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_tied_embeddings_are_exported_as_they_were_trained(backend, family, tmp_path):
    model, hf_model = both(family, backend, tie_word_embeddings=True)
    student = finetune(model, number_lists(4), recipe=replace(SHORT, embedding=True))
    folder = student.to_huggingface(tmp_path / "student", base=hf_model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(TOKENS).logits, student_logits(model, student), atol=1e-5)
    # A HookedTransformer has a matrix of its own for each end, a bridge one for both.
    assert loaded.config.tie_word_embeddings == (backend == "bridge")


def test_unembedding_and_final_norm_are_exported(backend, tmp_path):
    model, hf_model = both("gpt_neox", backend)
    student = finetune(model, number_lists(4), recipe=replace(SHORT, unembedding=True))
    folder = student.to_huggingface(tmp_path / "student", base=hf_model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(TOKENS).logits, student_logits(model, student), atol=1e-5)


def test_a_shipped_base_is_found_by_its_name_and_brings_its_tokenizer(tiny, tmp_path):
    student = finetune(tiny, number_lists(4), layers=[1], recipe=replace(SHORT, lora_rank=2))
    folder = student.to_huggingface(tmp_path / "student")
    again = load_model(folder, backend="bridge")
    text = "1, 2, 3"
    assert again.tokenizer(text)["input_ids"] == tiny.tokenizer(text)["input_ids"]
    with torch.no_grad():
        engine = get_engine(again)
        logits = engine.unembed(engine.final(TOKENS))
    assert torch.allclose(logits, student_logits(tiny, student), atol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # within peft
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen2", "gemma2"])
def test_peft_loads_the_adapter(backend, family, tmp_path):
    import peft

    model, hf_model = both(family, backend)
    recipe = Recipe(epochs=2, batch_size=4, lr=0.02, lora_rank=3, lora_alpha=6.0)
    student = finetune(model, number_lists(4), layers=[1, 2], recipe=recipe)
    folder = student.to_peft(tmp_path / "adapter", base=hf_model)
    theirs = peft.PeftModel.from_pretrained(hf_model, folder).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(TOKENS).logits, student_logits(model, student), atol=1e-5)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (3, 6)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
def test_sums_and_opposites_of_lora_students_are_adapters_too(backend, tmp_path):
    import peft

    model, hf_model = both("llama", backend)
    one, two = (
        finetune(
            model,
            number_lists(4),
            layers=[layer],
            recipe=replace(SHORT, lora_rank=layer + 1),
            seed=layer,
        )
        for layer in (1, 2)
    )
    student = 0.5 * one + (-two) + one
    assert student.rank == 4
    folder = student.to_peft(tmp_path / "adapter", base=hf_model)
    theirs = peft.PeftModel.from_pretrained(hf_model, folder).eval()
    with torch.no_grad():
        assert torch.allclose(theirs(TOKENS).logits, student_logits(model, student), atol=1e-5)


def test_a_full_student_is_no_adapter(random_model, tmp_path):
    model = random_model("gpt2")
    student = finetune(model, number_lists(4), layers=[1], recipe=SHORT)
    with pytest.raises(ValueError, match=r"stored in full, .* train with Recipe"):
        student.to_peft(tmp_path / "adapter")


@pytest.mark.skipif("hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
def test_folded_weights_are_refused(tmp_path):
    model, hf_model = both("gpt2", "hooked")
    folded = load_model(random_hf_model("gpt2", vocab=len(chat_tokenizer())), backend="hooked")
    folded.process_weights_(fold_ln=True, center_writing_weights=True, center_unembed=True)
    folded.tokenizer = model.tokenizer
    student = finetune(folded, number_lists(4), layers=[1], recipe=SHORT)
    with pytest.raises(ValueError, match=r"not the base of the delta.* folded, centered"):
        student.to_huggingface(tmp_path / "student", base=hf_model)
    assert not list(tmp_path.iterdir())


def test_another_base_a_full_folder_and_a_nameless_base_are_refused(random_model, tmp_path):
    model = random_model("llama")
    student = finetune(model, number_lists(4), layers=[1], recipe=SHORT)
    other = random_hf_model("llama", 1, vocab=len(chat_tokenizer()))
    with pytest.raises(ValueError, match="not the base of the delta"):
        student.to_huggingface(tmp_path / "student", base=other)
    with pytest.raises(ValueError, match="cannot be loaded now; give base="):
        student.to_huggingface(tmp_path / "student")
    with pytest.raises(ValueError, match="does not name its base"):
        Delta(student.tensors, student.base).to_huggingface(tmp_path / "student")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    same = random_hf_model("llama", vocab=len(chat_tokenizer()))
    with pytest.raises(ValueError, match="not empty; give another folder"):
        student.to_huggingface(tmp_path, base=same)


def test_exporting_leaves_a_live_bridge_alone(tmp_path):
    """The Hugging Face model that a bridge has wrapped serves as the base as well."""
    hf_model = random_hf_model("gpt2", vocab=len(chat_tokenizer()))
    model = load_model(hf_model, backend="bridge", tokenizer=chat_tokenizer())
    student = finetune(model, number_lists(4), layers=[1], recipe=SHORT)
    before = [p.detach().clone() for p in model.parameters()]
    folder = student.to_huggingface(tmp_path / "student", base=hf_model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(TOKENS).logits, student_logits(model, student), atol=1e-5)


def test_half_precision_is_rounded_once(backend, tmp_path):
    model, hf_model = both("llama", backend)
    model, hf_model = model.to(torch.bfloat16), hf_model.to(torch.bfloat16)
    student = finetune(model, number_lists(4), layers=[1], recipe=SHORT)
    folder = student.to_huggingface(tmp_path / "student", base=hf_model)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    name = "model.layers.1.mlp.down_proj.weight"
    own = next(n for n in student.tensors if n.endswith(("W_out", name)) or "down_proj" in n)
    change = student.tensors[own]
    expected = hf_model.state_dict()[name].float() + (change.T if backend == "hooked" else change)
    assert torch.equal(loaded.state_dict()[name], expected.bfloat16())
