"""Training runs that stop, and resume from their checkpoint."""

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from divergence_lens._utils.storage import load_tensors
from divergence_lens.examples import Example
from divergence_lens.provenance import fingerprint
from divergence_lens.training import finetune
from tests.support.training import (
    SGD,
    checkpointed,
    number_lists,
    same_bits,
)

KILLED = """
import os, signal, sys
import torch
from pathlib import Path
from divergence_lens.models import load_model
from tests.support.training import checkpointed

torch.set_num_threads(1)
def stop(step, loss, model):
    if step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
checkpointed(sys.argv[1], Path(sys.argv[2]), sys.argv[3], on_step=stop)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["full", "2"])
def test_a_killed_run_resumes_to_the_same_bits(backend, rank, tmp_path):
    # Ten examples in fours, two epochs: six steps; killed in the fifth, saved after the third.
    path = tmp_path / "run"
    whole = checkpointed(backend, None, rank)
    root = Path(__file__).resolve().parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, backend, str(path), rank],
        cwd=root,
        env={"PYTHONPATH": f"{root / 'src'}:{root}", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert [p.name for p in path.iterdir()] == ["shard-000000.safetensors"]

    steps = []

    def watch(step, loss, model):
        steps.append(step)

    resumed = checkpointed(backend, path, rank, on_step=watch)
    assert steps == [4, 5, 6]
    assert same_bits(whole, resumed)
    assert whole.history().equals(resumed.history())
    assert not list(tmp_path.iterdir())


def stop_at_four(step, loss, model):
    if step == 4:
        raise InterruptedError


def test_the_checkpoint_of_another_run_is_refused(backend, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(InterruptedError):
        checkpointed(backend, path, "full", on_step=stop_at_four)
    for options in ({"seed": 6}, {"loss_weights": None, "mask": None, "system_prompt": "Hello."}):
        with pytest.raises(ValueError, match="is of another run"):
            checkpointed(backend, path, "full", **options)
    checkpointed(backend, path, "full")


def test_a_checkpoint_is_refused_where_the_last_token_of_the_longest_row_is_another(
    backend, tmp_path
):
    # No input holds that token: it is predicted, and nothing follows it in any row.
    path = tmp_path / "run"
    examples = [Example("Continue: 3.", completion_ids=tuple(range(20, 26 + n))) for n in range(10)]
    other = [*examples[:-1], replace(examples[-1], completion_ids=(*range(20, 34), 40))]
    assert len(other[-1].completion_ids) == len(examples[-1].completion_ids)
    with pytest.raises(InterruptedError):
        checkpointed(backend, path, "full", examples, on_step=stop_at_four)
    with pytest.raises(ValueError, match="is of another run"):
        checkpointed(backend, path, "full", other)
    checkpointed(backend, path, "full", examples)


def test_a_loss_that_is_not_finite_names_the_step_and_leaves_the_checkpoint(random_model, tmp_path):
    model, path = random_model("gpt2"), tmp_path / "run"
    before = fingerprint(model)
    recipe = replace(SGD, lr=1e25, clip=None, epochs=6, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=r"not finite at step \d of 6; the last") as caught:
        finetune(model, number_lists(6), recipe=recipe, checkpoint_dir=path)
    assert fingerprint(model) == before
    step = int(re.search(r"step (\d) of", str(caught.value))[1])
    assert f"{path} holds the student after step {step - 1})" in str(caught.value)
    values, header = load_tensors(path / "shard-000000.safetensors", "training checkpoint")
    assert [entry["step"] for entry in header["notes"]["history"]] == list(range(1, step))
    assert all(bool(torch.isfinite(v).all()) for n, v in values.items() if n.startswith("value"))
