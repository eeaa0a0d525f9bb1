"""The chunked cross-entropy, against the plain one: loss, gradients, students and memory."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from divergence_lens.training import Recipe, finetune
from divergence_lens.training import cross_entropy as _cross_entropy
from divergence_lens.training import loop as _loop
from tests.support.training import SHORT, number_lists


@given(positions=st.integers(1, 40), vocabulary=st.integers(2, 60), rows=st.integers(1, 41))
@settings(max_examples=30, deadline=None)
def test_loss_and_gradients_are_those_of_plain_torch(positions, vocabulary, rows):
    generator = torch.Generator().manual_seed(positions)
    hidden = torch.randn(positions, 6, generator=generator, dtype=torch.float64)
    matrix = torch.randn(6, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (positions,), generator=generator)
    weights = torch.rand(positions, generator=generator)
    one, other = (hidden.clone().requires_grad_() for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cross_entropy, "_CHUNK_ELEMENTS", rows * vocabulary)
        loss = _cross_entropy.chunked_cross_entropy(
            lambda part: part @ matrix, one, targets, weights, d_vocab=vocabulary
        )
    log_p = (other @ matrix).log_softmax(-1)
    expected = -(log_p[torch.arange(positions), targets] * weights).sum()
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_a_student_of_a_large_vocabulary_is_the_same(random_model, monkeypatch, lora_rank):
    model = random_model("llama")
    recipe = Recipe(epochs=2, batch_size=4, warmup_steps=1, lora_rank=lora_rank)
    options = {"layers": [1], "recipe": recipe, "seed": 3}
    plain = finetune(model, number_lists(10), **options)
    calls = []
    chunked = _cross_entropy.chunked_cross_entropy

    def counted(*args, **kwargs):
        calls.append(kwargs["d_vocab"])
        return chunked(*args, **kwargs)

    monkeypatch.setattr(_loop, "_MOST_LOGITS", 0)
    monkeypatch.setattr(_loop, "chunked_cross_entropy", counted)
    monkeypatch.setattr(_cross_entropy, "_CHUNK_ELEMENTS", 300)
    other = finetune(model, number_lists(10), **options)
    assert calls
    losses, others = (student.history()["loss"].to_numpy() for student in (plain, other))
    assert others == pytest.approx(losses, rel=1e-5)
    for name, values in plain.tensors.items():
        torch.testing.assert_close(other.tensors[name], values, rtol=1e-3, atol=2e-5)


def test_an_unembedding_that_learns_gets_its_own_gradient(random_model, monkeypatch):
    """Its gradient needs the plain computation, whatever the size."""
    model = random_model("qwen2", tie_word_embeddings=False)
    expected = finetune(model, number_lists(8), recipe=replace(SHORT, unembedding=True))
    monkeypatch.setattr(_loop, "_MOST_LOGITS", 0)
    student = finetune(model, number_lists(8), recipe=replace(SHORT, unembedding=True))
    assert all(torch.equal(student.tensors[n], v) for n, v in expected.tensors.items())
    assert all(bool(v.any()) for v in student.tensors.values())


# Not ru_maxrss: a child process inherits its parent's.
MEMORY = """
import re, sys, torch
from pathlib import Path
import torch.nn.functional as F
from divergence_lens.training.cross_entropy import chunked_cross_entropy
hidden = torch.randn(800, 16, requires_grad=True)
matrix = torch.randn(16, 151_936)
targets, weights = torch.arange(800), torch.ones(800)
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
if sys.argv[1] == "chunked":
    unembed = lambda part: part @ matrix
    loss = chunked_cross_entropy(unembed, hidden, targets, weights, d_vocab=151_936)
else:
    loss = F.cross_entropy(hidden @ matrix, targets, reduction="none") @ weights
loss.backward()
print((peak() - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_memory_does_not_grow_with_the_positions():
    """800 positions of 151,936 logits: 464 MiB each time they exist."""
    peaks = {}
    for side in ("plain", "chunked"):
        run = subprocess.run(
            [sys.executable, "-c", MEMORY, side], capture_output=True, text=True, check=True
        )
        peaks[side] = float(run.stdout)
    assert peaks["plain"] > 900
    assert peaks["chunked"] < 300
