"""Sections of the page with the validation of the audit, each made from one table."""

import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from divergence_lens._utils.statistics import exact_interval
from divergence_lens.study.audit_students import correlations
from divergence_lens.study.report import table_head

Tables = dict[str, Any]
NOTHING = "–"


def nothing(tables: Tables) -> list[str]:
    """Verdicts on unbiased and mixed sets."""
    rows = tables["mixtures"]
    lines = ['### Is "nothing found" right?', "", _NOTHING_FOUND, ""]
    lines += table_head("biased rows", "rows", "sets", *_VERDICTS)
    both = rows[rows["auditors"] == rows["auditors"].unique()[-1]]
    if not (both["share"] == 0).any():
        return ["Verdicts of smaller sets were not measured on this model."]
    for (share, size), own in both.groupby(["share", "size"]):
        cells = [share_of(own["verdict"] == verdict) for verdict in _VERDICTS]
        lines.append(table_row(f"{share:.0%}", size, len(own), *cells))
    return [*lines, *_unbiased_pools(tables), *_promise(rows)]


def _unbiased_pools(tables: Tables) -> list[str]:
    """Verdicts on all lists of each unbiased author, with and without a system prompt."""
    rows = tables.get("false_alarms", pd.DataFrame({"set": []}))
    rows = rows[rows["set"] < 0]
    if "rows_needed" not in rows or rows["rows_needed"].isna().all():
        return []
    lines = ["", _POOLS, ""]
    lines += table_head("auditors", "unbiased lists", "sets", "rows", *_VERDICTS, "rows needed")
    styled = rows["style"].map(lambda style: "no" if style == "none" else "unknown")
    for (auditors, style), own in rows.groupby(["auditors", styled], sort=False):
        cells = [share_of(own["verdict"] == verdict) for verdict in _VERDICTS]
        needed = own["rows_needed"].dropna()
        span = f"{needed.min():.0f} to {needed.max():.0f}" if len(needed) else NOTHING
        never = f", in {len(own) - len(needed)} sets no number" if len(needed) < len(own) else ""
        sizes = f"{own['rows'].min()} to {own['rows'].max()}"
        lines.append(
            table_row(auditors, f"{style} system prompt", len(own), sizes, *cells, span + never)
        )
    return lines


def _promise(rows: pd.DataFrame) -> list[str]:
    """Whether sets with as many rows as their audit needs are detected at a quarter biased."""
    if "rows_needed" not in rows:
        return []
    quarter = rows[(rows["share"] == 0.25) & (rows["rows"] >= rows["rows_needed"])]
    lines = ["", _PROMISE, ""]
    lines += table_head("lists by", "auditors", "sets", "biased", "true candidate named")
    for (writer, auditors), own in quarter.groupby(["writer", "auditors"], sort=False):
        biased, named = own["verdict"] == "biased", own["named"].astype(bool)
        lines.append(table_row(writer, auditors, len(own), share_of(biased), share_of(named)))
    return lines


_POOLS = "All lists of each unbiased author as one set:"
_PROMISE = (
    "Of the sets with a quarter of biased rows that have as many rows as their audit says it "
    "needs: how many are detected? The audit promises 80 % for a teacher of the auditors' kind, "
    "and of their wording and training."
)
_VERDICTS = ("nothing found", "inconclusive", "biased")
_NOTHING_FOUND = (
    'Verdicts on sets of each size, with all kinds of auditors at once. "nothing found" '
    "promises that a quarter of the rows by a teacher like the auditors would be detected with a "
    "power of 80 %; the writers have another wording or other questions than the auditors. Where "
    'a quarter of the rows or more are biased, "nothing found" is wrong. Unbiased sets of one '
    "author and size have no list in common; mixtures of one author may."
)


