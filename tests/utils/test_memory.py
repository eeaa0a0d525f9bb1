"""Memory that runs out in the middle: the work goes on in smaller parts, or ends as it began."""

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch

import divergence_lens as dl
from divergence_lens._utils.memory import halved, is_out_of_memory, run_halved
from divergence_lens.engine.factory import get_engine
from divergence_lens.engine.static import StaticDecoder
from divergence_lens.patching import ablations
from tests.support.patching_oracles import random_pairs
from tests.support.state import left_as_it_was

OWL = dl.Teacher("owl", system_prompt="You love owls.")
CAT = dl.Teacher("cat", system_prompt="You love the cat.")
EXAMPLES = [
    dl.Example(f"Continue: {number}", completion=f"{number + 1}, {number + 2}")
    for number in range(100, 112)
]
RECIPE = dl.Recipe(epochs=1, batch_size=6, warmup_steps=1)
QUESTIONS = ("Name your favorite animal.", "Which animal do you love?", "Say an animal.")

# What torch raises on a CUDA device, on a CPU and on Apple's GPUs, and NumPy.
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. can't allocate memory: 9 bytes"),
    RuntimeError("MPS backend out of memory"),
    MemoryError("Unable to allocate 1.00 TiB for an array"),
)


def pairs(model):
    return random_pairs(model.cfg.d_vocab, lengths=(6, 8), longer=(0, 0))


def finetuned(model):
    student = dl.finetune(model, EXAMPLES, layers=[1], recipe=RECIPE)
    return torch.cat([tensor.flatten() for _, tensor in sorted(student.tensors.items())]).numpy()


def swept(model):
    sweep = dl.layer_sweep(model, EXAMPLES, measure=owl_or_cat, layers=[1], recipe=RECIPE)
    return np.stack([student.values["probability"] for student in sweep.students])


def owl_or_cat(model):
    return dl.preference(model, target="owl", questions=QUESTIONS, candidates=("owl", "cat"))


def preferred(model):
    candidates = ("owl", "cat", "wolf")
    return dl.preference(
        model, target="owl", questions=QUESTIONS, candidates=candidates
    ).probabilities


CALLS = {
    "find_divergence": lambda model: (
        dl.find_divergence(model, EXAMPLES, teacher=OWL, counterfactuals=[CAT]).logprob
    ),
    "generate": lambda model: np.concatenate(
        [e.completion_ids for e in dl.generate(model, [e.prompt for e in EXAMPLES], teacher=OWL)]
    ),
    "causal_mediation": lambda model: dl.causal_mediation(model, pairs(model)).values,
    "mean ablation": lambda model: (
        dl.causal_mediation(model, pairs(model), corruption="mean").values
    ),
    "attribution_patch": lambda model: dl.attribution_patch(model, pairs(model)).values,
    "integrated": lambda model: (
        dl.attribution_patch(model, pairs(model), method="integrated", steps=3).values
    ),
    "finetune": finetuned,
    "layer_sweep": swept,
    "preference": preferred,
}


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


@pytest.fixture
def error(request):
    """Another one for each call."""
    return ERRORS[list(CALLS).index(request.node.callspec.params["call"]) % len(ERRORS)]


@pytest.fixture
def model(random_model):
    return random_model("qwen2")


def room_for(rows, engine, monkeypatch, error):
    """Let no block and no decoder run with more rows than that; return the rows of each call."""
    block, start, seen = engine.block, StaticDecoder.start, []

    def small(layer, resid, run, **options):
        if len(resid) > rows:
            raise error
        seen.append(len(resid))
        return block(layer, resid, run, **options)

    def small_start(decoder, prompts, new_tokens):
        if len(prompts) > rows:
            raise error
        seen.append(len(prompts))
        return start(decoder, prompts, new_tokens)

    monkeypatch.setattr(engine, "block", small)
    monkeypatch.setattr(StaticDecoder, "start", small_start)
    return seen


