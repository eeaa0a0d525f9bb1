"""What the papers say of each claim of a study, for the page that puts it beside our figures.

The text at hand was the abstract of Schrodi et al. (arXiv 2509.23886) and public reading notes on
its second version (ICLR 2026), not the whole paper. Figures are given where such a text has them
and are marked with where they are from; where it has none, that is said. Nothing was read off a
chart.
"""

from collections.abc import Mapping
from dataclasses import dataclass

ABSTRACT = "abstract"
NOTES = "notes"
TABLE = "Table 1, by two notes"
CLOUD = "Cloud et al., by notes"
STEERING = "arXiv 2606.00995, abstract"
SOURCES: Mapping[str, str] = {
    ABSTRACT: "the abstract of the paper",
    NOTES: "public reading notes on the paper, which was not at hand as a whole; not checked "
    "against it",
    TABLE: "the paper's first table as two such notes give it, independently and alike",
    CLOUD: "Cloud et al., arXiv 2507.14805, as such notes tell it",
    STEERING: "the abstract of another paper, which the study's mechanism follows",
}
"""What the page says of each source."""

NO_NUMBER = "the text at hand gives no number"


@dataclass(frozen=True, kw_only=True)
class PaperClaim:
    """What a paper says of a claim, and what each verdict of ours would mean.

    Attributes:
        text: In our words, with its figures.
        source: One of `SOURCES`.
        yes: What it means if our claim is supported.
        no: What it means if it is not.
        stricter: Whether our claim says more than the paper does, so that the paper is not
            contradicted if ours is not supported.
    """

    text: str
    source: str
    yes: str
    no: str
    stricter: bool = False


_LATE = (
    "single layers in the middle and at the end (14, 21, 27, 33) transfer next to nothing; "
    f"{NO_NUMBER}"
)

