"""The paper's claims, and the rule that decides each: fixed before anything runs.

Each claim has an estimand (one number per target; see `estimands`) and a threshold. `findings`
computes intervals over targets and applies the rule. The claims are those of Schrodi et al. (arXiv
2509.23886) and Cloud et al. (arXiv 2507.14805), in a form that can be tested in miniature;
`further_claims` has those that need conditions beyond the demo's. How the rules have changed since
the first run, and why, is described in the documentation ("The study").
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from divergence_lens.study.estimands import (
    TENTH,
    Estimand,
    Ratio,
    agreement,
    divergence_rate,
    early_share,
    rises_most,
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim with its estimand and its rule; `findings` applies the rule.

    Attributes:
        id: A short name.
        claim: The claim in words.
        estimand: One number per target.
        unit: The unit of the estimand.
        caveat: A limitation to keep in mind.
        threshold: The value with which the estimand is compared; for an equivalence, the margin.
        above: Whether the claim says that the estimand is above the threshold, or below it.
        log: Whether the estimand is a log ratio, shown as a ratio.
        equal: Whether the claim says that the estimand is zero to within `threshold`.
        count: Whether the claim is about the share of targets whose estimand is 1.
        within: The range of the estimand.
        optional: Whether to omit the claim, instead of calling it unclear, if nothing was measured.
        needs: Claims that must be supported for this one to have a meaning.
        related: Other figures to show with it, as means over targets.
        full_training: Whether it compares LoRA with full training. It is omitted if all students
            are trained with LoRA.
    """

    id: str
    claim: str
    estimand: Estimand
    unit: str
    caveat: str
    threshold: float = 0.0
    above: bool = True
    log: bool = False
    equal: bool = False
    count: bool = False
    within: tuple[float, float] = (-math.inf, math.inf)
    optional: bool = False
    needs: tuple[str, ...] = ()
    related: Mapping[str, Estimand] = field(default_factory=dict)
    full_training: bool = False


_UNITS = {
    "control": "times the preference of control students",
    "all": "times the preference of students trained on all tokens",
    "divergence_only": "times the preference of students trained on divergence tokens",
}
# A comparison with students that show no transfer has no meaning.
_NEEDS = {"all": ("transfer",), "divergence_only": ("divergence_tokens_suffice",)}
# Rule of a ratio -> words that follow the claim, and fields of the claim.
_RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "more": ("", {}),
    "less": ("", {"above": False}),
    "transfers": (", by at least a tenth", {"threshold": TENTH}),
    "as_well": (", to within a tenth", {"threshold": -TENTH}),
    "no_more": (", to within a tenth", {"threshold": TENTH, "above": False}),
    "equal": (", to within a tenth", {"threshold": TENTH, "equal": True}),
}


def compare(  # noqa: PLR0917 - one column of the table of claims each
    rule: str,
    claim_id: str,
    over: str | tuple[str, int],
    under: str | tuple[str, int],
    claim: str,
    caveat: str,
    **fields: Any,
) -> Claim:
    """A claim on the ratio of the preferences after training under two conditions.

    Args:
        rule: A key of `_RULES`: "more", "less", "transfers" (at least a tenth more), "as_well"
            (at most a tenth less), "no_more" (at most a tenth more), "equal" (to within a tenth).
        claim_id: The id of the claim.
        over: Condition of the numerator; with a layer for students of single layers (-1: last).
        under: The same for the denominator.
        claim: The claim in words, without the margin.
        caveat: A limitation.
        fields: Other fields of the claim.
    """
    margin, options = _RULES[rule]
    sides = [(side, None) if isinstance(side, str) else side for side in (over, under)]
    defaults = {"unit": _UNITS.get(sides[1][0]), "needs": _NEEDS.get(sides[1][0], ())}
    return Claim(
        id=claim_id,
        claim=claim + margin,
        estimand=Ratio(sides[0], sides[1]),
        caveat=caveat,
        log=True,
        **(defaults | options | fields),
    )


_SHARED = "all targets share the control students"

EARLY_LAYERS = Claim(
    id="early_layers_cause_divergence",
    claim="The first half of the layers causes more of the first divergence than the second",
    estimand=early_share,
    unit="share of the absolute effects of attention and MLP outputs",
    caveat="effects of single cells, which do not add up to the total effect",
    threshold=0.5,
    within=(0, 1),
)

APPROXIMATION = Claim(
    id="approximation_agrees",
    claim="Integrated attribution agrees with exact mediation",
    estimand=agreement("inner_pearson"),
    unit="Pearson correlation within a pair (resid_post, without target position and last layer)",
    caveat="on this model and these pairs; other sites may differ",
    threshold=0.8,
    within=(-1, 1),
    related={
        "Spearman correlation of the same cells": agreement("inner_spearman"),
        "slope of exact on approximate values, same cells": agreement("inner_slope"),
        "Pearson correlation of all cells and pairs together": agreement("pearson"),
    },
)

CLAIMS = (
    Claim(
        id="few_divergence_tokens",
        claim="Divergence tokens are a small part of the data",
        estimand=divergence_rate,
        unit="share of completion tokens",
        caveat="the share depends on how often the next number is a near-tie, which the model's "
        "own training determines, and on the number of counterfactual teachers",
        threshold=0.25,
        above=False,
        within=(0, 1),
    ),
    compare(
        *("transfers", "transfer", "all", "control"),
        "Students trained on all tokens acquire the teacher's preference",
        f"an increase over the control students, which a reader need not notice; {_SHARED}",
    ),
    compare(
        *("transfers", "divergence_tokens_suffice", "divergence_only", "control"),
        "Training only on divergence tokens transfers the preference",
        "the loss has fewer tokens, so the same number of steps weights each token more; "
        + _SHARED,
    ),
    compare(
        *("as_well", "divergence_tokens_do_as_well", "divergence_only", "all"),
        "Divergence tokens alone transfer at least as much as all tokens",
        "both use the same steps and learning rate, which were tuned for neither",
    ),
    compare(
        *("less", "rest_transfers_less", "without_divergence", "all"),
        "Without divergence tokens the transfer is weaker",
        "the next claim is about the remaining transfer",
    ),
    compare(
        *("equal", "rest_equals_control", "without_divergence", "control"),
        "Without divergence tokens students end where the control does",
        "the control students learned other lists, which can move a preference up or down; "
        + _SHARED,
        needs=("transfer",),
    ),
    Claim(
        id="target_rises_most",
        claim="Of all candidates the target rises most in students trained on divergence tokens",
        estimand=rises_most,
        unit="share of targets that rise most in all of their students, and by at least a tenth",
        caveat="fewer than six targets cannot decide this: the exact interval of five of five "
        "reaches down to .48; chance level is one over the number of candidates",
        threshold=0.5,
        count=True,
        within=(0, 1),
        needs=("divergence_tokens_suffice",),
    ),
    compare(
        *("transfers", "first_layer_suffices", ("layer", 0), "control"),
        "Training only the first layer, on divergence tokens, transfers the preference",
        f"control students trained all layers; {_SHARED}",
    ),
    compare(
        *("more", "first_layer_beats_last", ("layer", 0), ("layer", -1)),
        "The first layer transfers more of the preference than the last",
        "all layers use one learning rate, which was tuned for none of them",
        unit="times the preference of students of the last layer",
    ),
    compare(
        *("equal", "last_layer_equals_control", ("layer", -1), "control"),
        "Students of only the last layer end where the control does",
        f"control students trained all layers, on other lists; {_SHARED}",
        needs=("divergence_tokens_suffice",),
    ),
    EARLY_LAYERS,
    APPROXIMATION,
)
