"""captum's `LayerGradientXActivation` at the outputs of all blocks, in one call."""

from pathlib import Path

import numpy as np
import torch
from captum.attr import LayerGradientXActivation
from worker import Arrays, Run, load_hf, serve


def prepare(folder: str, inputs: Path, _options: list[str]) -> Run:
    """Return the sum of gradient times activation by pair, layer and position."""
    given = np.load(inputs)
    clean = torch.from_numpy(given["clean"])
    answer, foil = int(given["answer"]), int(given["foil"])
    model = load_hf(folder).requires_grad_(False)

    def metric(ids: torch.Tensor) -> torch.Tensor:
        # captum takes gradients of what depends on a leaf: ids have none, embeddings do.
        embedded = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embedded, logits_to_keep=1).logits[:, -1]
        return logits[:, answer] - logits[:, foil]

    attribution = LayerGradientXActivation(metric, list(model.model.layers))

    def run() -> Arrays:
        products = attribution.attribute(clean)  # per layer [batch, pos, d_model]
        outputs = [one[0] if isinstance(one, tuple) else one for one in products]
        return {"values": torch.stack([one.sum(-1) for one in outputs], 1).detach().numpy()}

    return run


serve(prepare)
