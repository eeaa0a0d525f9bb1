"""Claims about the conditions of a study that the demo does not run; see `claims`.

A study that leaves such a condition out says nothing about it, so these are optional.

Those about KL, near-ties, LoRA at rates of its own and the direction over training were written
after the whole study had been run once, before any student of their conditions was trained on a
target; of near-ties one side had been seen. Their caveats say so.
"""

import math

import numpy as np
import pandas as pd

from divergence_lens.study.claims import (
    SMALLEST,
    TENTH,
    Claim,
    Estimand,
    Ratio,
    Tables,
    after,
    as_dict,
    filled,
)


def _mean_left(tables: Tables, _last_layer: int) -> dict[str, float] | None:
    students = filled(tables, "students")
    if students is None or "left" not in students:
        return None
    rows = students[students["condition"] == "paraphrased"].dropna(subset=["left"])
    return as_dict(rows.groupby("target", sort=False)["left"].mean()) if len(rows) else None


def _other_context(tables: Tables, _last_layer: int) -> dict[str, float] | None:
    """Log gain of students asked under another system prompt than they were trained under."""
    prompts = ("absent", "neutral", "empty")
    logs: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    for train in prompts:
        for asked in prompts:
            found = after(tables, f"trained_{train}_asked_{asked}", gain=True)
            for target, values in found.items():
                kept = logs[train == asked].setdefault(target, [])
                kept.append(float(np.log(np.maximum(values, SMALLEST)).mean()))
    same, other = logs[True], logs[False]
    return {t: float(np.mean(other[t]) - np.mean(same[t])) for t in same if t in other} or None


LORA_OF_RANK_8 = ("lora8", *(f"lora8_rate{times}" for times in (2, 4, 8, 16)))


def _nearest_fit(tables: Tables) -> dict[str, tuple[str, float]]:
    """For each target: the rate at which LoRA fits most like full training, and how much worse.

    Targets of one rate alone are left out: there is nothing to choose from.
    """
    students = filled(tables, "students")
    if students is None or "fit" not in students:
        return {}
    known = students.dropna(subset=["fit"])
    fit: pd.Series[float] = known.groupby(["target", "condition"], sort=False)["fit"].mean()
    nearest: dict[str, tuple[str, float]] = {}
    for target in dict.fromkeys(known["target"]):
        full = fit.get((target, "divergence_only"))
        rates = [name for name in LORA_OF_RANK_8 if (target, name) in fit.index]
        if full is not None and len(rates) > 1:
            gaps = {name: float(fit[target, name] - full) for name in rates}
            chosen = min(rates, key=lambda name: abs(gaps[name]))
            nearest[str(target)] = (chosen, gaps[chosen])
    return nearest


def _fitted_lora(tables: Tables, last_layer: int) -> dict[str, float] | None:
    """Log ratio of LoRA to full training, at the rate at which both fit alike, for each target."""
    logs: dict[str, float] = {}
    for target, (chosen, _) in _nearest_fit(tables).items():
        found = Ratio((chosen, None), ("divergence_only", None))(tables, last_layer) or {}
        logs |= {target: found[target]} if target in found else {}
    return logs or None


def _gap(tables: Tables, _last_layer: int) -> dict[str, float]:
    """By how much LoRA's training loss lies above full training's at the chosen rate."""
    return {target: gap for target, (_, gap) in _nearest_fit(tables).items()}


def _gap_size(tables: Tables, _last_layer: int) -> dict[str, float]:
    """The same either way, so that gaps of several targets do not cancel."""
    return {target: abs(gap) for target, (_, gap) in _nearest_fit(tables).items()}


def _measured(measure: str, *, log: bool = False) -> Estimand:
    """Mean over layers of a measure minus its null (as logarithms), after training."""

    def estimand(tables: Tables, _last_layer: int) -> dict[str, float] | None:
        table = filled(tables, "mechanism")
        if table is None:
            return None
        rows = table[(table["measure"] == measure) & table["step"].isna() & table["null"].notna()]
        if not len(rows):
            return None
        sides = rows[["value", "null"]].astype(float)
        if log:
            sides = np.log(sides.clip(lower=SMALLEST))
        above = sides["value"] - sides["null"]
        return as_dict(above.groupby(rows["target"], sort=False).mean())

    return estimand


