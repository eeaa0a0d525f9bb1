"""Each architecture is exact on logits, divergence and patching, or refused with a reason."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import divergence_lens as dl
from divergence_lens.chat import encode_prompt
from divergence_lens.engine import get_engine
from tests.support.architectures import ARCHITECTURES, VOCABULARY, build, decoder_layers
from tests.support.models import BACKENDS, chat_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
REFUSED = {
    "Falcon, ALiBi": "its logits differ from Hugging Face's",
    "MPT": "its blocks cannot be run one by one",
    "Cohere": "its logits differ from Hugging Face's",
    "Cohere 2": "its logits differ from Hugging Face's",
    "HunYuan": "its logits differ from Hugging Face's",
    "Helium": "Unsupported architecture",
    "Mamba": "its blocks cannot be run one by one",
}
"""On TransformerLens 3.9; the message says which comparison failed."""

NEEDS_HOOKED = {"GPT-2, unscaled attention"}
"""Exact as a HookedTransformer alone: the bridge computes something else and is refused."""


def load(title: str) -> tuple[Any, Any]:
    """The Hugging Face model and what `load_model` makes of it, ready to run."""
    hf_model = build(title)
    model = dl.load_model(copy.deepcopy(hf_model), tokenizer=chat_tokenizer())
    get_engine(model)
    return hf_model, model


def expected_refusal(title: str) -> str | None:
    if title in NEEDS_HOOKED and "hooked" not in BACKENDS:
        return "its logits differ from Hugging Face's"
    return REFUSED.get(title)


def accepted() -> list[str]:
    return [title for title in ARCHITECTURES if expected_refusal(title) is None]


@torch.no_grad()
def patched_by_hooks(
    hf_model: Any, clean: list[int], corrupted: list[int], metric: Callable[[torch.Tensor], float]
) -> np.ndarray:
    """The effect of replacing each layer's output at each position, by forward hooks alone."""
    n_layers = hf_model.config.num_hidden_layers
    layers = decoder_layers(hf_model, n_layers)
    outputs: list[torch.Tensor] = []

    def states(output: Any) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output

    handles = [
        m.register_forward_hook(lambda *args: outputs.append(states(args[2]))) for m in layers
    ]
    hf_model(torch.tensor([corrupted]), use_cache=False)
    for handle in handles:
        handle.remove()
    base = metric(hf_model(torch.tensor([clean]), use_cache=False).logits[0, -1])
    grid = np.zeros((n_layers, len(clean)))
    for layer, module in enumerate(layers):
        for position in range(len(clean)):

            def replace(_module: Any, _inputs: Any, output: Any, at: int = position) -> Any:
                changed = states(output).clone()
                changed[:, at] = outputs[layer][:, at]  # noqa: B023 - called before the loop moves
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            handle = module.register_forward_hook(replace)
            logits = hf_model(torch.tensor([clean]), use_cache=False).logits[0, -1]
            handle.remove()
            grid[layer, position] = metric(logits) - base
    return grid


@pytest.mark.slow
@pytest.mark.parametrize("title", accepted())
def test_logits_divergence_and_patching_are_hugging_faces(title):
    hf_model, model = load(title)
    tokens = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = hf_model(tokens, use_cache=False).logits
        ours = model(tokens)
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours, theirs, atol=1e-5 * scale, rtol=1e-4)

    example = dl.Example("Continue: 412, 467.", completion_ids=tuple(tokens[0, :20].tolist()))
    teachers = [dl.Teacher("plain"), dl.Teacher("owl", system_prompt="You love owls.")]
    result = dl.find_divergence(model, [example], teacher=teachers[0], counterfactuals=teachers[1:])
    for row, teacher in enumerate(teachers):
        prompt = encode_prompt(
            model.tokenizer, example.prompt, system_prompt=teacher.system_prompt
        ).ids
        ids = torch.tensor([[*prompt, *example.completion_ids]])
        with torch.no_grad():
            logprobs = hf_model(ids, use_cache=False).logits[0].log_softmax(-1)
        given = logprobs[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0]
        np.testing.assert_allclose(result.logprob[row], given.numpy(), atol=2e-4)

    clean, corrupted = tokens[0, :12].tolist(), tokens[1, :12].tolist()
    pairs = dl.Pairs.from_tokens([clean], [corrupted], answers=[7], foils=[11])
    grid = dl.causal_mediation(model, pairs, site="resid_post").values[0]
    oracle = patched_by_hooks(hf_model, clean, corrupted, lambda at: float(at[7] - at[11]))
    assert np.abs(oracle).max() > 1e-3
    np.testing.assert_allclose(grid, oracle, atol=2e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("title", [title for title in ARCHITECTURES if title not in accepted()])
def test_what_is_not_exact_is_refused_with_the_reason(title):
    hf_model = build(title)
    if "hooked" not in BACKENDS:
        # TransformerLens 4 converts some of these; then they must be exact, like the others.
        try:
            model = dl.load_model(copy.deepcopy(hf_model), tokenizer=chat_tokenizer())
            get_engine(model)
        except ValueError:
            return
        tokens = torch.randint(3, VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            theirs = hf_model(tokens, use_cache=False).logits
            torch.testing.assert_close(model(tokens), theirs, atol=1e-4, rtol=1e-4)
        return
    with pytest.raises(ValueError, match=expected_refusal(title)):
        get_engine(dl.load_model(hf_model, tokenizer=chat_tokenizer()))


def table() -> str:
    """The table in the documentation, for TransformerLens 3.9."""
    lines = ["| architecture | result |", "|---|---|"]
    lines += [
        f"| {title} | {f'refused: {REFUSED[title]}' if title in REFUSED else 'exact'} |"
        for title in sorted(ARCHITECTURES, key=str.casefold)
    ]
    return "\n".join(lines)


def test_the_documentation_has_the_table():
    assert table() in PAGE.read_text(), f"put this into {PAGE.name}:\n{table()}"
