"""What a command had done when it was stopped: finished parts in a folder beside its output.

`divergence-lens find --out owl.safetensors` keeps what it has in `owl.safetensors.partial/`. The
names of the parts begin with a hash of all that they depend on, so that the same command goes on
with them and a changed one passes them by; when the output is whole, the folder goes.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from divergence_lens.examples import Example

_OURS = re.compile(r"[0-9a-f]{12}-")


class Parts:
    """The finished parts of one command.

    Args:
        out: The file that the command writes.
        settings: All that its parts depend on, as JSON holds it.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder = out.with_name(f"{out.name}.partial")

    def path(self, name: str) -> Path:
        """Where a part goes."""
        return self.folder / f"{self.key}-{name}"

    def count(self) -> int:
        """How many parts of this very command there are."""
        return sum(1 for _ in self.folder.glob(f"{self.key}-*"))

    def drop(self) -> None:
        """Delete the parts, those of other settings too; files of somebody else stay."""
        if not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            # A process that was killed while it wrote leaves a hidden file.
            if _OURS.match(path.name.lstrip(".")):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def written_in_parts(
    asked: Sequence[str],
    write: Callable[[Sequence[str], bool], "list[Example]"],
    parts: Parts,
    *,
    texts: int = 512,
) -> "list[Example]":
    """Answers to all prompts, from the parts that are there and by `write`.

    Args:
        asked: The prompts.
        write: Answers some prompts; its second argument says whether it shows its own progress.
        parts: Where finished parts are kept.
        texts: Different texts in one part. Prompts of one text stay together, because a sampled
            answer depends on how often the text came before.
    """
    from divergence_lens.examples import load_examples, save_examples

    place = {text: number // texts for number, text in enumerate(dict.fromkeys(asked))}
    groups: dict[int, list[int]] = {}
    for row, text in enumerate(asked):
        groups.setdefault(place[text], []).append(row)
    if len(groups) == 1:
        return write(asked, True)
    answers: dict[int, Example] = {}
    with tqdm(total=len(asked), desc="generate", unit="row") as bar:
        for number, rows in groups.items():
            path = parts.path(f"{number:06d}.jsonl")
            if path.exists():
                found = load_examples(path)
            else:
                found = write([asked[row] for row in rows], False)
                save_examples(path, found)
            answers |= zip(rows, found, strict=True)
            bar.update(len(rows))
    return [answers[row] for row in range(len(asked))]