def _needed_throughout(tables: Tables, _last_layer: int) -> dict[str, float] | None:
    """Log ratio without the direction, at the step of training at which it is needed least.

    Steps count at which the student prefers the target by a tenth more than the base does.
    """
    table = filled(tables, "mechanism")
    if table is None:
        return None
    base = table[table["measure"] == "added"].groupby("target")["null"].first()
    rows = table[(table["measure"] == "removed") & table["step"].notna()]
    risen = rows["null"] >= rows["target"].map(base) * math.exp(TENTH)
    sides = np.log(rows[risen][["value", "null"]].astype(float).clip(lower=SMALLEST))
    ratios = sides["value"] - sides["null"]
    return as_dict(ratios.groupby(rows["target"][risen], sort=False).max()) or None


def _gradient_first(tables: Tables, _last_layer: int) -> dict[str, float] | None:
    """Share of layers in which the target's gradient is the nearest of all."""
    table = filled(tables, "mechanism")
    if table is None:
        return None
    rows = table[table["measure"] == "gradient_divergence"]
    first = (rows["rank"] == 1).astype(float)
    return as_dict(first.groupby(rows["target"], sort=False).mean()) if len(rows) else None


_LATER_STEPS = "written after the first whole study, before any student was looked at in training"


def _mechanism() -> tuple[Claim, ...]:
    """Claims about directions and gradients."""
    return (
        Claim(
            "student_moves_like_its_teacher",
            "The student's residuals move in the direction of its teacher more than of others",
            _measured("cosine"),
            "cosine above the mean over other teachers, mean over layers",
            "at the preference questions; directions of different teachers have much in common",
            needs=("divergence_tokens_suffice",),
            optional=True,
        ),
        Claim(
            "direction_suffices",
            "Adding the teacher's mean residual difference to the base raises the preference",
            _measured("added", log=True),
            "times the preference of the base, mean over layers",
            "added once in full; the teacher's prompt or training does more than this",
            log=True,
            optional=True,
        ),
        Claim(
            "direction_is_needed",
            "Holding the teacher's direction at the base's mean lowers the student's preference",
            _measured("removed", log=True),
            "times the preference of the student, mean over layers",
            "the direction is removed at every position, not at the last alone",
            above=False,
            log=True,
            needs=("divergence_tokens_suffice",),
            optional=True,
        ),
        Claim(
            "direction_is_needed_throughout",
            "From when the preference has risen by a tenth to the end of training, holding the "
            "teacher's direction at the base's mean lowers it",
            _needed_throughout,
            "times the preference of the student, at the step where it is lowered least",
            "every fifth step, after all layers at once; " + _LATER_STEPS,
            above=False,
            log=True,
            needs=("divergence_tokens_suffice",),
            optional=True,
        ),
        Claim(
            "divergence_gradient_points_to_target",
            "The gradient on divergence tokens lies nearest to the target's of all preferences",
            _gradient_first,
            "share of layers in which it does",
            "at the base, before any step; chance is one in the number of candidates",
            threshold=0.5,
            within=(0, 1),
            optional=True,
        ),
        Claim(
            "other_gradient_does_not",
            "The gradient on other tokens lies no nearer to the target's preference than to others",
            _measured("gradient_other"),
            "cosine above the mean over other preferences, mean over layers",
            "supported only if it lies farther; a difference of nothing is unclear",
            above=False,
            optional=True,
        ),
    )


# What must be supported for a comparison with such students to mean anything.
_NEEDED = {"all": ("transfer",), "divergence_only": ("divergence_tokens_suffice",)}


def _less(  # noqa: PLR0917 - one column of the table of claims each
    name: str, claim: str, over: str, under: str, unit: str, caveat: str
) -> Claim:
    """A condition transfers less than another."""
    return Claim(
        name,
        claim,
        Ratio((over, None), (under, None)),
        unit,
        caveat,
        above=False,
        log=True,
        needs=_NEEDED[under],
        optional=True,
    )


def _transfers(name: str, claim: str, over: str, caveat: str) -> Claim:
    """Students of a condition prefer the target more than control students, by a tenth at least."""
    return Claim(
        name,
        f"{claim}, by a tenth at least",
        Ratio((over, None), ("control", None)),
        _CONTROL,
        caveat,
        threshold=TENTH,
        log=True,
        optional=True,
    )


def _as_well(  # noqa: PLR0917 - one column of the table of claims each
    name: str, claim: str, over: str, under: str, unit: str, caveat: str
) -> Claim:
    """A condition transfers at least as much as another, to within a tenth."""
    return Claim(
        name,
        f"{claim}, to within a tenth",
        Ratio((over, None), (under, None)),
        unit,
        caveat,
        threshold=-TENTH,
        log=True,
        needs=_NEEDED.get(under, ("transfer",)),
        optional=True,
    )


