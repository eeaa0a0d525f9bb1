"""A HookedTransformer with the weights of a folder, by TransformerLens's own converters.

`HookedTransformer.from_pretrained` takes only names of released models.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import (
    get_pretrained_model_config,
    get_pretrained_state_dict,
)
from transformers import AutoTokenizer
from worker import load_hf


def hooked(folder: str) -> Any:
    """Load the weights as they are, without folding or centering."""
    hf = load_hf(folder)
    # The converter reads the class from the file, where some lack it, and the rest from its name.
    config = hf.config.to_dict() | {"architectures": [type(hf).__name__]}
    with tempfile.TemporaryDirectory(prefix="config-") as place:
        (Path(place) / "config.json").write_text(json.dumps(config, default=str), encoding="utf-8")
        cfg = get_pretrained_model_config(
            place, hf_cfg=config, dtype=torch.float32, device="cpu", default_prepend_bos=False
        )
        weights = get_pretrained_state_dict(place, cfg, hf, dtype=torch.float32)
    cfg.n_ctx, cfg.tokenizer_name = config["max_position_embeddings"], None
    model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        weights,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model.eval()
