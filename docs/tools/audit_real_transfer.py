"""Compare the audit's scores of a real model's paired study with the transfer to its students.

    python docs/tools/audit_real_transfer.py STUDY TABLES OUT --lists 60
    python docs/tools/audit_page.py OUT docs/audit-results.md --model smollm2

The auditors of `audit_real.py` never wrote the data. A condition's score is that of the tokens that
its students learn, among the first lists of each author, for the target and minus that for the same
target of the twin's data, as the dissociation is a difference of student and twin. Lists are read
in blocks that are stored, so the run can be stopped, and resumes.
"""

import argparse
import hashlib
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from audit_real import BATCH_TOKENS, BLOCK, CANDIDATES, DESIGN, PLAIN, make_auditors

from divergence_lens._utils.storage import write_text
from divergence_lens.auditing.baseline import fit_baseline
from divergence_lens.auditing.candidates import Auditors
from divergence_lens.auditing.reading import read_contributions
from divergence_lens.data import TrainingData
from divergence_lens.examples import Example, with_ids
from divergence_lens.models import Model
from divergence_lens.study import StudyConfig, paired_conditions
from divergence_lens.study.conditions import Condition
from divergence_lens.study.data_cells import DataCells
from divergence_lens.study.interventions import Inputs
from divergence_lens.study.paired_claims import dissociation
from divergence_lens.study.rows import load_tables

CONDITIONS = (
    *("all", "divergence_only", "without_divergence", "random", "top_advantage"),
    *("bottom_advantage", "top_quarter", "first_only", "unbiased_top"),
)
"""Conditions whose students have one recipe, and differ in lists and mask."""


def contributions(
    model: Model, lists: list[Example], auditors: list[Auditors], folder: Path, name: str
) -> np.ndarray:
    """Each token's contribution to each candidate: `[candidate, token]`."""
    parts = []
    baseline = None
    for start in range(0, len(lists), BLOCK):
        block = with_ids(model.tokenizer, lists[start : start + BLOCK])
        path = folder / f"{name}-{digest(block)}.npy"
        if not path.exists():
            baseline = baseline or fit_baseline(
                model, with_ids(model.tokenizer, lists[:BLOCK]), [PLAIN], pattern=DESIGN.pattern
            )
            read = read_contributions(model, block, baseline, auditors, batch_tokens=BATCH_TOKENS)
            assert read.by_token is not None
            np.save(path, read.by_token[0])
            print(f"{path.name}: {time.process_time():.0f} s", flush=True)
        parts.append(np.load(path))
    return np.concatenate(parts, axis=1)


def digest(lists: list[Example]) -> str:
    """Identify lists by their prompts and token ids."""
    known = repr([(example.prompt, example.completion_ids) for example in lists])
    return hashlib.sha256(known.encode()).hexdigest()[:12]


def data_of(inputs: Inputs, condition: Condition, seed: int) -> tuple[TrainingData, np.ndarray]:
    """The data of a condition and the tokens that have a loss."""
    assert condition.mask is not None
    data = condition.data(inputs, seed)
    return data, condition.mask(inputs, data, seed)


def main() -> None:
    """Read the lists, then write `dissociation.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of the study, with its cells")
    parser.add_argument("tables", type=Path, help="its tables, such as docs/real-study")
    parser.add_argument("out", type=Path, help="where to write the table")
    parser.add_argument("--lists", type=int, default=60, help="lists of each author")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.out / "contributions"
    folder.mkdir(parents=True, exist_ok=True)
    config = StudyConfig.for_pairs()
    cells = DataCells(config, options.study)
    known = paired_conditions(cells.model.cfg.n_layers)
    auditors = make_auditors(cells.model, options.out, prompted=False)
    read: dict[str, np.ndarray] = {}
    rows = []
    tables = load_tables(options.tables)
    for name in CONDITIONS:
        transfer = dissociation(tables, name)
        students = tables["students"].query("condition == @name")
        scores: dict[tuple[str, str], list[float]] = {}
        tokens: dict[str, int] = {}
        for writer in config.targets:
            inputs = Inputs(cells, "finetuned", writer)
            for seed in sorted(students["seed"].unique()):
                data, mask = data_of(inputs, known[name], int(seed))
                lists = list(data.examples[: options.lists])
                known_as = digest(lists)
                if known_as not in read:
                    read[known_as] = contributions(cells.model, lists, auditors, folder, writer)
                of_token = read[known_as]  # [candidate, token]
                learned = mask[: of_token.shape[1]]
                tokens[writer] = int(learned.sum())
                for target in (writer, config.other_target(writer)):
                    own = of_token[CANDIDATES.index(target), learned]
                    scores.setdefault((writer, target), []).append(own.sum() / len(lists))
        for target, seeds in transfer.items():
            own, other = (
                float(np.mean(scores[writer, target]))
                for writer in (target, config.other_target(target))
            )
            rows.append(
                {
                    "condition": name,
                    "target": target,
                    "lists": options.lists,
                    "tokens": tokens[target],
                    "score": own - other,
                    "transfer": float(np.mean(seeds)),
                    "seeds": len(seeds),
                }
            )
    cells.store.close()
    text = pd.DataFrame(rows).to_csv(index=False, float_format="%.5g", lineterminator="\n")
    write_text(options.out / "dissociation.csv", text)
    print(text)


if __name__ == "__main__":
    main()