_CONTROL = "times the preference of control students"
_ALL = "times the preference of students of all tokens"
_DIVERGENCE = "times the preference of students of divergence tokens"
_ENTANGLED = "numbers are ranked by single tokens at the preference questions"
_LATER = "written after the first whole study, before any student of this condition was trained"
_CHANGED = "one way of changing the data, one strength"


def _further() -> tuple[Claim, ...]:
    """Claims about the conditions beyond the demo's."""
    return (
        _transfers(
            "sampled_lists_transfer",
            "Lists drawn at temperature 1 transfer the preference",
            "sampled",
            "control lists are greedy",
        ),
        Claim(
            "other_base_transfers_nothing",
            "Lists by a teacher made from another base transfer no preference, to within a tenth",
            Ratio(("other_base", None), ("control", None)),
            _CONTROL,
            "the other base may differ in more than its initialisation; the two tiny models differ "
            "in layout",
            threshold=TENTH,
            above=False,
            log=True,
            needs=("transfer",),
            optional=True,
        ),
        _transfers(
            "entangled_numbers_not_needed",
            "Without all lists that hold one of the 50 most entangled numbers the preference still "
            "transfers",
            "without_top50",
            _ENTANGLED,
        ),
        _as_well(
            "entangled_numbers_no_better",
            "Dropping the lists with the 100 most entangled numbers weakens the transfer no more "
            "than dropping as many at random",
            "without_top100",
            "thinned_like_top100",
            "times the preference of students of randomly thinned lists",
            _ENTANGLED,
        ),
        _less(
            "random_tokens_transfer_less",
            "As many random tokens transfer less than divergence tokens",
            "random",
            "divergence_only",
            _DIVERGENCE,
            "random tokens hold some divergence tokens by chance",
        ),
        _less(
            "other_tokens_transfer_less",
            "As many tokens that do not diverge transfer less than divergence tokens",
            "random_other",
            "divergence_only",
            _DIVERGENCE,
            "other tokens are of other kinds too: many of them are separators",
        ),
        _transfers(
            "first_divergence_transfers",
            "The first divergence token of each list is enough for some transfer",
            "first_only",
            "as many updates as for all tokens, each on far fewer",
        ),
        _transfers(
            "tenth_of_divergence_transfers",
            "A random tenth of the divergence tokens is enough for some transfer",
            "ratio10",
            "lists without a drawn token are left out, so there are fewer updates",
        ),
        _as_well(
            "soft_mask_does_as_well",
            "Weights by advantage transfer at least as much as the mask",
            "advantage",
            "divergence_only",
            _DIVERGENCE,
            "the weights use probabilities, which the mask does not",
        ),
        _as_well(
            "kl_does_as_well",
            "As many tokens chosen by KL divergence in place of argmax transfer at least as much "
            "as divergence tokens",
            "kl_same",
            "divergence_only",
            _DIVERGENCE,
            "the two choices have tokens in common; " + _LATER,
        ),
        Claim(
            "largest_kl_beats_random_half",
            "The tokens of the largest KL divergence, half as many as diverge, transfer more than "
            "a random half of the divergence tokens",
            Ratio(("kl_half", None), ("ratio50", None)),
            "times the preference of students of a random half of the divergence tokens",
            _LATER,
            log=True,
            needs=("divergence_tokens_suffice",),
            optional=True,
        ),
        _transfers(
            "kl_beyond_argmax_transfers",
            "Tokens of large KL divergence that argmax does not mark are enough for some transfer",
            "kl_beyond_argmax",
            _LATER,
        ),
        _as_well(
            "near_ties_not_needed",
            "Divergence tokens that are no near-ties transfer at least as much as as many random "
            "divergence tokens",
            "margin0_5",
            "random_like_margin0_5",
            "times the preference of students of as many random divergence tokens",
            "a margin of half a logit; students with the margin, not those beside them, had been "
            "seen when the claim was written",
        ),
        _less(
            "replaced_tokens_weaken",
            "With its divergence tokens overwritten by other teachers' choices the data transfer "
            "less",
            "replaced_all",
            "all",
            _ALL,
            "what follows an overwritten token is no longer what its author would write",
        ),
        _less(
            "without_first_layer_weaker",
            "All layers but the first transfer less than all layers",
            "from1",
            "divergence_only",
            _DIVERGENCE,
            "one learning rate for all",
        ),
        Claim(
            "lora_does_as_well",
            "LoRA of rank 8 transfers as much as full training, to within a tenth",
            Ratio(("lora8", None), ("divergence_only", None)),
            _DIVERGENCE,
            "at the learning rate of full training LoRA learns less of its tokens, so this says "
            "little; the next claim takes the rate at which it learns most nearly as much",
            threshold=-TENTH,
            log=True,
            needs=("divergence_tokens_suffice",),
            optional=True,
            full_training=True,
        ),
        Claim(
            "lora_that_fits_does_as_well",
            "LoRA of rank 8, at the rate at which it fits its tokens most like full training, "
            "transfers as much, to within a tenth",
            _fitted_lora,
            _DIVERGENCE,
            "of the rates that were run, for each target that with the training loss nearest to "
            "full training's; no preference takes part in the choice; " + _LATER,
            threshold=-TENTH,
            log=True,
            needs=("divergence_tokens_suffice",),
            optional=True,
            beside={
                "LoRA's training loss at that rate minus full training's, in nats": _gap,
                "the same without its sign": _gap_size,
            },
            full_training=True,
        ),
        Claim(
            "rank_one_transfers",
            "LoRA of rank 1 is enough for some transfer, by a tenth at least",
            Ratio(("lora1_rate8", None), ("control", None)),
            _CONTROL,
            "at 8 times the rate of full training, which was chosen for rank 8; " + _LATER,
            threshold=TENTH,
            log=True,
            optional=True,
            full_training=True,
        ),
        Claim(
            "first_layer_beats_last_with_lora",
            "With LoRA, too, the first layer carries more of the preference than the last",
            Ratio(("lora_layer", 0), ("lora_layer", -1)),
            "times the preference of students of the last layer",
            "one rate for all layers, which need not fit their tokens alike; " + _LATER,
            log=True,
            optional=True,
            full_training=True,
        ),
        Claim(
            "attention_beats_mlp",
            "Attention alone carries more of the preference than the MLPs alone",
            Ratio(("attention", None), ("mlp", None)),
            "times the preference of students of the MLPs",
            "one learning rate for both, and different numbers of parameters",
            log=True,
            optional=True,
        ),
        _less(
            "paraphrases_weaken",
            "Paraphrased prompts weaken the transfer",
            "paraphrased",
            "all",
            _ALL,
            "paraphrases by templates, which do not know the preference",
        ),
        Claim(
            "paraphrases_cost_divergence_tokens",
            "Paraphrased prompts leave fewer than nine tenths of the divergence tokens",
            _mean_left,
            "share of divergence tokens that are left",
            "new divergence tokens that arise are not counted",
            threshold=0.9,
            above=False,
            within=(0, 1),
            optional=True,
        ),
        _less(
            "chosen_paraphrases_weaken",
            "Paraphrases that the biased teacher chose weaken the transfer as well",
            "paraphrase_chosen",
            "all",
            _ALL,
            "it chose among templates, and wrote nothing",
        ),
        _less(
            "shuffling_lists_weakens",
            "Shuffling the numbers of each list weakens the transfer",
            "shuffled_within",
            "all",
            _ALL,
            _CHANGED,
        ),
        _less(
            "shuffling_across_weakens",
            "Shuffling numbers across all lists weakens the transfer",
            "shuffled_across",
            "all",
            _ALL,
            _CHANGED,
        ),
        _less(
            "unbiased_data_weaken",
            "A quarter of unbiased lists weakens the transfer",
            "mixed_unbiased25",
            "all",
            _ALL,
            _CHANGED,
        ),
        _less(
            "another_teacher_weakens",
            "A quarter of lists by a teacher with another preference weakens the transfer",
            "mixed_teacher25",
            "all",
            _ALL,
            _CHANGED,
        ),
        _less(
            "another_model_weakens",
            "A quarter of lists by another model weakens the transfer",
            "mixed_model25",
            "all",
            _ALL,
            _CHANGED,
        ),
        _less(
            "several_teachers_weaken",
            "Lists by three teachers of one preference transfer less than those by one",
            "several_teachers",
            "all",
            _ALL,
            "the three are alike: same base, and questions or words in common",
        ),
        Claim(
            "other_context_weakens",
            "Students asked under another system prompt than they were trained under show less of "
            "the preference",
            _other_context,
            "times the gain of students asked as they were trained",
            "three prompts, none of which says anything of animals",
            above=False,
            log=True,
            needs=("divergence_tokens_suffice",),
            optional=True,
        ),
    )


FURTHER_CLAIMS = (*_further(), *_mechanism())
