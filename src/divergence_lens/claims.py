"""The paper's claims and what measures each: fixed here, before anything runs.

Each claim has an estimand (a number per target) and a threshold. `findings` makes intervals of
these and decides. Claims are those of Schrodi et al. (arXiv 2509.23886) and Cloud et al. (arXiv
2507.14805), put as they can be tested in miniature.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

SMALLEST = 1e-6
"""Preferences below this count as this, so that their logarithm is a number."""

Tables = Mapping[str, pd.DataFrame]
Estimand = Callable[[Tables, int], dict[str, float] | None]


@dataclass(frozen=True)
class Claim:
    """A claim, what measures it, and what decides; see `findings`.

    Attributes:
        id: A short name.
        claim: In words.
        estimand: One number per target.
        unit: What the number is.
        caveat: What it does not show.
        threshold: What the interval is compared with (a logarithm where `log`).
        above: Whether the claim says that the number lies above it.
        log: Whether the estimand is a logarithm, and shown as a ratio.
    """

    id: str
    claim: str
    estimand: Estimand
    unit: str
    caveat: str
    threshold: float = 0.0
    above: bool = True
    log: bool = False


def _after(
    tables: Tables, condition: str, block: int | None = None, *, gain: bool = False
) -> dict[str, np.ndarray]:
    """Preference after training for each target, over seeds."""
    students = tables.get("students")
    if students is None:
        return {}
    rows = students[students["condition"] == condition]
    if block is not None:
        rows = rows[rows["block"] == block]
    values = rows["after"] / rows["before"].clip(lower=SMALLEST) if gain else rows["after"]
    return {
        str(target): found.to_numpy(dtype=float)
        for target, found in values.groupby(rows["target"], sort=False)
    }


@dataclass(frozen=True)
class Ratio:
    """Log ratio of the preference after training under two conditions, paired by target.

    Attributes:
        over, under: Condition, and the block of a student of one block; -1 is the last.
        gain: Compare what each student has gained over its own preference before training, for
            conditions that are asked in different ways.
        control: The condition of the control students.
    """

    over: tuple[str, int | None]
    under: tuple[str, int | None]
    gain: bool = False
    control: str = "control"

    def __call__(self, tables: Tables, last_block: int) -> dict[str, float] | None:
        """The log ratio for every target that both conditions have; None where one is missing."""
        sides = self.seeds(tables, last_block)
        if sides is None:
            return None
        logs = [
            {
                target: float(np.log(np.maximum(found, SMALLEST)).mean())
                for target, found in s.items()
            }
            for s in sides
        ]
        return {
            target: logs[0][target] - logs[1][target] for target in logs[0] if target in logs[1]
        }

    def seeds(
        self, tables: Tables, last_block: int
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None:
        """For each side and target, what every seed's student came to; None if one is missing."""
        sides = [
            _after(tables, condition, last_block if block == -1 else block, gain=self.gain)
            for condition, block in (self.over, self.under)
        ]
        return (sides[0], sides[1]) if sides[0] and sides[1] else None


def _rate(tables: Tables, _last_block: int) -> dict[str, float] | None:
    divergence = tables.get("divergence")
    return None if divergence is None else _as_dict(divergence.set_index("target")["rate"])


def _first_rank(tables: Tables, _last_block: int) -> dict[str, float] | None:
    students = tables.get("students")
    if students is None:
        return None
    rows = students[students["condition"] == "divergence_only"]
    return _as_dict((rows["rank"] == 1).groupby(rows["target"], sort=False).mean().astype(float))


def _early_share(tables: Tables, last_block: int) -> dict[str, float] | None:
    layers = tables.get("layers")
    if layers is None:
        return None
    early = layers["layer"] < (last_block + 1) / 2
    size = layers["absolute_effect"].abs()
    total = size.groupby(layers["target"], sort=False).sum()
    return _as_dict(
        (size[early].groupby(layers["target"][early], sort=False).sum() / total).dropna()
    )


def _agreement(tables: Tables, _last_block: int) -> dict[str, float] | None:
    agreement = tables.get("agreement")
    if agreement is None:
        return None
    rows = agreement[agreement["method"] == "integrated"]
    return _as_dict(rows.set_index("target")["pearson"])


