"""Slow oracles for edges and circuits: a Llama of Hugging Face, rewired with forward hooks.

Each receiver reads a residual of its own, a sum over senders; every run is one whole forward pass
of one row. Nothing here uses the library's engine, graph or blocks.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

Include = Callable[[str, str], Tensor]
"""Of a sender and a receiver, the sender's output that the receiver reads, given live outputs."""


class Rewired:
    """One row of a Llama whose queries, keys, values, MLPs and logits read chosen outputs."""

    def __init__(self, hf: PreTrainedModel) -> None:
        self.hf, self.config = hf, hf.config
        self.layers: Any = hf.base_model.layers
        self.n_heads, self.n_kv = self.config.num_attention_heads, self.config.num_key_value_heads

    def senders(self, layer: int, *, heads: bool = True) -> list[str]:
        """All senders before a layer's MLP (or before its attention)."""
        names = ["embed"]
        for below in range(layer):
            names += [f"a{below}.h{head}" for head in range(self.n_heads)] + [f"m{below}"]
        if heads:
            names += [f"a{layer}.h{head}" for head in range(self.n_heads)]
        return names

    @torch.no_grad()
    def run(
        self, row: Tensor, choose: Callable[[str, str, Tensor], Tensor] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Every sender's output `[pos, d_model]`, and the logits of the last position.

        `choose(sender, receiver, live)` returns what the receiver reads of the sender.
        """
        live: dict[str, Tensor] = {}

        def reads(receiver: str, senders: list[str], default: Tensor) -> Tensor:
            if choose is None:
                return default
            return torch.stack([choose(s, receiver, live[s]) for s in senders]).sum(0)[None]

        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                self._hook_layer(stack, number, layer, live, reads)

            def final(_module: Any, args: Any) -> Any:
                count = len(self.layers)
                return (reads("logits", self.senders(count, heads=False), args[0]), *args[1:])

            stack.callback(self.hf.base_model.norm.register_forward_pre_hook(final).remove)
            logits = self.hf(row[None], use_cache=False).logits[0, -1]
        return live, logits

    def _hook_layer(self, stack: ExitStack, number: int, layer: Any, live: Any, reads: Any) -> None:
        attention, resid = layer.self_attn, {}
        below = self.senders(number, heads=False)

        def entered(_module: Any, args: Any) -> None:
            resid["pre"] = args[0]
            if number == 0:
                live["embed"] = args[0][0].clone()

        stack.callback(layer.input_layernorm.register_forward_pre_hook(entered).remove)
        group = self.n_heads // self.n_kv
        kinds = {
            "q": (attention.q_proj, self.n_heads),
            "k": (attention.k_proj, self.n_kv),
            "v": (attention.v_proj, self.n_kv),
        }
        for kind, (module, heads) in kinds.items():
            letter = "h" if kind == "q" or group == 1 else "g"

            def projected(
                module: Any,
                _args: Any,
                output: Tensor,
                kind: str = kind,
                heads: int = heads,
                letter: str = letter,
            ) -> Tensor:
                width = output.shape[-1] // heads
                parts = []
                for head in range(heads):
                    x = reads(f"a{number}.{letter}{head}.{kind}", below, resid["pre"])
                    # `norm` and `forward` are called without hooks.
                    normed = layer.input_layernorm.forward(x)
                    full = torch.nn.functional.linear(normed, module.weight, module.bias)
                    parts.append(full[..., head * width : (head + 1) * width])
                return torch.cat(parts, -1)

            stack.callback(module.register_forward_hook(projected).remove)

        def mixed(module: Any, args: Any) -> None:
            width = args[0].shape[-1] // self.n_heads
            for head in range(self.n_heads):
                own = slice(head * width, (head + 1) * width)
                live[f"a{number}.h{head}"] = args[0][0, :, own] @ module.weight[:, own].T

        stack.callback(attention.o_proj.register_forward_pre_hook(mixed).remove)

        def middle(_module: Any, args: Any) -> Any:
            return (reads(f"m{number}", self.senders(number), args[0]), *args[1:])

        norm = layer.post_attention_layernorm
        stack.callback(norm.register_forward_pre_hook(middle).remove)

        def added(_module: Any, _args: Any, output: Tensor) -> None:
            live[f"m{number}"] = output[0].clone()

        stack.callback(layer.mlp.register_forward_hook(added).remove)


def path_patched(
    hf: PreTrainedModel,
    base: Tensor,
    source: Tensor,
    sender: str,
    receiver: str,
    *,
    positions: list[int] | None = None,
) -> Tensor:
    """The last logits of the base run, with one edge's sender replaced by the source run's."""
    rewired = Rewired(hf)
    change = rewired.run(source)[0][sender] - rewired.run(base)[0][sender]
    if positions is not None:
        kept = torch.zeros(len(change), 1)
        kept[positions] = 1
        change = change * kept

    def choose(s: str, r: str, live: Tensor) -> Tensor:
        return live + change if (s, r) == (sender, receiver) else live

    return rewired.run(base, choose)[1]


def circuit_logits(
    hf: PreTrainedModel, base: Tensor, ablated: dict[str, Tensor], edges: set[tuple[str, str]]
) -> Tensor:
    """The last logits with every edge outside `edges` reading the sender's ablated output."""
    return Rewired(hf).run(base, lambda s, r, live: live if (s, r) in edges else ablated[s])[1]
