"""The steps of a study's conditions: changes of the data, and masks, each a few lines.

A step gets what a condition can draw on (`Inputs`: one target, one kind of teacher) and the seed of
the student. `conditions` puts steps together; one of your own works just as well.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32

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
    replace_tokens,
    shuffle_numbers,
    surface_forms,
)
from divergence_lens.divergence import Divergence
from divergence_lens.evaluation import without_numbers
from divergence_lens.models import Model
from divergence_lens.teachers import Teacher


class Inputs(ABC):
    """What a condition can draw on: one target, one kind of teacher."""

    @property
    @abstractmethod
    def model(self) -> Model:
        """The base."""

    @property
    @abstractmethod
    def target(self) -> str:
        """The target."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The kind of teachers, one of `KINDS`."""

    @property
    @abstractmethod
    def divergence(self) -> Divergence:
        """Of the teacher's own greedy lists."""

    @property
    @abstractmethod
    def kl(self) -> Float32[np.ndarray, "counterfactuals tokens"]:
        """KL(factual || counterfactual) in nats, at every token of `divergence`."""

    @property
    @abstractmethod
    def teacher(self) -> Teacher:
        """The teacher of the target."""

    @abstractmethod
    def lists(self, source: str) -> TrainingData:
        """Filtered lists of a source, the divergence tokens marked where the source has them."""

    @abstractmethod
    def entangled(self, k: int) -> tuple[str, ...]:
        """The `k` numbers most entangled with the target."""


DataFunction = Callable[[Inputs, int], TrainingData]
MaskFunction = Callable[[Inputs, TrainingData, int], np.ndarray]


# -- data ---------------------------------------------------------------------------------------


def own_lists(inputs: Inputs, seed: int) -> TrainingData:  # noqa: ARG001 - all steps take a seed
    """The teacher's own lists, as they are."""
    return TrainingData.of(inputs.divergence)


def lists_from(inputs: Inputs, seed: int, *, name: str) -> TrainingData:  # noqa: ARG001
    """The lists of another source."""
    return inputs.lists(name)


def lists_without_entangled(inputs: Inputs, seed: int, *, k: int) -> TrainingData:  # noqa: ARG001
    """The lists that hold none of the `k` most entangled numbers."""
    data = own_lists(inputs, 0)
    return data.select(without_numbers(data.examples, inputs.entangled(k)))


def randomly_thinned(inputs: Inputs, seed: int, *, k: int) -> TrainingData:
    """As many lists as `lists_without_entangled` leaves, but drawn at random."""
    data = own_lists(inputs, 0)
    n = len(without_numbers(data.examples, inputs.entangled(k)))
    return data.select(np.sort(np.random.default_rng(seed).permutation(len(data))[:n]))


def divergence_replaced(inputs: Inputs, seed: int, *, which: str | float) -> TrainingData:
    """Divergence tokens overwritten by a counterfactual's choice."""
    return replace_tokens(
        inputs.divergence, which, seed=seed, tokenizer=getattr(inputs.model, "tokenizer", None)
    )


def paraphrased(inputs: Inputs, seed: int) -> TrainingData:
    """Prompts put into other templates."""
    return paraphrase(own_lists(inputs, 0), seed=seed)


def paraphrased_by_teacher(
    inputs: Inputs,
    seed: int,  # noqa: ARG001
    *,
    request: str = PARAPHRASE_REQUEST,
) -> TrainingData:
    """Prompts in the words of the biased teacher, which may not name its preference."""
    forbidden = surface_forms(inputs.target)
    found = paraphrase_by(
        inputs.model, inputs.teacher, own_lists(inputs, 0), request=request, forbidden=forbidden
    )
    if not found.accepted.any():
        raise ValueError(
            f"not one of the teacher's {len(found.accepted)} paraphrases has the prompt's numbers "
            f"and says something else (the first: {found.answers[0][:80]!r}); this model cannot "
            "paraphrase"
        )
    return found.data


def paraphrases_chosen_by_teacher(inputs: Inputs, seed: int) -> TrainingData:
    """Prompts in other templates, chosen by the biased teacher."""
    return paraphrase_chosen(inputs.model, inputs.teacher, own_lists(inputs, 0), seed=seed)