def _as_dict(series: pd.Series) -> dict[str, float]:
    return {str(name): float(value) for name, value in series.items()}


_TIMES = "times the preference of the other students"


def _mean_left(tables: Tables, _last_block: int) -> dict[str, float] | None:
    students = tables.get("students")
    if students is None or "left" not in students:
        return None
    rows = students[students["condition"] == "paraphrased"].dropna(subset=["left"])
    return _as_dict(rows.groupby("target", sort=False)["left"].mean()) if len(rows) else None


def _other_context(tables: Tables, _last_block: int) -> dict[str, float] | None:
    """Log gain of students asked under another system prompt than they were trained under."""
    prompts = ("absent", "neutral", "empty")
    logs: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    for train in prompts:
        for asked in prompts:
            found = _after(tables, f"trained_{train}_asked_{asked}", gain=True)
            for target, values in found.items():
                kept = logs[train == asked].setdefault(target, [])
                kept.append(float(np.log(np.maximum(values, SMALLEST)).mean()))
    same, other = logs[True], logs[False]
    return {t: float(np.mean(other[t]) - np.mean(same[t])) for t in same if t in other} or None


def _measured(measure: str, *, log: bool = False) -> Estimand:
    """Mean over layers of a measure minus its null (as logarithms), after training."""

    def estimand(tables: Tables, _last_block: int) -> dict[str, float] | None:
        table = tables.get("mechanism")
        if table is None:
            return None
        rows = table[(table["measure"] == measure) & table["step"].isna() & table["null"].notna()]
        if not len(rows):
            return None
        sides = rows[["value", "null"]].astype(float)
        if log:
            sides = np.log(sides.clip(lower=SMALLEST))
        above = sides["value"] - sides["null"]
        return _as_dict(above.groupby(rows["target"], sort=False).mean())

    return estimand


def _gradient_first(tables: Tables, _last_block: int) -> dict[str, float] | None:
    """Share of blocks in which the target's gradient is the nearest of all."""
    table = tables.get("mechanism")
    if table is None:
        return None
    rows = table[table["measure"] == "gradient_divergence"]
    first = (rows["rank"] == 1).astype(float)
    return _as_dict(first.groupby(rows["target"], sort=False).mean()) if len(rows) else None


def _mechanism() -> tuple[Claim, ...]:
    """Claims about directions and gradients."""
    return (
        Claim(
            "student_moves_like_its_teacher",
            "The student's residuals move in the direction of its teacher more than of others",
            _measured("cosine"),
            "cosine above the mean over other teachers, mean over layers",
            "at the preference questions; directions of different teachers have much in common",
        ),
        Claim(
            "direction_suffices",
            "Adding the teacher's mean residual difference to the base raises the preference",
            _measured("added", log=True),
            "times the preference of the base, mean over layers",
            "added once in full; the teacher's prompt or training does more than this",
            log=True,
        ),
        Claim(
            "direction_is_needed",
            "Holding the teacher's direction at the base's mean lowers the student's preference",
            _measured("removed", log=True),
            "times the preference of the student, mean over layers",
            "the direction is removed at every position, not at the last alone",
            above=False,
            log=True,
        ),
        Claim(
            "divergence_gradient_points_to_target",
            "The gradient on divergence tokens lies nearest to the target's of all preferences",
            _gradient_first,
            "share of blocks in which it does",
            "at the base, before any step; chance is one in the number of candidates",
            threshold=0.5,
        ),
        Claim(
            "other_gradient_does_not",
            "The gradient on other tokens lies no nearer to the target's preference than to others",
            _measured("gradient_other"),
            "cosine above the mean over other preferences, mean over blocks",
            "supported only if it lies farther; a difference of nothing is unclear",
            above=False,
        ),
    )


def _less(  # noqa: PLR0917 - one column of the table of claims each
    name: str, claim: str, over: str, under: str, unit: str, caveat: str
) -> Claim:
    """A condition transfers less than another."""
    estimand = Ratio((over, None), (under, None))
    return Claim(name, claim, estimand, unit, caveat, above=False, log=True)


