"""The scripts in docs/tools, imported by path because they are not part of the package."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

sys.path.insert(0, str(ROOT / "docs" / "tools"))

from audit_page import audit_page  # noqa: E402
from paired_page import paired_page, paired_summary, write_paired_page  # noqa: E402
from paper import PAPER_CLAIMS, SOURCES  # noqa: E402
from results_page import results_pages, write_results_page  # noqa: E402

__all__ = [
    "PAPER_CLAIMS",
    "SOURCES",
    "audit_page",
    "paired_page",
    "paired_summary",
    "results_page",
    "text_of",
    "write_paired_page",
    "write_results_page",
]


def results_page(folder: Path) -> str:
    """The text of all pages, the summary first and the others by name."""
    pages = results_pages(folder)
    return "\n".join([pages.pop(""), *(pages[name] for name in sorted(pages))])


def text_of(page: Path) -> str:
    """The text of all written pages in the same order."""
    others = sorted(page.with_suffix("").glob("*.md"))
    return "\n".join(path.read_text(encoding="utf-8") for path in (page, *others))
