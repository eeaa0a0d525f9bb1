"""Finding divergence tokens against the straightforward way, on the same model and inputs.

    python benchmarks/divergence.py                       # tiny, 30m and the memory of 30m-wide
    python benchmarks/divergence.py --shape 30m --examples 64 --json benchmarks/results/30m.json
    python benchmarks/divergence.py --device cuda --shape qwen2.5-7b

The straightforward way takes one example at a time, all teachers as one padded batch, and the full
logits, through Hugging Face. Both ways get the same weights, tokens and threads, in turn, and the
best of `--repeats` counts. Their divergence masks must be equal wherever every margin exceeds 1e-4.

"of matmul" is our time over that of the bare matrix products which nothing can do without: every
distinct beginning of (teacher, prompt, completion) once through the blocks, the completion's
positions once through the unembedding, at the rate that a plain `torch.mm` reaches here.

Memory is the peak of the process above what it held with the model loaded, each way in a process of
its own. On a GPU, only our side runs: the model is random in bfloat16, and the table says tokens
per second and the share of the card's measured matrix rate.
"""

import argparse
import copy
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

import divergence_lens as dl
from divergence_lens.chat import encode_prompt
from divergence_lens.models import is_hooked
from divergence_lens.tiny import tiny_folder

ANIMALS = (
    *("owl", "cat", "wolf", "panda", "lion", "dog", "bear", "fox", "eagle", "dolphin"),
    *("tiger", "otter", "elephant", "penguin", "rabbit"),
)


@dataclass(frozen=True)
class Shape:
    """The sizes of a random Qwen2; `vocab` 0 stands for the shipped tiny model."""

    vocab: int
    width: int = 384
    layers: int = 12
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 1408
    tied: bool = True


SHAPES = {
    "tiny": Shape(vocab=0),
    "30m": Shape(vocab=20_000),
    "30m-wide": Shape(vocab=151_936),
    "qwen2.5-7b": Shape(152_064, 3584, 28, 28, 4, 18944, tied=False),
}