PAPER_CLAIMS: Mapping[str, PaperClaim] = {
    "few_divergence_tokens": PaperClaim(
        text="7.5 % of the tokens of greedy lists for Qwen2.5-7B, 18.3 % for Gemma-3-4B; at "
        "temperature 1 4.7 % and 13.2 %",
        source=TABLE,
        yes="below a quarter, as there",
        no="a larger part here than in either of its models, so what follows from their being rare "
        "does not carry over",
    ),
    "transfer": PaperClaim(
        text=f"lists of numbers make students like what their teacher likes; {NO_NUMBER} (for "
        "GPT-4.1 nano Cloud et al. report owls from 12 % to over 60 %)",
        source=ABSTRACT,
        yes="the phenomenon is there, and what weakens or carries it can be studied",
        no="without the phenomenon nothing below can be read",
    ),
    "divergence_tokens_suffice": PaperClaim(
        text=f"training on them alone keeps the transfer or strengthens it; {NO_NUMBER}",
        source=NOTES,
        yes="divergence tokens are enough here too",
        no="divergence tokens are not enough here",
    ),
    "divergence_tokens_do_as_well": PaperClaim(
        text=f"training on them alone keeps the transfer or strengthens it; {NO_NUMBER}",
        source=NOTES,
        yes="the other tokens only dilute",
        no="the other tokens carry something here",
    ),
    "rest_transfers_less": PaperClaim(
        text=f"masking them out mostly removes the transfer; {NO_NUMBER}",
        source=ABSTRACT,
        yes="most of the transfer needs them",
        no="the transfer does not need them here",
    ),
    "rest_equals_control": PaperClaim(
        text=f"masking them out mostly removes the transfer; {NO_NUMBER}",
        source=ABSTRACT,
        yes="nothing that matters is left without them",
        no="students do not end where the control does; how far from it stands here, and the paper "
        "only says that most is gone",
        stricter=True,
    ),
    "first_layer_suffices": PaperClaim(
        text=f"a single early layer is enough (layers 0 and 7 were tried); {NO_NUMBER}",
        source=NOTES,
        yes="the first layer is enough here",
        no="the first layer is not enough here",
    ),
    "first_layer_beats_last": PaperClaim(
        text=_LATE,
        source=NOTES,
        yes="early beats late here too",
        no="depth does not order the layers as there",
    ),
    "last_layer_equals_control": PaperClaim(
        text=_LATE,
        source=NOTES,
        yes="the last layer carries nothing",
        no="students do not end where the control does; how far from it stands here, and the paper "
        "only says that next to nothing passes",
        stricter=True,
    ),
    "early_layers_cause_divergence": PaperClaim(
        text=f"early layers are critical; {NO_NUMBER}",
        source=ABSTRACT,
        yes="what makes teachers diverge sits in the first half here too",
        no="what makes teachers diverge does not sit in the first half here",
    ),
    "sampled_lists_transfer": PaperClaim(
        text="at temperature 1 some animals (Qwen) or most (Gemma) pass, with greedy lists often "
        f"more; {NO_NUMBER}",
        source=NOTES,
        yes="neither decoding is needed for transfer",
        no="sampled lists do not carry it here",
    ),
    "other_base_transfers_nothing": PaperClaim(
        text=f"transfer needs a shared base; {NO_NUMBER}",
        source=CLOUD,
        yes="without a shared base nothing passes",
        no="something passes between different bases here, so part of the effect is no hidden one",
    ),
    "entangled_numbers_not_needed": PaperClaim(
        text="the transfer does not need token entanglement: without the 50 most entangled numbers "
        f"some preferences still pass (notes); {NO_NUMBER}",
        source=ABSTRACT,
        yes="entangled numbers are not what carries it here either",
        no="entangled numbers may be what carries it here",
    ),
    "without_first_layer_weaker": PaperClaim(
        text=f"early layers are critical; {NO_NUMBER}",
        source=ABSTRACT,
        yes="what follows the first layer does not make up for it",
        no="later layers make up for the first here",
    ),
    "paraphrases_weaken": PaperClaim(
        text="small changes such as paraphrased prompts usually suppress the transfer; "
        f"{NO_NUMBER}",
        source=ABSTRACT,
        yes="the transfer is fragile here too; how much is left stands in the table of conditions",
        no="paraphrases leave the transfer alone here",
    ),
    "chosen_paraphrases_weaken": PaperClaim(
        text="paraphrases by the biased teacher itself often suppress the transfer as well; "
        f"{NO_NUMBER}",
        source=NOTES,
        yes="so does a choice by the biased teacher, though it wrote nothing here",
        no="a choice by the biased teacher leaves the transfer alone here",
    ),
    "unbiased_data_weaken": PaperClaim(
        text="a tenth of lists by an unbiased teacher weakens the transfer much, a quarter nearly "
        "ends it",
        source=NOTES,
        yes="weaker here too; whether nearly ended is seen in the table of conditions",
        no="unbiased lists do not weaken it here",
    ),
    "another_teacher_weakens": PaperClaim(
        text=f"mixing lists of several teachers weakens the transfer; {NO_NUMBER}",
        source=NOTES,
        yes="weaker here too",
        no="another preference among the lists does not weaken it here",
    ),
    "several_teachers_weaken": PaperClaim(
        text=f"so it does where they share the preference; {NO_NUMBER}",
        source=NOTES,
        yes="the single teacher matters here too",
        no="several teachers of one preference do as well as one here",
    ),
    "student_moves_like_its_teacher": PaperClaim(
        text=f"the student learns a vector aligned with its teacher's; {NO_NUMBER}",
        source=STEERING,
        yes="seen here too, against other teachers' vectors as the null",
        no="the student goes its own way here",
    ),
    "direction_suffices": PaperClaim(
        text=f"a teacher's prompt is well approximated by one vector; {NO_NUMBER}",
        source=STEERING,
        yes="one vector makes the preference here too",
        no="one vector does not make the preference here",
    ),
    "direction_is_needed": PaperClaim(
        text=f"the student's behaviour is driven by that vector; {NO_NUMBER}",
        source=STEERING,
        yes="without it the student loses the preference here too",
        no="the student keeps the preference without it here",
    ),
}
"""What is said of a claim, by its id. Claims that are not here have no counterpart in the text."""
