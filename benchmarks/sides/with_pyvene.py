"""Exact patching as in pyvene's tutorial on interchange interventions ("Basic Intervention").

One `IntervenableModel` per layer, and one call per position.
"""

from pathlib import Path

import numpy as np
import pyvene
import torch
from worker import Arrays, Run, load_hf, serve


def prepare(folder: str, inputs: Path, _options: list[str]) -> Run:
    """Return a sweep over all layers and positions."""
    given = np.load(inputs)
    clean, corrupted = (
        {"input_ids": torch.from_numpy(given[name])[None]} for name in ("clean", "corrupted")
    )
    answer, foil = int(given["answer"]), int(given["foil"])
    model = load_hf(folder)

    @torch.no_grad()
    def run() -> Arrays:
        n_layers, n_pos = model.config.num_hidden_layers, clean["input_ids"].shape[1]
        values = np.zeros((n_layers, n_pos))
        for layer in range(n_layers):
            representation = pyvene.RepresentationConfig(layer, "block_output", "pos", 1)
            config = pyvene.IntervenableConfig(
                model_type=type(model),
                representations=[representation],
                intervention_types=pyvene.VanillaIntervention,
            )
            intervenable = pyvene.IntervenableModel(config, model)
            for position in range(n_pos):
                _, patched = intervenable(clean, [corrupted], {"sources->base": position})
                logits = patched.logits[0, -1]
                values[layer, position] = float(logits[answer] - logits[foil])
        return {"values": values}

    return run


serve(prepare)
