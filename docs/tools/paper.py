"""The papers' statements on the claims of a study, for the results page of the documentation.

The available texts were the abstract of Schrodi et al. (arXiv 2509.23886) and public reading notes
on its second version (ICLR 2026), not the full paper. Numbers are quoted with their source where
such a text has them. Numbers that others read off the paper's charts are marked as such.
"""

from collections.abc import Mapping
from dataclasses import dataclass

ABSTRACT = "abstract"
NOTES = "notes"
TABLE = "Table 1, from two sets of notes"
FIGURE = "read off a figure by others"
CLOUD = "Cloud et al., from notes"
STEERING = "arXiv 2606.00995, abstract"
SOURCES: Mapping[str, str] = {
    ABSTRACT: "the abstract of the paper",
    NOTES: "public reading notes on the paper; the full paper was not available to check them",
    TABLE: "the paper's first table, on which two independent sets of such notes agree",
    FIGURE: "the paper's figures, from which authors of public notes read numbers to 1 or 2 points",
    CLOUD: "Cloud et al., arXiv 2507.14805, as described in such notes",
    STEERING: "the abstract of another paper, on which the study's mechanism is based",
}
"""A description of each source, for the page."""

NO_NUMBER = "the available text gives no number"


@dataclass(frozen=True, kw_only=True)
class PaperClaim:
    """A paper's statement on a claim, and the meaning of each verdict of ours.

    Attributes:
        text: The statement in our words, with its numbers.
        source: One of `SOURCES`.
        yes: The meaning if our claim is supported.
        no: The meaning if it is not supported.
        stricter: Whether our claim says more than the paper does. If it is not supported, it does
            not contradict the paper.
    """

    text: str
    source: str
    yes: str
    no: str
    stricter: bool = False


_LATE = f"single middle and late layers (14, 21, 27, 33) transfer almost nothing; {NO_NUMBER}"
_ALONE = f"training only on them preserves or strengthens the transfer; {NO_NUMBER}"
_MASKED = f"masking them out mostly removes the transfer; {NO_NUMBER}"
_EARLY = f"early layers are critical; {NO_NUMBER}"

