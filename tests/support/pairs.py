"""Pairs of single rows."""

from divergence_lens.pairs import Pairs


def pair(clean, corrupted, **options):
    """Build one pair from token ids, with answer 1 and foil 2 unless given."""
    return Pairs.from_tokens([clean], [corrupted], **{"answers": [1], "foils": [2]} | options)
