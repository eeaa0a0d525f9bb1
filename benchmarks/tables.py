"""Measurements as JSON files, and tables between the markers of a documentation page."""

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/speed-peers.md"
FIGURES = ROOT / "docs/measurements"


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """Return the result of `run`, and its CPU seconds over all threads."""
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def two_digits(value: float) -> str:
    """Format a number with two significant digits, or as a whole number above ten."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def spread(values: Sequence[float]) -> str:
    """Format the median and the range of some times."""
    middle = two_digits(statistics.median(values))
    return f"{middle} ({two_digits(min(values))} to {two_digits(max(values))})"


def multiplications_per_second(rows: int, inner: int, outer: int, dtype: Any = None) -> float:
    """Measure the rate of a product [rows, inner] x [inner, outer] in CPU time."""
    left = torch.randn(rows, inner).to(dtype or torch.float32)
    right = torch.randn(outer, inner).to(left.dtype)
    repeats = max(1, int(2e9 / (rows * inner * outer)))

    def products() -> None:
        for _ in range(repeats):
            torch.nn.functional.linear(left, right)

    products()
    return repeats * rows * inner * outer / min(timed(products)[1] for _ in range(5))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_section(page: Path, name: str, text: str) -> None:
    """Replace the text between two markers, `<!-- name: begin -->` and `<!-- name: end -->`.

    Raises:
        SystemExit: The page lacks the markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = page.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise SystemExit(f"{page} lacks the markers {begin} and {end}")
    inner = f"{begin}\n{text}\n{end}"
    new = re.sub(f"{begin}.*?{end}", lambda _: inner, old, flags=re.DOTALL)
    page.write_text(new, encoding="utf-8")


def merge_figures(path: Path, new: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add rows to the JSON file of measurements by model and row, and return all of them."""
    figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for model, rows in new.items():
        figures[model] = figures.get(model, {}) | rows
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures
