"""One side of a comparison: prepare a task, then run it each time the command asks.

    PYTHON SIDE.py FOLDER THREADS

Both sides of a comparison are such processes, each in its own environment, so this file imports
only numpy and torch. It reads lines of JSON. A list of the files of inputs and results and further
options prepares a task; the answer is "ready". null runs the task; the answer is its times, and the
results are in their file.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # loops show bars and have no option to hide them

import numpy as np
import torch

Arrays = Mapping[str, np.ndarray]
Run = Callable[[], Arrays]


def load_hf(folder: str) -> Any:
    """Load the Hugging Face model of a folder, in float32 and without gradients of its weights."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def until_stop(written: torch.Tensor, stops: list[int], new_tokens: int) -> np.ndarray:
    """Replace what follows a row's first stop token by -1, and pad rows to `new_tokens`."""
    tokens = np.full((len(written), new_tokens), -1)
    for number, row in enumerate(written.tolist()):
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        tokens[number, :end] = row[:end]
    return tokens


def serve(prepare: Callable[[str, Path, list[str]], Run]) -> None:
    """Prepare tasks and run them until stdin ends.

    Args:
        prepare: Gets the model's folder, the file with the inputs, and further options; returns the
            function whose calls are timed. It returns arrays by name.
    """
    # Whatever libraries print goes to stderr, so that stdout holds only the protocol.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    run, results = None, ""  # type: Run | None, str
    for line in sys.stdin:
        request = json.loads(line)
        if request is not None:
            inputs, results, *options = request
            run = prepare(folder, Path(inputs), options)
            print(json.dumps("ready"), file=answers)
            continue
        assert run is not None, "no task was prepared"
        cpu, clock = time.process_time(), time.perf_counter()
        arrays = run()
        times = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - clock}
        np.savez(results, **{name: np.asarray(array) for name, array in arrays.items()})
        print(json.dumps(times), file=answers)
