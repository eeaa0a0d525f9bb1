"""Write the documentation page with the validation of the audit.

    python docs/tools/audit_page.py RUN_FOLDER docs/audit-results.md --model tiny

Each run of `divergence-lens study --audit` is copied into a folder of CSV files beside the page,
and the page is generated from these files alone. A test can therefore compare the two.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from audit_sections import (
    NOTHING,
    Tables,
    area,
    by_category,
    cost,
    dissociation,
    nothing,
    outside,
    real,
    remedies,
    rounded,
    share_of,
    strength,
    table_row,
    transfer,
    writers,
)

from divergence_lens._utils.storage import write_text
from divergence_lens.auditing.baseline import MOST_SURPRISE
from divergence_lens.auditing.scoring import SHIFT
from divergence_lens.data import ANIMALS
from divergence_lens.plots import calibration_curve, save_figure
from divergence_lens.study.audit_run import TABLES
from divergence_lens.study.report import table_head

_MORE = ("dissociation", "real", "cost")
_FILES = (*(f"{name}.csv" for name in (*TABLES, *_MORE)), "settings.json")
_FIGURE = "calibration.png"
_ENOUGH = 100  # sets for a curve
_LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5)


def copy_run(run: str | Path, page: str | Path, model: str) -> None:
    """Copy the tables of a run beside the page."""
    folder = Path(page).with_suffix("") / model
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:  # a table that the run lacks stays as it is
        source = Path(run) / name
        if source.exists():
            shutil.copyfile(source, folder / name)
    if not (folder / "false_alarms.csv").exists():
        return
    alarms = pd.read_csv(folder / "false_alarms.csv")
    sets = alarms[alarms["set"] >= 0]
    count = int(sets.groupby("auditors").size().max())
    if count >= _ENOUGH:
        figure = calibration_curve(
            sets,
            headline="False alarms of the audit",
            detail=f"{model}: {count} unbiased sets; p: the smallest corrected p-value of a set; "
            "gray: 95% of the shares that chance gives a calibrated test",
        )
        save_figure(figure, folder / _FIGURE, width_mm=120, dpi=110, renderer="matplotlib")


def audit_page(folder: str | Path) -> str:
    """Generate the text of the page from the tables in the folders of its models."""
    lines = ["# Results of the audit", "", _INTRODUCTION]
    for own in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        tables = {
            name: pd.read_csv(file)
            for name in (*TABLES, *_MORE)
            if (file := own / f"{name}.csv").exists()
        }
        settings = json.loads((own / "settings.json").read_text(encoding="utf-8"))
        lines += ["", f"## Model `{own.name}`", "", _opening(own, tables, settings)]
        if (own / _FIGURE).exists():
            tables["figure"] = f"{own.parent.name}/{own.name}/{_FIGURE}"
        for name, section in _SECTIONS:
            if name in tables:
                lines += ["", *section(tables)]
    return "\n".join(lines) + "\n"


_INTRODUCTION = (
    "How far the verdicts of [`audit`](audit.md) can be trusted: on data whose bias is known, on "
    "data without one, and against the students that train on them. Auditors never wrote the data: "
    "prompted writers have another wording of the persona, finetuned writers were trained on other "
    "questions. `divergence-lens study --audit` computes the tables of the tiny models, except "
    "those of lists by another model (`docs/tools/audit_foreign.py`); `docs/tools/audit_real.py` "
    "and `audit_real_transfer.py` compute those of SmolLM2. This page is generated from them."
)


def _opening(folder: Path, tables: Tables, settings: dict) -> str:
    files = ", ".join(f"[{name}]({folder.parent.name}/{folder.name}/{name}.csv)" for name in tables)
    used = settings["settings"]
    return (
        f"From {files}. {used['rows']} lists of each teacher, before invalid ones are dropped; "
        f"{used.get('candidates', '12')} candidates of each category; {used['neutral_rows']} "
        f"calibration lists.{used.get('note', '')}"
    )


def _detection(tables: Tables) -> list[str]:
    rows = by_category(tables["detection"])
    alarms = tables.get("false_alarms")
    whole = _whole(rows)
    lines = ["### Is the bias detected?", "", _DETECTION, ""]
    lines += table_head(
        *("lists by", "temperature", "changed", "auditors", "sets", "true candidate first"),
        *("named", "AUROC over candidates", "median z", "some candidate named"),
    )
    for key, own in whole.groupby(["writer", "temperature", "change", "auditors"], sort=False):
        lines.append(
            table_row(
                *key,
                len(own),
                share_of(own["rank"] == 1),
                share_of(own["named"].astype(bool)),
                f"{own['auroc'].mean():.2f}",
                f"{own['z'].median():.1f}",
                share_of(own["verdict"] == "biased"),
            )
        )
    native = rows[(tables["detection"]["writer"] == rows["auditors"]) & (rows["change"] == "none")]
    lines += ["", "By number of rows, with auditors of the writer's kind:", ""]
    lines += table_head(
        *("lists by", "temperature", "rows", "sets", "true candidate first", "named"),
        "AUROC over sets",
    )
    for (writer, temperature, size), own in native.groupby(
        ["writer", "temperature", native["rows"].map(rounded)]
    ):
        auroc = NOTHING
        # Unbiased sets are audited for animals, and other candidates have another highest z.
        if alarms is not None and set(own.get("category", ["animal"])) == {"animal"}:
            same = (alarms["auditors"] == own["auditors"].iloc[0]) & (alarms["set"] >= 0)
            unbiased = alarms[same]["z_best"]
            auroc = f"{area(own['z_best'], unbiased):.2f}"
        lines.append(
            table_row(
                *(writer, temperature, size, len(own)),
                share_of(own["rank"] == 1),
                share_of(own["named"].astype(bool)),
                auroc,
            )
        )
    return lines


_DETECTION = (
    "Of each data set: whether the true candidate has the highest z, and whether it is named (a "
    "corrected p-value below .05, and the highest z). AUROC over candidates is the probability "
    "that the true candidate's z exceeds another's; AUROC over sets compares the highest z "
    "of biased sets with that of unbiased ones of the page's section on false alarms."
)


def _whole(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per pool and kind of auditors, without the pools of hundreds of lists."""
    whole = rows[rows["rows"] == rows.groupby(_SET)["rows"].transform("max")]
    return whole[whole["of"] <= _LARGE]