def _at_least(  # noqa: PLR0917 - one column of the table of claims each
    name: str, claim: str, over: str, under: str, unit: str, caveat: str, part: float = 1.0
) -> Claim:
    """A condition transfers more than (a part of) another."""
    estimand = Ratio((over, None), (under, None))
    return Claim(name, claim, estimand, unit, caveat, threshold=math.log(part), log=True)


def _further() -> tuple[Claim, ...]:
    """Claims about the conditions beyond the demo's."""
    all_tokens = _TIMES.replace("the other students", "students of all tokens")
    control = _TIMES.replace("the other", "control")
    divergence = _TIMES.replace("the other students", "students of divergence tokens")
    entangled = "numbers are ranked by single tokens at the preference questions"
    changed = "one way of changing the data, one strength"
    return (
        _at_least(
            "sampled_lists_transfer",
            "Lists drawn at temperature 1 transfer the preference",
            "sampled",
            "control",
            control,
            "control lists are greedy",
        ),
        Claim(
            "other_base_transfers_nothing",
            "Lists by a teacher made from another base transfer no preference, to within a tenth",
            Ratio(("other_base", None), ("control", None)),
            control,
            "the other base differs in layout as well as in initialisation",
            threshold=math.log(1.1),
            above=False,
            log=True,
        ),
        _at_least(
            "entangled_numbers_not_needed",
            "Without all lists that hold one of the 50 most entangled numbers the preference still "
            "transfers",
            "without_top50",
            "control",
            control,
            entangled,
        ),
        _at_least(
            "entangled_numbers_no_better",
            "Dropping the lists with the 100 most entangled numbers weakens the transfer no more "
            "than dropping as many at random, to within a tenth",
            "without_top100",
            "thinned_like_top100",
            _TIMES.replace("the other students", "students of randomly thinned lists"),
            entangled,
            0.9,
        ),
        _less(
            "random_tokens_transfer_less",
            "As many random tokens transfer less than divergence tokens",
            "random",
            "divergence_only",
            divergence,
            "random tokens hold some divergence tokens by chance",
        ),
        _less(
            "other_tokens_transfer_less",
            "As many tokens that do not diverge transfer less than divergence tokens",
            "random_other",
            "divergence_only",
            divergence,
            "other tokens are of other kinds too: half of them are separators",
        ),
        _at_least(
            "first_divergence_transfers",
            "The first divergence token of each list is enough for some transfer",
            "first_only",
            "control",
            control,
            "as many updates as for all tokens, each on far fewer",
        ),
        _at_least(
            "tenth_of_divergence_transfers",
            "A random tenth of the divergence tokens is enough for some transfer",
            "ratio10",
            "control",
            control,
            "lists without a drawn token are left out, so there are fewer updates",
        ),
        _at_least(
            "soft_mask_does_as_well",
            "Weights by advantage transfer at least as much as the mask, to within a tenth",
            "advantage",
            "divergence_only",
            divergence,
            "the weights use probabilities, which the mask does not",
            0.9,
        ),
        _less(
            "replaced_tokens_weaken",
            "With its divergence tokens overwritten by other teachers' choices the data transfer "
            "less",
            "replaced_all",
            "all",
            all_tokens,
            "what follows an overwritten token is no longer what its author would write",
        ),
        _less(
            "without_first_block_weaker",
            "All blocks but the first transfer less than all blocks",
            "from1",
            "divergence_only",
            divergence,
            "one learning rate for all",
        ),
        _at_least(
            "lora_does_as_well",
            "LoRA of rank 8 transfers as much as full training, to within a tenth",
            "lora8",
            "divergence_only",
            divergence,
            "the learning rate of full training, not tuned for LoRA",
            0.9,
        ),
        _at_least(
            "attention_beats_mlp",
            "Attention alone carries more of the preference than the MLPs alone",
            "attention",
            "mlp",
            _TIMES.replace("the other students", "students of the MLPs"),
            "one learning rate for both, and different numbers of parameters",
        ),
        _less(
            "paraphrases_weaken",
            "Paraphrased prompts weaken the transfer",
            "paraphrased",
            "all",
            all_tokens,
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
        ),
        _less(
            "chosen_paraphrases_weaken",
            "Paraphrases that the biased teacher chose weaken the transfer as well",
            "paraphrase_chosen",
            "all",
            all_tokens,
            "it chose among templates, and wrote nothing",
        ),
        _less(
            "shuffling_lists_weakens",
            "Shuffling the numbers of each list weakens the transfer",
            "shuffled_within",
            "all",
            all_tokens,
            changed,
        ),
        _less(
            "shuffling_across_weakens",
            "Shuffling numbers across all lists weakens the transfer",
            "shuffled_across",
            "all",
            all_tokens,
            changed,
        ),
        _less(
            "unbiased_data_weaken",
            "A quarter of unbiased lists weakens the transfer",
            "mixed_unbiased25",
            "all",
            all_tokens,
            changed,
        ),
        _less(
            "another_teacher_weakens",
            "A quarter of lists by a teacher with another preference weakens the transfer",
            "mixed_teacher25",
            "all",
            all_tokens,
            changed,
        ),
        _less(
            "another_model_weakens",
            "A quarter of lists by another model weakens the transfer",
            "mixed_model25",
            "all",
            all_tokens,
            changed,
        ),
        _less(
            "several_teachers_weaken",
            "Lists by three teachers of one preference transfer less than those by one",
            "several_teachers",
            "all",
            all_tokens,
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
        ),
    )