def test_what_does_not_fit_is_done_in_parts(call, error, model, monkeypatch):
    whole = call(model)
    seen = room_for(3, get_engine(model), monkeypatch, error)
    with left_as_it_was(model):
        parts = call(model)
    assert max(seen) in (2, 3)
    np.testing.assert_allclose(parts, whole, atol=1e-4)


@pytest.mark.slow
def test_what_never_fits_ends_with_the_models_own_error(call, model, monkeypatch):
    call(model)
    room_for(0, get_engine(model), monkeypatch, ERRORS[0])
    with left_as_it_was(model), pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        call(model)


def test_other_errors_are_raised_at_once(call, model, monkeypatch):
    call(model)
    seen = room_for(0, get_engine(model), monkeypatch, RuntimeError("the device is gone"))
    with left_as_it_was(model), pytest.raises(RuntimeError, match="the device is gone"):
        call(model)
    assert seen == []


def test_items_are_halved_in_order_down_to_one():
    tried = []

    def run(items):
        tried.append(list(items))
        if len(items) > 2:
            raise MemoryError
        return list(items)

    assert list(halved(range(5), run)) == [[0, 1], [2], [3, 4]]
    assert tried == [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1], [2], [3, 4]]
    done = []
    run_halved([7, 8], done.extend)
    assert done == [7, 8]


def test_memory_is_told_from_other_errors():
    assert all(map(is_out_of_memory, ERRORS))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.slow
@pytest.mark.parametrize("when", range(1, 30, 4))
def test_means_count_no_pair_twice(when, model, monkeypatch):
    """Memory may also run out between two additions, long after the model has run."""
    whole = dl.causal_mediation(model, pairs(model), corruption="mean").values
    add, widen = ablations._SiteMeans._add, torch.Tensor.float
    count = [0]

    def short(tensor):
        count[0] += 1
        if count[0] == when:
            raise ERRORS[0]
        return widen(tensor)

    def watched(self, chunk, run):
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "float", short)
            add(self, chunk, run)

    monkeypatch.setattr(ablations._SiteMeans, "_add", watched)
    again = dl.causal_mediation(model, pairs(model), corruption="mean").values
    np.testing.assert_allclose(again, whole, atol=1e-5)
    assert count[0] > 0


def test_means_of_teachers_with_weights(model):
    name, parameter = next(iter(get_engine(model).block_parameters(0).items()))
    delta = dl.Delta({name: 0.1 * torch.ones(parameter.shape)}, dl.provenance.fingerprint(model))
    rows = [[1, 2, 3], [4, 5, 6]]
    moved = dl.Pairs.from_tokens(
        rows, rows, answers=[1, 2], foils=[3, 4], clean_teacher=dl.Teacher("moved", delta=delta)
    )
    found = dl.causal_mediation(model, moved, corruption="mean")
    with delta.applied(model):
        # Of the same weights on both sides: only the means are put in, which are of the clean runs.
        other = dl.Pairs.from_tokens(rows, [[4, 2, 3], [1, 5, 6]], answers=[1, 2], foils=[3, 4])
        expected = dl.causal_mediation(model, other, corruption="mean")
    np.testing.assert_allclose(found.values, expected.values, atol=1e-5)


FREED = """
from pathlib import Path
from divergence_lens._utils.memory import return_freed_memory

def resident():
    (line,) = [s for s in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in s]
    return int(line.split()[1]) // 1024

before = resident()
parts = [b"1" * 2**20 for _ in range(300)]
end = b"1" * 2**20  # at the end of the heap, so that what lies below stays with the process
del parts
freed = resident()
return_freed_memory()
print(before, freed, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries return it at once")
def test_freed_memory_is_returned():
    # Large parts would be returned at once, as parts that lie in no heap.
    settings = {"MALLOC_MMAP_THRESHOLD_": str(2**26), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
    run = subprocess.run(
        [sys.executable, "-c", FREED],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    before, freed, returned = map(int, run.stdout.split())
    assert freed > before + 250
    assert returned < before + 50
