"""Cross-patching: one model's lower layers under another model's upper layers.

At a token where two checkpoints disagree, the residual stream computed by one of them up to some
block is passed to the other's blocks from there on. With two lower and two upper halves there are
four margins at each boundary. They separate three effects: that of the upper layers alone, that of
the lower layers alone, and their interaction. After Zhou (2026, arXiv 2605.07284).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from tqdm.auto import tqdm

from divergence_lens._utils.batching import pad_right
from divergence_lens._utils.hub import OnHub
from divergence_lens._utils.interrupts import partial_on_interrupt
from divergence_lens._utils.plotting import draw
from divergence_lens._utils.statistics import bootstrap_interval, resampled_means
from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens._utils.wording import plural
from divergence_lens.deltas import Delta
from divergence_lens.engine import Engine, get_engine
from divergence_lens.models import Model, model_name
from divergence_lens.pairs import Pairs, check_pairs, check_tokenizers
from divergence_lens.patching.metrics import bind, check_tokens, finite, row_readings
from divergence_lens.patching.readings import Readings
from divergence_lens.patching.trace import logits_at, states_at
from divergence_lens.provenance import run_metadata
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Which = Literal["a", "b"]
_KIND = "cross_patch"


@dataclass(frozen=True, eq=False, repr=False)
class CrossPatch(OnHub):
    """The four margins of two models, at every boundary between two blocks.

    A margin is logit(answer) - logit(foil) at the target position, where the answer is model a's
    token and the foil is model b's; with several tokens each, it is the difference of their summed
    log-probabilities. At boundary l, blocks 0 to l - 1 (and the embeddings) are the
    lower model's and blocks l and up (and the unembedding) the upper model's; so at
    boundary 0 only the embeddings are the lower model's, and at the last boundary only the final
    norm and the unembedding are the upper model's.

    Attributes:
        margins: `[pairs, boundaries, lower, upper]`, logits; index 0 is model a, 1 is model b.
        names: Names of the two models.
        metadata: Settings and versions; JSON-able.
    """

    margins: Float32[np.ndarray, "pairs boundaries 2 2"]
    names: tuple[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)

    def margin(self, lower: Which, upper: Which) -> Float32[np.ndarray, "pairs boundaries"]:
        """The margin with these origins of the lower and the upper layers."""
        return np.asarray(self.margins[:, :, _index(lower), _index(upper)])

    def upper_effect(self, lower: Which) -> Float32[np.ndarray, "pairs boundaries"]:
        """Change of the margin when a's upper layers replace b's, over the same lower layers."""
        return np.asarray(self.margin(lower, "a") - self.margin(lower, "b"))

    def lower_effect(self, upper: Which) -> Float32[np.ndarray, "pairs boundaries"]:
        """Change of the margin when a's lower layers replace b's, under the same upper layers."""
        return np.asarray(self.margin("a", upper) - self.margin("b", upper))

    @property
    def interaction(self) -> Float32[np.ndarray, "pairs boundaries"]:
        """Upper effect of a over a's own lower layers, minus its upper effect over b's.

        It is zero where the effects of the two halves are independent.
        """
        return np.asarray(self.upper_effect("a") - self.upper_effect("b"))

    def by_boundary(
        self, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> "pd.DataFrame":
        """Means over pairs, with a bootstrap interval of the interaction.

        Args:
            level: Coverage of the interval.
            resamples: Bootstrap resamples over pairs.
            seed: Seed of the resampling.

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
        """Write to one safetensors file with a JSON header."""
        header = {"names": self.names, "metadata": self.metadata}
        save_tensors(path, {"margins": self.margins}, header, kind=_KIND)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "CrossPatch":
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a cross-patch file, or is damaged.
        """
        tensors, header = load_tensors(path, kind=_KIND)
        first, second = header["names"]
        return cls(np.asarray(tensors["margins"]), (first, second), header["metadata"])

    def plot(self) -> "go.Figure":
        """The mean margins and the interaction, boundary by boundary."""
        return draw("cross_patch_margins", self)

    def __repr__(self) -> str:
        """One line: the models, the shape, and the mean margins of the unpatched models."""
        pairs, boundaries = self.margins.shape[:2]
        own = ", ".join(f"{self.margins[:, 0, i, i].mean():.3f}" for i in (0, 1))
        return (
            f"CrossPatch({self.names[0]!r} (a) and {self.names[1]!r} (b): "
            f"{plural(pairs, 'pair')}, {boundaries} boundaries; mean margins of a and b "
            f"themselves {own})"
        )

    def _repr_html_(self) -> str:
        pairs, boundaries = self.margins.shape[:2]
        table = self.by_boundary(resamples=200).to_html(float_format=lambda x: f"{x:.3f}", border=0)
        return (
            f"<p><b>cross-patch</b> of {escape(self.names[0])} (a) and {escape(self.names[1])} (b):"
            f" {plural(pairs, 'pair')}, {boundaries} boundaries; margins by lower and upper "
            f"layers</p>{table}"
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

    The row of boundary l joins one staggered pass of the upper model at block l, so all boundaries
    together cost about half as many full passes as there are layers.

    Args:
        model_a: The model whose token is the answer.
        model_b: The model whose token is the foil; or a delta over `model_a`, which is applied and
            removed again, so that only one model is in memory.
        pairs: Their clean rows are the shared prefixes, their answers are model a's tokens and
            their foils model b's; see `Pairs.from_disagreements`. Their teachers are not applied.
        batch_rows: The maximum number of rows run at once.
        progress: Whether to show a progress bar.

    Returns:
        The four margins of every pair and boundary.

    Raises:
        Interrupted: If it was interrupted; `partial` holds the margins of the finished pairs.
        ValueError: If the two models differ in shape or one is in training mode, the rows of a pair
            are not the same on both sides, a pair lacks its answer or foil, a row does not fit the
            context or the vocabulary, or the models' tokenizers differ.
    """
    b = Teacher("b", delta=model_b) if isinstance(model_b, Delta) else None
    other = model_a if isinstance(model_b, Delta) else model_b
    engine = get_engine(model_a)
    check_tokenizers(model_a, other)
    _check(engine, get_engine(other), pairs, batch_rows)
    for name in ("answers", "foils"):
        check_tokens(pairs, name, "cross_patch")
    boundaries = engine.n_layers + 1
    margins = np.zeros((len(pairs), boundaries, 2, 2), dtype=np.float32)

    def half(which: int) -> AbstractContextManager[Model]:
        if which == 0:
            return nullcontext(model_a)
        return nullcontext(other) if b is None else b.applied(model_a)

    names = (model_name(model_a), "delta" if isinstance(model_b, Delta) else model_name(model_b))
    finished: list[int] = []

    def partial() -> CrossPatch:
        rows = sorted(finished)
        metadata = run_metadata(model_a, names=list(names), finished_pairs=rows)
        return CrossPatch(margins[rows], names, metadata)

    with (
        engine.packed(),
        get_engine(other).packed(),
        tqdm(total=len(pairs), desc="cross-patch", unit="pair", disable=not progress) as bar,
        partial_on_interrupt("cross_patch", finished, len(pairs), "pairs", partial),
    ):
        for chosen in _batches(pairs, max(1, batch_rows // boundaries)):
            margins[chosen] = _margins(pairs, chosen, half)
            finished += chosen
            bar.update(len(chosen))
    return CrossPatch(margins, names, run_metadata(model_a, names=list(names)))


def _batches(pairs: Pairs, size: int) -> Iterator[list[int]]:
    """Pairs of similar length; those with several tokens each are in batches of their own."""
    multi_token = [bool(row_readings("logit_difference", pairs, i)) for i in range(len(pairs))]
    order = sorted(range(len(pairs)), key=lambda i: (multi_token[i], -len(pairs.clean[i]), i))
    for _, group in groupby(order, key=multi_token.__getitem__):
        members = list(group)
        for first in range(0, len(members), size):
            yield members[first : first + size]


def _margins(
    pairs: Pairs, chosen: list[int], half: Callable[[int], AbstractContextManager[Model]]
) -> Float32[np.ndarray, "pairs boundaries 2 2"]:
    """The margins of some pairs; `half(0)` and `half(1)` apply the weights of a model."""
    with half(0) as model:
        engine = get_engine(model)
    by_pair = [row_readings("logit_difference", pairs, i) for i in chosen]
    readings = Readings.of_pairs(by_pair, engine.device)
    indices = torch.tensor(chosen, device=engine.device)  # [batch]
    if readings is not None:  # an answer and its foil may need a row each
        indices = indices[readings.owner]
    rows = [pairs.clean[i] for i in indices.tolist()]
    target = torch.tensor([len(row) - 1 for row in rows], device=engine.device)  # [batch]
    if readings is not None:
        rows = readings.continued(rows)
    tokens = pad_right(rows, engine.device)  # [batch, pos]
    measure = bind("logit_difference", pairs, indices, readings=readings)
    # The weights of one model at a time: a delta is applied to the first model itself.
    states = []  # of each model, the residual at every boundary
    for which in (0, 1):
        with half(which) as model:
            states.append(_residuals(get_engine(model), tokens))
    boundaries = len(states[0])
    # Row `batch` of boundary 0, then of boundary 1, and so on, as `_last_by_boundary` orders them.
    repeated = torch.arange(len(rows), device=engine.device).repeat(boundaries)
    margins = np.zeros((len(chosen), boundaries, 2, 2), dtype=np.float32)
    for upper in (0, 1):
        with half(upper) as model:
            engine = get_engine(model)
            for lower in (0, 1):
                x = _last_by_boundary(
                    engine, tokens, states[lower]
                )  # [bound * batch, pos, d_model]
                at = states_at(x, target[repeated], repeated, readings)  # [states, d_model]
                margin = measure(logits_at(engine, at), repeated)  # [boundaries * batch]
                which_run = f"{'ab'[lower]}'s lower under {'ab'[upper]}'s upper half"
                finite(margin, indices[repeated], which_run)
                margin = rearrange(margin, "(bound batch) -> batch bound", bound=boundaries)
                if readings is not None:
                    margin = readings.merged(margin)[: readings.pairs]
                margins[:, :, lower, upper] = margin.cpu()
    return margins


def _residuals(
    engine: Engine, tokens: Int64[Tensor, "batch pos"]
) -> list[Float[Tensor, "batch pos d_model"]]:
    """The residual at every boundary, from the embeddings to the last block's output."""
    run = engine.begin(tokens)
    states = [run.resid]
    for layer in range(engine.n_layers):
        states.append(engine.block(layer, states[-1], run))
    return states


def _last_by_boundary(
    engine: Engine,
    tokens: Int64[Tensor, "batch pos"],
    states: Sequence[Float[Tensor, "batch pos d_model"]],
) -> Float[Tensor, "rows pos d_model"]:
    """The last residual, continued from each boundary; the lowest boundary comes first."""
    run = engine.begin(tokens[:1])  # a pass needs the number of positions, not the tokens
    x = states[0]
    for layer in range(engine.n_layers):
        # The states of the next boundary join as new rows: [(layer + 2) * batch, pos, d_model].
        x = torch.cat([engine.block(layer, x, run), states[layer + 1]])
    return x


def _check(a: Engine, b: Engine, pairs: Pairs, batch_rows: int) -> None:
    check_pairs(pairs)
    if batch_rows < 1:
        raise ValueError(f"batch_rows is {batch_rows}; at least 1 row is needed")
    shapes = [(e.n_layers, e.d_model, e.d_vocab_out) for e in (a, b)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "states can only be patched into a model of the same shape; layers, d_model and "
            f"vocabulary are {shapes[0]} and {shapes[1]}"
        )
    if a.model.training or b.model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    pairs.check_direction(causal=a.causal)
    for i, (clean, corrupted) in enumerate(zip(pairs.clean, pairs.corrupted, strict=True)):
        if not torch.equal(clean, corrupted):
            raise ValueError(
                f"the two rows of pair {i} are not the same tokens; cross-patching needs one "
                "shared prefix; build the pairs with Pairs.from_disagreements"
            )
        readings = row_readings("logit_difference", pairs, i)
        length = len(clean) + max([0, *(len(reading.continuation) for reading in readings)])
        largest = int(torch.cat([clean, pairs.answers[i], pairs.foils[i]]).max())
        if length > a.n_ctx or largest >= a.d_vocab:
            raise ValueError(
                f"pair {i} has {length} tokens, with its answer, and ids up to {largest}; the "
                f"model holds {a.n_ctx} tokens and a vocabulary of {a.d_vocab}"
            )


def _index(which: Which) -> int:
    if which not in ("a", "b"):
        raise ValueError(f'the model is {which!r}; it is "a" or "b"')
    return "ab".index(which)
