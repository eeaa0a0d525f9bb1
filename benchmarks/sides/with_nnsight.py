"""Exact patching as in nnsight's documentation ("Activation Patching", sweep over layers).

One trace per cell: the first invocation reads the state from the corrupted row, and the second
writes it into the clean row. A barrier hands the value over.
"""

from pathlib import Path

import numpy as np
import torch
from nnsight import LanguageModel
from transformers import AutoTokenizer
from worker import Arrays, Run, load_hf, serve


def prepare(folder: str, inputs: Path, _options: list[str]) -> Run:
    """Return a sweep over all layers and positions."""
    given = np.load(inputs)
    clean, corrupted = (given[name].tolist() for name in ("clean", "corrupted"))
    answer, foil = int(given["answer"]), int(given["foil"])
    model = LanguageModel(load_hf(folder), tokenizer=AutoTokenizer.from_pretrained(folder))
    layers = model.model.layers

    @torch.no_grad()
    def run() -> Arrays:
        values = np.zeros((len(layers), len(clean)))
        for layer in range(len(layers)):
            for position in range(len(clean)):
                with model.trace() as tracer:
                    barrier = tracer.barrier(2)
                    with tracer.invoke([corrupted]):
                        state = layers[layer].output[:, position, :]
                        barrier()
                    with tracer.invoke([clean]):
                        barrier()
                        layers[layer].output[:, position, :] = state
                        logits = model.lm_head.output[:, -1, :].save()
                values[layer, position] = float(logits[0, answer] - logits[0, foil])
        return {"values": values}

    return run


serve(prepare)
