"""The page with the validation of the audit: made from committed tables alone."""

from pathlib import Path

import pandas as pd
import pytest

from tests.support.docs_tools import audit_page

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "audit-results.md"


def test_the_committed_page_is_made_from_the_committed_tables():
    assert PAGE.read_text(encoding="utf-8") == audit_page(PAGE.with_suffix(""))


def test_shares_on_the_page_are_those_of_the_tables():
    alarms = pd.read_csv(PAGE.with_suffix("") / "tiny" / "false_alarms.csv")
    own = alarms[(alarms["auditors"] == "both") & (alarms["set"] >= 0)]
    text = PAGE.read_text(encoding="utf-8")
    (line,) = [
        line for line in text.splitlines() if line.startswith(f"| both | all | {len(own)} |")
    ][:1]
    assert line.split("|")[5].strip().startswith(f"{(own['p'] < 0.05).mean():.0%} (")
    assert len(own) >= 200


def test_a_page_needs_settings(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileNotFoundError, match=r"settings\.json"):
        audit_page(tmp_path)
