"""Write the tables of docs/circuits.md from benchmarks/results/circuits.

    python benchmarks/circuits_page.py

The tables are those that `circuits_real.py` and `circuits_divergence.py` wrote.
"""

import json
from typing import Any

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


def tokens() -> str:
    """The divergence tokens with the largest margins."""
    every = pd.read_csv(RESULTS / "divergence-tokens.csv", dtype={"answer": str, "foil": str})
    rows = [
        [
            f"{row['factual']} against {row['counterfactual']}",
            f"`{row['answer']}`, not `{row['foil']}`",
            f"{row['clean']:+.2f} and {row['corrupted']:+.2f}",
            *(f"{row[f'at {share}']:.2f}" for share in ("1.0%", "10.0%", "20.0%")),
            f"{row['cmd']:.2f}",
        ]
        for _, row in every.iterrows()
    ]
    head = [
        "teachers",
        "token",
        "metric of both runs",
        "faithfulness at 1 %",
        "10 %",
        "20 %",
        "CMD",
    ]
    return table(head, rows)


def best() -> str:
    """Who reads the bias span, and who writes the digit, for the best token."""
    reads = pd.read_csv(RESULTS / "divergence-reads-bias.csv")
    writes = pd.read_csv(RESULTS / "divergence-writes-logits.csv")
    rows: list[list[Any]] = [
        [f"`{a.receiver}`", f"{a.score:+.3f}", f"`{b.sender}`", f"{b.score:+.3f}"]
        for a, b in zip(reads.itertuples(), writes.itertuples(), strict=False)
    ]
    return table(["reads the bias span", "score", "writes to the logits", "score"], rows)


def main() -> None:
    """Write every section."""
    write_section(PAGE, "ioi", curves("ioi"))
    write_section(PAGE, "formats", formats())
    stats = json.loads((RESULTS / "divergence.json").read_text(encoding="utf-8"))
    checked = stats["verified"]
    text = (
        f"Path patching of {checked['cells']} cells agrees: Pearson {checked['pearson']:.3f}, "
        f"slope {checked['slope']:.2f}."
    )
    write_section(PAGE, "tokens", tokens())
    write_section(PAGE, "best", f"{best()}\n\n{text}")


if __name__ == "__main__":
    main()
