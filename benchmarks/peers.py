"""Compare this library with other tools: the same model, inputs and threads, equal results.

    python benchmarks/peers.py --model FOLDER                        # every peer
    python benchmarks/peers.py --model FOLDER --peers nnsight trl --rounds 5 --write
    python benchmarks/peers.py --model FOLDER --peers eap-ig --eap-ig CHECKOUT

Each peer gets a virtual environment of its own below runs/peers/, built on its first use (torch
first and alone, so that pip takes the build for this machine). A comparison is two processes, ours
and the peer's, that exchange inputs and results as files and run in turn. Printed are the medians
and ranges of CPU seconds over all threads, which other programs hardly affect, the speedup in CPU
time and in time passed, and the largest difference of the results, relative to the largest value.
The command fails if a difference exceeds its tolerance. `--write` stores the figures in
docs/measurements/peers.json and writes the tables of docs/speed-peers.md.

EAP-IG is not on the package index: `--eap-ig` names the folder of a checkout.
"""

import argparse
import contextlib
import json
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tables import FIGURES, PAGE, ROOT, merge_figures, spread, table, two_digits, write_section

SIDES = Path(__file__).parent / "sides"
LENS_3, LENS_4 = ("transformer-lens==3.9.0", "matplotlib"), ("transformer-lens==4.3.0",)


@dataclass(frozen=True)
class Comparison:
    """One task of one peer.

    Attributes:
        peer: The peer's name in `--peers`.
        title: The task in the table.
        task: The name of the task in `sides/ours.py`.
        size: Its size: tokens per row, prompts, or examples.
        side: The peer's file in `sides/`.
        packages: The packages of its environment; peers with equal packages share one.
        options: Further options of the peer's file.
        tolerance: The largest difference that the command accepts.
    """

    peer: str
    title: str
    task: str
    size: int
    side: str
    packages: tuple[str, ...]
    options: tuple[str, ...] = ()
    tolerance: float = 1e-3


COMPARISONS = (
    Comparison("nnsight", "exact patching", "patching", 12, "with_nnsight", ("nnsight==0.8.1",)),
    Comparison("pyvene", "exact patching", "patching", 12, "with_pyvene", ("pyvene==0.1.8",)),
    Comparison(
        *("transformer-lens", "exact patching", "patching", 12, "with_transformer_lens", LENS_3),
        options=("patching",),
    ),
    Comparison(
        *("transformer-lens-4", "attribution of nodes", "nodes", 16, "with_transformer_lens"),
        LENS_4,
        options=("nodes",),
    ),
    Comparison(
        *("captum", "gradient x activation", "activations", 16, "with_captum"),
        ("captum==0.9.0", "transformers==5.23.0"),
    ),
    Comparison(
        *("eap-ig", "attribution of heads", "heads", 16, "with_eap_ig", LENS_3),
        options=("EAP", "1"),
    ),
    # EAP-IG evaluates the gradient at the ends of its intervals, we at their middles: the values
    # are equal only in the limit of many steps.
    Comparison(
        *("eap-ig", "integrated inputs, 5 steps", "integrated", 16, "with_eap_ig", LENS_3),
        options=("EAP-IG-inputs", "5"),
        tolerance=math.inf,
    ),
    Comparison(
        *("trl", "LoRA on the middle layer", "training", 16, "with_trl"),
        ("trl==1.16.0", "peft==0.21.2"),
    ),
    Comparison(
        *("huggingface", "generate", "generation", 16, "with_huggingface"),
        ("transformers==5.23.0",),
    ),
    Comparison(
        *("transformer-lens", "generate", "generation", 16, "with_transformer_lens", LENS_3),
        options=("generation",),
    ),
    Comparison(
        *("lm-eval", "scores of answers", "answers", 4, "with_lm_eval"),
        ("lm-eval[hf]==0.4.13",),
    ),
    Comparison(
        *("lm-eval", "scores of lists", "lists", 8, "with_lm_eval"),
        ("lm-eval[hf]==0.4.13",),
    ),
)
PEERS = tuple(dict.fromkeys(comparison.peer for comparison in COMPARISONS))


def environment(comparison: Comparison, folder: Path) -> str:
    """Return the Python of the peer's environment; build it if it is missing or has changed."""
    place = folder / re.sub(r"[^\w.]+", "-", comparison.packages[0])
    python, built = place / "bin/python", place / "packages.txt"
    if built.exists() and built.read_text(encoding="utf-8").split() == list(comparison.packages):
        return str(python)
    print(f"building {place}", file=sys.stderr)
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)  # noqa: S603
    for packages in ([torch], [torch, *comparison.packages]):
        command = [python, "-m", "pip", "install", "-qq", *packages]
        subprocess.run(command, check=True)  # noqa: S603
    built.write_text("\n".join(comparison.packages), encoding="utf-8")
    return str(python)


