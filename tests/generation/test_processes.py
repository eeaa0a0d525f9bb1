"""Two processes that share a call return what one process returns."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import divergence_lens as dl
from divergence_lens.generation import generating
from divergence_lens.generation.local import LocalWriter
from divergence_lens.models import load_model
from tests.support.models import chat_tokenizer, random_hf_model
from tests.support.processes import Shared

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from accelerate import PartialState
import divergence_lens as dl
from tests.support.models import chat_tokenizer, random_hf_model

torch.set_num_threads(1)
state = PartialState(cpu=True)
out = Path(sys.argv[1])
hf = random_hf_model("llama", 0, vocab=len(chat_tokenizer()))
model = dl.load_model(hf, backend="bridge", tokenizer=chat_tokenizer())
prompts = dl.number_prompts(9, seed=0)
options = {"max_new_tokens": 8, "batch_tokens": 200, "temperature": 1.0, "accelerator": state}
examples = dl.generate(model, prompts, checkpoint_dir=out / "run", **options)
(out / f"ids{state.process_index}").write_text(json.dumps([e.completion_ids for e in examples]))
try:
    dl.generate(model, prompts[state.process_index :], **options)
except ValueError as error:
    (out / f"other{state.process_index}").write_text(str(error))
state.wait_for_everyone()
state.destroy_process_group()
"""


def test_two_threads_divide_the_batches(random_model, monkeypatch):
    # One model per thread, as each process has its own: a bridge is changed while it begins a pass.
    models = [random_model("llama", seed=2) for _ in range(2)]
    prompts = [*dl.number_prompts(6, seed=0), "cat", "cat"]
    options = {"max_new_tokens": 8, "batch_tokens": 200, "temperature": 1.0}
    alone = dl.generate(models[0], prompts, **options)
    decoded, write = {}, LocalWriter.write

    def noted(self, batch, finish):
        decoded.setdefault(threading.get_ident(), []).extend(batch)
        write(self, batch, finish)

    monkeypatch.setattr(LocalWriter, "write", noted)
    monkeypatch.setattr(generating, "Processes", Shared.of)
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(dl.generate, model, prompts, accelerator=Shared(index), **options)
            for index, model in enumerate(models)
        ]
        assert [call.result() for call in calls] == [alone, alone]
    first, second = decoded.values()
    assert sorted(first + second) == list(range(len(prompts)))


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    # `--multi_gpu` is accelerate's name for one process per device, of whatever kind.
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"),
        *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--main_process_port", "0", str(script), str(tmp_path)),
    ]
    done = subprocess.run(
        launch, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    hf_model = random_hf_model("llama", 0, vocab=len(chat_tokenizer()))
    model = load_model(hf_model, backend="bridge", tokenizer=chat_tokenizer())
    prompts = dl.number_prompts(9, seed=0)
    alone = dl.generate(model, prompts, max_new_tokens=8, batch_tokens=200, temperature=1.0)
    expected = [list(example.completion_ids) for example in alone]
    assert len(list((tmp_path / "run").iterdir())) > 2
    for process in (0, 1):
        assert json.loads((tmp_path / f"ids{process}").read_text()) == expected
        assert "were given different data" in (tmp_path / f"other{process}").read_text()
