"""Loading: which class is built, that its logits are Hugging Face's, and what is refused."""

import json

import pytest
import torch

from divergence_lens.engine.factory import get_engine
from divergence_lens.models import check_model, load_model, model_name
from divergence_lens.provenance import fingerprint, run_metadata
from tests.support.models import (
    BACKENDS,
    FAMILIES,
    HOOKED_FAMILIES,
    chat_tokenizer,
    random_hf_model,
)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_bridge_logits_are_hugging_faces(family, tokens):
    reference = random_hf_model(family)(tokens).logits
    model = load_model(random_hf_model(family), backend="bridge")
    torch.testing.assert_close(model(tokens), reference, atol=2e-5, rtol=1e-4)


@pytest.mark.skipif("hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("family", HOOKED_FAMILIES)
def test_hooked_logits_are_hugging_faces(family, tokens):
    hf_model = random_hf_model(family)
    model = load_model(hf_model, backend="hooked")
    torch.testing.assert_close(model(tokens), hf_model(tokens).logits, atol=2e-5, rtol=1e-4)
    assert type(model).__name__ == "HookedTransformer"


@pytest.mark.parametrize("family", ["gemma2", "llama"])
def test_auto_takes_the_class_that_can_hold_the_model(family, tokens):
    hf_model = random_hf_model(family)
    reference = hf_model(tokens).logits
    model = load_model(hf_model)
    torch.testing.assert_close(model(tokens), reference, atol=2e-5, rtol=1e-4)
    expected = (
        "HookedTransformer"
        if family in HOOKED_FAMILIES and "hooked" in BACKENDS
        else "TransformerBridge"
    )
    assert type(model).__name__ == expected


def test_a_family_that_cannot_be_hooked_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r'use backend="bridge"'):
        load_model(random_hf_model("gemma2"), backend="hooked")


def test_a_folder_loads_with_its_tokenizer(tmp_path, backend, tokens):
    hf_model = random_hf_model("qwen2", vocab=len(chat_tokenizer()))
    hf_model.save_pretrained(tmp_path / "llama-like name")
    chat_tokenizer().save_pretrained(tmp_path / "llama-like name")
    model = load_model(tmp_path / "llama-like name", backend=backend)
    torch.testing.assert_close(model(tokens), hf_model(tokens).logits, atol=2e-5, rtol=1e-4)
    assert model.tokenizer.encode("owls") == chat_tokenizer().encode("owls")
    assert not model.training


def test_the_shipped_tokenizers_know_numbers_and_animals(tiny, tiny_qwen2):
    for model in (tiny, tiny_qwen2):
        ids = model.tokenizer("412, 467 owl", add_special_tokens=False)["input_ids"]
        assert len(ids) == 4
        assert model.tokenizer.unk_token_id not in ids


def test_a_tokenizer_that_pads_on_the_left_is_no_hindrance(backend):
    tokenizer = chat_tokenizer()
    tokenizer.padding_side = "left"
    model = load_model(
        random_hf_model("gpt2", vocab=len(tokenizer)), backend=backend, tokenizer=tokenizer
    )
    assert get_engine(model).model is model
    assert tokenizer.padding_side == "left"


def test_the_callers_tokenizer_is_left_as_it_was(backend):
    tokenizer = chat_tokenizer()
    kept = (tokenizer.padding_side, tokenizer.pad_token, tokenizer.bos_token)
    load_model(random_hf_model("gpt2", vocab=len(tokenizer)), backend=backend, tokenizer=tokenizer)
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.bos_token) == kept


def test_loading_prints_nothing(capsys, backend):
    load_model(random_hf_model("llama"), backend=backend)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_a_loaded_model_comes_back_itself(tiny):
    assert load_model(tiny) is tiny
    check_model(tiny)


def test_dtype_is_the_one_asked_for(backend):
    model = load_model(random_hf_model("llama"), backend=backend, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_fingerprint_sees_one_changed_bit(backend):
    model = load_model(random_hf_model("llama"), backend=backend)
    before = fingerprint(model)
    assert before == fingerprint(load_model(random_hf_model("llama"), backend=backend))
    weight = next(p for p in model.parameters() if p.ndim == 2)
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))
    assert fingerprint(model) != before


def test_provenance_is_json_and_names_what_ran(tiny):
    record = json.loads(json.dumps(run_metadata(tiny, seeds=(0, 1), folder=object())))
    assert record["model"]["name"] == model_name(tiny) == "tiny"
    assert record["versions"]["torch"] == torch.__version__
    assert record["settings"]["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        ("./no-such-folder", FileNotFoundError, "no folder"),
        (12, TypeError, "int"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_sources_say_what_is_wrong(source, kind, says):
    with pytest.raises(kind, match=says):
        load_model(source)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("damage", ["config", "weights", "missing weights"])
def test_a_broken_folder_is_refused_in_one_sentence(tmp_path, damage):
    random_hf_model("gpt2", vocab=len(chat_tokenizer())).save_pretrained(tmp_path)
    chat_tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if damage == "config":
        (tmp_path / "config.json").write_text("{ not json")
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:500])
    else:
        weights.unlink()
    with pytest.raises(ValueError, match="cannot load") as caught:
        load_model(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_hub_name_is_refused_without_the_network():
    with pytest.raises(ValueError, match=r"cannot load 'nobody/nothing'.*tiny"):
        load_model("nobody/nothing")


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="hooked"):
        load_model("tiny", backend="fast")


def test_a_plain_module_is_no_model():
    with pytest.raises(TypeError, match="load_model"):
        check_model(torch.nn.Linear(2, 2))


@pytest.mark.skipif("hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
def test_a_loaded_model_does_not_change_class():
    model = load_model(random_hf_model("llama"), backend="bridge")
    with pytest.raises(ValueError, match="already a TransformerBridge"):
        load_model(model, backend="hooked")


@pytest.mark.parametrize("kind", ["Hugging Face's", "TransformerLens's"])
def test_a_loaded_model_keeps_its_precision_unless_told(backend, kind):
    model = random_hf_model("llama").to(torch.bfloat16)
    if kind == "TransformerLens's":
        model = load_model(model, backend=backend)
    assert next(load_model(model, backend=backend).parameters()).dtype is torch.bfloat16
    told = load_model(model, backend=backend, dtype=torch.float32)
    assert next(told.parameters()).dtype is torch.float32


def test_loading_draws_no_random_numbers(backend):
    hf_model = random_hf_model("gpt2")
    state = torch.random.get_rng_state()
    load_model(hf_model, backend=backend)
    assert torch.equal(torch.random.get_rng_state(), state)
