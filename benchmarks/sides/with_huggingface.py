"""Greedy generation with Hugging Face's `generate`, one batch padded on the left."""

from pathlib import Path

import numpy as np
import torch
from worker import Arrays, Run, load_hf, serve, until_stop


def prepare(folder: str, inputs: Path, _options: list[str]) -> Run:
    """Return completions, right-padded with -1."""
    given = np.load(inputs)
    rows = [row[row >= 0].tolist() for row in given["prompts"]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    stops, new_tokens = given["stops"].tolist(), int(given["new_tokens"])
    model = load_hf(folder)

    @torch.no_grad()
    def run() -> Arrays:
        written = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=stops,
            pad_token_id=0,
        )[:, width:]
        return {"tokens": until_stop(written, stops, new_tokens)}

    return run


serve(prepare)
