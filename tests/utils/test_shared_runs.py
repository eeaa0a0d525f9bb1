"""Runs that several processes share give the result of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from divergence_lens._utils.checkpoints import Processes
from divergence_lens.divergence import Divergence
from divergence_lens.models import load_model
from divergence_lens.patching.effects import Effects
from divergence_lens.training.sweep_result import Sweep
from tests.support.models import chat_tokenizer, random_hf_model
from tests.support.runs import (
    assert_same_bits,
    assert_same_effects,
    assert_same_students,
    find,
    patch_and_sweep,
    shards,
    some_examples,
)

SCRIPT = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from divergence_lens.engine import get_engine
from divergence_lens.models import load_model
from tests.support.models import chat_tokenizer, random_hf_model
from tests.support.runs import find, patch_and_sweep, some_examples, sweep

torch.set_num_threads(1)
out = Path(sys.argv[1])
state = PartialState(cpu=True)
assert state.num_processes == 2
tokenizer = chat_tokenizer()
hf = random_hf_model("qwen2", 0, vocab=len(tokenizer))
model = load_model(hf, backend="bridge", tokenizer=tokenizer)
examples = some_examples(60)
div = find(model, examples, accelerator=state, checkpoint_dir=out / "run")
div.save(out / f"process{state.process_index}.safetensors")

effects, attributed, swept = patch_and_sweep(model, out / "students", accelerator=state)
effects.save(out / f"effects{state.process_index}.safetensors")
attributed.save(out / f"attributed{state.process_index}.safetensors")
swept.save(out / f"sweep{state.process_index}.safetensors")
try:
    sweep(model, accelerator=state)
except ValueError as error:
    assert "give checkpoint_dir" in str(error)

try:
    find(model, examples[state.process_index :], accelerator=state)
except ValueError as error:
    (out / f"other{state.process_index}").write_text(str(error))

if state.process_index == 1:
    get_engine(model).final = None
try:
    find(model, examples, accelerator=state)
except Exception as error:
    (out / f"failed{state.process_index}").write_text(f"{type(error).__name__}: {error}")
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    # `--multi_gpu` is accelerate's name for one process per device, of whatever kind.
    launch = [
        *(
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
        ),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0", str(script), str(tmp_path)),
    ]
    done = subprocess.run(
        launch, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    tokenizer = chat_tokenizer()
    hf = random_hf_model("qwen2", 0, vocab=len(tokenizer))
    model = load_model(hf, backend="bridge", tokenizer=tokenizer)
    alone = find(model, some_examples(60))
    for process in range(2):
        shared = Divergence.load(tmp_path / f"process{process}.safetensors")
        assert_same_bits(shared, alone)
        refused = (tmp_path / f"other{process}").read_text()
        assert "2 processes were given different data" in refused
    assert len(shards(tmp_path / "run")) > 5
    effects, attributed, swept = patch_and_sweep(model, tmp_path / "alone")
    assert len(shards(tmp_path / "students")) == len(swept.students) == 3
    for process in range(2):
        for name, alone in (("effects", effects), ("attributed", attributed)):
            shared = Effects.load(tmp_path / f"{name}{process}.safetensors")
            assert_same_effects(shared, alone)
        assert_same_students(Sweep.load(tmp_path / f"sweep{process}.safetensors"), swept)
    assert "TypeError" in (tmp_path / "failed1").read_text()
    assert (tmp_path / "failed0").read_text().startswith("RuntimeError: another process")


def test_other_accelerators_are_refused():
    with pytest.raises(TypeError, match="accelerator is a str; give an accelerate"):
        Processes("gpu")
