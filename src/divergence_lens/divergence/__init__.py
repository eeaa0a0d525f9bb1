"""Find divergence tokens: teacher-forced reading, rules, files, and the notebook view."""

from divergence_lens.divergence.allowed import AllowedTokens
from divergence_lens.divergence.files import read_decision_points, write_decision_points
from divergence_lens.divergence.finding import find_divergence
from divergence_lens.divergence.reading import read_states, read_teachers
from divergence_lens.divergence.reading_inputs import refuse_dropout
from divergence_lens.divergence.result import Divergence
from divergence_lens.divergence.rules import Rule
from divergence_lens.divergence.tokens import KINDS, token_kind
from divergence_lens.divergence.view import ExampleDivergence

__all__ = [
    "KINDS",
    "AllowedTokens",
    "Divergence",
    "ExampleDivergence",
    "Rule",
    "find_divergence",
    "read_decision_points",
    "read_states",
    "read_teachers",
    "refuse_dropout",
    "token_kind",
    "write_decision_points",
]
