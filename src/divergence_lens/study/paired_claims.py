"""The claims of a paired study, and the rule that decides each.

They were committed before any student of the four targets was trained, except those whose caveat
says otherwise. Until then only wolf and lion had been looked at, in rough experiments and while
recipe, dose and rates were chosen; neither is a target. A change of a rule after that is a new
claim, which says so in its caveat.

A verdict needs all targets of the study. With fewer, the estimate is shown and the claim is
unclear.

The estimand of all students is the *dissociation* of a target, in nats: its margin in its own
student minus its margin in the twin, mean over seeds. Intervals are over targets (Student's t); the
two targets of a pair share their students, so four targets are less than four independent ones.
"""

from dataclasses import dataclass, replace

import numpy as np

from divergence_lens.study.claims import APPROXIMATION, EARLY_LAYERS, Claim
from divergence_lens.study.estimands import TENTH, Tables, table
from divergence_lens.study.paired import trained_alone

Side = tuple[str, int | None]
"""A condition, and for students of single layers the place of the layer in `trained_alone`."""

UNBIASED = "unbiased_layer"
"""Label of the students of single layers that learn from the base model's lists."""

EARLY, LATE = (0, 1), (-2, -1)
"""Places of the layers in `trained_alone` that count as early and as late."""


def dissociation(
    tables: Tables, condition: str, layer: int | None = None
) -> dict[str, list[float]]:
    """For each target and seed, its margin in its own student minus that in the twin.

    A student without a twin of the same seed is left out.

    Args:
        tables: The tables of the study.
        condition: The condition of the students.
        layer: The layer of students of single layers.

    Returns:
        Target -> one number per seed, in nats.
    """
    return {t: list(own.values()) for t, own in _by_seed(tables, condition, layer).items()}


def _by_seed(tables: Tables, condition: str, layer: int | None) -> dict[str, dict[int, float]]:
    rows = table(tables, "students", "condition", "layer", "seed", "twin", "distribution")
    rows = rows[rows["condition"] == condition]
    if layer is not None:
        rows = rows[rows["layer"] == layer]
    margins = {
        (row["target"], row["seed"]): (row["twin"], row["distribution"])
        for row in rows.to_dict("records")
    }
    result: dict[str, dict[int, float]] = {}
    for (target, seed), (twin, own) in margins.items():
        if (twin, seed) in margins:
            other = margins[twin, seed][1]
            result.setdefault(str(target), {})[int(seed)] = float(own[target] - other[target])
    return result


def single_layers(tables: Tables, condition: str = "layer") -> list[int]:
    """The layers that were trained alone, on the teacher's lists or under another condition."""
    rows = table(tables, "students", "condition", "layer")
    rows = rows[rows["condition"] == condition]
    return sorted({int(layer) for layer in rows["layer"].dropna()})


@dataclass(frozen=True)
class Dissociation:
    """The dissociation under conditions, minus that under other conditions.

    Several conditions on one side are averaged. Only seeds that all conditions have are used, and
    a target without one is left out.

    Attributes:
        over: The conditions.
        under: The conditions to subtract; none for the dissociation itself.
    """

    over: tuple[Side, ...]
    under: tuple[Side, ...] = ()

    def __call__(self, tables: Tables, last_layer: int) -> dict[str, float]:
        """One number per target, in nats."""
        layers = trained_alone(last_layer + 1)
        measured = [
            [
                _by_seed(tables, condition, None if place is None else layers[place])
                for condition, place in side
            ]
            for side in (self.over, self.under)
        ]
        result = {}
        for target in sorted({name for part in measured[0] for name in part}):
            own = [[part.get(target, {}) for part in side] for side in measured]
            seeds = set.intersection(*(set(part) for side in own for part in side))
            if seeds:
                over, under = (
                    [float(np.mean([part[seed] for seed in sorted(seeds)])) for part in side]
                    for side in own
                )
                result[target] = float(np.mean(over)) - (float(np.mean(under)) if under else 0.0)
        return result


def digit_rate(tables: Tables, _last_layer: int) -> dict[str, float]:
    """Share of the digits that are divergence tokens."""
    rows = table(tables, "divergence", "divergence_tokens", "digits")
    shares = rows["divergence_tokens"].astype(float) / rows["digits"].astype(float)
    return {str(t): float(s) for t, s in zip(rows["target"], shares, strict=True)}


def _margins(
    claim_id: str,
    claim: str,
    over: str | tuple[Side, ...],
    under: str | tuple[Side, ...] = (),
    caveat: str = "one base model, one recipe",
    **fields: object,
) -> Claim:
    sides = [((side, None),) if isinstance(side, str) else side for side in (over, under)]
    return Claim(
        id=claim_id,
        claim=claim,
        estimand=Dissociation(sides[0], sides[1]),
        unit="nats, own margin minus the twin's" + (", difference" if under else ""),
        caveat=caveat,
        **fields,  # type: ignore[arg-type]
    )


_ONE_RATE = "one learning rate for all single layers, chosen by training loss on another target"
_SELECTED = "the selection uses probabilities of both teachers, which argmax does not"
_LAST = "added when all students of the core had been seen, before any of this condition"
_LATER = "added when the first students of the core had been seen, before any of this condition"
_TRANSFERS = ("all_digits_transfer",)