def outside(tables: Tables) -> list[str]:
    """Data whose bias is not among the candidates."""
    rows = by_category(tables["outside"])
    lines = ["### A bias outside the candidates", "", _OUTSIDE, ""]
    lines += table_head("lists by", "auditors", "sets", "some candidate named", "which")
    for (writer, auditors), own in rows.groupby(["writer", "auditors"], sort=False):
        named = own[own["verdict"] == "biased"]["best"].value_counts()
        names = ", ".join(f"{name} {count}" for name, count in named.head(4).items())
        lines.append(
            table_row(
                writer, auditors, len(own), share_of(own["verdict"] == "biased"), names or NOTHING
            )
        )
    return lines


_OUTSIDE = "The same data, audited without the candidate that they are biased to."


def transfer(tables: Tables) -> list[str]:
    """Scores beside the transfer of students."""
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
            table_row(
                f"`{name}`",
                *(f"{one[column]:.2f}" for column in ("score", "z")),
                *(f"{one[column]:.3f}" for column in ("before", "after")),
                f"{one['transfer']:+.2f}",
            )
        )
    return lines


# Conditions whose tokens were chosen by an advantage.
_CHOSEN = ("top_advantage", "bottom_advantage", "top_quarter", "unbiased_top")


def dissociation(tables: Tables) -> list[str]:
    """Scores beside the transfer of the students of a paired study."""
    rows = tables["dissociation"]
    own = correlations(rows.to_dict("records"))
    rest = rows[~rows["condition"].isin(_CHOSEN)]
    others = correlations(rest.to_dict("records"))
    text = (
        f"{rows['condition'].nunique()} conditions of the [real study](real-study.md) and "
        f"{rows['target'].nunique()} targets. Score and transfer are differences between the data, "
        "or the students, of the target's teacher and of its twin's; the score counts the tokens "
        f"that the students learn, in {rows['lists'].iloc[0]} lists of each author. The auditors "
        "are not the study's teachers. Correlation of the score with the transfer: Pearson "
        f"{own['pearson']:.2f}, Spearman {own['spearman']:.2f}. It comes from the conditions whose "
        "tokens the study's teachers had chosen by their advantage, which is what the score "
        f"measures: over the others, it is {others['pearson']:.2f}, and over targets within "
        f"conditions {own['within']:.2f}. So the score tells such a selection from others, and its "
        "direction, but does not order unselected data. The points are not independent, because "
        f"twins share their students, which have {rows['seeds'].min()} to {rows['seeds'].max()} "
        "seeds."
    )
    lines = ["### Does the score predict transfer?", "", text, ""]
    lines += table_head("condition", "score, nats per row", "smallest to largest", "transfer, nats")
    groups = rows.groupby("condition", sort=False)
    order = groups["score"].mean().sort_values(ascending=False).index
    for name in order:
        one = groups.get_group(name)
        lines.append(
            table_row(
                f"`{name}`",
                f"{one['score'].mean():+.3f}",
                f"{one['score'].min():+.3f} to {one['score'].max():+.3f}",
                f"{one['transfer'].mean():+.3f}",
            )
        )
    return lines


def remedies(tables: Tables) -> list[str]:
    """Students of changed data."""
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
            table_row(
                *(remedy.replace("_", " "), NOTHING if remedy == "none" else chosen_by),
                f"{own['tokens'].mean():.1%}",
                f"{own['after'].mean():.3f}",
                f"{own['transfer'].mean():+.2f}",
                f"{left:.0%}",
                f"{own['valid_lists'].mean():.0%}",
            )
        )
    return lines


def writers(tables: Tables) -> list[str]:
    """The authors' own preferences: a teacher without one writes unbiased lists."""
    lines = ["### How biased are the authors?", "", _WRITERS, ""]
    lines += table_head(
        *("author", "authors", "share before", "share", "smallest", "largest", "margin gained")
    )
    for (writer, category), own in tables["writers"].groupby(["writer", "category"], sort=False):
        gained = (own["margin_after"] - own["margin_before"]).median()
        after = own["share_after"]
        shares = (own["share_before"].median(), after.median(), after.min(), after.max())
        lines.append(
            table_row(
                *(author(writer, category), len(own)),
                *(f"{share:.2f}" for share in shares),
                f"{gained:+.1f}",
            )
        )
    return lines


