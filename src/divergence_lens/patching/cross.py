"""Cross-patching: one model's lower layers under another model's upper layers.

At a token where two checkpoints disagree, the residual stream that one of them makes up to some
block is handed to the other's blocks from there on. With both origins and both continuations there
are four margins at each boundary, and they tell three things apart: what the upper layers do by
themselves, what the lower layers do by themselves, and what they do only together (the
interaction). After Zhou (2026, arXiv 2605.07284).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from html import escape
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from tqdm.auto import tqdm

from divergence_lens._utils.batching import pad_right
from divergence_lens._utils.interrupts import partial_on_interrupt
from divergence_lens._utils.plotting import draw
from divergence_lens._utils.statistics import bootstrap_interval, resampled_means
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens.deltas import Delta
from divergence_lens.engine import Engine, get_engine
from divergence_lens.models import Model, model_name, untyped
from divergence_lens.pairs import Pairs, Rows
from divergence_lens.patching.metrics import check_tokens, finite
from divergence_lens.patching.request import target_logits
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Which = Literal["a", "b"]
_KIND = "cross_patch"


@dataclass(frozen=True, eq=False, repr=False)
class CrossPatch:
    """The four margins of two models, at every boundary between two blocks.

    A margin is logit(answer) - logit(foil) at the target position, where the answer is model a's
    token and the foil is model b's. At boundary l, blocks 0 to l - 1 (and the embeddings) are the
    lower model's and blocks l and up (and the unembedding) the upper model's; so boundary 0 has the
    lower model's embeddings alone, and the last boundary the upper model's unembedding alone.

    Attributes:
        margins: `[pairs, boundaries, lower, upper]`, logits; index 0 is model a, 1 is model b.
        names: Of the two models.
        metadata: Settings and versions; JSON-able.
    """

    margins: Float32[np.ndarray, "pairs boundaries 2 2"]
    names: tuple[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)

    def margin(self, lower: Which, upper: Which) -> Float32[np.ndarray, "pairs boundaries"]:
        """The margin with these origins of the lower and the upper layers."""
        return np.asarray(self.margins[:, :, _index(lower), _index(upper)])

    def upper_effect(self, lower: Which) -> Float32[np.ndarray, "pairs boundaries"]:
        """What a's upper layers add to the margin, in place of b's, over the same lower layers."""
        return np.asarray(self.margin(lower, "a") - self.margin(lower, "b"))

    def lower_effect(self, upper: Which) -> Float32[np.ndarray, "pairs boundaries"]:
        """What a's lower layers add to the margin, in place of b's, under the same upper layers."""
        return np.asarray(self.margin("a", upper) - self.margin("b", upper))

    @property
    def interaction(self) -> Float32[np.ndarray, "pairs boundaries"]:
        """How much more a's upper layers add over a's own lower layers than over b's.

        Zero where what the two halves add does not depend on one another.
        """
        return np.asarray(self.upper_effect("a") - self.upper_effect("b"))

    def by_boundary(
        self, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> "pd.DataFrame":
        """Means over pairs, with a bootstrap interval of the interaction.

        Args:
            level: Coverage of the interval.
            resamples: Bootstrap resamples over pairs.
            seed: Of the resampling.

        Returns:
            One row per boundary, with columns `aa`, `ab`, `ba`, `bb` (lower, then upper),
            `interaction`, `low` and `high`.
        """
        import pandas as pd

        low, high = bootstrap_interval(
            resampled_means(self.interaction, resamples), level=level, seed=seed
        )
        return pd.DataFrame(
            {
                **{
                    lower + upper: self.margin(lower, upper).mean(0)
                    for lower in ("a", "b")
                    for upper in ("a", "b")
                },
                "interaction": self.interaction.mean(0),
                "low": low,
                "high": high,
            },
            index=pd.RangeIndex(self.margins.shape[1], name="boundary"),
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per pair and boundary: `pair`, `boundary`, the four margins, `interaction`."""
        import pandas as pd

        pairs, boundaries = np.indices(self.margins.shape[:2])
        return pd.DataFrame(
            {
                "pair": pairs.ravel(),
                "boundary": boundaries.ravel(),
                **{
                    lower + upper: self.margin(lower, upper).ravel()
                    for lower in ("a", "b")
                    for upper in ("a", "b")
                },
                "interaction": self.interaction.ravel(),
            }
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to one safetensors file with a JSON header."""
        header = {"names": self.names, "metadata": self.metadata}
        save_tensors(path, {"margins": self.margins}, header, kind=_KIND)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "CrossPatch":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not such a file, or was damaged.
        """
        tensors, header = load_tensors(path, kind=_KIND)
        first, second = header["names"]
        return cls(np.asarray(tensors["margins"]), (first, second), header["metadata"])

    def plot(self) -> "go.Figure":
        """The mean margins and the interaction, boundary by boundary."""
        return draw("cross_patch_margins", self)

    def __repr__(self) -> str:
        """One line: the models, how much was patched, and the margins of the whole models."""
        pairs, boundaries = self.margins.shape[:2]
        own = ", ".join(f"{self.margins[:, 0, i, i].mean():.3f}" for i in (0, 1))
        return (
            f"CrossPatch({self.names[0]!r} (a) and {self.names[1]!r} (b): {pairs} pairs, "
            f"{boundaries} boundaries; mean margins of a and b themselves {own})"
        )

    def _repr_html_(self) -> str:
        pairs, boundaries = self.margins.shape[:2]
        table = self.by_boundary(resamples=200).to_html(float_format=lambda x: f"{x:.3f}", border=0)
        return (
            f"<p><b>cross-patch</b> of {escape(self.names[0])} (a) and {escape(self.names[1])} (b):"
            f" {pairs} pairs, {boundaries} boundaries; margins by lower and upper layers</p>{table}"
        )


@torch.no_grad()
def cross_patch(
    model_a: Model,
    model_b: "Model | Delta",
    pairs: Pairs,
    *,
    batch_rows: int = 128,
    progress: bool = False,
) -> CrossPatch:
    """Run each model's lower layers under each model's upper layers, at every boundary.

    A row of boundary l joins one staggered pass of the upper model at block l, so that all
    boundaries together cost about half as many full passes as there are layers.

    Args:
        model_a: The model whose token is the answer.
        model_b: The model whose token is the foil; or a delta over `model_a`, which is put in and
            taken out again, so that only one model is in memory.
        pairs: Their clean rows are the shared prefixes, their answers are model a's tokens and
            their foils model b's; see `first_disagreements`. Teachers in them are not applied.
        batch_rows: At most so many rows run at once.
        progress: Whether to show a progress bar.

    Returns:
        The four margins of every pair and boundary.

    Raises:
        Interrupted: If it was stopped; `partial` holds the margins of the pairs that were finished.
        ValueError: If the two models differ in shape or one is in training mode, the rows of a pair
            are not the same on both sides, a pair lacks its answer or foil, a row does not fit the
            context or the vocabulary, or the models' tokenizers differ.
    """
    b = Teacher("b", delta=model_b) if isinstance(model_b, Delta) else None
    other = model_a if isinstance(model_b, Delta) else model_b
    engine = get_engine(model_a)
    _check_tokenizers(model_a, other)
    _check(engine, get_engine(other), pairs, batch_rows)
    for name in ("answers", "foils"):
        check_tokens(pairs, name, "cross_patch")
    boundaries = engine.n_layers + 1
    margins = np.zeros((len(pairs), boundaries, 2, 2), dtype=np.float32)

    def entered(which: int) -> AbstractContextManager[Model]:
        if which == 0:
            return nullcontext(model_a)
        return nullcontext(other) if b is None else b.applied(model_a)

    order = sorted(range(len(pairs)), key=lambda i: (-len(pairs.clean[i]), i))
    size = max(1, batch_rows // boundaries)
    names = (model_name(model_a), "delta" if isinstance(model_b, Delta) else model_name(model_b))
    finished: list[int] = []

    def partial() -> CrossPatch:
        rows = sorted(finished)
        header = run_metadata(model_a, names=list(names), finished_pairs=rows)
        return CrossPatch(margins[rows], names, header)

    with (
        tqdm(total=len(order), desc="cross-patch", unit="pair", disable=not progress) as bar,
        partial_on_interrupt("cross_patch", finished, len(order), "pairs", partial),
    ):
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            rows = [pairs.clean[i] for i in chosen]
            tokens = pad_right(rows, engine.device)
            target = torch.tensor([len(row) - 1 for row in rows], device=engine.device)
            answers, foils = (ids[chosen].to(engine.device) for ids in (pairs.answers, pairs.foils))
            states = []
            for which in (0, 1):
                with entered(which) as model:
                    states.append(_residuals(get_engine(model), tokens))
            for upper in (0, 1):
                with entered(upper) as model:
                    for lower in (0, 1):
                        logits = _continued(get_engine(model), tokens, states[lower], target)
                        index = answers.repeat(boundaries), foils.repeat(boundaries)
                        at = torch.arange(len(logits), device=logits.device)
                        margin = logits[at, index[0]] - logits[at, index[1]]
                        half = f"{'ab'[lower]}'s lower under {'ab'[upper]}'s upper half"
                        finite(margin, torch.tensor(chosen).repeat(boundaries), half)
                        margins[chosen, :, lower, upper] = margin.view(boundaries, -1).T.cpu()
            finished += chosen
            bar.update(len(chosen))
    return CrossPatch(margins, names, run_metadata(model_a, names=list(names)))


@torch.no_grad()
def first_disagreements(
    model_a: Model,
    model_b: "Model | Delta",
    rows: Rows,
    *,
    start: int = 1,
    batch_rows: int = 32,
) -> Pairs:
    """Pairs at the first position of each row where two models would choose another token.

    Args:
        model_a: Its choice is the answer.
        model_b: Its choice is the foil; or a delta over `model_a`, as in `cross_patch`.
        rows: Token ids; both models read the same row.
        start: The first token that may count, as a position in the row.
        batch_rows: At most so many rows run at once.

    Returns:
        One pair for each row with a disagreement, cut before the token; both sides hold the same
        prefix, and the corrupted teacher has the weights of `model_b`.

    Raises:
        ValueError: If `start` is not positive, a row is not longer than it, the models' tokenizers
            differ, or they agree everywhere.
    """
    if start < 1:
        raise ValueError(f"start is {start}; the first token that a model predicts is number 1")
    ids = [torch.as_tensor(row, dtype=torch.int64).cpu() for row in rows]
    short = [i for i, row in enumerate(ids) if len(row) < start + 1]
    if short:
        raise ValueError(f"row {short[0]} has {len(ids[short[0]])} tokens; start is {start}")
    second = (
        Teacher("delta", delta=model_b)
        if isinstance(model_b, Delta)
        else Teacher(model_name(model_b), model=model_b)
    )
    if second.model is not None:
        _check_tokenizers(model_a, second.model)
    prefixes, answers, foils = [], [], []
    for first in range(0, len(ids), batch_rows):
        some = ids[first : first + batch_rows]
        tokens = pad_right(some)
        choices = [_choices(get_engine(model_a), tokens).cpu()]
        with (
            second.applied(model_a) if second.model is None else nullcontext(second.model) as other
        ):
            choices.append(_choices(get_engine(other), tokens).cpu())
        for row, a, b in zip(some, *choices, strict=True):
            # The choice at position p is of the token at p + 1.
            differ = (a != b)[start - 1 : len(row) - 1].nonzero()
            if len(differ):
                at = int(differ[0]) + start - 1
                prefixes.append(row[: at + 1])
                answers.append(int(a[at]))
                foils.append(int(b[at]))
    if not prefixes:
        raise ValueError(f"the two models choose the same tokens in all {len(ids)} rows")
    return Pairs.from_tokens(
        prefixes,
        prefixes,
        answers=answers,
        foils=foils,
        corrupted_teacher=second,
        tokenizer=model_a.tokenizer,
    )


def _residuals(
    engine: Engine, tokens: Int64[Tensor, "batch pos"]
) -> list[Float[Tensor, "batch pos d_model"]]:
    """The residual at every boundary."""
    run = engine.begin(tokens)
    states = [run.resid]
    for layer in range(engine.n_layers):
        states.append(engine.block(layer, states[-1], run))
    return states


def _continued(
    engine: Engine,
    tokens: Int64[Tensor, "batch pos"],
    states: Sequence[Float[Tensor, "batch pos d_model"]],
    target: Int64[Tensor, " batch"],
) -> Float[Tensor, "rows d_vocab"]:
    """Logits at the targets when the model goes on from each boundary; the lowest come first."""
    run = engine.begin(tokens[:1])
    x = states[0]
    for layer in range(engine.n_layers):
        x = torch.cat([engine.block(layer, x, run), states[layer + 1]])
    return target_logits(engine, x, target.repeat(len(states)))


def _choices(engine: Engine, tokens: Int64[Tensor, "batch pos"]) -> Int64[Tensor, "batch pos"]:
    hidden = engine.final(tokens)
    # Row by row, so that logits of a batch are never held at once.
    return torch.stack([engine.unembed(row).argmax(-1) for row in hidden])


def _check_tokenizers(a: Model, b: Model) -> None:
    """Refuse two models that read ids differently, as far as they have tokenizers to compare."""
    if untyped(a).tokenizer is not None and untyped(b).tokenizer is not None:
        Teacher(model_name(b), model=b).check_tokenizer(a)


def _check(a: Engine, b: Engine, pairs: Pairs, batch_rows: int) -> None:
    if batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}; at least 1 row is needed")
    shapes = [(e.n_layers, e.d_model, e.d_vocab) for e in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "states can only be handed to a model of the same shape; layers, d_model and "
            f"vocabulary are {shapes[0]} and {shapes[1]}"
        )
    if a.model.training or b.model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
        if not torch.equal(clean, corrupted):
            raise ValueError(
                f"the two rows of pair {i} are not the same tokens; cross-patching needs one "
                "shared prefix, as first_disagreements gives it"
            )
        if len(clean) > a.n_ctx or int(clean.max()) >= a.d_vocab:
            raise ValueError(
                f"pair {i} has {len(clean)} tokens with ids up to {int(clean.max())}; the model "
                f"holds {a.n_ctx} tokens and a vocabulary of {a.d_vocab}"
            )


def _index(which: Which) -> int:
    if which not in ("a", "b"):
        raise ValueError(f'the model is {which!r}; it is "a" or "b"')
    return "ab".index(which)
