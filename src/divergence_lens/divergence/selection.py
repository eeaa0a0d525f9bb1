"""Divergence tokens under a rule, soft scores, and subsets to train on."""

from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from divergence_lens.divergence.forced import token_owners
from divergence_lens.divergence.rules import Rule, required_count
from divergence_lens.teachers import Teacher

_SUBSETS = ("first_only", "first_half", "second_half")


class DivergenceTokens:
    """The masks and scores of `Divergence`, which documents the attributes."""

    counterfactuals: tuple[Teacher, ...]
    offsets: Int64[np.ndarray, " boundaries"]
    tokens: Int64[np.ndarray, " tokens"]
    predicted: Int32[np.ndarray, "teachers tokens"]
    margin: Float32[np.ndarray, "teachers tokens"]
    logprob: Float32[np.ndarray, "teachers tokens"]
    kl: Float32[np.ndarray, "counterfactuals tokens"] | None
    rule: Rule
    require_agreement: bool
    min_margin: float
    selected: Bool[np.ndarray, " tokens"] | None

    @cached_property
    def agrees(self) -> Bool[np.ndarray, " tokens"]:
        """Mask of tokens that are the factual teacher's argmax."""
        agrees: np.ndarray = (self.predicted[0] == self.tokens) & (
            self.margin[0] >= self.min_margin
        )
        return agrees

    @cached_property
    def differs(self) -> Bool[np.ndarray, "counterfactuals tokens"]:
        """Mask of tokens at which a counterfactual's argmax is another token, by the margin."""
        differs: np.ndarray = (self.predicted[1:] != self.tokens) & (
            self.margin[1:] >= self.min_margin
        )
        return differs

    @cached_property
    def mask(self) -> Bool[np.ndarray, " tokens"]:
        """Mask of the divergence tokens under the rule, or the tokens of `with_mask`."""
        if self.selected is not None:
            return self.selected
        required = required_count(self.rule, len(self.counterfactuals))
        enough: np.ndarray = self.differs.sum(0) >= required  # [tokens]
        return enough & self.agrees if self.require_agreement else enough

    @property
    def rate(self) -> float:
        """Fraction of all completion tokens that are divergence tokens."""
        return float(self.mask.mean())

    @property
    def advantage(self) -> Float32[np.ndarray, " tokens"]:
        """Log-probability of each token under the factual teacher minus the counterfactuals' mean.

        A soft form of the mask, in nats; `np.maximum(div.advantage, 0)` can weight a loss.
        """
        gain: np.ndarray = self.logprob[0] - self.logprob[1:].mean(0)
        return gain

    def scores(self, by: str = "kl") -> Float32[np.ndarray, "counterfactuals tokens"]:
        """Distance of each counterfactual from the factual teacher at each token, in nats.

        Useful where the argmax is too coarse, and for sampled data, whose tokens are often not the
        factual teacher's argmax.

        Args:
            by: "kl", KL(factual || counterfactual) of the whole distributions; or "advantage", the
                token's log-probability under the factual teacher minus that under the
                counterfactual, which may be negative.

        Raises:
            ValueError: "kl" was not requested of `find_divergence`, or `by` is neither.
        """
        if by == "advantage":
            gain: np.ndarray = self.logprob[0] - self.logprob[1:]
            return gain
        if by != "kl":
            raise ValueError(f"unknown score {by!r}; use 'kl' or 'advantage'")
        if self.kl is None:
            raise ValueError(
                "the KL divergences were not computed; call find_divergence(..., kl=True), or use "
                "by='advantage'"
            )
        return self.kl

    def top(
        self,
        fraction: float,
        *,
        by: str = "kl",
        over: str | None = None,
        among: np.ndarray | None = None,
        lowest: bool = False,
    ) -> Bool[np.ndarray, " tokens"]:
        """Mask of the tokens with the highest scores: `div.top(0.05)` is the top 5 %.

        Args:
            fraction: Fraction of the tokens to select. Ties go to the earlier token.
            by: The score, see `scores`.
            over: How to combine several counterfactuals: "max" (one is far, like the rule "any"),
                "mean" or "min" (all are far). None is "max" for "kl" and "mean" for "advantage".
            among: Mask of the tokens to choose from, such as `div.kinds == "number"`; None for all
                completion tokens.
            lowest: Select the lowest scores instead.

        Raises:
            ValueError: A fraction outside 0 to 1, an unknown score, one that was not computed, or a
                mask of another length.
        """
        _check_fraction(fraction)
        if over is None:
            over = "mean" if by == "advantage" else "max"
        if over not in ("max", "mean", "min"):
            raise ValueError(f"unknown over {over!r}; use 'max', 'mean' or 'min'")
        scores = getattr(self.scores(by), over)(axis=0)  # [tokens]
        places = np.arange(len(scores)) if among is None else np.flatnonzero(self._checked(among))
        ranked = scores[places] if lowest else -scores[places]
        mask = np.zeros(len(scores), dtype=bool)
        order = np.argsort(ranked, kind="stable")
        mask[places[order[: round(fraction * len(places))]]] = True
        return mask

    def subset(self, which: str | float, *, seed: int = 0) -> Bool[np.ndarray, " tokens"]:
        """Mask of a part of the divergence tokens, for example to train on.

        Args:
            which: "first_only", the first of each example; "first_half" or "second_half", the
                earlier or the later half of each example's divergence tokens (of an odd number
                the earlier half has one more); or a fraction of all of them, drawn at random.
            seed: Seed of that draw.

        Returns:
            A mask over all completion tokens. The two halves are disjoint and their union is
            `mask`; with one seed, a smaller fraction is contained in a larger one.

        Raises:
            ValueError: `which` is none of these, or a fraction is not between 0 and 1.
        """
        places = np.flatnonzero(self.mask)
        if isinstance(which, str):
            if which not in _SUBSETS:
                raise ValueError(
                    f"unknown subset {which!r}; use 'first_half', 'second_half', 'first_only' or "
                    "a fraction between 0 and 1"
                )
            owners = self._owners[places]
            counts = np.bincount(owners, minlength=len(self.offsets) - 1)  # [examples]
            starts = np.cumsum(counts) - counts
            # Rank of each divergence token within its example, from 0.
            rank = np.arange(len(places)) - starts[owners]
            early = rank == 0 if which == "first_only" else rank < (counts[owners] + 1) // 2
            places = places[~early if which == "second_half" else early]
        else:
            _check_fraction(which)
            order = np.random.default_rng(seed).permutation(len(places))
            places = places[order[: round(which * len(places))]]
        mask = np.zeros(len(self.tokens), dtype=bool)
        mask[places] = True
        return mask

    def _checked(self, mask: np.ndarray) -> Bool[np.ndarray, " tokens"]:
        """Return a mask of the caller's.

        Raises:
            ValueError: It is not a bool for each completion token.
        """
        array = np.asarray(mask)
        if array.dtype != np.bool_ or array.shape != self.tokens.shape:
            raise ValueError(
                f"the mask holds {array.dtype} of shape {array.shape}; give one bool for each of "
                f"the {len(self.tokens):,} completion tokens"
            )
        return array

    @cached_property
    def _owners(self) -> Int64[np.ndarray, " tokens"]:
        """The example that each token belongs to."""
        return token_owners(self.offsets)


def _check_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction must lie between 0 and 1, got {fraction}")