PAIRED_CLAIMS: tuple[Claim, ...] = (
    Claim(
        id="few_digits_diverge",
        claim="Fewer than a quarter of the digits are divergence tokens",
        estimand=digit_rate,
        unit="share of the digits",
        caveat="sampled lists and one counterfactual, the twin",
        threshold=0.25,
        above=False,
        within=(0, 1),
    ),
    _margins(
        "all_digits_transfer",
        "Students trained on all digits prefer the target more than their twins do",
        "all",
    ),
    _margins(
        "divergence_tokens_transfer",
        "Training only on divergence tokens transfers the preference",
        "divergence_only",
    ),
    _margins(
        "divergence_tokens_beat_all",
        "Divergence tokens alone transfer more than all digits",
        "divergence_only",
        "all",
        "the same learning rate, but fewer updates, because lists without one are left out",
    ),
    _margins(
        "rest_transfers_less",
        "Without divergence tokens the transfer is weaker",
        "without_divergence",
        "all",
        above=False,
        needs=_TRANSFERS,
    ),
    _margins(
        "top_advantage_transfers",
        "Training only on the tenth of the digits with the largest advantage transfers the "
        "preference",
        "top_advantage",
        (),
        _SELECTED,
    ),
    _margins(
        "top_advantage_beats_random",
        "The tenth of the digits with the largest advantage transfers more than a random tenth",
        "top_advantage",
        "random",
        _SELECTED,
    ),
    _margins(
        "bottom_advantage_reverses",
        "Training only on the tenth of the digits with the smallest advantage transfers the "
        "twin's preference",
        "bottom_advantage",
        (),
        _SELECTED,
        above=False,
    ),
    _margins(
        "first_layer_transfers",
        "Training only the first layer, on the digits with the largest advantage, transfers the "
        "preference",
        (("layer", 0),),
        (),
        _ONE_RATE,
    ),
    _margins(
        "early_layers_beat_late",
        "The two earliest of the layers that are trained alone transfer more than the two latest",
        tuple(("layer", place) for place in EARLY),
        tuple(("layer", place) for place in LATE),
        _ONE_RATE,
    ),
    _margins(
        "last_layer_transfers_nothing",
        f"Students of only the last layer are like their twins, to within {TENTH:.2f} nats",
        (("layer", -1),),
        (),
        _ONE_RATE,
        threshold=TENTH,
        equal=True,
    ),
    _margins(
        "first_divergence_transfers",
        "The first divergence token of each list is enough for some transfer",
        "first_only",
        optional=True,
    ),
    _margins(
        "attention_beats_mlp",
        "Attention alone transfers more than the MLPs alone",
        "attention",
        "mlp",
        "one learning rate for both, and different numbers of parameters",
        optional=True,
    ),
    _margins(
        "greedy_beats_sampled",
        "Greedy lists transfer more than sampled ones",
        "greedy",
        "all",
        "greedy lists of a small model are degenerate",
        optional=True,
    ),
    _margins(
        "paraphrases_weaken",
        "Paraphrased prompts weaken the transfer",
        "paraphrased",
        "all",
        "the paraphrases are templates, which contain no preference",
        above=False,
        optional=True,
        needs=_TRANSFERS,
    ),
    _margins(
        "twins_lists_weaken",
        "A quarter of lists by the twin's teacher weakens the transfer",
        "mixed_twin25",
        "all",
        above=False,
        optional=True,
        needs=_TRANSFERS,
    ),
    _margins(
        "replaced_tokens_weaken",
        "Lists whose divergence tokens are replaced with the twin's choices transfer less",
        "replaced_all",
        "all",
        above=False,
        optional=True,
        needs=_TRANSFERS,
    ),
    _margins(
        "selection_suffices",
        "The tenth with the largest advantage of lists that the base model wrote transfers the "
        "preference",
        "unbiased_top",
        caveat=_LAST,
        optional=True,
    ),
    _margins(
        "authors_matter",
        "With the same selection, the teacher's own lists transfer more than the base model's",
        "top_advantage",
        "unbiased_top",
        _LAST,
        optional=True,
    ),
    _margins(
        "unbiased_first_layer_transfers",
        "Training only the first layer, on that selection of the base model's lists, transfers the "
        "preference",
        ((UNBIASED, 0),),
        caveat=_LAST,
        optional=True,
    ),
    _margins(
        "unbiased_first_layer_beats_last",
        "On the base model's lists, the first layer alone transfers more than the last alone",
        ((UNBIASED, 0),),
        ((UNBIASED, -1),),
        _LAST,
        optional=True,
    ),
    _margins(
        "authors_matter_for_layers",
        "With the same selection, the teacher's own lists transfer more than the base model's when "
        "a single layer is trained (mean of the first, the middle and the last)",
        tuple(("layer", place) for place in (0, 2, -1)),
        tuple((UNBIASED, place) for place in (0, 2, -1)),
        _LAST,
        optional=True,
    ),
    _margins(
        "dose_matters",
        "All lists transfer more than the first quarter of them, each on its tenth of the digits",
        "top_advantage",
        "dose25",
        optional=True,
    ),
    _margins(
        "different_lists_beat_repeated_ones",
        "All lists once transfer more than a quarter of them four times, each on its tenth of the "
        "digits",
        "top_advantage",
        "few_rows",
        _LATER,
        optional=True,
    ),
    _margins(
        "soft_beats_hard",
        "Soft distillation transfers more than the tokens themselves",
        "soft",
        "all",
        f"soft targets have far more information per token; {_LATER}",
        optional=True,
    ),
    replace(EARLY_LAYERS, optional=True),
    replace(APPROXIMATION, optional=True, related={}),
)
"""Claims on the core conditions, then optional ones on the further conditions."""
