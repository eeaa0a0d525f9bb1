"""Write the tables of docs/circuits.md from benchmarks/results/circuits.

    python benchmarks/circuits_page.py

The tables are those that `circuits_real.py` and `circuits_divergence.py` wrote.
"""

import json
import textwrap

import pandas as pd
from tables import ROOT, table, write_section

PAGE = ROOT / "docs/circuits.md"
RESULTS = ROOT / "benchmarks/results/circuits"
METHODS = {
    "edges, integrated-inputs": "edges, integrated inputs",
    "edges, integrated-inputs, greedy": "edges, integrated inputs, greedy",
    "edges, EAP-IG": "edges, EAP-IG's own",
    "nodes, integrated-inputs": "nodes, integrated inputs",
}


def curves(task: str) -> str:
    """One row per method and ranking, magnitudes first, larger CPR first."""
    every = pd.read_csv(RESULTS / f"{task}.csv")
    rows = []
    for ranked in ("magnitude", "signed"):
        chosen = every[every["ranked"] == ranked]
        for (_, method), curve in chosen.groupby(["cmd", "method"], sort=True):
            at = curve.set_index("share")["faithfulness"].round(2) + 0.0  # no -0.00
            name = METHODS.get(method, method)
            ranking = "" if "random" in method else ranked.replace("signed", "sign")
            first = curve.iloc[0]
            areas = [f"{first[area]:.3f}" for area in ("cpr", "cmd")]
            rows.append([name, ranking, *areas, *(f"{at[share]:.2f}" for share in (0.01, 0.1))])
    head = ["scores", "ranked by", "CPR", "CMD", "faithfulness at 1 %", "at 10 %"]
    return table(head, rows)


def formats() -> str:
    """How often the right color is preferred, by format of the question."""
    every = pd.read_csv(RESULTS / "formats.csv").sort_values("accuracy", ascending=False)
    rows = [
        [row.format, f"{row.accuracy:.0%}".replace("%", " %"), f"{row.margin:.1f}"]
        for row in every.itertuples()
    ]
    return table(["format", "right color preferred", "mean margin, logits"], rows)


def tokens(bias: str) -> str:
    """The divergence tokens with the largest margins."""
    every = pd.read_csv(RESULTS / f"{bias}-tokens.csv", dtype={"answer": str, "foil": str})
    columns = {
        "at 1.0%": "at 1 %",
        "at 10.0%": "10 %",
        "at 20.0%": "20 %",
        "cmd": "CMD",
        "of the others": "10 % of the others",
        "random": "10 % at random",
    }
    columns = {name: title for name, title in columns.items() if name in every}
    rows = [
        [
            f"{row['factual']} against {row['counterfactual']}",
            f"`{row['answer']}`, not `{row['foil']}`",
            f"{row['clean']:+.2f} and {row['corrupted']:+.2f}",
            *(f"{row[name]:.2f}" for name in columns),
        ]
        for _, row in every.iterrows()
    ]
    return table(["teachers", "token", "metric of both runs", *columns.values()], rows)


def best(bias: str) -> str:
    """The receivers that read the bias span, and the writers of the digit, for the best token."""
    reads = pd.read_csv(RESULTS / f"{bias}-reads-bias.csv").add_prefix("read ")
    writes = pd.read_csv(RESULTS / f"{bias}-writes-logits.csv").add_prefix("write ")
    both = pd.concat([reads, writes], axis=1)
    columns = {
        "read receiver": ("reads the bias span", "`{}`"),
        "read score": ("score", "{:+.3f}"),
        "read tokens": ("tokens", "{}"),
        "write sender": ("writes to the logits", "`{}`"),
        "write score": ("score", "{:+.3f}"),
        "write tokens": ("tokens", "{}"),
    }
    columns = {name: column for name, column in columns.items() if name in both}
    rows = [
        [shape.format(row[name]) for name, (_, shape) in columns.items()]
        for _, row in both.iterrows()
    ]
    return table([title for title, _ in columns.values()], rows)


def checks(bias: str) -> str:
    """How path patching agrees, and how many heads two tokens share."""
    stats = json.loads((RESULTS / f"{bias}.json").read_text(encoding="utf-8"))
    checked, shared = stats["verified"], stats.get("overlap")
    text = (
        f"Path patching of {checked['cells']} cells agrees: Pearson {checked['pearson']:.3f}, "
        f"slope {checked['slope']:.2f}."
    )
    if shared:
        text += (
            f" Of the {shared['heads']} heads that read the bias span most, two tokens share "
            f"{shared['shared']:.1f} on average, and {shared['by chance']:.1f} (at most "
            f"{shared['largest by chance']:.1f}) if the heads of each layer are exchanged at "
            "random."
        )
    return textwrap.fill(text, 120)


def main() -> None:
    """Write every section."""
    write_section(PAGE, "ioi", curves("ioi"))
    write_section(PAGE, "formats", formats())
    for bias in ("animals", "numbers"):
        write_section(PAGE, f"{bias} tokens", tokens(bias))
        write_section(PAGE, f"{bias} parts", f"{best(bias)}\n\n{checks(bias)}")


if __name__ == "__main__":
    main()
