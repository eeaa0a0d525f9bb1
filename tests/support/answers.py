"""Slow oracles for answers of several tokens: Hugging Face models with forward hooks."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from divergence_lens.pairs import NO_TOKEN, Pairs

State = Callable[[int, int], Tensor]
"""Of a layer and a position of the base row, the state that is patched in."""

MIXED = (
    ([1], [7]),
    ([5, 6], [8]),
    ([5, 6, 7], [5, 9]),
    ([3, 4], [9, 1, 2]),
)
"""Answers and foils of one to three tokens; the third pair shares its first token."""


def mixed_pairs(vocab: int, *, lengths: Sequence[int] = (9, 6, 8, 6), seed: int = 0) -> Pairs:
    """Pairs with the answers of `MIXED`, which differ at positions 2 and 3."""
    generator = torch.Generator().manual_seed(seed)
    clean = [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]
    corrupted = [row.clone() for row in clean]
    for row in corrupted:
        row[2:4] = (row[2:4] + torch.randint(1, vocab, (2,), generator=generator)) % vocab
    answers, foils = zip(*MIXED, strict=True)
    return Pairs.from_tokens(clean, corrupted, answers=answers, foils=foils)


def tokens_of(row: Tensor) -> list[int]:
    """An answer without its padding."""
    return [token for token in row.tolist() if token != NO_TOKEN]


def _blocks(model: PreTrainedModel) -> Sequence[Any]:
    inner: Any = model.base_model
    return inner.h if hasattr(inner, "h") else inner.layers


def _module(block: Any, site: str) -> nn.Module:
    if site in ("resid_pre", "resid_post"):
        return block
    if site == "mlp_out":
        return block.mlp
    attention = block.attn if hasattr(block, "attn") else block.self_attn
    return attention.c_proj if hasattr(attention, "c_proj") else attention.o_proj


def _hook(module: nn.Module, site: str, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the input of a module (for `resid_pre` and `z`) or its output."""
    if site in ("resid_pre", "z"):
        return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))

    def after(_module: nn.Module, _args: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    return module.register_forward_hook(after)


def hf_states(model: PreTrainedModel, row: Tensor, site: str) -> list[Tensor]:
    """The states of a site in each layer, `[pos, width]`."""
    states: list[Tensor] = []
    with ExitStack() as stack:
        for block in _blocks(model):

            def record(activation: Tensor) -> Tensor:
                states.append(activation[0].detach().clone())
                return activation

            stack.callback(_hook(_module(block, site), site, record).remove)
        model(row[None], use_cache=False)
    return states


def hf_log_probability(model: PreTrainedModel, row: Tensor, answer: Sequence[int]) -> Tensor:
    """The summed log-probability of an answer after a row, teacher-forced."""
    tokens = torch.cat([row, torch.tensor(answer, dtype=torch.int64)])
    log_p = model(tokens[None], use_cache=False).logits[0].double().log_softmax(-1)
    return sum(
        (log_p[len(row) - 1 + i, token] for i, token in enumerate(answer)),
        start=torch.zeros((), dtype=torch.float64),
    )


def hf_metric(model: PreTrainedModel, row: Tensor, pairs: Pairs, i: int) -> Tensor:
    """The difference of the summed log-probabilities of answer and foil."""
    return hf_log_probability(model, row, tokens_of(pairs.answers[i])) - hf_log_probability(
        model, row, tokens_of(pairs.foils[i])
    )


def hf_patched_metric(
    model: PreTrainedModel,
    row: Tensor,
    pairs: Pairs,
    i: int,
    *,
    site: str,
    layer: int,
    position: int,
    state: Tensor,
    part: slice = slice(None),
) -> float:
    """The metric with one state replaced; `part` selects components of it, such as one head's."""

    def change(activation: Tensor) -> Tensor:
        changed = activation.clone()
        changed[:, position, part] = state[part]
        return changed

    handle = _hook(_module(_blocks(model)[layer], site), site, change)
    try:
        return float(hf_metric(model, row, pairs, i))
    finally:
        handle.remove()


@torch.no_grad()
def hf_grid(
    model: PreTrainedModel,
    pairs: Pairs,
    site: str,
    *,
    noising: bool = True,
    heads: int = 0,
    states: Callable[[int], list[Tensor]] | None = None,
) -> np.ndarray:
    """One whole forward pass per cell and side, one pair at a time, by clean position.

    Args:
        model: The model.
        pairs: Rows of equal lengths on both sides.
        site: The site to patch.
        noising: Whether the clean run is patched.
        heads: The number of heads, for `z`.
        states: Of a pair the states to patch in; the other run's if not given.
    """
    layers = len(_blocks(model))
    width = max(len(row) for row in pairs.clean)
    values = np.full((len(pairs), layers, width, max(heads, 1)), np.nan, dtype=np.float32)
    for i in range(len(pairs)):
        base, source = pairs.clean[i], pairs.corrupted[i]
        if not noising:
            base, source = source, base
        new = hf_states(model, source, site) if states is None else states(i)
        before = float(hf_metric(model, base, pairs, i))
        size = new[0].shape[-1] // max(heads, 1)
        for layer in range(layers):
            for position in range(len(base)):
                for head in range(max(heads, 1)):
                    patched = hf_patched_metric(
                        model,
                        base,
                        pairs,
                        i,
                        site=site,
                        layer=layer,
                        position=position,
                        state=new[layer][position],
                        part=slice(head * size, (head + 1) * size),
                    )
                    values[i, layer, position, head] = patched - before
    return values if heads else values[..., 0]


def hf_gradient_values(
    model: PreTrainedModel, pairs: Pairs, i: int, site: str
) -> list[list[float]]:
    """The gradient of the metric at each state of the clean run, times the state's change."""
    clean, corrupted = pairs.clean[i], pairs.corrupted[i]
    change = [
        new - old
        for new, old in zip(
            hf_states(model, corrupted, site), hf_states(model, clean, site), strict=True
        )
    ]
    values = []
    for layer, block in enumerate(_blocks(model)):
        # The metric as a function of an offset that both sides' rows add to their prompt's states.
        offset = torch.zeros_like(change[layer]).requires_grad_()

        def add(activation: Tensor, offset: Tensor = offset) -> Tensor:
            more = activation.shape[1] - len(offset)
            return activation + nn.functional.pad(offset, (0, 0, 0, more))

        handle = _hook(_module(block, site), site, add)
        try:
            (gradient,) = torch.autograd.grad(hf_metric(model, clean, pairs, i), offset)
        finally:
            handle.remove()
        values.append((gradient * change[layer]).sum(-1).tolist())
    return values
