"""Patching of spans of unequal length by hand, with hooks on the layers of Hugging Face models."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from divergence_lens.pairs import Column, Pairs
from tests.support.architectures import decoder_layers


@dataclass
class HandRun:
    """One run of a Hugging Face model: what enters and leaves each layer, and the last logits."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    logits: Tensor


def _states(value: object) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


@contextmanager
def _replaced(layer: nn.Module, site: str, state: Tensor) -> Iterator[None]:
    def before(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (state, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": state}

    def after(_layer: nn.Module, _args: tuple, output: object) -> object:
        return (state, *output[1:]) if isinstance(output, tuple) else state

    if site == "resid_pre":
        handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = layer.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def run_by_hand(
    hf: nn.Module, tokens: Sequence[int], replace: dict[tuple[int, str], Tensor] | None = None
) -> HandRun:
    """Run the model on one row, with the given states at (layer, site)."""
    layers = decoder_layers(hf, hf.config.num_hidden_layers)
    result = HandRun([], [], torch.empty(0))
    handles = []
    for layer in layers:
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: result.inputs.append(
                    (args[0] if args else kwargs["hidden_states"]).clone()
                ),
                with_kwargs=True,
            )
        )
        handles.append(
            layer.register_forward_hook(lambda _, __, out: result.outputs.append(_states(out)))
        )
    try:
        with _all_replaced(layers, replace or {}):
            row = torch.tensor([list(tokens)])
            logits = hf(row, attention_mask=torch.ones_like(row), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    result.logits = logits[0, -1].float()
    return result


@contextmanager
def _all_replaced(layers: nn.ModuleList, replace: dict[tuple[int, str], Tensor]) -> Iterator[None]:
    if not replace:
        yield
        return
    ((index, site), state), *others = replace.items()
    with _replaced(layers[index], site, state), _all_replaced(layers, dict(others)):
        yield


def patched_by_hand(
    hf: nn.Module,
    pairs: Pairs,
    i: int,
    chosen: Sequence[Column],
    *,
    site: str,
    layers: Sequence[int],
    noising: bool = True,
    measure: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """The effect of patching some columns of pair `i` at a residual site of some layers.

    The row is put together token by token and state by state, and the model runs on it from its
    first layer; what it computes below the patched layer is thrown away. `measure` takes the last
    position's logits; without it, the effect is on the logit difference.
    """
    rows = pairs.clean[i].tolist(), pairs.corrupted[i].tolist()
    base_tokens, source_tokens = rows if noising else rows[::-1]
    base, source = run_by_hand(hf, base_tokens), run_by_hand(hf, source_tokens)

    def put_together(of_base: object, of_source: object) -> list:
        parts: list = []
        for column in pairs.columns(i):
            spans = (
                (column.clean, column.corrupted)
                if noising
                else (
                    column.corrupted,
                    column.clean,
                )
            )
            parts += (
                [of_source[p] for p in spans[1]]
                if column in chosen
                else [of_base[p] for p in spans[0]]
            )
        return parts

    tokens = put_together(base_tokens, source_tokens)
    plain = run_by_hand(hf, tokens)
    from_source = put_together([False] * len(base_tokens), [True] * len(source_tokens))
    replace: dict[tuple[int, str], Tensor] = {}

    def whole(layer: int) -> Tensor:
        name = "inputs" if site == "resid_pre" else "outputs"
        of_base, of_source = (getattr(run, name)[layer][0] for run in (base, source))
        state = torch.stack(put_together(of_base, of_source))
        if site == "resid_pre" and layer == 0:  # other tokens are embedded where they stand now
            there = torch.tensor(from_source)[:, None]
            state = torch.where(there, state, plain.inputs[0][0])
        return state[None]

    first, *further = layers
    replace[first, site] = whole(first)
    for layer in further:
        below = run_by_hand(hf, tokens, replace)
        now = (below.inputs if site == "resid_pre" else below.outputs)[layer]
        there = torch.tensor(from_source)[:, None]
        replace[layer, site] = torch.where(there, whole(layer), now)
    after = run_by_hand(hf, tokens, replace).logits
    if measure is not None:
        return float(measure(after) - measure(base.logits))
    answer, foil = int(pairs.answers[i]), int(pairs.foils[i])
    return float(after[answer] - after[foil] - (base.logits[answer] - base.logits[foil]))


def patched_answers_by_hand(
    hf: nn.Module, pairs: Pairs, i: int, chosen: Sequence[Column], **options: object
) -> float:
    """The effect on the difference of summed log-probabilities, one run per token.

    The token number j of an answer is read after a pair whose two rows end with the tokens before
    it, and nothing of these is patched.
    """
    clean, corrupted = pairs.clean[i].tolist(), pairs.corrupted[i].tolist()
    effect = 0.0
    for sign, side in ((1, pairs.answers[i]), (-1, pairs.foils[i])):
        tokens = [token for token in side.tolist() if token >= 0]
        for j, token in enumerate(tokens):
            own = [*pairs.alignment[i].tolist(), *range(len(corrupted), len(corrupted) + j)]
            longer = Pairs.from_tokens(
                [clean + tokens[:j]], [corrupted + tokens[:j]], alignment=[own]
            )

            def log_probability(logits: Tensor, token: int = token) -> Tensor:
                return logits.double().log_softmax(-1)[token]

            effect += sign * patched_by_hand(
                hf, longer, 0, chosen, measure=log_probability, **options
            )
    return effect
