"""Checkpoints of `divergence-lens generate`: finished parts of the completions in a folder."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from divergence_lens.examples import Example
    from divergence_lens.models import Model
    from divergence_lens.teachers import Teacher


def settings_hash(model: "Model", teacher: "Teacher", settings: Mapping[str, Any]) -> str:
    """Hash everything that the completions depend on: weights, teacher and settings."""
    from divergence_lens import __version__
    from divergence_lens.deltas import base_fingerprint

    delta = hashlib.sha256()
    if teacher.delta is not None:
        for name, tensor in sorted(teacher.delta.tensors.items()):
            delta.update(f"{name}{tuple(tensor.shape)}".encode())
            delta.update(tensor.detach().float().cpu().numpy().tobytes())
    identity = {
        "version": __version__,
        "model": f"{type(model).__name__} {base_fingerprint(model)}",
        "teacher": [
            teacher.system_prompt,
            delta.hexdigest(),
            None if teacher.model is None else base_fingerprint(teacher.model),
        ],
        **settings,
    }
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def generate_in_parts(
    prompts: Sequence[str],
    generate: Callable[[Sequence[str], bool], "list[Example]"],
    folder: Path,
    key: str,
    *,
    part_size: int = 512,
) -> "list[Example]":
    """Generate part by part, reading the parts that are already in `folder`.

    Args:
        prompts: The prompts.
        generate: Generates completions; its second argument says whether it shows progress.
        folder: Where finished parts are stored.
        key: Hash of the settings; parts with another key are ignored.
        part_size: Distinct prompts per part. Copies of a prompt stay in one part, because a sampled
            completion depends on how many copies precede it.
    """
    from divergence_lens.examples import load_examples, save_examples

    part_of = {text: number // part_size for number, text in enumerate(dict.fromkeys(prompts))}
    parts: dict[int, list[int]] = {}
    for row, text in enumerate(prompts):
        parts.setdefault(part_of[text], []).append(row)
    if len(parts) == 1:
        return generate(prompts, True)
    examples: dict[int, Example] = {}
    with tqdm(total=len(prompts), desc="generate", unit="row") as bar:
        for number, rows in parts.items():
            path = folder / f"{key}-{number:06d}.jsonl"
            if path.exists():
                part = load_examples(path)
            else:
                part = generate([prompts[row] for row in rows], False)
                save_examples(path, part)
            examples |= zip(rows, part, strict=True)
            bar.update(len(rows))
    return [examples[row] for row in range(len(prompts))]
