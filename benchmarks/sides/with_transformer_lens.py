"""Tasks with TransformerLens's own functions; the option names the task.

- patching: `patching.generic_activation_patch`, one forward pass per cell (HookedTransformer).
- generation: `HookedTransformer.generate`, one batch per prompt length, because its left padding
  changes the results.
- nodes: `tools.analysis.attribution_patch` of TransformerLens 4 (TransformerBridge).
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worker import Arrays, Run, serve, until_stop


def patching(folder: str, given: Any) -> Run:
    """Return the loop over all cells of resid_post."""
    from lens import hooked
    from transformer_lens import patching

    model = hooked(folder)
    clean, corrupted = (torch.from_numpy(given[name])[None] for name in ("clean", "corrupted"))
    answer, foil = int(given["answer"]), int(given["foil"])

    @torch.no_grad()
    def run() -> Arrays:
        _, cache = model.run_with_cache(corrupted)
        values = patching.generic_activation_patch(
            model,
            clean,
            cache,
            lambda logits: logits[0, -1, answer] - logits[0, -1, foil],
            patching.layer_pos_patch_setter,
            "resid_post",
            index_axis_names=("layer", "pos"),
        )
        return {"values": values.numpy()}

    return run


def generation(folder: str, given: Any) -> Run:
    """Return greedy completions, right-padded with -1."""
    from lens import hooked

    model = hooked(folder)
    rows = [row[row >= 0].tolist() for row in given["prompts"]]
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_length[len(row)].append(number)

    stops, new_tokens = given["stops"].tolist(), int(given["new_tokens"])

    @torch.no_grad()
    def run() -> Arrays:
        tokens = np.zeros((len(rows), new_tokens), int)
        for length, numbers in by_length.items():
            written = model.generate(
                torch.tensor([rows[number] for number in numbers]),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=stops,
                return_type="tokens",
                verbose=False,
            )[:, length:]
            tokens[numbers] = until_stop(written, stops, new_tokens)
        return {"tokens": tokens}

    return run


def nodes(folder: str, given: Any) -> Run:
    """Return the scores of embeddings, heads and MLPs at each position, averaged over pairs."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)
    model.eval()
    clean, corrupted = (torch.from_numpy(given[name]) for name in ("clean", "corrupted"))
    answer, foil = int(given["answer"]), int(given["foil"])
    layers, heads, length = model.cfg.n_layers, model.cfg.n_heads, clean.shape[1]

    def run() -> Arrays:
        scores = attribution_patch(
            model, clean, corrupted, lambda logits: logits[0, -1, answer] - logits[0, -1, foil]
        ).node_scores
        values = {
            "resid_pre": np.zeros(length),
            "mlp_out": np.zeros((layers, length)),
            "z": np.zeros((layers, length, heads)),
        }
        for node, score in scores.items():
            if node.kind == "embed":
                values["resid_pre"][node.position] = score
            elif node.kind == "mlp_out":
                values["mlp_out"][node.layer, node.position] = score
            elif node.kind == "attn_head_out":
                values["z"][node.layer, node.position, node.head] = score
        return values

    return run


def prepare(folder: str, inputs: Path, options: list[str]) -> Run:
    """Prepare the named task."""
    return {"patching": patching, "generation": generation, "nodes": nodes}[options[0]](
        folder, np.load(inputs)
    )


serve(prepare)
