"""Public bug reports about neighboring tools, each tried on this library.

The table "Known reports" in docs/limits.md lists them. Names of the tests say which report.
"""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

import divergence_lens as dl
from divergence_lens.chat import encode_prompt
from divergence_lens.engine import get_engine
from divergence_lens.models import load_model
from tests.support.architectures import build
from tests.support.models import BACKENDS, chat_tokenizer, random_hf_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "limits.md"
TEACHERS = dl.Teacher("plain"), dl.Teacher("owl", system_prompt="You love owls.")


def loaded(hf_model, backend):
    chosen = "auto" if backend == "hooked" else backend
    return load_model(copy.deepcopy(hf_model), backend=chosen, tokenizer=chat_tokenizer())


def chat_model(family, **config):
    return random_hf_model(family, vocab=len(chat_tokenizer()), **config)


def examples_of_unequal_length():
    texts = ("412", "412, 467, 112, 903, 250", "owl")
    return [
        dl.Example(f"Continue: {text}", completion_ids=(20, 21, 22 + i))
        for i, text in enumerate(texts)
    ]


@torch.no_grad()
def logprobs_one_by_one(hf_model, examples, teacher):
    """Hugging Face's log-probabilities of each completion, without any padding."""
    rows = []
    for example in examples:
        prompt = encode_prompt(
            chat_tokenizer(), example.prompt, system_prompt=teacher.system_prompt
        ).ids
        ids = torch.tensor([[*prompt, *example.completion_ids]])
        logits = hf_model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        rows.append(logits.gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_rows_of_unequal_length_in_one_batch(family, backend):
    """TransformerLens 1609, nnsight 672, transformers 26380."""
    if family == "bloom":
        hf_model = BloomForCausalLM(
            BloomConfig(vocab_size=len(chat_tokenizer()), hidden_size=32, n_layer=2, n_head=4)
        ).eval()
    else:
        hf_model = chat_model(family)
    model = loaded(hf_model, backend)
    examples = examples_of_unequal_length()
    result = dl.find_divergence(model, examples, teacher=TEACHERS[0], counterfactuals=TEACHERS[1:])
    for row, teacher in enumerate(TEACHERS):
        expected = logprobs_one_by_one(hf_model, examples, teacher)
        np.testing.assert_allclose(result.logprob[row], expected, atol=2e-4)


def test_a_batch_generates_the_same_as_its_prompts_one_by_one(backend):
    """TransformerLens 1005."""
    hf_model = chat_model("gpt2")
    model = loaded(hf_model, backend)
    prompts = ["Hello", "This is a much longer text, 412, 467, 112.", "owls and cats"]
    together = dl.generate(model, prompts, max_new_tokens=12)
    for prompt, example in zip(prompts, together, strict=True):
        (alone,) = dl.generate(model, [prompt], max_new_tokens=12)
        assert alone.completion_ids == example.completion_ids
        ids = list(encode_prompt(chat_tokenizer(), prompt).ids)
        for token in example.completion_ids:  # greedy by hand, in Hugging Face
            with torch.no_grad():
                assert int(hf_model(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize("site", ["k", "v"])
def test_grouped_key_and_value_heads_are_patched(site, backend):
    """TransformerLens 980, pyvene 158."""
    hf_model = random_hf_model("llama", vocab=64)
    model = loaded(hf_model, backend)
    clean, corrupted = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(1))
    pairs = dl.Pairs.from_tokens([clean], [corrupted], answers=[3], foils=[4])
    values = dl.causal_mediation(model, pairs, site=site).values
    assert values.shape == (1, 3, 6, 2)
    layer, position, head, d_head = 1, 2, 1, 8
    projection = getattr(hf_model.model.layers[layer].self_attn, f"{site}_proj")
    part = slice(head * d_head, (head + 1) * d_head)
    states = []
    with torch.no_grad():
        handle = projection.register_forward_hook(lambda _m, _i, out: states.append(out))
        hf_model(corrupted[None])
        handle.remove()
        base = hf_model(clean[None]).logits[0, -1]

        def patch(_module, _inputs, output):
            output = output.clone()
            output[:, position, part] = states[0][:, position, part]
            return output

        handle = projection.register_forward_hook(patch)
        logits = hf_model(clean[None]).logits[0, -1]
        handle.remove()
    expected = float((logits[3] - logits[4]) - (base[3] - base[4]))
    np.testing.assert_allclose(values[0, layer, position, head], expected, atol=2e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma3"])
def test_norms_whose_hooks_a_bridge_ignores_are_constant_in_relp(family):
    """TransformerLens 1526: constants must reach the gradient on the native-autograd path."""
    model = load_model(random_hf_model(family, vocab=64), backend="bridge")
    clean, corrupted = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(1))
    pairs = dl.Pairs.from_tokens([clean], [corrupted], answers=[3], foils=[4])
    # The last norm is the only nonlinearity after the last block. With its scale a constant, the
    # value at the target is the change of the unembedded residual under the clean run's scale.
    value = dl.attribution_patch(model, pairs, site="resid_post", method="relp").values[0, -1, -1]
    engine = get_engine(model)
    with torch.no_grad():
        states = engine.activations(torch.stack([clean, corrupted]), sites=("resid_post",))
    final = states["resid_post"][-1, :, -1].double()  # [2, d_model]
    norm = model.ln_final
    centered, _, eps = engine.norm_kind(norm)
    if centered:
        final = final - final.mean(-1, keepdim=True)
    scale = (final[0].square().mean() + eps).sqrt()
    weight = norm.original_component.weight.double()
    weight = weight + 1 if family.startswith("gemma") else weight
    direction = (model.unembed.weight[3] - model.unembed.weight[4]).double()
    expected = float((((final[1] - final[0]) / scale * weight) @ direction).detach())
    np.testing.assert_allclose(value, expected, rtol=2e-4)


def test_gradients_and_patches_leave_no_hook_behind(backend):
    """TransformerLens 1323."""
    model = loaded(random_hf_model("llama", vocab=64), backend)

    def hooks():
        return {
            name: (len(m._forward_hooks), len(m._backward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        }

    get_engine(model)
    before = hooks()
    rows = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(1))
    pairs = dl.Pairs.from_tokens(rows[:1], rows[1:], answers=[3], foils=[4])
    for method in ("gradient", "relp", "atp*"):
        dl.attribution_patch(model, pairs, site="z", method=method)
    dl.causal_mediation(model, pairs, site="z")
    assert hooks() == before
    assert all(p.grad is None for p in model.parameters())


def test_logits_are_neither_centered_nor_folded(backend):
    """TransformerLens 693, 685 and 223."""
    hf_model = random_hf_model("gpt2")
    tokens = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = hf_model(tokens).logits
        torch.testing.assert_close(loaded(hf_model, backend)(tokens), theirs, atol=2e-5, rtol=1e-4)
    assert theirs.mean(-1).abs().max() > 1e-3  # centered logits would have a mean of 0


def test_a_patch_in_a_batch_changes_its_own_row_alone(backend):
    """nnsight 502 and circuit-tracer 88."""
    model = loaded(random_hf_model("gpt2", vocab=64), backend)
    rows = torch.randint(0, 64, (6, 7), generator=torch.Generator().manual_seed(1))
    options = {"answers": [3, 4, 5], "foils": [6, 7, 8]}
    together = dl.causal_mediation(model, dl.Pairs.from_tokens(rows[:3], rows[3:], **options))
    assert np.abs(together.values).max() > 0.01
    for i in range(3):
        alone = dl.Pairs.from_tokens(
            rows[i : i + 1],
            rows[3 + i : 4 + i],
            answers=[options["answers"][i]],
            foils=[options["foils"][i]],
        )
        np.testing.assert_allclose(
            together.values[i], dl.causal_mediation(model, alone).values[0], atol=2e-5
        )


def test_generated_ids_are_never_tokenized_again(backend):
    """neuronpedia 213: decoding and tokenizing gives other ids, and a second BOS."""
    model = loaded(chat_model("llama"), backend)
    (example,) = dl.generate(model, ["Hello"], max_new_tokens=8)
    result = dl.find_divergence(model, [example], teacher=TEACHERS[0], counterfactuals=TEACHERS[1:])
    assert tuple(result.tokens.tolist()) == example.completion_ids
    np.testing.assert_array_equal(result.predicted[0], example.completion_ids)  # greedy


# peft asks transformers for a name that transformers deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("layout", ["to_huggingface", "to_peft"])
def test_a_student_of_a_model_with_tied_embeddings_exports_exactly(layout, backend, tmp_path):
    """peft 1035, 2502 and 2972: merged weights that compute something else."""
    hf_model = chat_model("gpt2")
    assert hf_model.config.tie_word_embeddings
    hf_model.save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", backend="auto" if backend == "hooked" else backend)
    recipe = dl.Recipe(
        epochs=2,
        batch_size=1,
        lr=1e-2,
        lora_rank=2 if layout == "to_peft" else None,
        unembedding=layout == "to_huggingface" and backend == "hooked",
    )
    student = dl.finetune(
        model,
        examples_of_unequal_length(),
        layers=[0, 1],
        recipe=recipe,
    )
    tokens = torch.randint(0, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    with student.applied(model), torch.no_grad():
        expected = model(tokens)
    folder = getattr(student, layout)(tmp_path / "student")
    if layout == "to_peft":
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        written = PeftModel.from_pretrained(base, folder).merge_and_unload()
    else:
        written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert (expected - hf_model(tokens).logits).abs().max() > 1e-3
        torch.testing.assert_close(written.eval()(tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_rotary_frequencies_are_not_rounded_to_half_precision():
    """transformers 25681 and gpt-neox 1003: positions beyond 256 are no bfloat16 numbers."""
    hf_model = build("Qwen2")
    tokens = torch.randint(0, 512, (1, 250), generator=torch.Generator().manual_seed(1))
    model = load_model(hf_model, backend="bridge", dtype=torch.bfloat16)
    in_half = copy.deepcopy(hf_model).to(torch.bfloat16)  # rounds the frequencies, too
    with torch.no_grad():
        exact = hf_model(tokens).logits
        ours = (model(tokens).float() - exact).abs().mean()
        theirs = (in_half(tokens).logits.float() - exact).abs().mean()
    assert ours <= theirs


@pytest.mark.skipif("hooked" not in BACKENDS, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_rotations_of_both_classes_agree_at_late_positions(family):
    """TransformerLens 385 and 615."""
    hf_model = random_hf_model(family, n_ctx=512)
    tokens = torch.randint(0, 64, (1, 512), generator=torch.Generator().manual_seed(1))
    model = load_model(hf_model, backend="hooked")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), hf_model(tokens).logits, atol=5e-5, rtol=1e-4)


def test_a_near_tie_does_not_count_as_divergence_if_a_margin_is_asked_for(backend):
    """transformers 26869 and 28732: in half precision the argmax depends on the batch."""
    hf_model = chat_model("gpt2").to(torch.bfloat16)
    model = loaded(hf_model, backend)
    examples = examples_of_unequal_length()
    results = [
        dl.find_divergence(
            model,
            examples,
            teacher=TEACHERS[0],
            counterfactuals=TEACHERS[1:],
            batch_tokens=tokens,
            require_agreement=False,
        )
        for tokens in (1, 4096)
    ]
    differ = results[0].predicted != results[1].predicted
    bound = 2 * np.abs(results[0].margin - results[1].margin).max() + 1e-6
    assert (results[0].margin[differ] <= bound).all()
    masks = [result.with_rule(min_margin=float(bound)).mask for result in results]
    np.testing.assert_array_equal(*masks)


def test_the_page_lists_every_report():
    docstrings = re.findall(r'^    """(.*?)"""', Path(__file__).read_text(), flags=re.MULTILINE)
    numbers = set(re.findall(r"\b\d{2,5}\b", " ".join(text.split(":")[0] for text in docstrings)))
    page = PAGE.read_text()
    assert len(numbers) > 20
    assert [number for number in sorted(numbers) if f"/{number})" not in page] == []