class Side:
    """A process that runs one side of comparisons on demand."""

    def __init__(self, python: str, name: str, options: argparse.Namespace) -> None:
        self.times: dict[str, list[float]] = {}
        self._name = name
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603
            [python, SIDES / f"{name}.py", options.model, str(options.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def _ask(self, request: list[str] | None) -> Any:
        """Send a request and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the log says why
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            # Packages may print while they are imported.
            if line.startswith(('"ready"', '{"cpu"')):
                return json.loads(line)
        self._log.seek(0)
        raise SystemExit(f"{self._name} stopped:\n{self._log.read()[-2000:]}")

    def prepare(self, *request: str) -> None:
        """Prepare a task: the files of its inputs and results, and its options."""
        self.times = {"cpu": [], "wall": []}
        self._ask(list(request))

    def run(self) -> None:
        """Run the task once and record its times."""
        for name, value in self._ask(None).items():
            self.times[name].append(value)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._log.close()


def difference(ours: Any, theirs: Any) -> tuple[float, str]:
    """Return the largest difference of two result files and its description."""
    first, second = np.load(ours), np.load(theirs)
    if "tokens" in second:
        unequal = int((first["tokens"] != second["tokens"]).sum())
        return float(unequal), f"{unequal} of {(first['tokens'] >= 0).sum()} tokens"
    worst, correlation = 0.0, 1.0
    for name in second:
        if first[name].shape != second[name].shape:
            raise SystemExit(f"{name} has shape {first[name].shape} and {second[name].shape}")
        apart = np.abs(first[name] - second[name]).max() / np.abs(first[name]).max()
        worst = max(worst, float(apart))
        if first[name].size > 2:
            pair = np.corrcoef(first[name].ravel(), second[name].ravel())
            correlation = min(correlation, float(pair[0, 1]))
    return worst, f"{worst:.0e}" + (f", correlation {correlation:.2f}" if worst > 1e-2 else "")


def compare(
    comparison: Comparison, ours: Side, python: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Run both sides in turn and return the row's figures."""
    extra = comparison.options
    if comparison.peer == "eap-ig":
        extra = (str(options.eap_ig), *extra)
    size = str(options.size or comparison.size)
    with tempfile.TemporaryDirectory() as folder:
        inputs, *results = (f"{folder}/{name}.npz" for name in ("inputs", "ours", "peer"))
        ours.prepare(inputs, results[0], comparison.task, size, options.backend)
        with contextlib.closing(Side(python, comparison.side, options)) as peer:
            peer.prepare(inputs, results[1], *extra)
            for _ in range(options.rounds):
                ours.run()
                peer.run()
        apart, shown = difference(*results)
    if not apart <= comparison.tolerance:
        raise SystemExit(f"{comparison.peer}, {comparison.title}: results differ by {shown}")
    return {
        "task": comparison.title,
        "peer": comparison.packages[0] if comparison.peer != "eap-ig" else "EAP-IG",
        "size": int(size),
        "ours": ours.times,
        "theirs": peer.times,
        "difference": shown,
        "threads": options.threads,
        "backend": options.backend,
    }


def show(rows: dict[str, Any]) -> str:
    """Format the rows of one model."""
    lines = []
    for row in rows.values():
        ours, theirs = row["ours"], row["theirs"]
        ratios = [median(theirs[clock]) / median(ours[clock]) for clock in ("cpu", "wall")]
        lines.append(
            [
                *(row["task"], row["peer"].replace("==", " ")),
                *(spread(ours["cpu"]), spread(theirs["cpu"])),
                f"{ratios[0]:.2g}",
                *(two_digits(median(ours["wall"])), two_digits(median(theirs["wall"]))),
                row["difference"],
            ]
        )
    head = (
        *("task", "peer", "ours, CPU s", "peer, CPU s", "speedup"),
        *("ours, s passed", "peer, s passed", "difference"),
    )
    return table(head, lines)


def chosen(comparison: Comparison, options: argparse.Namespace) -> bool:
    """Whether the options select a comparison."""
    if comparison.peer not in options.peers:
        return False
    if options.tasks and comparison.task not in options.tasks:
        return False
    if comparison.peer == "eap-ig" and options.eap_ig is None:
        print("eap-ig is left out: --eap-ig names no checkout", file=sys.stderr)
        return False
    return True


def write(model: str, key: str, row: dict[str, Any]) -> None:
    """Store the figures of a row and write the tables."""
    figures = merge_figures(FIGURES / "peers.json", {model: {key: row}})
    order = [f"{one.peer}, {one.title}" for one in COMPARISONS]
    tables = [
        f"**{name}**\n\n" + show({key: part[key] for key in order if key in part})
        for name, part in figures.items()
    ]
    write_section(PAGE, "peers", "\n\n".join(tables))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the chosen comparisons, print their table, and return their figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder, Llama or Qwen2")
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--tasks", nargs="+", help="only these tasks of sides/ours.py")
    parser.add_argument("--backend", default="bridge", choices=["hooked", "bridge"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", type=int, help="tokens, prompts or examples of every task")
    parser.add_argument("--eap-ig", type=Path, help="a checkout of hannamw/EAP-IG")
    parser.add_argument("--environments", type=Path, default=ROOT / "runs/peers")
    parser.add_argument("--python", help="use this Python for every peer")
    parser.add_argument("--write", action="store_true", help="update the figures of the docs")
    options = parser.parse_args(arguments)
    rows: dict[str, Any] = {}
    with contextlib.closing(Side(sys.executable, "ours", options)) as ours:
        for comparison in COMPARISONS:
            if not chosen(comparison, options):
                continue
            key = f"{comparison.peer}, {comparison.title}"
            python = options.python or environment(comparison, options.environments)
            rows[key] = compare(comparison, ours, python, options)
            print(show({key: rows[key]}).splitlines()[-1], flush=True)
            if options.write:  # after each row: a later one may fail
                write(options.model.name, key, rows[key])
    return rows


if __name__ == "__main__":
    main()
