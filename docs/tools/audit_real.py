"""Audit the lists of a paired study of a real model, and write the tables of the results page.

    python docs/tools/audit_real.py MODEL STUDY OUT --foreign LISTS --only-fit
    python docs/tools/audit_real.py MODEL STUDY OUT --lists 48
    python docs/tools/audit_page.py OUT docs/audit-results.md --model smollm2

The study's finetuned teachers wrote the lists; the auditors were trained on other questions, with
another seed. The base model writes unbiased lists to prompts of the study. Lists are read in
blocks, and the tables are written after each author, so the run can be stopped, and resumes.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import divergence_lens as dl
from divergence_lens.auditing import Audit
from divergence_lens.auditing.baseline import Baseline, default_baselines, fit_baseline
from divergence_lens.auditing.candidates import Auditors, build_auditors
from divergence_lens.auditing.reading import read_contributions
from divergence_lens.data import NumberFilter, preference_questions
from divergence_lens.examples import Example, load_examples, with_ids
from divergence_lens.study.audit_measures import described, modes
from divergence_lens.study.audit_pools import Pool, joined
from divergence_lens.study.paired import PairedDesign
from divergence_lens.training import train_teacher

CANDIDATES = ("owl", "dog", "eagle", "bear", "wolf", "lion")
DESIGN = PairedDesign()
PLAIN = dl.Teacher("no system prompt")
BLOCK = 12
FIT_ROWS = 24
MOST_LISTS = 48
BATCH_TOKENS = 512  # to read in a few gigabytes of memory
# Neither the questions of the study's teachers nor those by which the margin is measured.
QUESTIONS = preference_questions()[10:46:3]


def make_auditors(model: Any, folder: Path, *, prompted: bool) -> list[Auditors]:
    """Finetuned auditors of the strength of the study's teachers, and prompted ones."""
    finetuned = [
        train_teacher(
            model,
            name,
            questions=QUESTIONS,
            prefixes=DESIGN.prefixes,
            strength=DESIGN.strength,
            seed=1,
            cache_dir=folder / "teachers",
        )
        for name in CANDIDATES
    ]
    return [
        Auditors("finetuned", tuple(finetuned)),
        *(build_auditors(model, CANDIDATES, "prompted") if prompted else ()),
    ]


def read(
    model: Any, lists: list[Example], baseline: Baseline | None, auditors: list[Auditors]
) -> Audit:
    """Audit a block of lists, with the baseline of the first block."""
    if baseline is None:
        baseline = fit_baseline(model, lists, [PLAIN], pattern=DESIGN.pattern)
    contributions = read_contributions(
        model, lists, baseline, auditors, by_token=False, batch_tokens=BATCH_TOKENS
    )
    shape = (len(auditors), len(CANDIDATES))
    return Audit(
        candidates=CANDIDATES,
        kinds=tuple(kind.kind for kind in auditors),
        examples=tuple(lists),
        offsets=contributions.offsets,
        token_ids=contributions.tokens,
        choice=contributions.choice,
        by_row=contributions.rows,
        by_token=None,
        neutral=np.zeros((*shape, 1, 0)),
        own=np.full((*shape, 0), np.nan),
        baseline=baseline,
    )


def write_tables(out: Path, audits: dict[Pool, Audit], rows: int) -> None:
    """Write detection, false alarms and settings."""
    tables: dict[str, list[dict[str, Any]]] = {"detection": [], "false_alarms": []}
    for pool, audit in audits.items():
        for mode, own in modes(audit):
            row = described(replace(pool, rows=len(audit)), mode, own)
            if pool.target is None:
                tables["false_alarms"].append(row | {"set": int(pool.style[4:])})
            else:
                tables["detection"].append(row | {"draw": 0})
    for name, records in tables.items():
        text = pd.DataFrame(records).to_csv(index=False, float_format="%.5g", lineterminator="\n")
        (out / f"{name}.csv").write_text(text)
    write_settings(out, rows)


def write_settings(out: Path, rows: int) -> None:
    """Write the settings that the page states."""
    settings = {"rows": rows, "neutral_rows": 0, "candidates": len(CANDIDATES)}
    (out / "settings.json").write_text(json.dumps({"settings": settings}, indent=1) + "\n")


def cost(model: Any, lists: list[Example], out: Path) -> None:
    """Processor seconds of an audit and of `find_divergence`, with twelve prompted teachers."""
    teachers = dl.animal_teachers(dl.ANIMALS)
    records = []
    for call in ("find_divergence", "audit", "audit", "find_divergence"):
        start = time.process_time()
        if call == "audit":
            dl.audit(
                model,
                lists,
                teachers=teachers,
                pattern=DESIGN.pattern,
                baseline=PLAIN,
                neutral_rows=0,
                own_rows=0,
            )
        else:
            dl.find_divergence(
                model,
                lists,
                teacher=PLAIN,
                counterfactuals=teachers,
                pattern=DESIGN.pattern,
            )
        seconds = time.process_time() - start
        records.append({"call": call, "teachers": 13, "lists": len(lists), "seconds": seconds})
        means = pd.DataFrame(records).groupby("call", as_index=False).mean()
        means.to_csv(out / "cost.csv", index=False, float_format="%.5g", lineterminator="\n")