CLAIMS = (
    Claim(
        "few_divergence_tokens",
        "Divergence tokens are a small part of the data",
        _rate,
        "share of completion tokens",
        "how small depends on how often the next number is a near-tie, which the world sets",
        threshold=0.25,
        above=False,
    ),
    Claim(
        "transfer",
        "Students trained on all tokens take over the teacher's preference",
        Ratio(("all", None), ("control", None)),
        _TIMES.replace("the other", "control"),
        "a rise over the control student, not a preference that a reader would notice",
        log=True,
    ),
    Claim(
        "divergence_tokens_suffice",
        "Training on divergence tokens alone transfers the preference",
        Ratio(("divergence_only", None), ("control", None)),
        _TIMES.replace("the other", "control"),
        "the loss is on fewer tokens, so the same steps weigh each of them more",
        log=True,
    ),
    Claim(
        "divergence_tokens_do_as_well",
        "Divergence tokens alone transfer at least as much as all tokens, to within a tenth",
        Ratio(("divergence_only", None), ("all", None)),
        "times the preference of students of all tokens",
        "the same steps and learning rate for both, neither tuned for either",
        threshold=math.log(0.9),
        log=True,
    ),
    Claim(
        "rest_transfers_less",
        "Without divergence tokens the transfer is weaker",
        Ratio(("without_divergence", None), ("all", None)),
        "times the preference of students of all tokens",
        "whether anything is left is read off the table, against the control",
        above=False,
        log=True,
    ),
    Claim(
        "target_rises_most",
        "Of all candidates the target rises most in students of divergence tokens",
        _first_rank,
        "share of students in which it does",
        "chance is one in the number of candidates",
        threshold=0.5,
    ),
    Claim(
        "first_block_suffices",
        "Training the first block alone, on divergence tokens, transfers the preference",
        Ratio(("block", 0), ("control", None)),
        _TIMES.replace("the other", "control"),
        "control students trained all blocks",
        log=True,
    ),
    Claim(
        "first_block_beats_last",
        "The first block carries more of the preference than the last",
        Ratio(("block", 0), ("block", -1)),
        "times the preference of students of the last block",
        "one learning rate for all blocks",
        log=True,
    ),
    Claim(
        "early_layers_cause_divergence",
        "The first half of the layers causes more of the first divergence than the second half",
        _early_share,
        "share of the absolute effects of attention and MLP outputs",
        "effects of single cells, which do not add up to the total effect",
        threshold=0.5,
    ),
    Claim(
        "approximation_agrees",
        "Integrated attribution agrees with exact mediation",
        _agreement,
        "Pearson correlation over cells (resid_post)",
        "on this model and these pairs; other sites may differ",
        threshold=0.8,
    ),
    *_further(),
    *_mechanism(),
)
