"""Write the documentation page with the validation of the audit.

    python docs/tools/audit_page.py RUN_FOLDER docs/audit-results.md --model tiny

Each run of `divergence-lens study --audit` is copied into a folder of CSV files beside the page,
and the page is generated from these files alone. A test can therefore compare the two.
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from divergence_lens._utils.statistics import exact_interval
from divergence_lens._utils.storage import write_text
from divergence_lens.study.audit_run import TABLES
from divergence_lens.study.audit_students import correlations
from divergence_lens.study.report import table_head

_FILES = (*(f"{name}.csv" for name in TABLES), "settings.json", "real.csv")
_NATIVE = {"finetuned": "finetuned", "prompted": "prompted"}
_LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5)


def copy_run(run: str | Path, page: str | Path, model: str) -> None:
    """Copy the tables of a run beside the page."""
    folder = Path(page).with_suffix("") / model
    folder.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        source = Path(run) / name
        if source.exists():
            shutil.copyfile(source, folder / name)


def audit_page(folder: str | Path) -> str:
    """Generate the text of the page from the tables in the folders of its models."""
    lines = ["# Results of the audit", "", _INTRODUCTION]
    for own in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        tables = {
            name: pd.read_csv(file)
            for name in (*TABLES, "real")
            if (file := own / f"{name}.csv").exists()
        }
        settings = json.loads((own / "settings.json").read_text(encoding="utf-8"))
        lines += ["", f"## Model `{own.name}`", "", _opening(own, tables, settings)]
        for name, section in _SECTIONS.items():
            if name in tables:
                lines += ["", *section(tables)]
    return "\n".join(lines) + "\n"


_INTRODUCTION = (
    "How far the verdicts of [`audit`](audit.md) can be trusted: on data whose bias is known, on "
    "data without one, and against the students that train on them. Auditors never wrote the data: "
    "prompted writers have another wording of the persona, finetuned writers were trained on other "
    "questions. `divergence-lens study --audit` computes the tables; this page is generated from "
    "them."
)


def _opening(folder: Path, tables: dict[str, pd.DataFrame], settings: dict) -> str:
    files = ", ".join(f"[{name}]({folder.parent.name}/{folder.name}/{name}.csv)" for name in tables)
    used = settings["settings"]
    return (
        f"From {files}. {used['rows']} lists of each teacher, before invalid ones are dropped; "
        f"12 candidates of each category; {used['neutral_rows']} calibration lists."
    )


def _detection(tables: dict[str, pd.DataFrame]) -> list[str]:
    rows = tables["detection"]
    alarms = tables.get("false_alarms")
    whole = rows[rows["rows"] == rows.groupby(_SET)["rows"].transform("max")]
    lines = ["### Is the bias detected?", "", _DETECTION, ""]
    lines += table_head(
        *("lists by", "temperature", "changed", "auditors", "sets", "true candidate first"),
        *("named", "AUROC over candidates", "median z", "some candidate named"),
    )
    for key, own in whole.groupby(["writer", "temperature", "change", "auditors"], sort=False):
        lines.append(
            _row(
                *key,
                len(own),
                _share(own["rank"] == 1),
                _share(own["named"].astype(bool)),
                f"{own['auroc'].mean():.2f}",
                f"{own['z'].median():.1f}",
                _share(own["verdict"] == "biased"),
            )
        )
    native = rows[rows["writer"].map(_NATIVE) == rows["auditors"]]
    native = native[native["change"] == "none"]
    lines += ["", "By number of rows, with auditors of the writer's kind:", ""]
    lines += table_head(
        *("lists by", "rows", "sets", "true candidate first", "named", "AUROC over sets")
    )
    for (writer, size), own in native.groupby(["writer", native["rows"].map(_rounded)]):
        area = _NOTHING
        if alarms is not None:
            same = (alarms["auditors"] == own["auditors"].iloc[0]) & (alarms["set"] >= 0)
            unbiased = alarms[same]["z_best"]
            area = f"{_area(own['z_best'], unbiased):.2f}"
        lines.append(
            _row(
                *(writer, size, len(own)),
                _share(own["rank"] == 1),
                _share(own["named"].astype(bool)),
                area,
            )
        )
    return lines


_DETECTION = (
    "Of each data set: whether the true candidate has the highest z, and whether it is named (a "
    "corrected p-value below .05, and the highest z). AUROC over candidates is the probability "
    "that the true candidate's z exceeds another's; AUROC over sets compares the highest z "
    "of biased sets with that of unbiased ones of the page's section on false alarms."
)


def _mixtures(tables: dict[str, pd.DataFrame]) -> list[str]:
    rows = tables["mixtures"]
    native = rows[rows["writer"].map(_NATIVE) == rows["auditors"]]
    lines = ["### Mixtures with lists of the base model", "", _MIXTURES, ""]
    lines += table_head("lists by", "temperature", "biased", "sets", "first", "named", "median z")
    for key, own in native.groupby(["writer", "temperature", "share"], sort=False):
        writer, temperature, share = key
        lines.append(
            _row(
                *(writer, temperature, f"{share:.0%}", len(own)),
                _share(own["rank"] == 1),
                _share(own["named"].astype(bool)),
                f"{own['z'].median():.1f}",
            )
        )
    return lines


_MIXTURES = (
    "A power curve: about 100 rows, of which a share is biased; auditors of the writer's kind."
)


def _alarms(tables: dict[str, pd.DataFrame]) -> list[str]:
    every = tables["false_alarms"]
    rows, pools = every[every["set"] >= 0], every[every["set"] < 0]
    sets = len(rows.drop_duplicates(["style", "temperature", "set"]))
    lines = ["### False alarms", "", _ALARMS.format(sets=sets), ""]
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
            _row(auditors, shown, len(own), *(_share(own["p"] < level) for level in _LEVELS))
        )
    alarms = ", ".join(
        f"{auditors} {int((own['p'] < 0.05).sum())} of {len(own)}"
        for auditors, own in pools.groupby("auditors", sort=False)
    )
    if len(pools):
        largest = f"{pools['rows'].min():,} to {pools['rows'].max():,}"
        lines += ["", f"Pools of {largest} lists as one set each, p < 0.05: {alarms}."]
    return lines


_STYLES = {
    "none": "no system prompt",
    "neutral": "a neutral prompt like the baseline",
    "unseen": "prompts unlike any that the audit knows",
}
_ALARMS = (
    "{sets} sets without common lists, by the base model, at temperatures 0, 0.5 and 1. p is the "
    "smallest corrected p-value of a set. At the stated level, at most 5 % of the sets have one "
    "below 0.05; the other columns are the calibration curve. Intervals are exact (Clopper and "
    "Pearson)."
)


def _outside(tables: dict[str, pd.DataFrame]) -> list[str]:
    rows = tables["outside"]
    lines = ["### A bias outside the candidates", "", _OUTSIDE, ""]
    lines += table_head("lists by", "auditors", "sets", "some candidate named", "which")
    for (writer, auditors), own in rows.groupby(["writer", "auditors"], sort=False):
        named = own[own["verdict"] == "biased"]["best"].value_counts()
        names = ", ".join(f"{name} {count}" for name, count in named.head(4).items())
        lines.append(
            _row(writer, auditors, len(own), _share(own["verdict"] == "biased"), names or _NOTHING)
        )
    return lines


_OUTSIDE = "The same data, audited without the candidate that they are biased to."


def _transfer(tables: dict[str, pd.DataFrame]) -> list[str]:
    rows = tables["transfer"]
    own = correlations(rows.to_dict("records"))
    text = (
        f"{len(rows)} students of {rows['condition'].nunique()} conditions of the study and "
        f"{rows['target'].nunique()} targets. Correlation of the score with the transfer (log of "
        f"the share after over before): Pearson {own['pearson']:.2f}, Spearman "
        f"{own['spearman']:.2f}; slope {own['slope']:.2f} for each nat per row. Within "
        f"conditions, over targets: Pearson {own['within']:.2f}, slope {own['slope_within']:.2f}. "
        "Masked tokens contribute nothing to the score."
    )
    lines = ["### Does the score predict transfer?", "", text, ""]
    lines += table_head("condition", "score", "z", "share before", "share after", "transfer")
    means = rows.groupby("condition", sort=False)[["score", "z", "before", "after", "transfer"]]
    for name, one in means.mean().sort_values("score", ascending=False).iterrows():
        lines.append(
            _row(
                f"`{name}`",
                *(f"{one[column]:.2f}" for column in ("score", "z")),
                *(f"{one[column]:.3f}" for column in ("before", "after")),
                f"{one['transfer']:+.2f}",
            )
        )
    return lines


def _remedies(tables: dict[str, pd.DataFrame]) -> list[str]:
    rows = tables["remedies"]
    full = rows[rows["remedy"] == "none"].set_index("target")["transfer"]
    text = (
        "Students of the changed data, beside changes of as many tokens or rows at random; means "
        f"over {rows['target'].nunique()} targets. Remaining is the transfer as a share of that of "
        "the unchanged data. Valid lists measure the task. Tokens replaced at random are drawn "
        "from those that are not the baseline's choice."
    )
    lines = ["### Do the remedies work?", "", text, ""]
    lines += table_head(
        "remedy", "chosen by", "tokens", "share after", "transfer", "remaining", "valid lists"
    )
    for (remedy, chosen_by), own in rows.groupby(["remedy", "chosen_by"], sort=False):
        left = own["transfer"].mean() / full.mean()
        lines.append(
            _row(
                *(remedy.replace("_", " "), _NOTHING if remedy == "none" else chosen_by),
                f"{own['tokens'].mean():.1%}",
                f"{own['after'].mean():.3f}",
                f"{own['transfer'].mean():+.2f}",
                f"{left:.0%}",
                f"{own['valid_lists'].mean():.0%}",
            )
        )
    return lines


def _real(tables: dict[str, pd.DataFrame]) -> list[str]:
    lines = ["### Lists that another model wrote", "", _REAL, ""]
    lines += table_head("lists", "auditors", "rows", "fitted temperature", "best", "p", "verdict")
    for own in tables["real"].to_dict("records"):
        lines.append(
            _row(
                *(own["lists"], own["auditors"], own["rows"], f"{own['fitted']:.2f}", own["best"]),
                f"{own['p']:.2g}",
                own["verdict"],
            )
        )
    return lines


_REAL = (
    "Lists that Qwen2.5-7B-Instruct wrote under a system prompt that loves pandas or lions. This "
    "base is another model, so nothing should be found."
)

_SECTIONS: dict[str, Callable[[dict[str, pd.DataFrame]], list[str]]] = {
    "detection": _detection,
    "mixtures": _mixtures,
    "false_alarms": _alarms,
    "outside": _outside,
    "transfer": _transfer,
    "remedies": _remedies,
    "real": _real,
}
_NOTHING = "–"
_SET = ["writer", "target", "temperature", "change", "auditors"]


def _rounded(rows: int) -> int:
    """Sizes of whole pools vary a little, because invalid lists are dropped."""
    return min((25, 50, 100, 200, 400, 1000), key=lambda size: abs(math.log(size / rows)))


def _area(high: Iterable[float], low: Iterable[float]) -> float:
    """Probability that a value of one sample exceeds one of the other; ties count half."""
    first, second = list(high), list(low)
    wins = sum((a > b) + 0.5 * (a == b) for a in first for b in second)
    return wins / (len(first) * len(second))


def _share(flags: pd.Series) -> str:
    """A share with its exact interval."""
    low, high = exact_interval(int(flags.sum()), len(flags))
    return f"{flags.mean():.0%} ({low:.0%} to {high:.0%})"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


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