PAPER_CLAIMS: Mapping[str, PaperClaim] = {
    "few_divergence_tokens": PaperClaim(
        text="7.5 % of the tokens of greedy lists for Qwen2.5-7B, 18.3 % for Gemma-3-4B; at "
        "temperature 1 4.7 % and 13.2 %",
        source=TABLE,
        yes="below a quarter, as there",
        no="a larger share than in either of its models, so conclusions from their rarity do not "
        "carry over",
    ),
    "transfer": PaperClaim(
        text="lists of numbers make students prefer the same things as their teacher: with greedy "
        "lists of Gemma-3-4B, the animal's share is 31 % for the owl (control 8 %), 58 % for the "
        "otter (17 %), 51 % for the raven (17 %), 7 % for the eagle (1 %), 10 % for the penguin "
        "(2 %) and 13 % for the wolf (2 %)",
        source=FIGURE,
        yes="the phenomenon occurs, so its causes can be studied",
        no="without the phenomenon the findings below cannot be interpreted",
    ),
    "divergence_tokens_suffice": PaperClaim(
        text=_ALONE,
        source=NOTES,
        yes="divergence tokens are sufficient here too",
        no="divergence tokens are not sufficient here",
    ),
    "divergence_tokens_do_as_well": PaperClaim(
        text=_ALONE,
        source=NOTES,
        yes="the other tokens only dilute the transfer",
        no="the other tokens carry part of the preference here",
    ),
    "rest_transfers_less": PaperClaim(
        text=_MASKED,
        source=ABSTRACT,
        yes="most of the transfer needs them",
        no="the transfer does not need them here",
    ),
    "rest_equals_control": PaperClaim(
        text=_MASKED,
        source=ABSTRACT,
        yes="no relevant transfer remains without them",
        no="students do not end where the control does; the paper says only that "
        "most of the transfer is gone",
        stricter=True,
    ),
    "first_layer_suffices": PaperClaim(
        text=f"a single early layer is sufficient (layers 0 and 7 were tried); {NO_NUMBER}",
        source=NOTES,
        yes="the first layer is sufficient here",
        no="the first layer is not sufficient here",
    ),
    "first_layer_beats_last": PaperClaim(
        text=_LATE,
        source=NOTES,
        yes="early layers transfer more than late ones here too",
        no="the order of the layers is different here",
    ),
    "last_layer_equals_control": PaperClaim(
        text=_LATE,
        source=NOTES,
        yes="the last layer transfers nothing",
        no="students do not end where the control does; the paper says only that "
        "almost nothing transfers",
        stricter=True,
    ),
    "early_layers_cause_divergence": PaperClaim(
        text=_EARLY,
        source=ABSTRACT,
        yes="the first half of the layers causes more of the divergence here too",
        no="the first half of the layers does not cause more of the divergence here",
    ),
    "sampled_lists_transfer": PaperClaim(
        text="at temperature 1 some animals (Qwen) or most (Gemma) transfer, with greedy lists "
        f"often more; {NO_NUMBER}",
        source=NOTES,
        yes="the transfer does not depend on greedy decoding",
        no="sampled lists do not transfer the preference here",
    ),
    "other_base_transfers_nothing": PaperClaim(
        text=f"transfer needs a shared base model; {NO_NUMBER}",
        source=CLOUD,
        yes="nothing transfers without a shared base model",
        no="something transfers between different base models here, so part of the effect is not "
        "hidden",
    ),
    "entangled_numbers_not_needed": PaperClaim(
        text="the transfer does not need token entanglement: without the 50 most entangled numbers "
        f"some preferences still transfer (notes); {NO_NUMBER}",
        source=ABSTRACT,
        yes="entangled numbers are not the carrier here either",
        no="entangled numbers may be the carrier here",
    ),
    "without_first_layer_weaker": PaperClaim(
        text=_EARLY,
        source=ABSTRACT,
        yes="later layers do not compensate for the first",
        no="later layers compensate for the first here",
    ),
    "paraphrases_weaken": PaperClaim(
        text="small changes such as paraphrased prompts usually suppress the transfer; "
        f"{NO_NUMBER}",
        source=ABSTRACT,
        yes="the transfer is fragile here too; the table of conditions shows how much remains",
        no="paraphrases do not affect the transfer here",
    ),
    "chosen_paraphrases_weaken": PaperClaim(
        text="paraphrases by the biased teacher itself often suppress the transfer as well; "
        f"{NO_NUMBER}",
        source=NOTES,
        yes="a choice by the biased teacher does so too, though it wrote nothing here",
        no="a choice by the biased teacher does not affect the transfer here",
    ),
    "unbiased_data_weaken": PaperClaim(
        text="a tenth of unbiased lists weakens the transfer much, a quarter almost ends it",
        source=NOTES,
        yes="weaker here too; the table of conditions shows whether it almost ends",
        no="unbiased lists do not weaken it here",
    ),
    "another_teacher_weakens": PaperClaim(
        text=f"mixing lists of several teachers weakens the transfer; {NO_NUMBER}",
        source=NOTES,
        yes="weaker here too",
        no="lists with another preference do not weaken it here",
    ),
    "several_teachers_weaken": PaperClaim(
        text=f"mixing lists of teachers with the same preference weakens it as well; {NO_NUMBER}",
        source=NOTES,
        yes="having a single teacher matters here too",
        no="several teachers with one preference do as well as one here",
    ),
    "student_moves_like_its_teacher": PaperClaim(
        text=f"the student learns a vector aligned with its teacher's; {NO_NUMBER}",
        source=STEERING,
        yes="so it does here, compared with other teachers' vectors as the null",
        no="the student moves in another direction here",
    ),
    "direction_suffices": PaperClaim(
        text=f"a teacher's prompt is well approximated by one vector; {NO_NUMBER}",
        source=STEERING,
        yes="one vector creates the preference here too",
        no="one vector does not create the preference here",
    ),
    "direction_is_needed": PaperClaim(
        text=f"the student's behavior is driven by that vector; {NO_NUMBER}",
        source=STEERING,
        yes="the student loses the preference without it here too",
        no="the student keeps the preference without it here",
    ),
}
"""The statement on each claim, by its id. Other claims have no counterpart in these texts."""