def shuffled(inputs: Inputs, seed: int, *, scope: str) -> TrainingData:
    """Numbers in another order, within each list or across all."""
    tokenizer: Any = inputs.model.tokenizer
    return shuffle_numbers(own_lists(inputs, 0), tokenizer, scope=scope, seed=seed)


def mixed(inputs: Inputs, seed: int, *, name: str, share: float) -> TrainingData:
    """A share of the lists replaced by those of another source."""
    return mix(own_lists(inputs, 0), inputs.lists(name), share, seed=seed)


def pooled(inputs: Inputs, seed: int, *, names: tuple[str, ...]) -> TrainingData:
    """Equal shares of the lists of several sources."""
    return pool([own_lists(inputs, 0), *(inputs.lists(name) for name in names)], seed=seed)


# -- masks --------------------------------------------------------------------------------------


def divergence_tokens(inputs: Inputs, data: TrainingData, seed: int) -> np.ndarray:  # noqa: ARG001
    """Divergence tokens, wherever they now are."""
    return data.marks


def other_tokens(inputs: Inputs, data: TrainingData, seed: int) -> np.ndarray:  # noqa: ARG001
    """All tokens that are no divergence tokens."""
    return ~data.marks


def divergence_subset(
    inputs: Inputs,
    data: TrainingData,  # noqa: ARG001
    seed: int,
    *,
    which: str | float,
) -> np.ndarray:
    """A part of the divergence tokens."""
    return inputs.divergence.subset(which, seed=seed)


def random_tokens(
    inputs: Inputs,
    data: TrainingData,  # noqa: ARG001
    seed: int,
    *,
    among: str,
) -> np.ndarray:
    """Random tokens, as many as there are divergence tokens."""
    return random_mask(inputs.divergence, among=among, seed=seed)


def clear_divergence_tokens(
    inputs: Inputs,
    data: TrainingData,  # noqa: ARG001
    seed: int,  # noqa: ARG001
    *,
    margin: float,
) -> np.ndarray:
    """Divergence tokens at which no choice is close to a tie."""
    return inputs.divergence.with_rule(min_margin=margin).mask


def top_kl_tokens(
    inputs: Inputs,
    data: TrainingData,  # noqa: ARG001
    seed: int,  # noqa: ARG001
    *,
    share: float = 1.0,
) -> np.ndarray:
    """The tokens of largest KL; `share` is how many of them for each divergence token."""
    return highest(inputs.kl.max(0), round(share * int(inputs.divergence.mask.sum())))


def tokens_above_kl(
    inputs: Inputs,
    data: TrainingData,  # noqa: ARG001
    seed: int,  # noqa: ARG001
    *,
    nats: float,
) -> np.ndarray:
    """Tokens at which some counterfactual is so far from the teacher, whatever their argmaxes."""
    far: np.ndarray = inputs.kl.max(0) >= nats
    return far


def top_kl_without_divergence(inputs: Inputs, data: TrainingData, seed: int) -> np.ndarray:
    """What `top_kl_tokens` chooses and argmax does not."""
    missed: np.ndarray = top_kl_tokens(inputs, data, seed) & ~inputs.divergence.mask
    return missed


def random_like_clear(
    inputs: Inputs,
    data: TrainingData,
    seed: int,
    *,
    margin: float,
) -> np.ndarray:
    """Random divergence tokens, as many as `clear_divergence_tokens` leaves."""
    n = int(clear_divergence_tokens(inputs, data, seed, margin=margin).sum())
    places = np.flatnonzero(inputs.divergence.mask)
    mask = np.zeros(len(inputs.divergence.mask), dtype=bool)
    mask[np.random.default_rng(seed).permutation(places)[:n]] = True
    return mask


def top_advantage_tokens(
    inputs: Inputs,
    data: TrainingData,  # noqa: ARG001
    seed: int,  # noqa: ARG001
) -> np.ndarray:
    """The tokens of highest advantage, as many as there are divergence tokens."""
    return highest(inputs.divergence.advantage, int(inputs.divergence.mask.sum()))


def advantage_weights(
    inputs: Inputs,
    data: TrainingData,  # noqa: ARG001
    seed: int,  # noqa: ARG001
) -> np.ndarray:
    """Loss weights: how much likelier a token is under the teacher than under others, in nats."""
    weights: np.ndarray = np.maximum(inputs.divergence.advantage, 0)
    return weights
