"""The values that options accept, known without importing the library.

Typer lists them in `--help` and refuses any other value at once. The library defines them next to
the code that implements them; importing that takes seconds, so they are repeated here, and a test
compares the two.
"""

from enum import Enum
from typing import Any, Literal, get_args


class Site(str, Enum):
    """The sites of `patch`; Typer accepts a list of an Enum, but not of a Literal."""

    RESID_PRE = "resid_pre"
    RESID_MID = "resid_mid"
    RESID_POST = "resid_post"
    ATTN_OUT = "attn_out"
    MLP_OUT = "mlp_out"
    BLOCK_OUT = "block_out"
    Z = "z"
    Q = "q"
    K = "k"
    V = "v"
    PATTERN = "pattern"


Method = Literal[
    "exact",
    "gradient",
    "integrated",
    "integrated-left",
    "integrated-inputs",
    "qk",
    "graddrop",
    "atp*",
    "relp",
]
Direction = Literal["noising", "denoising"]
Metric = Literal["logit_difference", "probability_difference", "log_probability", "kl"]
Span = Literal["position", "segment", "all"]
Category = Literal["animal", "tree", "risk"]
Score = Literal["advantage", "kl"]
DataType = Literal["float32", "bfloat16", "float16"]
Backend = Literal["auto", "hooked", "bridge"]

CANDIDATES: dict[str, tuple[str, ...]] = {
    "animal": (
        *("owl", "cat", "dog", "wolf", "fox", "bear"),
        *("lion", "eagle", "dolphin", "panda", "tiger", "horse"),
    ),
    "tree": (
        *("oak", "maple", "willow", "pine", "birch", "cedar"),
        *("cherry", "sequoia", "elm", "spruce", "beech", "poplar"),
    ),
}


def listed(values: Any) -> str:
    """Join the values of a Literal, or of a sequence, by commas, for help texts.

    A long list in the column of types would be broken within words.
    """
    return ", ".join(get_args(values) or values)
