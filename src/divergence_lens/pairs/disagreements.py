"""The first position of each row at which two models choose different tokens."""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from jaxtyping import Int64
from torch import Tensor

from divergence_lens._utils.batching import pad_right
from divergence_lens._utils.validation import token_ids
from divergence_lens.deltas import Delta
from divergence_lens.engine import Engine, get_engine
from divergence_lens.models import Model, lens_model, model_name
from divergence_lens.pairs.inputs import Rows
from divergence_lens.teachers import Teacher


def second_teacher(model_b: Model | Delta) -> Teacher:
    """A teacher with the weights of `model_b`."""
    if isinstance(model_b, Delta):
        return Teacher("delta", delta=model_b)
    return Teacher(model_name(model_b), model=model_b)


def first_disagreements(
    model_a: Model, second: Teacher, rows: Rows, *, start: int, batch_rows: int
) -> Iterator[tuple[Int64[Tensor, " prefix"], int, int]]:
    """Find where the greedy choices of `model_a` and of `second` differ first.

    Yields:
        For each row with a disagreement: the prefix before it, and the two choices.

    Raises:
        ValueError: `start` is not positive, a row is not longer than it, or the models' tokenizers
            differ.
    """
    if start < 1:
        raise ValueError(f"start is {start}; the first token that a model predicts is number 1")
    d_vocab = get_engine(model_a).d_vocab
    ids = [
        torch.from_numpy(token_ids(row, f"row {i}", d_vocab=d_vocab)) for i, row in enumerate(rows)
    ]
    short = [i for i, row in enumerate(ids) if len(row) < start + 1]
    if short:
        raise ValueError(f"row {short[0]} has {len(ids[short[0]])} tokens; start is {start}")
    if second.model is not None:
        check_tokenizers(model_a, second.model)
    for first in range(0, len(ids), batch_rows):
        batch = ids[first : first + batch_rows]
        tokens = pad_right(batch)  # [batch, pos]
        chosen_a = _greedy_choices(get_engine(model_a), tokens).cpu()  # [batch, pos]
        with (
            second.applied(model_a) if second.model is None else nullcontext(second.model) as other
        ):
            chosen_b = _greedy_choices(get_engine(other), tokens).cpu()  # [batch, pos]
        for row, a, b in zip(batch, chosen_a, chosen_b, strict=True):
            # The logits at position p predict the token at p + 1.
            differ = (a != b)[start - 1 : len(row) - 1].nonzero()
            if len(differ):
                at = int(differ[0]) + start - 1
                yield row[: at + 1], int(a[at]), int(b[at])


def check_tokenizers(a: Model, b: Model) -> None:
    """Refuse two models with different tokenizers; a model without one is not checked.

    Raises:
        ValueError: The tokenizers differ.
    """
    if lens_model(a).tokenizer is not None and lens_model(b).tokenizer is not None:
        Teacher(model_name(b), model=b).check_tokenizer(a)


def _greedy_choices(
    engine: Engine, tokens: Int64[Tensor, "batch pos"]
) -> Int64[Tensor, "batch pos"]:
    hidden = engine.final(tokens)  # [batch, pos, d_model]
    # Unembed row by row: the logits [batch, pos, d_vocab] of a whole batch may not fit in memory.
    return torch.stack([engine.unembed(row).argmax(-1) for row in hidden])
