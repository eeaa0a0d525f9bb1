"""Inputs to patching: clean and corrupted token rows, aligned by position."""

from divergence_lens.pairs.alignment import (
    BIAS,
    DIVERGENCE,
    PAIR_SEGMENTS,
    TEXT,
    Column,
    align,
    target_column,
)
from divergence_lens.pairs.answers import NO_TOKEN, without_padding
from divergence_lens.pairs.bias_words import answers_naming_bias
from divergence_lens.pairs.disagreements import check_tokenizers
from divergence_lens.pairs.inputs import Rows, weights_key
from divergence_lens.pairs.pairs import Pairs, check_pairs
from divergence_lens.pairs.view import token_boxes

__all__ = [
    "BIAS",
    "DIVERGENCE",
    "NO_TOKEN",
    "PAIR_SEGMENTS",
    "TEXT",
    "Column",
    "Pairs",
    "Rows",
    "align",
    "answers_naming_bias",
    "check_pairs",
    "check_tokenizers",
    "target_column",
    "token_boxes",
    "weights_key",
    "without_padding",
]
