"""Node scores of EAP-IG; the options are the folder of a checkout, the method and its steps.

The ids are ours, the model is a HookedTransformer. Scores of MLPs are left out: they multiply the
change of an MLP's output by the gradient at its input. The package places its buffers on
"cuda" by name; on a machine without one, this file places them on the CPU.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from lens import hooked
from worker import Arrays, Run, serve

NEEDED = (
    *("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"),
    "ungroup_grouped_query_attention",
)


def prepare(folder: str, inputs: Path, options: list[str]) -> Run:
    """Return the scores of the embeddings and of all heads."""
    checkout, method, steps = options
    sys.path.insert(0, str(Path(checkout) / "src"))
    from eap import attribute_node as package
    from eap.graph import Graph

    given = np.load(inputs)
    rows = {name: torch.from_numpy(given[name]) for name in ("clean", "corrupted")}
    answer, foil = int(given["answer"]), int(given["foil"])
    zeros = torch.zeros
    if not torch.cuda.is_available():
        torch.zeros = lambda *size, **more: zeros(*size, **{**more, "device": "cpu"})

    def ids(
        _model: object, names: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        tokens = rows[names[0]]
        mask = torch.ones_like(tokens)
        return tokens, mask, mask.sum(1), tokens.shape[1]

    package.tokenize_plus = ids
    model = hooked(folder)
    for name in NEEDED:
        setattr(model.cfg, name, True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # The gradients start at the embeddings, which are the nodes below all others.
    model.hook_embed.add_hook(lambda value, **_: value.requires_grad_(), is_permanent=True)
    graph = Graph.from_model(model, node_scores=True)
    layers, heads = model.cfg.n_layers, model.cfg.n_heads
    count = len(rows["clean"])

    def metric(logits: torch.Tensor, *_others: object) -> torch.Tensor:
        return (logits[:, -1, answer] - logits[:, -1, foil]).sum()

    def run() -> Arrays:
        batch = [(["clean"] * count, ["corrupted"] * count, [0] * count)]
        package.attribute_node(model, graph, batch, metric, method, ig_steps=int(steps), quiet=True)
        scores = graph.nodes_scores.numpy()

        def score(name: str) -> float:
            return float(scores[graph.forward_index(graph.nodes[name], attn_slice=False)])

        of_heads = [
            [score(f"a{layer}.h{head}") for head in range(heads)] for layer in range(layers)
        ]
        return {"resid_pre": np.array(score("input")), "z": np.array(of_heads)}

    return run


serve(prepare)
