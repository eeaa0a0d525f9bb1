"""Forward passes shared by all higher packages: hooked, bridge, fused blocks, logits."""

from divergence_lens.engine.base import Engine
from divergence_lens.engine.decoding import Decoder
from divergence_lens.engine.equivalence import pass_tolerance, probe_tokens
from divergence_lens.engine.factory import get_engine
from divergence_lens.engine.heads import BlockParts, HeadMap, block_parts
from divergence_lens.engine.hooking import SiteFunction
from divergence_lens.engine.logits import (
    chunk_rows,
    few_ids,
    in_chunks,
    kl_divergence,
    read_hidden,
    restricted,
    score,
    score_expected,
)
from divergence_lens.engine.parameters import block_of, canonical, inside_block, plain
from divergence_lens.engine.passes import KeyValues, Pass
from divergence_lens.engine.sites import SITES, register_site, unregister_site

__all__ = [
    "SITES",
    "BlockParts",
    "Decoder",
    "Engine",
    "HeadMap",
    "KeyValues",
    "Pass",
    "SiteFunction",
    "block_of",
    "block_parts",
    "canonical",
    "chunk_rows",
    "few_ids",
    "get_engine",
    "in_chunks",
    "inside_block",
    "kl_divergence",
    "pass_tolerance",
    "plain",
    "probe_tokens",
    "read_hidden",
    "register_site",
    "restricted",
    "score",
    "score_expected",
    "unregister_site",
]
