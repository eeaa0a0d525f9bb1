"""Files of audits: safetensors with a JSON header."""

import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from divergence_lens._utils.storage import load_tensors, save_tensors
from divergence_lens.auditing.baseline import Baseline
from divergence_lens.examples import as_example, example_row
from divergence_lens.teachers import Teacher

if TYPE_CHECKING:
    from divergence_lens.auditing.result import Audit

_KIND = "audit"
_ARRAYS = ("offsets", "token_ids", "choice", "by_row", "neutral", "own")


def save_audit(path: str | os.PathLike[str], audit: "Audit") -> None:
    """Write an audit, without the teachers' weights and the tokenizer."""
    # Prompts of a large data set would exceed a safetensors header, so they are stored as bytes.
    rows = [example_row(replace(example, completion_ids=None)) for example in audit.examples]
    text = np.frombuffer(json.dumps(rows).encode(), dtype=np.uint8)
    arrays = {name: getattr(audit, name) for name in _ARRAYS}
    if audit.by_token is not None:
        arrays["by_token"] = audit.by_token
    baseline = audit.baseline
    header = {
        "candidates": list(audit.candidates),
        "kinds": list(audit.kinds),
        "baseline": {
            "name": baseline.teacher.name,
            "system_prompt": baseline.teacher.system_prompt,
            "temperature": baseline.temperature,
            "logprob": dict(baseline.logprob),
            "kinds": list(baseline.kinds),
            "known": baseline.known,
            "fitted": baseline.fitted,
            "pattern": baseline.pattern,
            "surprise": baseline.surprise,
        },
        "alpha": audit.alpha,
        "share": audit.share,
        "texts": {str(token_id): text for token_id, text in audit.texts.items()},
        "metadata": dict(audit.metadata),
    }
    save_tensors(path, {**arrays, "examples": text}, header, _KIND)


def load_audit(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the fields that `save_audit` wrote.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or of another kind or version.
    """
    tensors, header = load_tensors(path, _KIND)
    arrays = {name: tensors[name].numpy() for name in _ARRAYS}
    offsets, ids = arrays["offsets"], arrays["token_ids"]
    rows = json.loads(tensors["examples"].numpy().tobytes())
    examples = [as_example(row, f"{path}, example {i}") for i, row in enumerate(rows)]
    stored = header["baseline"]
    return {
        **arrays,
        "by_token": tensors["by_token"].numpy() if "by_token" in tensors else None,
        "candidates": tuple(header["candidates"]),
        "kinds": tuple(header["kinds"]),
        "examples": tuple(
            replace(example, completion_ids=tuple(ids[offsets[i] : offsets[i + 1]].tolist()))
            for i, example in enumerate(examples)
        ),
        "baseline": Baseline(
            Teacher(stored["name"], system_prompt=stored["system_prompt"]),
            stored["temperature"],
            stored["logprob"],
            tuple(stored["kinds"]),
            stored["known"],
            stored["fitted"],
            stored["pattern"],
            stored["surprise"],
        ),
        "alpha": header["alpha"],
        "share": header["share"],
        "texts": {int(token_id): text for token_id, text in header["texts"].items()},
        "metadata": header["metadata"],
    }
