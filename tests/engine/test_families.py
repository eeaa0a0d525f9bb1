"""Every public call on every family, and the table of the documentation that says so."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import divergence_lens as dl
from divergence_lens.engine.factory import get_engine
from tests.support.models import (
    BACKENDS,
    FAMILIES,
    HOOKED_FAMILIES,
    chat_tokenizer,
    random_hf_model,
)
from tests.support.state import left_as_it_was

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLASSES = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}
TITLES = {
    "gpt2": "GPT-2",
    "gpt_neo": "GPT-Neo (TinyStories)",
    "gpt_neox": "GPT-NeoX (Pythia)",
    "llama": "Llama",
    "mistral": "Mistral (sliding window)",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
    "phi3": "Phi-3",
    "olmo2": "OLMo 2",
    "mixtral": "Mixtral (mixture of experts)",
    "qwen2_moe": "Qwen2-MoE (mixture of experts)",
}
FAILING = {("olmo2", "bridge", "bfloat16")}
"""What TransformerLens itself cannot run: there, float32 and bfloat16 meet in one product."""
COLUMNS = [*product(("hooked", "bridge"), PRECISIONS)]


def holds(family: str, backend: str, precision: str) -> bool:
    """Whether TransformerLens 3.9 can run this family in this class."""
    held = backend == "bridge" or family in HOOKED_FAMILIES
    return held and (family, backend, precision) not in FAILING


CASES = [
    (family, backend, precision)
    for family in FAMILIES
    for backend, precision in COLUMNS
    if backend in BACKENDS and holds(family, backend, precision)
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def loaded(request):
    """A random model of the family, and its weights in Hugging Face's hands."""
    family, backend, precision = request.param
    tokenizer = chat_tokenizer()
    dtype = PRECISIONS[precision]
    hf_model = random_hf_model(family, vocab=len(tokenizer)).to(dtype)
    again = random_hf_model(family, vocab=len(tokenizer)).to(dtype)
    return hf_model, dl.load_model(again, backend=backend, dtype=dtype, tokenizer=tokenizer)


@torch.no_grad()
def test_logits_are_hugging_faces(loaded):
    hf_model, model = loaded
    tokens = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(3))
    engine = get_engine(model)
    ours = engine.unembed(engine.final(tokens)).float()
    theirs = hf_model(tokens).logits.float()
    if engine.dtype is torch.float32:
        torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-4)
    else:  # eight bits: two orders of the same sums differ by this much
        assert (ours - theirs).square().mean() < 1e-2 * theirs.square().mean()


@pytest.mark.slow
def test_every_public_call_runs_and_leaves_the_model_as_it_was(loaded):
    _, model = loaded
    owl, cat, wolf = dl.animal_teachers(["owl", "cat", "wolf"])
    prompts = ["Continue: 412, 467.", "More numbers: 3, 4.", "List: 1, 2."]
    tokens = torch.arange(24).reshape(2, 12)
    with left_as_it_was(model):
        examples = dl.generate(model, prompts, teacher=owl, max_new_tokens=6)
        divergence = dl.find_divergence(model, examples, teacher=owl, counterfactuals=[cat, wolf])
        assert divergence.agrees.mean() > 0.9  # in bfloat16 a near-tie can go the other way
        pairs = dl.Pairs.from_tokens(
            tokens,
            tokens.flip(0),
            target_position=[11, 11],
            answers=[1, 2],
            foils=[3, 4],
        )
        for site in get_engine(model).sites:
            exact = dl.causal_mediation(model, pairs, site=site)
            near = dl.attribution_patch(model, pairs, site=site, method="gradient")
            assert exact.values[0].shape == near.values[0].shape
            assert all(np.isfinite(values).any() for values in exact.values)
        student = dl.finetune(
            model, examples, layers=[1], recipe=dl.Recipe(epochs=1, batch_size=2, warmup_steps=0)
        )
        with student.applied(model):
            preference = dl.preference(model, target="owl", candidates=["owl", "cat"])
        assert 0 < preference.share < 1


def table() -> str:
    """Build the table of tested families, as printed in the documentation."""
    heads = " | ".join(f"{CLASSES[backend]}, {precision}" for backend, precision in COLUMNS)
    lines = [f"| family | {heads} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for family in FAMILIES:
        cells = ["yes" if holds(family, *column) else "no" for column in COLUMNS]
        lines.append(f"| {TITLES[family]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_documentation_lists_what_is_tested():
    assert table() in PAGE.read_text(), f"put this into {PAGE.name}:\n{table()}"


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(HOOKED_FAMILIES)))
def test_a_family_that_cannot_be_hooked_is_refused_with_the_way_out(family):
    if "hooked" not in BACKENDS:
        pytest.skip("this TransformerLens has one model class")
    with pytest.raises(ValueError, match=r'use backend="bridge"'):
        dl.load_model(random_hf_model(family), backend="hooked")


@pytest.mark.parametrize(("family", "backend", "precision"), FAILING)
def test_what_transformer_lens_cannot_run_is_refused_with_the_way_out(family, backend, precision):
    hf_model = random_hf_model(family)
    model = dl.load_model(hf_model, backend=backend, dtype=PRECISIONS[precision])
    with pytest.raises(ValueError, match=r"cannot run in torch.bfloat16: .*dtype=torch.float32"):
        get_engine(model)
