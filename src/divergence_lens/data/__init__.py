"""The two tasks of the experiments: number lists carry a bias, preference questions show it."""

from divergence_lens.data.numbers import (
    FilterReport,
    NumberFilter,
    NumberList,
    Reason,
    Rejection,
    format_numbers,
    number_prompts,
    parse_numbers,
)
from divergence_lens.data.questions import (
    ANIMALS,
    TREES,
    check_candidate,
    known_candidates,
    neutral_prompt,
    persona_prompt,
    plural,
    preference_questions,
    read_answer,
    surface_forms,
)

__all__ = [
    "ANIMALS",
    "TREES",
    "FilterReport",
    "NumberFilter",
    "NumberList",
    "Reason",
    "Rejection",
    "check_candidate",
    "format_numbers",
    "known_candidates",
    "neutral_prompt",
    "number_prompts",
    "parse_numbers",
    "persona_prompt",
    "plural",
    "preference_questions",
    "read_answer",
    "surface_forms",
]