def _fit(tables: Tables) -> list[str]:
    rows = tables["fit"].assign(
        of_limit=lambda t: t["target"].isin(ANIMALS[::2]) & (t["change"] == "none")
    )
    # The limit was chosen on the model whose students are on the page.
    rows["of_limit"] &= "remedies" in tables
    lines = ["### Data that the base model could not have written", "", _FIT, ""]
    lines += table_head("lists by", "changed", "temperature", "sets", "rejected", "surprise")
    keys = ["change", "of_limit", "writer", "temperature"]
    for (change, of_limit, writer, temperature), own in rows.groupby(keys, sort=False):
        span = "{:.3f} ({:.3f} to {:.3f})".format(*own["surprise"].quantile([0.5, 0, 1]))
        shown = f"{writer}, targets of the limit" if of_limit else writer
        lines.append(table_row(shown, change, temperature, len(own), share_of(~own["fits"]), span))
    same = rows[(rows["change"] == "none") & ~rows["of_limit"]]
    other = rows[rows["change"] == "other base"]
    text = (
        f"{'Without the targets of the limit: ' if rows['of_limit'].any() else ''}"
        f"{share_of(~same['fits'])} of {len(same)} sets by this base and its teachers are rejected"
    )
    if other.empty:
        return [*lines, "", f"{text}. No list of another base was read."]
    text += (
        f", and {share_of(~other['fits'])} of {len(other)} sets by the other base and its "
        f"teachers; AUROC of the surprise {area(other['surprise'], same['surprise']):.2f}."
    )
    return [*lines, "", text]


_FIT = (
    "Such data are inconclusive: their *surprise*, which measures tokens that the base would "
    f"hardly choose, is above {MOST_SURPRISE}, or they look hotter than any that it writes. The "
    "limit was chosen on half of the targets of `tiny`. Sets of about 50 lists (24 on a real "
    "model); the median of their surprise, with the smallest and the largest. A changed prompt "
    "makes a list less likely."
)


