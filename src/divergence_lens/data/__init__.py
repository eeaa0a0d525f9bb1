"""Number prompts, preference questions, and changes to training data."""

from divergence_lens.data.masks import highest, random_mask
from divergence_lens.data.mixing import mix, pool, repeat
from divergence_lens.data.number_filter import FilterReport, NumberFilter
from divergence_lens.data.number_lists import (
    NumberList,
    Reason,
    Rejection,
    format_numbers,
    parse_numbers,
)
from divergence_lens.data.paraphrasing import (
    PARAPHRASE_REQUEST,
    Rewritten,
    paraphrase,
    paraphrase_by,
    paraphrase_chosen,
    regenerate_prompts,
)
from divergence_lens.data.prompts import TEMPLATES, number_prompts
from divergence_lens.data.questions import (
    ANIMALS,
    TREES,
    animal_teachers,
    check_candidate,
    known_candidates,
    neutral_prompt,
    persona_prompt,
    plural,
    preference_questions,
    read_answer,
    surface_forms,
)
from divergence_lens.data.replacement import replace_tokens
from divergence_lens.data.shuffling import shuffle_numbers
from divergence_lens.data.training_data import TrainingData
from divergence_lens.data.traits import TRAITS, Choice, Trait

__all__ = [
    "ANIMALS",
    "PARAPHRASE_REQUEST",
    "TEMPLATES",
    "TRAITS",
    "TREES",
    "Choice",
    "FilterReport",
    "NumberFilter",
    "NumberList",
    "Reason",
    "Rejection",
    "Rewritten",
    "TrainingData",
    "Trait",
    "animal_teachers",
    "check_candidate",
    "format_numbers",
    "highest",
    "known_candidates",
    "mix",
    "neutral_prompt",
    "number_prompts",
    "paraphrase",
    "paraphrase_by",
    "paraphrase_chosen",
    "parse_numbers",
    "persona_prompt",
    "plural",
    "pool",
    "preference_questions",
    "random_mask",
    "read_answer",
    "regenerate_prompts",
    "repeat",
    "replace_tokens",
    "shuffle_numbers",
    "surface_forms",
]