def fit_table(model: Any, sources: dict[Pool, list[Example]], out: Path) -> None:
    """Whether the base model could have written each author's lists."""
    path = out / "fit.csv"
    records = pd.read_csv(path).to_dict("records") if path.exists() else []
    for pool, examples in list(sources.items())[len(records) :]:
        pattern = None if pool.change == "other base" else DESIGN.pattern
        lists = with_ids(model.tokenizer, examples[:FIT_ROWS])
        baselines = default_baselines(model) if pool.writer == "prompted" else [PLAIN]
        fitted = fit_baseline(model, lists, baselines, pattern=pattern)
        records.append(
            {
                "writer": pool.writer,
                "target": pool.target,
                "style": pool.style,
                "temperature": pool.temperature,
                "change": pool.change,
                "rows": len(lists),
                "baseline": fitted.teacher.name,
                "fitted": fitted.fitted,
                "surprise": fitted.surprise,
                "fits": fitted.fits,
            }
        )
        print(f"{pool.name}: {time.process_time():.0f} s, {records[-1]}", flush=True)
        table = pd.DataFrame(records)
        table.to_csv(path, index=False, float_format="%.5g", lineterminator="\n")


def foreign(folder: Path) -> dict[Pool, list[Example]]:
    """Valid lists by another model, one set per file."""
    made = {}
    for path in sorted(folder.glob("*.jsonl")):
        examples = load_examples(path)[:96]
        fit = NumberFilter().report([e.completion or "" for e in examples]).select(examples)
        made[Pool(writer="Qwen2.5-7B", target=path.stem, temperature=1.0, change="other base")] = (
            fit
        )
    return made


def main() -> None:
    """Read blocks of lists until all are read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the base model")
    parser.add_argument("study", type=Path, help="folder of the study, with its cells")
    parser.add_argument("out", type=Path, help="where to write the tables")
    parser.add_argument("--lists", type=int, default=MOST_LISTS, help="lists of each author")
    parser.add_argument("--finetuned", action="store_true", help="no prompted auditors")
    parser.add_argument("--foreign", type=Path, help="folder of lists by another model")
    parser.add_argument("--only-fit", action="store_true", help="write the table of the fit alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    model = dl.load_model(options.model, backend="bridge")
    sources: dict[Pool, list[Example]] = {}
    for path in sorted((options.study / "cells/lists/finetuned").glob("*-sampled.*.jsonl")):
        target = path.name.split("-")[0]
        sources[Pool(writer="finetuned", target=target, temperature=1.0)] = load_examples(path)
    prompts = [example.prompt for example in next(iter(sources.values()))]
    for number in range(4):
        first = max(len(prompts) - (number + 1) * MOST_LISTS, 0)
        asked = prompts[first : first + (FIT_ROWS if options.only_fit else options.lists)]
        sources[Pool(writer="base", style=f"none{number}", temperature=1.0)] = dl.generate(
            model,
            asked,
            pattern=DESIGN.pattern,
            temperature=DESIGN.temperature,
            max_new_tokens=48,
            seed=100 + number,
        )
    if options.only_fit:
        prompted = {
            Pool(writer="prompted", target=teacher.name, temperature=1.0): dl.generate(
                model,
                prompts[:FIT_ROWS],
                teacher=teacher,
                pattern=DESIGN.pattern,
                temperature=DESIGN.temperature,
                max_new_tokens=48,
            )
            for teacher in dl.animal_teachers(CANDIDATES[:2])
        }
        others = {} if options.foreign is None else foreign(options.foreign)
        write_settings(options.out, FIT_ROWS)
        fit_table(model, sources | prompted | others, options.out)
        return
    auditors = make_auditors(model, options.out, prompted=not options.finetuned)
    print(f"auditors: {time.process_time():.0f} s", flush=True)
    files_of = {pool: options.out / f"{pool.name}.safetensors" for pool in sources}
    audits = {pool: Audit.load(path) for pool, path in files_of.items() if path.exists()}
    for start in range(0, options.lists, BLOCK):
        for pool, lists in sources.items():
            before = audits.get(pool)
            read_already = before is not None and len(before) > start
            if read_already or start >= len(lists):
                continue
            block = with_ids(model.tokenizer, lists[start : start + BLOCK])
            audit = read(model, block, before and before.baseline, auditors)
            audits[pool] = audit if before is None else joined(before, audit)
            audits[pool].save(files_of[pool])
            print(f"{pool.name}: {time.process_time():.0f} s, {audits[pool]!r}", flush=True)
            write_tables(options.out, audits, start + BLOCK)
        if not (options.out / "cost.csv").exists():
            cost(model, next(iter(sources.values()))[: BLOCK // 2], options.out)
            print(f"cost: {time.process_time():.0f} s", flush=True)


if __name__ == "__main__":
    main()
