"""The values that options accept, known without importing the library.

Typer lists them in `--help` and refuses any other value at once. The library defines them next to
the code that implements them; importing that takes seconds, so they are repeated here, and a test
compares the two.
"""

from typing import Literal

Site = Literal[
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "block_out",
    "z",
    "q",
    "k",
    "v",
    "pattern",
]
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