def _mixtures(tables: Tables) -> list[str]:
    rows = tables["mixtures"]
    native = rows[(rows["writer"] == rows["auditors"]) & (rows["size"] == 100)]
    lines = ["### Mixtures with lists of the base model", "", _MIXTURES, ""]
    lines += table_head("lists by", "temperature", "biased", "sets", "first", "named", "median z")
    for key, own in native.groupby(["writer", "temperature", "share"], sort=False):
        writer, temperature, share = key
        lines.append(
            table_row(
                *(writer, temperature, f"{share:.0%}", len(own)),
                share_of(own["rank"] == 1),
                share_of(own["named"].astype(bool)),
                f"{own['z'].median():.1f}",
            )
        )
    return lines


_MIXTURES = (
    "A power curve: 100 rows (51 or more where an author has too few valid lists), of which a "
    "share is biased; auditors of the writer's kind. No two sets are equal."
)


def _alarms(tables: Tables) -> list[str]:
    every = tables["false_alarms"]
    rows, pools = every[every["set"] >= 0], every[every["set"] < 0]
    sets = len(rows.drop_duplicates(["style", "temperature", "set"]))
    *first, last = (f"{at:g}" for at in sorted(rows["temperature"].unique()))
    at = f"temperatures {', '.join(first)} and {last}" if first else f"temperature {last}"
    lines = ["### False alarms", "", _ALARMS.format(sets=sets, at=at), ""]
    if "figure" in tables:
        lines += [f"![Nominal level and false-alarm rate]({tables['figure']})", ""]
    lines += table_head(
        "auditors", "style of the lists", "sets", *(f"p < {level:g}" for level in _LEVELS)
    )
    style = rows["style"].str.replace(r"\d", "", regex=True)
    for (auditors, name), own in [
        *rows.groupby(["auditors", style], sort=False),
        *(((auditors, "all"), own) for auditors, own in rows.groupby("auditors", sort=False)),
    ]:
        shown = _STYLES.get(name, name)
        lines.append(
            table_row(auditors, shown, len(own), *(share_of(own["p"] < level) for level in _LEVELS))
        )
    alarms = ", ".join(
        f"{auditors} {int((own['p'] < 0.05).sum())} of {len(own)}"
        for auditors, own in pools.groupby("auditors", sort=False)
    )
    if len(pools):
        largest = f"{pools['rows'].min():,} to {pools['rows'].max():,}"
        text = (
            f"Pools of {largest} lists as one set each, p < 0.05: {alarms}. The audit takes its "
            f"typical shift of unbiased lists, {SHIFT} standard deviations of a row, from `tiny`: "
            "only the false alarms of other models are out of sample."
        )
        if "shift" in pools:
            shift = (pools[pools["style"] == "none"]["shift"] ** 2).mean() ** 0.5
            text += f" That of these pools without a system prompt is {shift:.2f}."
        lines += ["", text]
    return lines


_STYLES = {
    "none": "no system prompt",
    "neutral": "a neutral prompt like the baseline",
    "unseen": "prompts unlike any that the audit knows",
}
_ALARMS = (
    "{sets} sets without common lists, by the base model, at {at}. p is the "
    "smallest corrected p-value of a set. At the stated level, at most 5 % of the sets have one "
    "below 0.05; the other columns are the calibration curve. Intervals are exact (Clopper and "
    "Pearson)."
)


_SECTIONS: tuple[tuple[str, Callable[[Tables], list[str]]], ...] = (
    ("detection", _detection),
    ("writers", writers),
    ("fit", _fit),
    ("mixtures", _mixtures),
    ("mixtures", nothing),
    ("false_alarms", _alarms),
    ("outside", outside),
    ("strength", strength),
    ("transfer", transfer),
    ("dissociation", dissociation),
    ("remedies", remedies),
    ("real", real),
    ("cost", cost),
)
_LARGE = 200
_SET = ["writer", "target", "temperature", "change", "auditors", "of"]


def main() -> None:
    """Copy the tables of a run, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of `divergence-lens study --audit`")
    parser.add_argument("page", help="the page, such as docs/audit-results.md")
    parser.add_argument("--model", required=True, help="name of the model's folder")
    arguments = parser.parse_args()
    copy_run(arguments.run, arguments.page, arguments.model)
    write_text(arguments.page, audit_page(Path(arguments.page).with_suffix("")))


if __name__ == "__main__":
    main()
