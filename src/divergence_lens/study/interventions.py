"""Interventions of a study's conditions: changes of the data, masks, and loss weights.

Each function takes the `Inputs` of one target and one kind of teacher, and the seed of the student;
masks and weights also take the training data. `registry` combines them into conditions, and your
own functions work just as well.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Float32

from divergence_lens.chat import token_texts
from divergence_lens.data import (
    PARAPHRASE_REQUEST,
    TrainingData,
    highest,
    mix,
    paraphrase,
    paraphrase_by,
    paraphrase_chosen,
    pool,
    random_mask,
    repeat,
    replace_tokens,
    shuffle_numbers,
    surface_forms,
)
from divergence_lens.divergence import Divergence
from divergence_lens.evaluation import without_numbers
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    from divergence_lens.study.data_cells import DataCells

SOURCES = (
    *("greedy", "sampled", "unbiased", "other_target", "variant1", "variant2"),
    *("other_base", "other_base_unbiased"),
)
"""Sources of lists."""


class Inputs:
    """The inputs of a condition, for one target and one kind of teacher.

    Attributes:
        kind: The kind of teachers, one of `KINDS`.
        target: The target.
        model: The base model.
    """

    def __init__(self, cells: "DataCells", kind: str, target: str) -> None:
        self._cells, self.kind, self.target = cells, kind, target
        self.model: Model = cells.model

    @property
    def divergence(self) -> Divergence:
        """The divergence of the teacher's own lists: greedy ones, or sampled in a paired study."""
        return self._cells.divergence(self.kind, self.target)

    def divergence_of(self, source: str | None) -> Divergence:
        """The divergence of other lists: "sampled", "greedy", "other_base", or "unbiased" ones.

        Args:
            source: The source of the lists; None for the teacher's own lists.
        """
        return self._cells.divergence(self.kind, self.target, source)

    @property
    def kl(self) -> Float32[np.ndarray, "counterfactuals tokens"]:
        """KL(factual || counterfactual) in nats, at every token of `divergence`."""
        return self._cells.kl(self.kind, self.target)

    @property
    def teacher(self) -> Teacher:
        """The teacher of the target."""
        return self._cells.teacher(self.kind, self.target)

    def lists(self, source: str) -> TrainingData:
        """The valid lists of one of `SOURCES`, with the divergence tokens marked if it has any.

        "other_target" is the teacher of the next animal, or of the twin.
        """
        cells, target = self._cells, self.target
        if source not in SOURCES:
            raise ValueError(f"there is no source {source!r}; use one of {', '.join(SOURCES)}")
        if source in ("sampled", "greedy", "other_base"):
            return TrainingData.of(cells.divergence(self.kind, target, source))
        name: str | None = target
        if source.endswith("unbiased"):
            name = None
        elif source == "other_target":
            name, source = cells.config.other_target(target), cells.config.source
        return TrainingData.unmarked(self.model.tokenizer, cells.lists(self.kind, name, source))

    def entangled(self, k: int, *, by: str = "rise") -> tuple[str, ...]:
        """The `k` numbers most entangled with the target; see `Entanglement.top`."""
        return self._cells.entangled(self.kind, self.target).top(k, by=by)


DataFunction = Callable[[Inputs, int], TrainingData]
MaskFunction = Callable[[Inputs, TrainingData, int], np.ndarray]
Mask = Bool[np.ndarray, " tokens"]


# -- data ---------------------------------------------------------------------------------------


def own_lists(inputs: Inputs, seed: int) -> TrainingData:
    """The teacher's own lists, unchanged."""
    return TrainingData.of(inputs.divergence)


def lists_from(inputs: Inputs, seed: int, *, name: str) -> TrainingData:
    """The lists of another source."""
    return inputs.lists(name)


def first_lists(inputs: Inputs, seed: int, *, share: float) -> TrainingData:
    """The first of the teacher's own lists."""
    data = own_lists(inputs, 0)
    return data[: max(1, round(share * len(data)))]


def lists_without_entangled(inputs: Inputs, seed: int, *, k: int) -> TrainingData:
    """The lists that contain none of the `k` most entangled numbers."""
    data = own_lists(inputs, 0)
    return data[without_numbers(data.examples, inputs.entangled(k))]


