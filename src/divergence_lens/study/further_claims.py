"""Claims on conditions that the demo does not run; see `claims`.

They are optional: a study without the conditions of a claim omits it. The claims on KL, near-ties,
LoRA at its own learning rate, and the direction during training were written after the first full
study, before any student of their conditions was trained on a target; of the near-ties, one side
had been seen. Their caveats say so.
"""

import dataclasses

from divergence_lens.study.claims import Claim, compare
from divergence_lens.study.estimands import (
    TENTH,
    above_null,
    absolute_fit_gap,
    fit_gap,
    fitted_lora,
    gradient_first,
    mean_left,
    needed_throughout,
    other_context,
)

_ENTANGLED = "numbers are ranked by single tokens at the preference questions"
_LATER = "written after the first full study, before any student of this condition was trained"
_CHANGED = "one way to change the data, at one strength"
_TRANSFER, _SUFFICE = ("transfer",), ("divergence_tokens_suffice",)

_DATA = (
    compare(
        *("transfers", "sampled_lists_transfer", "sampled", "control"),
        "Lists sampled at temperature 1 transfer the preference",
        "the control lists are greedy",
    ),
    compare(
        *("no_more", "other_base_transfers_nothing", "other_base", "control"),
        "Lists by a teacher derived from another base model transfer no preference",
        "the other base model may differ in more than its initialization; the two tiny models "
        "differ in architecture",
        needs=_TRANSFER,
    ),
    compare(
        *("transfers", "entangled_numbers_not_needed", "without_top50", "control"),
        "Without the lists that contain one of the 50 most entangled numbers the preference still "
        "transfers",
        _ENTANGLED,
    ),
    compare(
        *("as_well", "entangled_numbers_no_better", "without_top100", "thinned_like_top100"),
        "Dropping the lists with the 100 most entangled numbers weakens the transfer no more than "
        "dropping as many at random",
        _ENTANGLED,
        unit="times the preference of students of randomly thinned lists",
        needs=_TRANSFER,
    ),
)

_MASKS = (
    compare(
        *("less", "random_tokens_transfer_less", "random", "divergence_only"),
        "As many random tokens transfer less than divergence tokens",
        "some of the random tokens are divergence tokens by chance",
    ),
    compare(
        *("less", "other_tokens_transfer_less", "random_other", "divergence_only"),
        "As many tokens that do not diverge transfer less than divergence tokens",
        "other tokens also differ in kind: many of them are separators",
    ),
    compare(
        *("transfers", "first_divergence_transfers", "first_only", "control"),
        "The first divergence token of each list is enough for some transfer",
        "as many updates as for all tokens, each on far fewer tokens",
    ),
    compare(
        *("transfers", "tenth_of_divergence_transfers", "ratio10", "control"),
        "A random tenth of the divergence tokens is enough for some transfer",
        "lists without a chosen token are omitted, so there are fewer updates",
    ),
    compare(
        *("as_well", "soft_mask_does_as_well", "advantage", "divergence_only"),
        "Weights by advantage transfer at least as much as the mask",
        "the weights use probabilities, which the mask does not",
    ),
    compare(
        *("as_well", "kl_does_as_well", "kl_same", "divergence_only"),
        "As many tokens chosen by KL divergence instead of argmax transfer at least as much as "
        "divergence tokens",
        f"the two choices overlap; {_LATER}",
    ),
    compare(
        *("more", "largest_kl_beats_random_half", "kl_half", "ratio50"),
        "The tokens of the largest KL divergence, half as many as diverge, transfer more than a "
        "random half of the divergence tokens",
        _LATER,
        unit="times the preference of students of a random half of the divergence tokens",
        needs=_SUFFICE,
    ),
    compare(
        *("transfers", "kl_beyond_argmax_transfers", "kl_beyond_argmax", "control"),
        "Tokens of large KL divergence that argmax does not mark are enough for some transfer",
        _LATER,
    ),
    compare(
        *("as_well", "near_ties_not_needed", "margin0_5", "random_like_margin0_5"),
        "Divergence tokens that are not near-ties transfer at least as much as equally many random "
        "divergence tokens",
        "a margin of half a logit; students with the margin, but not those with random tokens, had "
        "been seen when the claim was written",
        unit="times the preference of students of as many random divergence tokens",
        needs=_TRANSFER,
    ),
    compare(
        *("less", "replaced_tokens_weaken", "replaced_all", "all"),
        "Data whose divergence tokens are replaced with other teachers' choices transfer less",
        "the text after a replaced token is no longer what its author would have written",
    ),
)