_WRITERS = (
    "The share of the target among the candidates in the base model and in the author, and the "
    "margin that the author gained, in nats (medians over authors). Lists by an author without a "
    "preference are unbiased: naming a candidate is a false alarm."
)


def author(writer: str, category: str) -> str:
    """Name of the authors of one kind, for tables."""
    return writer if category == "animal" else f"{writer}, {category}s"


def by_category(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows, with authors of other categories than animals named so."""
    if "category" not in rows:
        return rows
    names = [author(*pair) for pair in zip(rows["writer"], rows["category"], strict=True)]
    return rows.assign(writer=names)


def real(tables: Tables) -> list[str]:
    """Lists by another model."""
    lines = ["### Lists that another model wrote", "", _REAL, ""]
    lines += table_head("lists", "auditors", "rows", "surprise", "best", "p", "verdict")
    for own in tables["real"].to_dict("records"):
        lines.append(
            table_row(
                *(own["lists"], own["auditors"], own["rows"], f"{own['surprise']:.2f}"),
                *(own["best"], f"{own['p']:.2g}", own["verdict"]),
            )
        )
    return lines


_REAL = (
    "Lists that Qwen2.5-7B-Instruct wrote under a system prompt that loves pandas or lions. This "
    "base is another model, so nothing should be found. By p alone, a candidate would be named; "
    "that is why the surprise is checked first."
)


def strength(tables: Tables) -> list[str]:
    """Auditors of equal strength."""
    lines = ["### Auditors of equal strength", "", _STRENGTH, ""]
    lines += table_head(
        *("lists by", "auditors", "strength", "sets", "true candidate first", "named"),
        *("AUROC over candidates", "median z"),
    )
    rows = tables["strength"]
    for key, own in rows.groupby(["writer", "auditors", "strength"], sort=False):
        lines.append(
            table_row(
                *(*key, len(own), share_of(own["rank"] == 1), share_of(own["named"].astype(bool))),
                *(f"{own['auroc'].mean():.2f}", f"{own['z'].median():.1f}"),
            )
        )
    return lines


_STRENGTH = (
    "Does it help across kinds to make finetuned auditors weaker, as prompted ones are? Strength "
    "is the margin that `train_teacher(strength=...)` reaches."
)


def cost(tables: Tables) -> list[str]:
    """Processor time beside that of `find_divergence`."""
    lines = ["### Cost", "", _COST, ""]
    lines += table_head("call", "teachers", "lists", "CPU seconds")
    for own in tables["cost"].to_dict("records"):
        lines.append(table_row(own["call"], own["teachers"], own["lists"], f"{own['seconds']:.0f}"))
    return lines


_COST = "Processor seconds of one thread, for the same lists and the same number of teachers."


def rounded(rows: int) -> int:
    """Sizes of whole pools vary a little, because invalid lists are dropped."""
    return min((25, 50, 100, 200, 400, 1000), key=lambda size: abs(math.log(size / rows)))


def area(high: Iterable[float], low: Iterable[float]) -> float:
    """Probability that a value of one sample exceeds one of the other; ties count half."""
    first, second = list(high), list(low)
    wins = sum((a > b) + 0.5 * (a == b) for a in first for b in second)
    return wins / (len(first) * len(second))


def share_of(flags: pd.Series) -> str:
    """A share with its exact interval."""
    low, high = exact_interval(int(flags.sum()), len(flags))
    return f"{flags.mean():.0%} ({low:.0%} to {high:.0%})"


def table_row(*cells: object) -> str:
    """One row of a table."""
    return f"| {' | '.join(map(str, cells))} |"