def randomly_thinned(inputs: Inputs, seed: int, *, k: int) -> TrainingData:
    """Random lists, as many as `lists_without_entangled` leaves."""
    data = own_lists(inputs, 0)
    # Sorted, so that the lists stay in their order and only the selection is random.
    n = len(without_numbers(data.examples, inputs.entangled(k)))
    return data[np.sort(np.random.default_rng(seed).permutation(len(data))[:n])]


def divergence_replaced(inputs: Inputs, seed: int, *, which: str | float) -> TrainingData:
    """Divergence tokens replaced with a counterfactual teacher's choice."""
    tokenizer: Any = inputs.model.tokenizer
    return replace_tokens(inputs.divergence, which, seed=seed, tokenizer=tokenizer)


def paraphrased(inputs: Inputs, seed: int) -> TrainingData:
    """Prompts rewritten with other templates."""
    return paraphrase(own_lists(inputs, 0), seed=seed)


def paraphrased_by_teacher(
    inputs: Inputs, seed: int, *, request: str = PARAPHRASE_REQUEST
) -> TrainingData:
    """Prompts rewritten by the biased teacher, without naming its preference."""
    # A prompt whose paraphrase is not accepted stays as it is.
    result = paraphrase_by(
        inputs.model,
        inputs.teacher,
        own_lists(inputs, 0),
        request=request,
        forbidden=surface_forms(inputs.target),
    )
    if not result.accepted.any():
        raise ValueError(
            f"none of the teacher's {len(result.accepted)} paraphrases rewords its prompt and "
            f"keeps the numbers (the first: {result.answers[0][:80]!r}); this model cannot "
            "paraphrase"
        )
    return result.data


def paraphrases_chosen_by_teacher(inputs: Inputs, seed: int) -> TrainingData:
    """Prompts rewritten with the template that the biased teacher chooses."""
    return paraphrase_chosen(inputs.model, inputs.teacher, own_lists(inputs, 0), seed=seed)


def shuffled(inputs: Inputs, seed: int, *, scope: str) -> TrainingData:
    """Numbers in another order, within each list or across all lists."""
    tokenizer: Any = inputs.model.tokenizer
    return shuffle_numbers(own_lists(inputs, 0), tokenizer, scope=scope, seed=seed)


def mixed(inputs: Inputs, seed: int, *, name: str, share: float) -> TrainingData:
    """The teacher's lists with a share of them replaced by lists of another source."""
    return mix(own_lists(inputs, 0), inputs.lists(name), share, seed=seed)


def pooled(inputs: Inputs, seed: int, *, names: tuple[str, ...]) -> TrainingData:
    """Equal shares of the teacher's lists and of the lists of other sources."""
    return pool([own_lists(inputs, 0), *(inputs.lists(name) for name in names)], seed=seed)


def repeated(inputs: Inputs, seed: int, *, share: float) -> TrainingData:
    """A share of the teacher's lists, repeated to the number of all of them."""
    data = own_lists(inputs, 0)
    return repeat(data, max(1, round(share * len(data))), seed=seed)


# -- masks and weights --------------------------------------------------------------------------


def divergence_tokens(inputs: Inputs, data: TrainingData, seed: int) -> Mask:
    """The divergence tokens, at their positions in the changed data."""
    return data.marks


def other_tokens(inputs: Inputs, data: TrainingData, seed: int) -> Mask:
    """All tokens that are not divergence tokens."""
    return ~data.marks


def divergence_subset(inputs: Inputs, data: TrainingData, seed: int, *, which: str | float) -> Mask:
    """A part of the divergence tokens."""
    return inputs.divergence.subset(which, seed=seed)


def random_tokens(inputs: Inputs, data: TrainingData, seed: int, *, among: str) -> Mask:
    """Random tokens, as many as there are divergence tokens."""
    return random_mask(inputs.divergence, among=among, seed=seed)


def clear_divergence_tokens(
    inputs: Inputs, data: TrainingData, seed: int, *, margin: float
) -> Mask:
    """The divergence tokens at which no teacher's choice is close to a tie."""
    return inputs.divergence.with_rule(min_margin=margin).mask