_LAYERS = (
    compare(
        *("less", "without_first_layer_weaker", "from1", "divergence_only"),
        "All layers but the first transfer less than all layers",
        "one learning rate for all",
    ),
    compare(
        *("as_well", "lora_does_as_well", "lora8", "divergence_only"),
        "LoRA of rank 8 transfers as much as full training",
        "at the learning rate of full training LoRA learns less of its tokens, so this says "
        "little; the next claim uses the rate at which it learns most nearly as much",
        full_training=True,
    ),
    Claim(
        id="lora_that_fits_does_as_well",
        claim="LoRA of rank 8, at the rate at which it fits its tokens most like full training, "
        "transfers as much, to within a tenth",
        estimand=fitted_lora,
        unit="times the preference of students trained on divergence tokens",
        caveat="for each target the rate is the one, of those that were run, with the training "
        f"loss nearest to full training's; the choice ignores preferences; {_LATER}",
        threshold=-TENTH,
        log=True,
        needs=_SUFFICE,
        related={
            "LoRA's training loss at that rate minus full training's, in nats": fit_gap,
            "the absolute value of that difference": absolute_fit_gap,
        },
        full_training=True,
    ),
    compare(
        *("transfers", "rank_one_transfers", "lora1_rate8", "control"),
        "LoRA of rank 1 is enough for some transfer",
        f"at 8 times the rate of full training, which was chosen for rank 8; {_LATER}",
        full_training=True,
    ),
    compare(
        *("more", "first_layer_beats_last_with_lora", ("lora_layer", 0), ("lora_layer", -1)),
        "With LoRA, too, the first layer transfers more of the preference than the last",
        f"one rate for all layers, which may fit their tokens to different degrees; {_LATER}",
        unit="times the preference of students of the last layer",
        full_training=True,
    ),
    compare(
        *("more", "attention_beats_mlp", "attention", "mlp"),
        "Attention alone transfers more of the preference than the MLPs alone",
        "one learning rate for both, and different numbers of parameters",
        unit="times the preference of students of the MLPs",
    ),
)

_FRAGILITY = (
    compare(
        *("less", "paraphrases_weaken", "paraphrased", "all"),
        "Paraphrased prompts weaken the transfer",
        "the paraphrases are templates, which contain no preference",
    ),
    Claim(
        id="paraphrases_cost_divergence_tokens",
        claim="Paraphrased prompts leave fewer than nine tenths of the divergence tokens",
        estimand=mean_left,
        unit="share of divergence tokens that remain",
        caveat="new divergence tokens are not counted",
        threshold=0.9,
        above=False,
        within=(0, 1),
    ),
    compare(
        *("less", "chosen_paraphrases_weaken", "paraphrase_chosen", "all"),
        "Paraphrases that the biased teacher chose weaken the transfer as well",
        "it chose among templates and wrote nothing",
    ),
    *(
        compare("less", claim_id, condition, "all", claim, _CHANGED)
        for claim_id, condition, claim in (
            (
                *("shuffling_lists_weakens", "shuffled_within"),
                "Shuffling the numbers of each list weakens the transfer",
            ),
            (
                *("shuffling_across_weakens", "shuffled_across"),
                "Shuffling numbers across all lists weakens the transfer",
            ),
            (
                *("unbiased_data_weaken", "mixed_unbiased25"),
                "A quarter of unbiased lists weakens the transfer",
            ),
            (
                *("another_teacher_weakens", "mixed_teacher25"),
                "A quarter of lists by a teacher with another preference weakens the transfer",
            ),
            (
                *("another_model_weakens", "mixed_model25"),
                "A quarter of lists by another model weakens the transfer",
            ),
        )
    ),
    compare(
        *("less", "several_teachers_weaken", "several_teachers", "all"),
        "Lists by three teachers with one preference transfer less than lists by one of them",
        "the three are alike: they share the base model, and questions or words",
    ),
    Claim(
        id="other_context_weakens",
        claim="Students evaluated under another system prompt than in training show less of the "
        "preference",
        estimand=other_context,
        unit="times the gain of students evaluated as they were trained",
        caveat="three prompts, none of which mentions animals",
        above=False,
        log=True,
        needs=_SUFFICE,
    ),
)

_MECHANISM = (
    Claim(
        id="student_moves_like_its_teacher",
        claim="The student's residual stream moves in the direction of its teacher more than of "
        "other teachers",
        estimand=above_null("cosine"),
        unit="cosine above the mean over other teachers, mean over layers",
        caveat="at the preference questions; directions of different teachers have much in common",
        needs=_SUFFICE,
    ),
    Claim(
        id="direction_suffices",
        claim="Adding the teacher's mean residual difference to the base model raises the "
        "preference",
        estimand=above_null("added", log=True),
        unit="times the preference of the base model, mean over layers",
        caveat="added once at full size; the teacher's prompt or training does more than this",
        log=True,
    ),
    Claim(
        id="direction_is_needed",
        claim="Holding the teacher's direction at the base model's mean lowers the student's "
        "preference",
        estimand=above_null("removed", log=True),
        unit="times the preference of the student, mean over layers",
        caveat="the direction is removed at every position, not only at the last",
        above=False,
        log=True,
        needs=_SUFFICE,
    ),
    Claim(
        id="direction_is_needed_throughout",
        claim="From the step at which the preference has risen by a tenth to the end of training, "
        "holding the teacher's direction at the base model's mean lowers it",
        estimand=needed_throughout,
        unit="times the preference of the student, at the step where it is lowered least",
        caveat="every fifth step, after all layers at once; written after the first full study, "
        "before any student was examined during training",
        above=False,
        log=True,
        needs=_SUFFICE,
    ),
    Claim(
        id="divergence_gradient_points_to_target",
        claim="The gradient on divergence tokens is nearest to the target's of all preferences",
        estimand=gradient_first,
        unit="share of layers in which it is",
        caveat="at the base model, before any step; chance level is one over the number of "
        "candidates",
        threshold=0.5,
        within=(0, 1),
    ),
    Claim(
        id="other_gradient_does_not",
        claim="The gradient on other tokens is no nearer to the target's preference than to others",
        estimand=above_null("gradient_other"),
        unit="cosine above the mean over other preferences, mean over layers",
        caveat="supported only if it is farther; a difference of zero is unclear",
        above=False,
    ),
)

FURTHER_CLAIMS = tuple(
    dataclasses.replace(claim, optional=True)
    for claim in (*_DATA, *_MASKS, *_LAYERS, *_FRAGILITY, *_MECHANISM)
)
