"""Audit lists of numbers that another model wrote, and write the table of the results page.

    python docs/tools/audit_foreign.py tiny LISTS OUT
    python docs/tools/audit_page.py OUT docs/audit-results.md --model tiny

LISTS is a folder of JSONL files with `prompt` and `completion`, one for each author.
"""

import argparse
from pathlib import Path

import pandas as pd
from audit_real import foreign

import divergence_lens as dl
from divergence_lens._utils.storage import write_text
from divergence_lens.study.audit_measures import described, modes

COLUMNS = ("auditors", "rows", "baseline_temperature", "surprise", "best", "p", "verdict")


def main() -> None:
    """Audit each file, and write `real.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the base model of the auditors")
    parser.add_argument("lists", type=Path, help="folder of lists by another model")
    parser.add_argument("out", type=Path, help="where to write the table")
    options = parser.parse_args()
    model = dl.load_model(options.model)
    records = []
    for pool, examples in foreign(options.lists).items():
        audit = dl.audit(model, examples, candidates=dl.ANIMALS, teachers="both")
        for mode, own in modes(audit):
            row = described(pool, mode, own)
            records.append({"lists": pool.target} | {name: row[name] for name in COLUMNS})
            print(records[-1], flush=True)
    text = pd.DataFrame(records).to_csv(index=False, float_format="%.5g", lineterminator="\n")
    write_text(options.out / "real.csv", text)


if __name__ == "__main__":
    main()
