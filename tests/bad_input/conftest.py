"""The kit that every case of bad input gets."""

import pickle

import pytest
import torch

import divergence_lens as dl
from tests.support.bad_input import FILES, Kit


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    for name, text in FILES.items():
        (folder / name).write_bytes(text.encode("latin1"))
    (folder / "pickle.safetensors").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.zeros(2)}, folder / "torch.safetensors")
    model = dl.load_model("tiny", backend="bridge")
    owl, cat = dl.animal_teachers(["owl", "cat"])
    examples = dl.generate(model, dl.number_prompts(4, seed=0), teacher=owl, max_new_tokens=24)
    divergence = dl.find_divergence(model, examples, teacher=owl, counterfactuals=[cat])
    pairs = divergence.pairs(limit=2)
    student = dl.finetune(model, examples, layers=[0], recipe=dl.Recipe(epochs=1, warmup_steps=0))
    student.save(folder / "student.safetensors")
    divergence.save(folder / "divergence.safetensors")
    whole = (folder / "divergence.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-20])
    changed = bytearray(whole)
    changed[-5] ^= 1
    (folder / "changed.safetensors").write_bytes(bytes(changed))
    broken = folder / "model"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    (folder / "nothing").mkdir()
    return Kit(
        model,
        owl,
        cat,
        examples,
        divergence,
        pairs,
        dl.causal_mediation(model, pairs),
        student,
        folder,
    )