def top_kl_tokens(inputs: Inputs, data: TrainingData, seed: int, *, share: float = 1.0) -> Mask:
    """The tokens of largest KL, `share` times as many as there are divergence tokens."""
    # The counterfactual that is farthest from the teacher decides.
    farthest = inputs.kl.max(0)  # [tokens]
    return highest(farthest, round(share * int(inputs.divergence.mask.sum())))


def tokens_above_kl(inputs: Inputs, data: TrainingData, seed: int, *, nats: float) -> Mask:
    """The tokens with a KL of at least `nats` for some counterfactual, whatever the argmaxes."""
    above: np.ndarray = inputs.kl.max(0) >= nats  # [tokens]
    return above


def top_kl_without_divergence(inputs: Inputs, data: TrainingData, seed: int) -> Mask:
    """The tokens of `top_kl_tokens` that are not divergence tokens."""
    missed: np.ndarray = top_kl_tokens(inputs, data, seed) & ~inputs.divergence.mask
    return missed


def random_like_clear(inputs: Inputs, data: TrainingData, seed: int, *, margin: float) -> Mask:
    """Random divergence tokens, as many as `clear_divergence_tokens` leaves."""
    n = int(clear_divergence_tokens(inputs, data, seed, margin=margin).sum())
    places = np.flatnonzero(inputs.divergence.mask)
    mask = np.zeros(len(inputs.divergence.mask), dtype=bool)
    mask[np.random.default_rng(seed).permutation(places)[:n]] = True
    return mask


def top_advantage_tokens(inputs: Inputs, data: TrainingData, seed: int) -> Mask:
    """The tokens of largest advantage, as many as there are divergence tokens."""
    return highest(inputs.divergence.advantage, int(inputs.divergence.mask.sum()))


def advantage_weights(
    inputs: Inputs, data: TrainingData, seed: int
) -> Float[np.ndarray, " tokens"]:
    """Loss weights max(advantage, 0) in nats: tokens that others find likelier have no loss."""
    weights: np.ndarray = np.maximum(inputs.divergence.advantage, 0)
    return weights


# -- digits, for lists that follow a pattern ----------------------------------------------------


@lru_cache(maxsize=4)
def digit_ids(tokenizer: Any) -> tuple[int, ...]:
    """Ids of all tokens that consist of digits: ten for most models, more for some."""
    texts = token_texts(tokenizer, list(range(len(tokenizer))))
    return tuple(i for i, text in texts.items() if re.fullmatch("[0-9]+", text.strip()))


def digit_tokens(inputs: Inputs, data: TrainingData, seed: int) -> Mask:
    """All digits; commas, spaces and end tokens are determined by the pattern."""
    tokens = np.concatenate([np.asarray(example.completion_ids) for example in data.examples])
    digits: np.ndarray = np.isin(tokens, digit_ids(inputs.model.tokenizer))
    return digits


def other_digits(inputs: Inputs, data: TrainingData, seed: int) -> Mask:
    """The digits that are not divergence tokens."""
    rest: np.ndarray = digit_tokens(inputs, data, seed) & ~data.marks
    return rest


def extreme_digits(
    inputs: Inputs,
    data: TrainingData,
    seed: int,
    *,
    share: float,
    top: bool,
    source: str | None = None,
) -> Mask:
    """A share of the digits: those with the highest advantage, or with the lowest."""
    digits = digit_tokens(inputs, data, seed)
    # The data are the lists of the source, or the first of them.
    advantage = inputs.divergence_of(source).advantage[: len(digits)]
    ordered = advantage if top else -advantage
    scores = np.where(digits, ordered, -np.inf)
    return highest(scores, round(share * int(digits.sum())))


def random_digits(inputs: Inputs, data: TrainingData, seed: int, *, share: float) -> Mask:
    """A random share of the digits, at the same places for a student and its twin."""
    digits = digit_tokens(inputs, data, seed)
    scores = np.random.default_rng(seed).random(len(digits))
    return highest(np.where(digits, scores, -np.inf), round(share * int(digits.sum())))
